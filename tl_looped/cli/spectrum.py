"""``tl-looped spectrum``: the loop's spectral radius beside the measured rate of convergence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_looped.cli.console import command_line, console, note
from tl_looped.cli.execution import run_all
from tl_looped.cli.runs import (
    BatchSize,
    Bos,
    Device,
    Dtype,
    Prompts,
    StateSeed,
    SubsetSeed,
    TooLong,
)


def spectrum(
    folder: Annotated[
        Path,
        typer.Argument(help="A training run with snapshots, a run, or a folder of runs."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for runs and figures; spectrum/ in the given one if left out."),
    ] = None,
    prompts: Prompts = "bundled",
    recurrences: Annotated[
        int, typer.Option(help="Recurrences of the snapshots' runs; many, to measure a rate.")
    ] = 64,
    subset: Annotated[
        int, typer.Option(help="Number of prompts, chosen by seed; the first 32 get a spectrum.")
    ] = 16,
    seed: SubsetSeed = 0,
    state_seed: StateSeed = 0,
    too_long: TooLong = "skip",
    bos: Bos = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = "auto",
) -> None:
    """Does the loop's spectral radius predict its rate of convergence? Over training, or of runs.

    A training run's snapshots (tl-looped train --snapshots 1) are measured first; what was stopped
    goes on. Of runs that have the extras convergence and spectrum, the figure is drawn at once.
    """
    from tl_looped.experiments.drawing import save_figures
    from tl_looped.experiments.snapshots import (
        draw_results,
        draw_training,
        snapshot_experiments,
    )
    from tl_looped.experiments.spec import PromptSet
    from tl_looped.training.recorder import SNAPSHOTS

    out = folder / "spectrum" if out is None else out
    if (folder / SNAPSHOTS).is_dir():
        chosen = PromptSet.parse(prompts, subset=subset, seed=seed, too_long=too_long)
        specs = snapshot_experiments(folder, chosen, recurrences, state_seed, dtype, bos)
        made = run_all([(spec, ()) for spec in specs.values()], out, device, batch_size)
        if not made:  # not the process that draws
            return
        drawn = draw_training(folder, {step: made[spec].load() for step, spec in specs.items()})
    else:
        figure, left_out = draw_results(folder)
        if left_out:
            note(f"without a spectrum and left out: {', '.join(left_out)}")
        drawn = [figure]
    save_figures(drawn, out / "figures", command_line())
    for one in drawn:
        console.print(f"[bold]{one.title}[/bold] {one.caption}", soft_wrap=True, highlight=False)
    console.print(f"Figures are in [bold]{(out / 'figures').resolve()}[/bold]", soft_wrap=True)
