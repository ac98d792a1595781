"""A run that is killed, damaged or mistaken for another."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_config
from safetensors.torch import load_file

from tl_looped import (
    CheckpointError,
    ConfigError,
    DataError,
    InitialState,
    Injection,
    LoopedTransformer,
)
from tl_looped.errors import DivergedError
from tl_looped.progress import Progress
from tl_looped.training.recurrences import PoissonLogNormal
from tl_looped.training.spec import TrainSpec
from tl_looped.training.trainer import train

pytestmark = pytest.mark.once

ROWS = torch.randint(0, 50, (21, 12), generator=torch.Generator().manual_seed(1))
HELD_OUT = ROWS[:3].flip(1)
SPEC = TrainSpec(
    steps=12,
    batch_size=2,
    warmup=3,
    evaluate_every=4,
    bf16=False,
    seed=5,
    recurrences=PoissonLogNormal(2.0, 0.5),
    backprop_last=2,
)


def model() -> LoopedTransformer:
    """With everything that is drawn: a random initial state and sampled recurrences."""
    values = {
        "injection": Injection.LINEAR,
        "initial_state": InitialState.RANDOM,
        "initial_state_std": 0.5,
        "n_recurrences": 2,
        "n_core": 1,
        "n_prelude": 1,
    }
    return LoopedTransformer.from_config(random_config(**values))


def weights(out: Path) -> bytes:
    return (out / "final" / "model.safetensors").read_bytes()


def without_times(out: Path) -> list[str]:
    return [line.rsplit(",", 2)[0] for line in (out / "log.csv").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    train(model(), ROWS, HELD_OUT, SPEC, out)
    return out


class Stop(Exception):
    pass


def stopped_at(step: int, out: Path, victim: LoopedTransformer) -> None:
    def stop(tick) -> None:
        if tick.step == step:
            raise Stop

    with pytest.raises(Stop):
        train(victim, ROWS, HELD_OUT, SPEC, out, Progress(tick=stop))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {folders!r}
from test_resume import HELD_OUT, ROWS, SPEC, model
from tl_looped.errors import DivergedError
from tl_looped.progress import Progress
from tl_looped.training.trainer import train

def tick(t):
    if t.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

train(model(), ROWS, HELD_OUT, SPEC, Path({out!r}), Progress(tick=tick))
"""


@pytest.mark.full
def test_a_killed_process_resumes_to_the_same_weights_and_log(whole: Path, tmp_path: Path) -> None:
    code = KILLED.format(folders=[str(p) for p in Path(__file__).parents[:2]], out=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", code], check=False)
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]
    steps = []
    progress = Progress(tick=lambda t: steps.append(t.step))
    train(model(), ROWS, HELD_OUT, SPEC, tmp_path, progress)
    assert steps == list(range(5, 13))
    assert weights(tmp_path) == weights(whole)
    assert without_times(tmp_path) == without_times(whole)


def test_an_exception_keeps_the_checkpoint_and_the_callers_generators(tmp_path: Path) -> None:
    victim = model()  # PyTorch's layers draw when they are made
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.rand(()), random.random())
    torch.manual_seed(3)
    random.seed(3)
    stopped_at(5, tmp_path, victim)
    assert (torch.rand(()), random.random()) == expected
    assert (tmp_path / "checkpoints" / "checkpoint-4" / "manifest.json").is_file()


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before, log = weights(whole), (whole / "log.csv").read_text()
    again = model()
    progress = Progress(tick=lambda t: pytest.fail("trained"))
    entries = train(again, ROWS, HELD_OUT, SPEC, whole, progress)
    assert weights(whole) == before
    assert (whole / "log.csv").read_text() == log
    assert [e["step"] for e in entries] == [4, 8, 12]
    final = LoopedTransformer.from_pretrained(whole / "final", device="cpu")
    assert all(
        torch.equal(p, q) for p, q in zip(again.parameters(), final.parameters(), strict=True)
    )


