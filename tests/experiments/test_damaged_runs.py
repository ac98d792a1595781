"""Files of a run that are damaged, or of another run or version: never taken for its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from conftest import VARIANTS, random_config

from tl_looped import DataError, LoopedTransformer
from tl_looped.experiments import sealing, store
from tl_looped.experiments.compare import compare_runs, load_runs
from tl_looped.experiments.runner import run_experiment
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.progress import Progress
from tl_looped.report.findings import read_findings

pytestmark = pytest.mark.once

TEXTS = ("Tom has 3 pens.", "One two.", "It is so.", "No.")
SPEC = Experiment(
    "tiny", prompts=PromptSet("text", texts=TEXTS), recurrences=2, metrics=("colsum_concentration",)
)
OTHER = replace(SPEC, recurrences=3, reference_recurrences=2)


@pytest.fixture(scope="module")
def tiny() -> LoopedTransformer:
    tokenizer = LoopedTransformer.from_pretrained("demo", device="meta").tokenizer
    return LoopedTransformer.from_config(
        random_config(**VARIANTS["pre-injection"], d_vocab=2048), tokenizer
    )


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """The results of a run that nothing happened to."""
    return run_experiment(SPEC, tmp_path_factory.mktemp("a"), model=tiny, batch_size=1).load()


class Stop(Exception):
    pass


def stopped(spec: Experiment, out: Path, model: LoopedTransformer, after: int = 2) -> Path:
    """The parts of a run that was stopped after so many prompts."""
    done: list[int] = []

    def advance(n: int) -> None:
        done.append(n)
        if len(done) == after:
            raise Stop

    before = set(out.glob("*"))
    with pytest.raises(Stop):
        run_experiment(spec, out, model=model, batch_size=1, progress=Progress(advance=advance))
    (folder,) = set(out.glob("*")) - before
    return folder / "parts"


def resumed(out: Path, model: LoopedTransformer) -> tuple[xr.Dataset, list[str], int]:
    """Results of going on, what was said, and how many prompts were done before."""
    said: list[str] = []
    before: list[int] = []
    progress = Progress(start=lambda total, done: before.append(done), say=said.append)
    run = run_experiment(SPEC, out, model=model, progress=progress)
    return run.load(), said, before[0]


# -- one file -----------------------------------------------------------------------------------

RESULT = xr.Dataset(
    {"x": (("layer", "prompt"), np.arange(12.0).reshape(3, 4))},
    coords={"label": ("layer", ["a", "b", "c"]), "prompt": range(4)},
    attrs={"spec": '{"state_seed": 0}', "hash": "f" * 64, "n": 3},
)


@pytest.mark.parametrize(
    ("write", "read", "name"),
    [
        (store.write_dataset, store.read_dataset, "a.nc"),
        (store.write_part, store.read_part, "a.npz"),
    ],
)
def test_no_changed_bit_and_no_lost_end_is_read(
    write: Callable[..., Path], read: Callable[[Path], xr.Dataset], name: str, tmp_path: Path
) -> None:
    path = write(RESULT, tmp_path / name)
    good = path.read_bytes()
    assert store.has_checksum(read(path))
    assert read(path).drop_attrs().identical(RESULT.drop_attrs())
    mark = good.rindex(b"\ntl_looped sha256 ")
    for at in [*range(0, mark, max(1, mark // 60)), *range(mark, len(good))]:
        changed = bytearray(good)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"a\.np?[cz].*checksum"):
            read(path)
    for cut in (*range(1, len(good) - mark - 18), len(good) - mark + 1, len(good) // 2):
        path.write_bytes(good[:-cut])
        with pytest.raises(DataError, match=r"a\.np?[cz]"):
            read(path)
    for more in (b"\n", bytes(1000)):
        path.write_bytes(good + more)
        with pytest.raises(DataError, match="checksum"):
            read(path)


def test_other_programs_read_a_result_with_its_checksum(tmp_path: Path) -> None:
    path = store.write_dataset(RESULT, tmp_path / "a.nc")
    found = xr.load_dataset(path, engine="h5netcdf")
    assert found.drop_attrs().identical(RESULT.drop_attrs())
    # What they write has none, and never gets one by being passed on.
    found.to_netcdf(tmp_path / "b.nc", engine="h5netcdf")
    theirs = store.read_dataset(tmp_path / "b.nc")
    assert not store.has_checksum(theirs)
    again = store.read_dataset(store.write_dataset(theirs.assign_attrs(n=4), tmp_path / "c.nc"))
    assert (again.attrs["n"], store.has_checksum(again)) == (4, False)


@pytest.mark.parametrize("value", [[1, 2], 1.0, "1"])
def test_a_format_that_is_no_integer_is_refused(value: object, tmp_path: Path) -> None:
    data = RESULT.assign_attrs(format=value)
    data.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    with pytest.raises(DataError, match=r"a\.nc has no integer attribute 'format'"):
        store.read_dataset(tmp_path / "a.nc")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "0", "null", '{"n": 1}', '{"n": 1, "sha256": 3}', "[" * 100_000, "\xff"],
)
def test_a_record_is_whole_or_refused(text: str, tmp_path: Path) -> None:
    path = sealing.write_record({"n": 12, "run": "é"}, tmp_path / "a.json")
    assert sealing.read_record(path) == {"n": 12, "run": "é"}
    path.write_text(path.read_text().replace("12", "13"))
    with pytest.raises(DataError, match=r"a\.json is damaged"):
        sealing.read_record(path)
    path.write_text(text, "latin-1")
    with pytest.raises(DataError, match=r"a\.json is damaged"):
        sealing.read_record(path)


# -- results ------------------------------------------------------------------------------------


def test_results_of_another_run_are_set_aside(tiny, whole, tmp_path: Path) -> None:
    mine, theirs = (run_experiment(s, tmp_path, model=tiny, batch_size=1) for s in (SPEC, OTHER))
    shutil.copy(theirs.folder / "results.nc", mine.folder / "results.nc")
    with pytest.raises(DataError, match="another run"):
        mine.load()
    said: list[str] = []
    again = run_experiment(
        SPEC, tmp_path, model=tiny, batch_size=1, progress=Progress(say=said.append)
    )
    assert again.is_new
    assert again.load().identical(whole)
    assert "holds the results of another run" in said[0]
    kept = store.read_dataset(mine.folder / "results.old-1.nc")
    assert kept.identical(theirs.load())


def test_results_without_a_checksum_are_used_and_said(tiny, whole, tmp_path: Path) -> None:
    run = run_experiment(SPEC, tmp_path, model=tiny, batch_size=1)
    path = run.folder / "results.nc"
    content, had_one = sealing.opened(path.read_bytes())
    assert had_one
    path.write_bytes(content)
    for spec in (SPEC, replace(SPEC, feedforward="b")):  # the second one writes it again
        said: list[str] = []
        again = run_experiment(spec, tmp_path, model=tiny, progress=Progress(say=said.append))
        assert not again.is_new
        assert "has no checksum" in said[0]
        assert not store.has_checksum(again.load())
    assert again.load().drop_attrs().identical(whole.drop_attrs())


def test_doors_of_results_refuse_those_of_another_run(tiny, tmp_path: Path) -> None:
    mine, theirs = (run_experiment(s, tmp_path, model=tiny, batch_size=1) for s in (SPEC, OTHER))
    content = (theirs.folder / "results.nc").read_bytes()
    (mine.folder / "results.nc").write_bytes(content)
    for door in (load_runs, lambda folders: read_findings(folders[0])):
        with pytest.raises(DataError, match=r"results\.nc holds the results of another run"):
            door([tmp_path])
    renamed = mine.folder.rename(tmp_path / "any name")
    (renamed / "results.nc").write_bytes(sealing.opened(content)[0])
    runs = load_runs([tmp_path])
    assert set(runs) == {"any name", theirs.folder.name}
    assert [n for n in compare_runs(runs).notices if "has no checksum" in n] == [
        store.no_checksum_notice("any name")
    ]


@pytest.mark.parametrize("missing", ["layers.csv", "prompts.parquet"])
def test_tables_are_written_before_the_results_and_again_if_missing(
    tiny, tmp_path: Path, monkeypatch, missing: str
) -> None:
    """The system refuses one of the tables, as it does on a full disk."""
    put = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == missing:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(DataError, match=rf"{missing} .*cannot be written"):
            run_experiment(SPEC, tmp_path, model=tiny)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "results.nc").exists()
    before: list[int] = []
    progress = Progress(start=lambda total, done: before.append(done))
    run_experiment(SPEC, tmp_path, model=tiny, progress=progress)
    assert before == [len(TEXTS)]  # nothing was run again
    tables = {path: path.read_bytes() for path in (folder / "tables").iterdir()}
    names = {path.name for path in tables}
    assert names == {"layers.csv", "layers.parquet", "prompts.csv", "prompts.parquet"}
    (folder / "tables" / missing).unlink()  # as a run of an earlier version could be left
    assert not run_experiment(SPEC, tmp_path, model=tiny).is_new
    assert {path: path.read_bytes() for path in (folder / "tables").iterdir()} == tables


# -- parts --------------------------------------------------------------------------------------


def change_record(path: Path, **changes: object) -> None:
    data, record = store.read_part_and_record(path)
    store.write_part(data, path, record | changes)


def drop(path: Path, name: str) -> None:
    data, record = store.read_part_and_record(path)
    store.write_part(data.drop_vars(name), path, record)


def halve(path: Path) -> None:
    data, record = store.read_part_and_record(path)
    store.write_part(data.isel(head=slice(1)), path, record)


def unseal(path: Path) -> None:
    path.write_bytes(sealing.opened(path.read_bytes())[0])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "a bit": (flip, "checksum", 1),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-500]), "damaged", 1),
    "empty": (lambda path: path.write_bytes(b""), "damaged", 1),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "damaged", 1),
    "no checksum": (unseal, "has no checksum", 1),
    "another run": (lambda path: change_record(path, run="0" * 64), "another run", 1),
    "another version": (lambda path: change_record(path, tl_looped="0"), "another version, 0", 1),
    "no plan": (lambda path: change_record(path, batch_size=None), "does not hold prompts", 1),
    "a copy": (lambda path: shutil.copy(path, path.with_name("9.npz")), "another part holds", 2),
    # Nothing tells which part is right, so both are run again.
    "lacks a variable": (lambda path: drop(path, "colsum_concentration"), "differ in colsum", 0),
    "lacks prompts": (lambda path: drop(path, "prompt"), "does not hold prompts", 1),
    "lacks a head": (halve, "differ in colsum_concentration, head", 0),
}


@pytest.mark.full
@pytest.mark.parametrize("name", DAMAGES)
def test_a_part_that_cannot_be_used_is_set_aside_and_run_again(
    name: str, tiny, whole, tmp_path: Path
) -> None:
    damage, reason, n_kept = DAMAGES[name]
    parts = stopped(SPEC, tmp_path, tiny)
    path = sorted(parts.glob("*.npz"))[0]
    damage(path)
    data, said, before = resumed(tmp_path, tiny)
    assert data.identical(whole)
    assert (before, len(said)) == (n_kept, 1 if n_kept else 2)
    assert all(reason in text and "set-aside/" in text for text in said)
    assert len(list((parts.parent / "set-aside").iterdir())) == len(said)


def test_parts_of_another_run_are_not_joined(tiny, whole, tmp_path: Path) -> None:
    theirs = stopped(OTHER, tmp_path, tiny)
    mine = stopped(SPEC, tmp_path, tiny, after=1)
    for path in theirs.glob("*.npz"):
        shutil.copy(path, mine)  # one of them over the run's own part
    data, said, before = resumed(tmp_path, tiny)
    assert data.identical(whole)
    assert (before, len(said)) == (0, 2)
    assert all("is of another run" in text for text in said)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"batch_size": 3}'])
def test_a_damaged_plan_is_read_off_the_parts(
    text: str | None, tiny, whole, tmp_path: Path
) -> None:
    parts = stopped(SPEC, tmp_path, tiny)
    plan = parts / "plan.json"
    planned = plan.read_bytes()
    plan.unlink() if text is None else plan.write_text(text)
    data, said, before = resumed(tmp_path, tiny)
    assert data.identical(whole)
    assert before == 2
    if text is not None:
        assert "The batch size is read off the parts: 1" in said[0]
        kept = parts.parent / "set-aside" / "plan.old-1.json"
        assert kept.read_text() == text
        assert json.loads(planned)["batch_size"] == 1


def test_a_lost_plan_is_said(tiny, whole, tmp_path: Path) -> None:
    parts = stopped(SPEC, tmp_path, tiny, after=1)
    for path in (*parts.glob("*.npz"), parts / "plan.json"):
        path.write_bytes(b"")
    data, said, before = resumed(tmp_path, tiny)
    assert before == 0
    assert "The batch size is lost and chosen anew" in said[1]
    assert data.sizes == whole.sizes


@pytest.mark.parametrize("text", ["", "0", "{}"])
def test_a_damaged_limit_is_found_again(text: str, tiny, whole, tmp_path: Path) -> None:
    parts = stopped(SPEC, tmp_path, tiny)
    (parts / "limit-0-of-1.json").write_text(text)
    data, said, before = resumed(tmp_path, tiny)
    assert data.identical(whole)
    assert before == 2
    assert "limit-0-of-1.json is damaged" in said[0]
    assert "The limit is found again" in said[0]


def test_set_aside_files_never_replace_each_other(tmp_path: Path) -> None:
    for content in (b"a", b"b"):
        (tmp_path / "x.npz").write_bytes(content)
        store.set_aside(tmp_path / "x.npz", tmp_path / "aside")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "aside").iterdir()}
    assert kept == {"x.old-1.npz": b"a", "x.old-2.npz": b"b"}
    with pytest.raises(DataError, match=r"x\.npz cannot be used"):
        store.set_aside(tmp_path / "x.npz")
