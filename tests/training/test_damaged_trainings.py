"""Checkpoints and records that are damaged, in the way or another run's; disks that are full."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import files_of_at_most
from test_resume import HELD_OUT, ROWS, SPEC, model, stopped_at, weights

from tl_looped import CheckpointError, ConfigError, DataError, LoopedTransformer
from tl_looped.progress import Progress
from tl_looped.training.log import read_log
from tl_looped.training.record import check_vacant, identity, make_record
from tl_looped.training.saved import (
    drop_older_checkpoints,
    newest_checkpoint,
    seal,
    sealed_checkpoints,
)
from tl_looped.training.trainer import train

pytestmark = [pytest.mark.once, pytest.mark.full]

NESTED = "[" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    train(model(), ROWS, HELD_OUT, SPEC, out)
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def again(out: Path, **changes: object) -> tuple[list[int], list[str]]:
    """Run it again: the steps that were done, and what was said."""
    steps: list[int] = []
    said: list[str] = []
    progress = Progress(tick=lambda t: steps.append(t.step), say=said.append)
    train(model(), ROWS, HELD_OUT, replace(SPEC, **changes), out, progress)
    return steps, said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fake(folder: Path, step: int, run: str = "r") -> Path:
    """A sealed checkpoint of a few bytes."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt"):
        (checkpoint / name).write_bytes(name.encode() * 9)
    seal(checkpoint, run)
    return checkpoint


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "changed": lambda c: flip(c / "optimizer.pt"),
    "missing": lambda c: (c / "optimizer.pt").unlink(),
    "truncated": lambda c: (c / "optimizer.pt").write_bytes(b"opt"),
    "added": lambda c: (c / "pytorch_model.bin").write_bytes(b"opt"),
    "manifest changed": lambda c: flip(c / "manifest.json"),
    "manifest nested": lambda c: (c / "manifest.json").write_text(NESTED),
    **{
        text: lambda c, text=text: (c / "manifest.json").write_text(text)
        for text in ("{", "[]", '{"a.pt": 3}', '["a"]', '{"format": 2}', "\udcff")
        if text.isascii()
    },
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_checkpoint_is_set_aside_for_a_sound_one(tmp_path: Path, damage: str) -> None:
    older, newest = fake(tmp_path, 9), fake(tmp_path, 10)
    DAMAGE[damage](newest)
    before = contents(newest)
    said: list[str] = []
    assert newest_checkpoint(tmp_path, "r", said.append) == older
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-9", "damaged-checkpoint-10"]
    assert contents(tmp_path / "damaged-checkpoint-10") == before
    assert len(said) == 1
    assert "steps 10 to 10 are done again" in said[0]
    DAMAGE[damage](older)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint-9 is damaged"):
        newest_checkpoint(tmp_path, "r", pytest.fail)
    assert contents(tmp_path) == before


def test_a_run_goes_on_from_the_older_checkpoint_to_the_same_weights(out, whole) -> None:
    flip(out / "checkpoints" / "checkpoint-12" / "model.safetensors")
    shutil.rmtree(out / "final")
    steps, said = again(out)
    assert steps == [9, 10, 11, 12]
    assert len(said) == 1
    assert "model.safetensors has changed" in said[0]
    assert weights(out) == weights(whole)
    found = sorted(os.listdir(out / "checkpoints"))
    assert found == ["checkpoint-12", "checkpoint-8", "damaged-checkpoint-12"]
    # A second damage finds the name taken.
    flip(out / "checkpoints" / "checkpoint-12" / "optimizer.pt")
    assert again(out)[0] == [9, 10, 11, 12]
    assert (out / "checkpoints" / "damaged-checkpoint-12-2").is_dir()


