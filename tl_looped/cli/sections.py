"""``tl-looped reproduce --section``: sections of the paper that are of many small models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tl_looped.cli.console import (
    bar,
    command_line,
    console,
    note,
    parse_batch_size,
    progress_bars,
    stoppable,
)
from tl_looped.errors import InputError
from tl_looped.words import count

if TYPE_CHECKING:
    from tl_looped.paper.section42.cells import Cell, CellSize


def reproduce_section51(
    runs: Path | None,
    out: Path,
    prompts: str | None = None,
    subset: int = 256,
    device: str | None = None,
    batch_size: str = "auto",
    recurrences: tuple[int, ...] | None = None,
) -> Path:
    """Measure the finished models of a folder of trainings, and write figures, data and page.

    Args:
        runs: Folder of ``tl-looped train-section51``.
        out: Gets ``runs``, ``figures``, ``data`` and ``section-5.1.html``.
        prompts, subset: As in ``analyze``; the bundled ones if None.
        device, batch_size: As in ``analyze``.
        recurrences: Of the runs with a verdict.

    Returns:
        The page.
    """
    from tl_looped.experiments.spec import PromptSet
    from tl_looped.paper.section51.data import write_data
    from tl_looped.paper.section51.models import VERDICT_RECURRENCES, measure, trained_runs
    from tl_looped.paper.section51.page import draw_section51, write_section51
    from tl_looped.paper.section51.tables import tables_of

    if runs is None:
        raise InputError(
            "section 5.1 is of models that are trained first: give their folder, --runs FOLDER "
            "(tl-looped train-section51 DATA --out FOLDER)"
        )
    found, missing = trained_runs(runs)
    chosen = PromptSet.parse(prompts or "bundled", subset=subset)
    size = parse_batch_size(batch_size)
    counts = VERDICT_RECURRENCES if recurrences is None else recurrences
    with stoppable(), progress_bars() as bars:
        measured = [
            measure(one, out / "runs", chosen, counts, device, size, partial(bar, bars))
            for one in found
        ]
    for name, why in missing.items():
        note(f"{name}: {why}")
    data = write_data(tables_of(measured, missing), out / "data")
    draw_section51(measured, data, out / "figures", command_line(), note)
    page = write_section51(data, out)
    console.print(
        f"{count(len(found), 'model')}; the page is [bold]{page.resolve()}[/bold]", soft_wrap=True
    )
    return page


def reproduce_section42(
    out: Path,
    seeds: int = 5,
    workers: int | None = None,
    wanted: Sequence[Cell] | None = None,
    size: CellSize | None = None,
) -> Path:
    """Run the grid of random models, and write figures, tables and page.

    Args:
        out: Gets ``cells``, ``figures``, ``tables`` and ``section-4.2.html``.
        seeds: Number of seeds of every condition, 0 to ``seeds - 1``.
        workers: Processes; one per core if None.
        wanted: Cells in place of the whole grid.
        size: Size of the models.

    Returns:
        The page.
    """
    from tl_looped.paper.section42.cells import CellSize, cells
    from tl_looped.paper.section42.grid import run_grid
    from tl_looped.paper.section42.page import draw_section42, write_section42
    from tl_looped.paper.section42.tables import grid_tables

    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    wanted = cells(range(seeds)) if wanted is None else wanted
    workers = os.cpu_count() or 1 if workers is None else workers
    with stoppable(), progress_bars() as bars:
        progress = bar(bars, "random models", len(wanted))
        found = run_grid(wanted, size or CellSize(), out, workers, progress)
    tables = grid_tables(found)
    tables.write(out / "tables")
    draw_section42(found, out / "figures", command_line(), note)
    page = write_section42(tables, out)
    console.print(
        f"{count(len(found), 'model')}; the page is [bold]{page.resolve()}[/bold]", soft_wrap=True
    )
    return page
