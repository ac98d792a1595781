"""Section 4.2: random models as cells, the grid they make, and what is said of it."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

from tl_looped.cli import app
from tl_looped.cli.sections import reproduce_section42
from tl_looped.errors import DataError, InputError
from tl_looped.experiments.sealing import opened
from tl_looped.experiments.store import read_part, write_part
from tl_looped.metrics import convergence_verdict, stream
from tl_looped.metrics.verdicts import CONVERGENCE
from tl_looped.paper.section42.cells import (
    METRICS,
    Cell,
    CellSize,
    cell_of,
    cells,
    model_of,
    run_cell,
    run_condition,
)
from tl_looped.paper.section42.grid import run_grid
from tl_looped.paper.section42.page import verdict_part
from tl_looped.paper.section42.tables import grid_tables, is_zero, read_grid_tables, shipped_grid
from tl_looped.progress import Progress
from tl_looped.transformer import LoopedTransformer

pytestmark = pytest.mark.once

SMALL = CellSize(d_model=32, n_tokens=3, n_recurrences=6, n_iterations=8)
PRE = Cell("normal", 2, "pre", True, 0)


def a_cell(**changes: object) -> Cell:
    return replace(PRE, **changes)  # type: ignore[arg-type]


# -- cells ----------------------------------------------------------------------------------------


def test_the_grid_is_what_the_paper_asks_for() -> None:
    grid = cells()
    assert len(grid) == len(set(grid)) == 4 * 2 * 3 * 2 * 5
    assert len({one.name for one in grid}) == 240
    assert {one.seed for one in grid[:48]} == {0}


@pytest.mark.parametrize(
    ("argument", "value"), [("norms", ("pre", "layer")), ("inits", ("xavier",))]
)
def test_an_unknown_condition_is_named(argument: str, value: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=f"{argument}: '{value[-1]}' is none of"):
        cells(**{argument: value})


@pytest.mark.parametrize(
    "wrong",
    [{"d_model": 96}, {"n_iterations": 7}, {"n_recurrences": 3}, {"n_tokens": 0}],
)
def test_a_size_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        CellSize(**wrong)


def the_core(cell: Cell) -> dict[str, torch.Tensor]:
    model = model_of(cell, SMALL)
    return {n: p for n, p in model.named_parameters() if n.startswith(("core.", "embed"))}


@pytest.mark.parametrize(
    "other", [a_cell(norm="residual"), a_cell(injected=False), a_cell(n_layers=4)], ids=str
)
def test_cells_of_a_seed_share_their_input_and_their_core(other: Cell) -> None:
    mine, theirs = the_core(PRE), the_core(other)
    shared = {name for name in mine if ".ln" not in name}
    assert len(shared) == 9  # the embedding and four matrices a layer
    assert shared <= set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in shared)


def test_initialisations_differ_by_factors_alone() -> None:
    normal, fan_in = the_core(PRE), the_core(a_cell(init="fan_in"))
    for name, weight in normal.items():
        if ".ln" not in name:
            ratio = fan_in[name] / weight
            assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-5), name


@pytest.mark.parametrize("init", ["normal", "fan_in"])
def test_the_input_is_standard_normal_and_not_the_start(init: str) -> None:
    size = replace(SMALL, d_model=256, n_tokens=64)
    model = model_of(a_cell(init=init, n_layers=1), size)
    _, cache = model.run_with_cache(torch.arange(64)[None], n_recurrences=1)
    given, start = cache["hook_embed"], cache["hook_initial_state"]
    assert given.std() == pytest.approx(1, abs=0.02)
    assert given.mean() == pytest.approx(0, abs=0.02)
    # A normal that is cut at three standard deviations has 0.987 of one.
    assert start.std() == pytest.approx(0.9866, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([given.flatten(), start.flatten()]))[0, 1]) < 0.03


def test_without_injection_the_loop_starts_from_the_input() -> None:
    model = model_of(a_cell(injected=False), SMALL)
    _, cache = model.run_with_cache(torch.arange(3)[None], n_recurrences=1)
    assert torch.equal(cache["hook_initial_state"], cache["hook_embed"])


@pytest.mark.parametrize("cell", [PRE, a_cell(injected=False, norm="residual", seed=3)], ids=str)
def test_curves_are_those_of_a_run_of_the_first_recurrences(cell: Cell) -> None:
    data = run_cell(cell, SMALL)
    model = LoopedTransformer.from_config(cell.config(SMALL))
    model.state_seed = cell.seed
    tokens = torch.arange(3)[None]
    alone = stream(model, tokens, [*METRICS, *CONVERGENCE], by="depth")
    longer = stream(model, tokens, CONVERGENCE, by="depth", n_recurrences=12)
    for name in METRICS:
        np.testing.assert_allclose(data[name], alone[name], rtol=1e-5, atol=1e-6, err_msg=name)
    # Means of ratios here, ratios of means there: the numbers differ, the verdict does not.
    verdict = convergence_verdict(alone, longer)
    assert data["verdict_name"].values == verdict["verdict_name"].values
    assert data.attrs.get("state_seed") == (cell.seed if cell.injected else None)


def test_one_model_for_all_seeds_gives_what_each_alone_gives() -> None:
    wanted = [a_cell(seed=seed) for seed in (4, 1)]
    for cell, data in run_condition(wanted, SMALL):
        assert data.identical(run_cell(cell, SMALL))
        assert cell_of(data) == cell


def test_one_model_is_not_used_for_another_condition() -> None:
    with pytest.raises(InputError, match="differ by more than their seed"):
        list(run_condition([PRE, a_cell(norm="post")], SMALL))


@pytest.mark.full
def test_weights_of_standard_deviation_002_give_the_pattern_of_figure_6() -> None:
    # metrics.md section 5, measured apart from this package: pre-norm with injection reaches
    # distinct fixed points, the Ouro norm reaches none, pre-norm alone drifts along one direction.
    size = CellSize(n_recurrences=32, n_iterations=32)
    found = {
        (norm, injected): run_cell(Cell("normal", 4, norm, injected, 0), size)
        for norm, injected in (("pre", True), ("sandwich", True), ("pre", False))
    }
    pre, ouro, plain = found.values()
    assert pre["verdict_name"].item() == "CONVERGED"
    assert pre["successive_rel"].values[-4:].max() < 1e-5
    assert pre["lowest_layer_cosine"].item() < 0.999
    assert not ouro["has_fixed_point"].item()
    assert ouro["successive_rel"].values[-4:].min() > 0.5
    assert plain["lowest_layer_cosine"].item() > 0.99
    norms = plain["residual_mean"].values[3::4, 0]
    growth = np.diff(norms)
    assert growth[-1] == pytest.approx(growth[len(growth) // 2], rel=0.2)
    assert np.isnan(ouro["spectral_radius"].item())
    assert pre["spectral_radius"].item() == pytest.approx(pre["rate"].item(), abs=0.06)


def test_weights_by_fan_in_have_no_fixed_point() -> None:
    size = CellSize(d_model=64, n_recurrences=32, n_iterations=0)
    data = run_cell(Cell("fan_in", 4, "pre", True, 0), size)
    assert not data["has_fixed_point"].item()
    assert data["successive_rel"].values[-4:].min() > 0.1


# -- grid -----------------------------------------------------------------------------------------

FEW = cells(seeds=(0, 1), layers=(2,), norms=("pre", "post"), inits=("normal",))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Cell, xr.Dataset]]:
    out = tmp_path_factory.mktemp("grid")
    return out, run_grid(FEW, SMALL, out, 1)


def test_a_grid_is_its_cells(grid: tuple[Path, dict[Cell, xr.Dataset]]) -> None:
    out, found = grid
    assert list(found) == FEW
    assert found[FEW[3]].identical(run_cell(FEW[3], SMALL))
    read = {cell: read_part(out / "cells" / f"{cell.name}.npz") for cell in FEW}
    assert all(found[cell].identical(data) for cell, data in read.items())


@pytest.mark.full
def test_processes_do_not_change_a_bit(
    grid: tuple[Path, dict[Cell, xr.Dataset]], tmp_path: Path
) -> None:
    advanced: list[int] = []
    found = run_grid(FEW, SMALL, tmp_path, 2, Progress(advance=advanced.append))
    assert sum(advanced) == len(FEW)
    assert all(found[cell].identical(data) for cell, data in grid[1].items())


def test_a_stopped_grid_goes_on(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    done: list[int] = []

    def stop(n: int) -> None:
        done.append(n)
        if len(done) == 3:
            raise Stop

    with pytest.raises(Stop):
        run_grid(FEW, SMALL, tmp_path, 1, Progress(advance=stop))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.npz")}
    assert len(kept) == 3
    before: list[int] = []
    advanced: list[int] = []
    progress = Progress(lambda total, done: before.append(done), advanced.append)
    found = run_grid(FEW, SMALL, tmp_path, 1, progress)
    assert (before, advanced) == ([3], [1, 1, 1, 1, 1])
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert found[FEW[-1]].identical(run_cell(FEW[-1], SMALL))


def test_a_damaged_cell_is_said_and_run_again(tmp_path: Path) -> None:
    first = run_grid(FEW[:2], SMALL, tmp_path, 1)
    path = tmp_path / "cells" / f"{FEW[0].name}.npz"
    path.write_bytes(path.read_bytes()[:100])
    said: list[str] = []
    again = run_grid(FEW[:2], SMALL, tmp_path, 1, Progress(say=said.append))
    assert len(said) == 1
    assert FEW[0].name in said[0]
    assert again[FEW[0]].identical(first[FEW[0]])
    (kept,) = (tmp_path / "set-aside").iterdir()
    assert kept.stat().st_size == 100


def test_a_folder_holds_one_size(grid: tuple[Path, dict[Cell, xr.Dataset]]) -> None:
    with pytest.raises(InputError, match="another n_tokens: give another folder"):
        run_grid(FEW, replace(SMALL, n_tokens=4), grid[0], 1)


@pytest.mark.parametrize(("wanted", "workers"), [([], 1), (FEW, 0), (FEW, True)])
def test_no_cells_and_no_processes_are_refused(
    wanted: list[Cell], workers: int, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="wanted" if not wanted else "workers"):
        run_grid(wanted, SMALL, tmp_path, workers)


# -- tables and page ------------------------------------------------------------------------------


def made(cell: Cell, fixed: bool, rate: float) -> xr.Dataset:
    """A cell's result with a verdict and a rate of our choice."""
    data = run_cell(cell, SMALL)
    name = "CONVERGED" if fixed else "NOT_CONVERGED"
    return data.assign(
        has_fixed_point=("prompt", [fixed]),
        rate=("prompt", [rate]),
        verdict_name=("prompt", [name]),
    )


