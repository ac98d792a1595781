"""Carrying out experiments for the commands: the runs, their figures, and one report of all."""

from __future__ import annotations

from collections.abc import Iterable
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
from tl_looped.errors import CheckpointError, DataError, InputError

if TYPE_CHECKING:
    from tl_looped.experiments.runner import Run
    from tl_looped.experiments.spec import Experiment
    from tl_looped.paper.plan import Overlay, Plan


def carry_out(plans: list[Plan], out: Path, device: str | None, batch_size: str) -> None:
    """Run what is planned, draw it, and write one report; what cannot be had is said at the end."""
    wanted = [(one.spec, one.figures) for plan in plans for one in plan.runs]
    failed: dict[str, str] = {}
    made = run_all(wanted, out, device, batch_size, failed)
    if made:
        for plan in plans:
            for overlay in plan.overlays:
                _draw_overlay(overlay, made, out)
        write_reports(out)
    if failed:
        raise InputError("not reproduced: " + "; ".join(f"{k}: {v}" for k, v in failed.items()))


def run_all(
    wanted: Iterable[tuple[Experiment, tuple[int, ...]]],
    out: Path,
    device: str | None,
    batch_size: str,
    failed: dict[str, str] | None = None,
) -> dict[Experiment, Run]:
    """Run experiments one after the other and draw their figures.

    Args:
        wanted: Experiments and the figures of each.
        out: Folder of runs.
        device, batch_size: As on the command line.
        failed: Gets what could not be had, a model or a set of prompts, with the reason, and the
            other runs go on; the first error ends all if None.

    Returns:
        The runs, in the process that draws and reports them: the first.
    """
    from tl_looped.experiments.parallel import Workers
    from tl_looped.experiments.runner import run_experiment

    size = parse_batch_size(batch_size)
    workers = Workers.here(device)
    done = {}
    try:
        with stoppable():
            for spec, figures in wanted:
                what = f"{spec.model}, {spec.prompts.label}"
                if failed and {spec.model, spec.prompts.label} & set(failed):
                    continue
                what += f", process 1 of {workers.world}" if workers.world > 1 else ""
                try:
                    with progress_bars(workers.first) as bars:
                        made = run_experiment(
                            spec, out, device=device, batch_size=size, progress=bar(bars, what)
                        )
                except (CheckpointError, DataError) as error:
                    if failed is None:
                        raise
                    is_model = isinstance(error, CheckpointError)
                    failed[spec.model if is_model else spec.prompts.label] = str(error)
                    continue
                if workers.first:
                    done[spec] = made
                    _draw(made, figures)
    finally:
        workers.close()
    return done


def _draw(made: Run, figures: tuple[int, ...]) -> None:
    """Figures and views of a run."""
    if not made.is_new:
        console.print(f"{made.folder} has its results already; nothing was run again")
    if figures:
        from tl_looped.paper.drawing import draw_figures
        from tl_looped.report.views import write_views

        data = made.load()
        draw_figures(data, figures, made.folder / "figures", command_line(), note)
        try:
            write_views(data, made.folder / "views", command_line())
        except InputError as error:  # too large for a page
            note(str(error))
    console.print(f"Results are in [bold]{made.folder.resolve()}[/bold]", soft_wrap=True)


def _draw_overlay(overlay: Overlay, made: dict[Experiment, Run], out: Path) -> None:
    """Figures and tables of a looped run over a feedforward one, if both are there."""
    from tl_looped.experiments.compare import compare_runs
    from tl_looped.files import make_folder
    from tl_looped.paper.drawing import draw_over

    if overlay.looped not in made or overlay.feedforward not in made:
        return
    looped, other = made[overlay.looped], made[overlay.feedforward]
    name = looped.folder.name
    one, base = looped.load(), other.load()
    draw_over(name, one, base, overlay.figures, out / "figures", command_line(), note)
    runs = {name: one, other.folder.name: base}
    compare_runs(runs).write(make_folder(out / "tables" / name))


def write_reports(folder: Path, feedforward: str | None = None) -> None:
    """Write the report of a folder, and print its summary table."""
    from rich.table import Table

    from tl_looped.experiments.store import has_checksum, no_checksum_notice
    from tl_looped.report.findings import read_findings
    from tl_looped.report.run_report import write_report

    found = read_findings(folder, feedforward)
    for name, data in found.data.items():
        if not has_checksum(data):
            note(no_checksum_notice(name))
    path, rows = write_report(found), found.rows()
    table = Table()
    for column in ("model", *(cell.label for cell in rows[0].cells)):
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = ["-" if cell.missing else cell.main for cell in row.cells]
        table.add_row(f"{row.model} {row.shape}", *cells)
    console.print(table)
    for row in rows:
        for said in row.notes:
            console.print(f"{row.model}: {said}", highlight=False, soft_wrap=True)
    console.print(f"The report is [bold]{path.resolve()}[/bold]", soft_wrap=True)