def test_a_checkpoint_of_another_run_is_refused(out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(model(), ROWS, HELD_OUT, replace(SPEC, steps=16, seed=6), other)
    foreign = out / "checkpoints" / "checkpoint-16"
    shutil.copytree(other / "checkpoints" / "checkpoint-16", foreign)
    before = contents(out)
    with pytest.raises(ConfigError, match="checkpoint-16 is a checkpoint of another run"):
        again(out)
    assert contents(out) == before
    # A folder that was renamed is not of the step that it says.
    shutil.rmtree(foreign)
    (out / "checkpoints" / "checkpoint-8").rename(foreign)
    steps, said = again(out)
    assert steps == []
    assert "its folder was renamed: it is of step 8" in said[0]


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_sentence(out, whole) -> None:
    shutil.rmtree(out / "checkpoints" / "checkpoint-12")
    shutil.rmtree(out / "final")
    checkpoint = out / "checkpoints" / "checkpoint-8"
    (checkpoint / "log.csv").unlink()
    seal(checkpoint, "")
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    (checkpoint / "manifest.json").write_text(json.dumps(files))
    record = json.loads((out / "run.json").read_text())
    del record["sha256"], record["weights"]
    (out / "run.json").write_text(json.dumps(record))
    steps, said = again(out)
    assert steps == [9, 10, 11, 12]
    assert len(said) == 1
    assert "earlier version" in said[0]
    assert weights(out) == weights(whole)
    assert [e["step"] for e in read_log(out / "log.csv")] == [4, 8, 12]
    assert again(out) == ([], [])


def test_checkpoints_are_kept_by_their_step_whatever_their_times(tmp_path: Path) -> None:
    """The clock goes back between a stop and the next call."""
    stopped_at(9, tmp_path, model())
    folder = tmp_path / "checkpoints"
    for path in folder.iterdir():
        os.utime(path, (4e9, 4e9))
    steps, said = again(tmp_path)
    assert (steps, said) == ([9, 10, 11, 12], [])
    assert sorted(os.listdir(folder)) == ["checkpoint-12", "checkpoint-8"]
    for step in (100, 20, 3):
        fake(tmp_path / "fakes", step)
    drop_older_checkpoints(tmp_path / "fakes")
    assert sorted(os.listdir(tmp_path / "fakes")) == ["checkpoint-100", "checkpoint-20"]


def test_what_stands_in_the_way_of_a_checkpoint_is_set_aside(out: Path, tmp_path: Path) -> None:
    folder = out / "checkpoints"
    (folder / "checkpoint-abc").mkdir()
    (folder / "checkpoint-007").mkdir()
    (folder / "checkpoint-20").write_text("mine")
    (folder / "checkpoint-9").symlink_to(tmp_path)
    assert [p.name for p in sealed_checkpoints(folder)] == ["checkpoint-8", "checkpoint-12"]
    steps, said = again(out)
    assert steps == []
    assert len(said) == 2
    assert (folder / "damaged-checkpoint-20").read_text() == "mine"
    assert (folder / "damaged-checkpoint-9").is_symlink()
    assert (folder / "checkpoint-abc").is_dir()
    assert again(out) == ([], [])


@pytest.mark.parametrize("text", ["", NESTED, '{"spec": {}, "sha256": "0"}'])
def test_a_damaged_record_is_written_anew_where_a_checkpoint_knows_the_run(out, text) -> None:
    record = (out / "run.json").read_bytes()
    (out / "run.json").write_text(text)
    steps, said = again(out)
    assert (steps, len(said)) == ([], 1)
    assert (out / "run.json").read_bytes() == record
    assert (out / "damaged-run.json").read_text() == text
    # Another run's checkpoints do not know it.
    (out / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read"):
        again(out, learning_rate=1e-3)
    assert (out / "run.json").read_text() == text


@pytest.mark.parametrize("damage", ["a" * 200_000, "step\n1\n", None])
def test_a_damaged_log_comes_back_from_the_checkpoint(out: Path, damage: str | None) -> None:
    """And with it what the best loss was, so that no worse model replaces the best one."""
    log = (out / "log.csv").read_bytes()
    (out / "log.csv").unlink()
    if damage is not None:
        (out / "log.csv").write_text(damage)
    steps, said = again(out)
    assert (steps, len(said)) == ([], 0 if damage is None else 1)
    assert (out / "log.csv").read_bytes() == log
    assert (out / "damaged-log.csv").exists() == (damage is not None)
    (out / "log.csv").write_text("a" * 200_000)
    with pytest.raises(DataError, match="cannot be read as a log"):
        read_log(out / "log.csv")


class Evil:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_pickle_of_a_checkpoint_is_run(out: Path, tmp_path: Path, name: str) -> None:
    shutil.rmtree(out / "checkpoints" / "checkpoint-12")
    checkpoint = out / "checkpoints" / "checkpoint-8"
    torch.save(Evil(tmp_path / "run by a pickle"), checkpoint / name)
    run = json.loads((checkpoint / "manifest.json").read_text())["run"]
    seal(checkpoint, run)
    with pytest.raises(CheckpointError, match=r"checkpoint-8 cannot be loaded"):
        again(out)
    assert not (tmp_path / "run by a pickle").exists()


def test_weights_of_another_model_are_never_mixed_with_random_ones(out: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.rmtree(out / "checkpoints" / "checkpoint-12")
    checkpoint = out / "checkpoints" / "checkpoint-8"
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.injection.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    seal(checkpoint, json.loads((checkpoint / "manifest.json").read_text())["run"])
    with pytest.raises(CheckpointError, match=r"missing \['model.injection.weight'\]"):
        again(out)


# -- what a run is --------------------------------------------------------------------------------


def test_the_identity_of_a_run_ignores_what_is_at_its_default() -> None:
    record = make_record(SPEC, model(), model().cfg, ROWS, HELD_OUT)
    assert json.loads(json.dumps(record)) == record
    known = identity(record)
    spec, config = dict(record["spec"]), dict(record["model"])
    del spec["diverged_by"], spec["optimizer"], config["v_bias"], config["source_layers"]
    assert identity(record | {"spec": spec, "model": config}) == known
    for part, key, value in (("spec", "clip", 2.0), ("spec", "steps", 1), ("model", "seed", 9)):
        assert identity(record | {part: record[part] | {key: value}}) != known
    other = model()
    other.final_norm.w.data[0] += 1
    assert identity(make_record(SPEC, other, other.cfg, ROWS, HELD_OUT)) != known


def test_a_model_that_an_interrupted_call_has_trained_may_be_given_again(whole, tmp_path) -> None:
    victim = model()
    stopped_at(9, tmp_path, victim)
    train(victim, ROWS, HELD_OUT, SPEC, tmp_path, progress=Progress(say=pytest.fail))
    assert weights(tmp_path) == weights(whole)


def test_a_run_without_a_checkpoint_says_that_it_begins_with_other_weights(tmp_path) -> None:
    victim = model()
    stopped_at(2, tmp_path, victim)
    with pytest.raises(ConfigError, match="weights that it begins with"):
        train(victim, ROWS, HELD_OUT, SPEC, tmp_path, fresh=True)
    said: list[str] = []
    train(victim, ROWS, HELD_OUT, SPEC, tmp_path, progress=Progress(say=said.append))
    assert len(said) == 1
    assert "not those that the run began with" in said[0]
    assert again(tmp_path) == ([], [])


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "best", "final"]
)
def test_a_folder_of_a_model_takes_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("x")
    (tmp_path / "notes.txt").write_text("kept")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigError, match=name):
        check_vacant(tmp_path)
    with pytest.raises(ConfigError, match=name):
        train(model(), ROWS, HELD_OUT, SPEC, tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


# -- full disks -----------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_the_run_goes_on_to_the_same_weights(
    whole: Path, tmp_path: Path
) -> None:
    size = (whole / "final" / "model.safetensors").stat().st_size
    # The optimiser's state is twice as long as the weights.
    stopped_at(5, tmp_path, model())
    with files_of_at_most(size + 4096), pytest.raises(DataError, match="checkpoint-8") as caught:
        again(tmp_path)
    assert "goes on from the newest checkpoint" in str(caught.value)
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint-4"]
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name or "saving" in p.name]
    LoopedTransformer.from_pretrained(tmp_path / "best", device="cpu")
    assert again(tmp_path) == (list(range(5, 13)), [])
    assert weights(tmp_path) == weights(whole)


def test_a_disk_that_fills_before_the_first_checkpoint_leaves_nothing_partial(
    whole: Path, tmp_path: Path
) -> None:
    with files_of_at_most(8192), pytest.raises(DataError, match="best cannot be saved"):
        again(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "run.json"]
    assert os.listdir(tmp_path / "checkpoints") == []
    assert again(tmp_path) == (list(range(1, 13)), [])
    assert weights(tmp_path) == weights(whole)


def test_a_snapshot_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with files_of_at_most(8192), pytest.raises(DataError, match="step-000000"):
        train(model(), ROWS, HELD_OUT, SPEC, tmp_path, snapshots=1)
    assert os.listdir(tmp_path / "snapshots") == []


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    if name:
        out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises((DataError, ConfigError), match=str(out)):
        again(out)
    assert (out / name).read_text() == "mine"