def test_the_older_checkpoint_gives_the_same_weights(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-12")
    # One that was interrupted while it was written, as the Trainer leaves it.
    shutil.copytree(out / "checkpoints" / "checkpoint-8", out / "checkpoints" / "checkpoint-10")
    (out / "checkpoints" / "checkpoint-10" / "manifest.json").unlink()
    (out / "checkpoints" / "checkpoint-10" / "optimizer.pt").unlink()
    shutil.rmtree(out / "final")
    train(model(), ROWS, HELD_OUT, SPEC, out)
    assert weights(out) == weights(whole)
    assert not (out / "checkpoints" / "checkpoint-10").exists()


def test_a_folder_takes_no_other_run(whole: Path, tmp_path: Path) -> None:
    for spec, rows, what in (
        (replace(SPEC, learning_rate=1e-3), ROWS, r"spec\.learning_rate \(0.002 there, 0.001"),
        (replace(SPEC, recurrences=PoissonLogNormal(3.0)), ROWS, r"spec\.recurrences"),
        (SPEC, ROWS.flip(0), "rows"),
    ):
        with pytest.raises(ConfigError, match=what):
            train(model(), rows, HELD_OUT, spec, whole)
    other = LoopedTransformer.from_config(random_config())
    with pytest.raises(ConfigError, match=r"model\.n_core \(1 there, 3 here\)"):
        train(other, ROWS, HELD_OUT, replace(SPEC, backprop_last=None), whole)
    (tmp_path / "log.csv").write_text("step\n")
    with pytest.raises(ConfigError, match=r"no run\.json"):
        train(model(), ROWS, HELD_OUT, SPEC, tmp_path)
    assert os.listdir(tmp_path) == ["log.csv"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"spec": 3}', '{"spec": {}}'])
def test_an_unreadable_record_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(str(tmp_path))):
        train(model(), ROWS, HELD_OUT, SPEC, tmp_path)
    assert (tmp_path / "run.json").read_text() == text


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its record lacks the model's newer fields; one that is not at its default is another run."""
    train(model(), ROWS, HELD_OUT, replace(SPEC, steps=4), tmp_path)
    path = tmp_path / "run.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    for name in ("v_bias", "qk_norm_per_head", "source_layers"):
        del record["model"][name]
    path.write_text(json.dumps(record))
    train(model(), ROWS, HELD_OUT, replace(SPEC, steps=4), tmp_path)
    del record["model"]["norm_layout"]
    record["model"]["seed"] = 5
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"differs in model\.seed") as caught:
        train(model(), ROWS, HELD_OUT, replace(SPEC, steps=4), tmp_path)
    assert "norm_layout" not in str(caught.value)  # pre is the default, and the model's


def poison(out: Path, at: int, change) -> str:
    """Train, and after a step do something to the model; the message of the error."""
    victim = model()

    def tick(value) -> None:
        if value.step == at:
            change(victim)

    with pytest.raises(DivergedError) as caught:
        train(victim, ROWS, HELD_OUT, SPEC, out, Progress(tick=tick))
    return str(caught.value)


def test_a_loss_that_is_no_number_stops_at_once(tmp_path: Path) -> None:
    def nan(victim: LoopedTransformer) -> None:
        victim.final_norm.w.data[0] = float("nan")

    message = poison(tmp_path, 6, nan)
    assert "at step 6: the training loss is nan" in message
    assert "checkpoint-4" in message
    assert str(tmp_path / "best") in message
    assert "learning_rate" in message
    kept = LoopedTransformer.from_pretrained(tmp_path / "best", device="cpu")
    assert all(bool(p.isfinite().all()) for p in kept.parameters())
    assert not (tmp_path / "final").exists()


def test_a_model_that_does_not_exist_is_not_named(tmp_path: Path) -> None:
    victim = model()
    victim.W_E.data[0] = float("nan")
    with pytest.raises(DivergedError) as caught:
        train(victim, ROWS, HELD_OUT, SPEC, tmp_path)
    assert not (tmp_path / "best").exists()
    assert str(tmp_path / "best") not in str(caught.value)