def test_tables_of_a_grid_by_hand() -> None:
    # Injection: fixed points in both seeds against none, rates 0.5 and 0.7 against 1 and 1.
    rates = {(True, 0): 0.5, (True, 1): 0.7, (False, 0): 1.0, (False, 1): 1.0}
    found = {
        cell: made(cell, cell.injected, rates[cell.injected, cell.seed])
        for cell in (a_cell(injected=i, seed=s) for i, s in rates)
    }
    tables = grid_tables(found)
    means = tables.conditions.set_index(["quantity", "injection"])["mean"]
    assert means["rate", "injected"] == pytest.approx(0.6)
    assert means["has a fixed point", "injected"] == 1
    assert means["has a fixed point", "none"] == 0
    contrasts = tables.contrasts.set_index("quantity")
    assert list(contrasts["contrast"]) == ["injected - none"] * 2
    assert contrasts.loc["rate", "mean"] == pytest.approx(-0.4)
    assert contrasts.loc["rate", "differences"] == "-0.5 -0.3"
    assert contrasts.loc["rate", "least_p"] == 0.5
    assert not is_zero(tables.contrasts).any()
    assert "cannot decide" in contrasts.loc["rate", "says"]
    counts = tables.verdicts.set_index("injection")
    assert counts.loc["injected", "CONVERGED"] == counts.loc["none", "NOT_CONVERGED"] == 2
    assert counts.loc["none", "CONVERGED"] == 0
    # A rate stands beside a fixed point, and beside nothing else.
    (table,) = verdict_part(tables).tables
    assert {row[2]: (row[3], row[4]) for row in table.rows} == {
        "yes": ("fixed point 2", "0.600"), "no": ("not converged 2", "–"),
    }  # fmt: skip