def test_a_gradient_that_is_no_number_changes_no_weight(tmp_path: Path) -> None:
    victims = []

    def hook(victim: LoopedTransformer) -> None:
        victims.append((victim, [p.detach().clone() for p in victim.parameters()]))
        victim.final_norm.w.register_hook(lambda grad: grad * float("inf"))

    message = poison(tmp_path, 5, hook)
    assert "the gradient of model." in message
    victim, before = victims[0]
    assert all(torch.equal(p, q) for p, q in zip(victim.parameters(), before, strict=True))


def test_a_loss_far_above_its_best_stops_before_the_checkpoint(tmp_path: Path) -> None:
    def worsen(victim: LoopedTransformer) -> None:
        victim.final_norm.w.data.mul_(30.0)

    message = poison(tmp_path, 4, worsen)
    assert "at step 8: the mean training loss rose from" in message
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint-4"]


def test_a_very_high_learning_rate_is_caught(tmp_path: Path) -> None:
    spec = replace(SPEC, learning_rate=300.0, warmup=0, clip=1e9)
    with pytest.raises(DivergedError, match="diverged"):
        train(model(), ROWS, HELD_OUT, spec, tmp_path)


@pytest.mark.parametrize(
    ("rows", "held_out", "message"),
    [
        (ROWS[:0], HELD_OUT, "rows must be"),
        (ROWS, HELD_OUT[:0], "held_out must be"),
        (ROWS[:, :1], HELD_OUT[:, :1], "rows must be"),
        (ROWS.repeat(1, 6), HELD_OUT.repeat(1, 6), "exceed the context of 64"),
    ],
)
def test_rows_that_cannot_be_trained_on(rows, held_out, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        train(model(), rows, held_out, SPEC, tmp_path)
    assert os.listdir(tmp_path) == []


SNAPSHOTS = ["step-000000", "step-000008", "step-000012"]


def test_snapshots_are_models_of_every_other_evaluation_and_change_nothing(
    whole: Path, tmp_path: Path
) -> None:
    train(model(), ROWS, HELD_OUT, SPEC, tmp_path, snapshots=2)
    kept = tmp_path / "snapshots"
    assert sorted(os.listdir(kept)) == SNAPSHOTS
    assert weights(tmp_path) == weights(whole)
    assert without_times(tmp_path) == without_times(whole)
    assert (tmp_path / "run.json").read_bytes() == (whole / "run.json").read_bytes()
    assert not (whole / "snapshots").exists()
    file = "model.safetensors"
    assert (kept / "step-000012" / file).read_bytes() == weights(whole)
    first = LoopedTransformer.from_pretrained(kept / "step-000000", device="cpu")
    pairs = zip(first.parameters(), model().parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    checkpoint = load_file(whole / "checkpoints" / "checkpoint-8" / file)
    then = LoopedTransformer.from_pretrained(kept / "step-000008", device="cpu")
    assert all(torch.equal(p, checkpoint[f"model.{n}"]) for n, p in then.named_parameters())


@pytest.mark.full
@pytest.mark.parametrize("step", [3, 10])
def test_a_run_that_goes_on_has_the_same_snapshots(tmp_path: Path, step: int) -> None:
    def stop(tick) -> None:
        if tick.step == step:
            raise Stop

    whole, out = tmp_path / "whole", tmp_path / "out"
    train(model(), ROWS, HELD_OUT, SPEC, whole, snapshots=2)
    with pytest.raises(Stop):
        train(model(), ROWS, HELD_OUT, SPEC, out, Progress(tick=stop), snapshots=2)
    # What a process that was killed in the middle of saving leaves behind.
    (out / "snapshots" / ".step-000012.partial").mkdir()
    (out / "snapshots" / ".step-000012.partial" / "config.json").write_text("{")
    train(model(), ROWS, HELD_OUT, SPEC, out, snapshots=2)
    wanted, found = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (whole / "snapshots", out / "snapshots")
    )
    assert found == wanted


@pytest.mark.parametrize("snapshots", [0, -1])
def test_numbers_of_snapshots_that_make_no_sense(tmp_path: Path, snapshots) -> None:
    with pytest.raises(ConfigError, match="snapshots must be an integer of at least 1"):
        train(model(), ROWS, HELD_OUT, SPEC, tmp_path, snapshots=snapshots)
    assert os.listdir(tmp_path) == []