def test_tables_are_read_as_they_were_written(
    grid: tuple[Path, dict[Cell, xr.Dataset]], tmp_path: Path
) -> None:
    tables = grid_tables(grid[1])
    tables.write(tmp_path)
    again = read_grid_tables(tmp_path)
    for name in ("cells", "conditions", "verdicts", "contrasts"):
        mine, theirs = getattr(tables, name), getattr(again, name)
        pd.testing.assert_frame_equal(mine, theirs, check_dtype=False, rtol=1e-7)
    assert again.about == tables.about
    (tmp_path / "cells.csv").unlink()
    with pytest.raises(DataError, match=r"does not hold the tables of Section 4\.2"):
        read_grid_tables(tmp_path)


def test_the_shipped_grid_is_whole() -> None:
    tables = shipped_grid()
    assert len(tables.cells) == len(cells())
    assert tables.about["size"] == asdict(CellSize())
    assert not tables.cells["verdict"].eq("UNDEFINED").any()
    assert set(tables.verdicts.iloc[:, 4:].sum(axis=1)) == {5}


def test_cell_tables_are_the_numbers_of_the_last_recurrence(
    grid: tuple[Path, dict[Cell, xr.Dataset]],
) -> None:
    cells_ = grid_tables(grid[1]).cells
    assert len(cells_) == len(FEW)
    row, data = cells_.iloc[0], grid[1][FEW[0]]
    last = data.isel(effective_layer=slice(-2, None), prompt=0)
    assert row["relative_step"] == last["successive_rel"].max()
    assert row["cosine_step"] == last["successive_cosine"].min()
    norms = data["residual_mean"].values[1::2, 0]
    assert row["growth"] == norms[5] / norms[3]


@pytest.mark.full
def test_the_page_shows_every_condition(tmp_path: Path) -> None:
    wanted = cells(seeds=(0, 1), layers=(4,), norms=("pre", "post"), inits=("normal",))
    page = reproduce_section42(tmp_path, wanted=wanted, size=SMALL, workers=1)
    text = page.read_text(encoding="utf-8")
    assert text.count("pre-norm") > 1
    assert "8 looped models of random weights, 2 seeds per condition" in text
    assert "so that no contrast can be" in text
    # 8 models of 4 layers and 12 recurrences.
    assert "384 layers in all" in text
    assert (tmp_path / "figures" / "fig30_normal.png").is_file()
    assert text.count("<figure") >= 1
    assert "Figure 30." in text
    assert not list((tmp_path / "figures").glob("fig06*"))  # of 12 layers
    table = pd.read_csv(tmp_path / "tables" / "cells.csv")
    assert sorted(table["seed"]) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--section", "4.3"], "section must be 4.2 or 5.1, got '4.3'"),
        (["--section", "4.2", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--section", "4.2", "--models", "huginn"], "--models changes nothing with --section 4.2"),
        (["--section", "5.1", "--dtype", "bfloat16"], "--dtype changes nothing with --section 5.1"),
        (["--seeds", "6"], "--seeds changes nothing without --section"),
        (["--section", "4.2", "--workers", "0"], "workers must be an integer of at least 1"),
    ],
)
def test_the_command_names_what_is_wrong(arguments: list[str], match: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["reproduce", *arguments, "--out", str(tmp_path)])
    assert isinstance(result.exception, InputError)
    assert match in str(result.exception)


@pytest.mark.full
def test_a_dead_process_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tl_looped.paper.section42.grid._start_worker", _die)
    with pytest.raises(DataError, match=r"a process of the grid in .* ended before"):
        run_grid(FEW, SMALL, tmp_path, 2)
    assert len(run_grid(FEW[:1], SMALL, tmp_path, 1)) == 1  # the lock is free again


def _die(stop: object) -> None:
    os._exit(1)


def test_a_copied_cell_is_not_taken_for_another(tmp_path: Path) -> None:
    run_grid(FEW[:1], SMALL, tmp_path, 1)
    first, second = (tmp_path / "cells" / f"{cell.name}.npz" for cell in FEW[:2])
    second.write_bytes(first.read_bytes())
    said: list[str] = []
    found = run_grid(FEW[:2], SMALL, tmp_path, 1, Progress(say=said.append))
    assert FEW[0].name in said[0]
    assert found[FEW[1]].identical(run_cell(FEW[1], SMALL))


def test_a_cell_of_another_size_is_not_taken(
    tmp_path: Path, grid: tuple[Path, dict[Cell, xr.Dataset]]
) -> None:
    other = run_cell(FEW[0], replace(SMALL, n_tokens=SMALL.n_tokens + 1))
    run_grid(FEW[:1], SMALL, tmp_path, 1)
    path = tmp_path / "cells" / f"{FEW[0].name}.npz"
    content = path.read_bytes()
    write_part(other, path)
    said: list[str] = []
    found = run_grid(FEW[:1], SMALL, tmp_path, 1, Progress(say=said.append))
    assert "is of another size" in said[0]
    assert found[FEW[0]].identical(grid[1][FEW[0]])
    # As an earlier version wrote it: taken, and said.
    path.write_bytes(opened(content)[0])
    assert run_grid(FEW[:1], SMALL, tmp_path, 1, Progress(say=said.append)).keys() == {FEW[0]}
    assert "1 cells in" in said[1]
    assert "no checksum" in said[1]
