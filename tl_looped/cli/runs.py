"""``tl-looped analyze``, ``run`` and ``reproduce``: what computes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_looped.cli.console import console, errors, watched
from tl_looped.errors import InputError, TLLoopedError

if TYPE_CHECKING:
    from tl_looped.experiments.parallel import Workers
    from tl_looped.experiments.run import Run
    from tl_looped.experiments.spec import Experiment

Out = Annotated[Path, typer.Option(help="Folder of runs; each gets a folder in it.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, mps; auto, balanced, balanced_low_0 or sequential spread a model "
        "that is too large for one device over all of them."
    ),
]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, float16.")]
BatchSize = Annotated[
    str,
    typer.Option(help="Prompts at a time; auto halves it when memory runs out."),
]
Prompts = Annotated[
    str,
    typer.Option(
        help="bundled, sentence, gsm8k, hellaswag, a jsonl or text file, or gsm8k:FILE.jsonl."
    ),
]
Subset = Annotated[int, typer.Option(help="How many prompts, chosen by seed; 0 for all.")]
TooLong = Annotated[
    str, typer.Option(help="What to do with prompts beyond the context: skip or truncate.")
]
STOPPED = 130


def analyze(
    model: Annotated[str, typer.Argument(help="demo, an alias, a hub id or a folder.")],
    prompts: Prompts = "bundled",
    recurrences: Annotated[
        str | None, typer.Option(help="One or several, 8,128; the trained number if left out.")
    ] = None,
    figures: Annotated[str, typer.Option(help="Numbers of figures, 2,4,7; none if empty.")] = "4,7",
    out: Out = Path("runs"),
    metrics: Annotated[
        str, typer.Option(help="Further metrics and groups: all, step, mixing_raw, ...")
    ] = "",
    extras: Annotated[
        str, typer.Option(help="convergence, limiting, neurons, pairwise, pca, tokens.")
    ] = "convergence",
    feedforward: Annotated[
        bool, typer.Option("--feedforward", help="A model without a loop, for comparison.")
    ] = False,
    subset: Subset = 256,
    seed: Annotated[int, typer.Option(help="Of the subset.")] = 0,
    state_seed: Annotated[int, typer.Option(help="Of a random initial state.")] = 0,
    too_long: TooLong = "skip",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = "auto",
) -> None:
    """Measure a model on prompts. What was stopped goes on; what was finished is not run again."""
    from tl_looped.experiments.needs import parse_figures, with_needs
    from tl_looped.experiments.spec import Experiment, PromptSet

    numbers = parse_figures(figures)
    wanted = () if feedforward else _names(extras)
    spec = Experiment(
        model,
        kind="feedforward" if feedforward else "looped",
        revision=revision,
        prompts=PromptSet.parse(prompts, subset=subset, seed=seed, too_long=too_long),
        extras=wanted,
        state_seed=state_seed,
        dtype=dtype,
    )
    spec = with_needs(_with_metrics(spec, _names(metrics)), numbers)
    specs = [_at(spec, n) for n in _counts(recurrences)]
    run_all([(one, numbers) for one in specs], out, device, batch_size)


def run(
    experiment: Annotated[list[Path], typer.Argument(help="TOML files.")],
    figures: Annotated[str, typer.Option(help="Numbers of figures, 2,4,7.")] = "",
    out: Out = Path("runs"),
    device: Device = None,
    batch_size: BatchSize = "auto",
) -> None:
    """Run experiments that are written down as TOML."""
    from tl_looped.experiments.needs import parse_figures, with_needs
    from tl_looped.experiments.spec import Experiment

    numbers = parse_figures(figures)
    specs = [with_needs(Experiment.read(path), numbers) for path in experiment]
    run_all([(spec, numbers) for spec in specs], out, device, batch_size)


def reproduce(
    models: Annotated[str, typer.Option(help="demo, names from the paper, or all.")] = "demo",
    prompts: Annotated[
        str | None,
        typer.Option(help="In place of GSM8K (bundled for the demo); as in analyze."),
    ] = None,
    hellaswag: Annotated[
        str | None, typer.Option(help="In place of HellaSwag from the hub: hellaswag:FILE.jsonl.")
    ] = None,
    subset: Subset = 256,
    out: Out = Path("reproduction"),
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = "auto",
) -> None:
    """Run the paper's experiments and draw its figures."""
    from tl_looped.experiments.needs import paper_runs, parse_models
    from tl_looped.experiments.spec import PromptSet

    failed = []
    names = parse_models(models)
    for name in names:
        main = PromptSet.parse(prompts or ("bundled" if name == "demo" else "gsm8k"), subset=subset)
        other = None
        if name != "demo" or hellaswag is not None:
            other = PromptSet.parse(hellaswag or "hellaswag", subset=subset)
        wanted = paper_runs(name, main, other, dtype)
        try:
            run_all([(one.spec, one.figures) for one in wanted], out, device, batch_size)
        except TLLoopedError as error:
            if len(names) == 1:
                raise
            # One model that cannot be had does not cost the others.
            errors.print(f"{name}: {error}", markup=False, soft_wrap=True)
            failed.append(name)
    if failed:
        raise InputError(f"not reproduced: {', '.join(failed)}; see the messages above")


# -- shared -------------------------------------------------------------------------------------


def run_all(
    wanted: Iterable[tuple[Experiment, tuple[int, ...]]],
    out: Path,
    device: str | None,
    batch_size: str,
) -> None:
    """Run experiments one after the other, draw their figures and write their reports."""
    from tl_looped.experiments.parallel import Workers
    from tl_looped.experiments.run import run_experiment

    size: int | str = int(batch_size) if batch_size.isdigit() else batch_size
    workers = Workers.here(device)
    try:
        for spec, figures in wanted:
            what = f"{spec.model}, {spec.prompts.label}"
            what += f", process 1 of {workers.world}" if workers.world > 1 else ""
            with watched(what, workers.first) as watch:
                made = run_experiment(spec, out, device=device, batch_size=size, watch=watch)
            _finish(made, figures, workers)
    except KeyboardInterrupt:
        console.print("Stopped. What is done stays; the same command goes on from there.")
        raise typer.Exit(STOPPED) from None
    finally:
        workers.close()


def _finish(made: Run, figures: tuple[int, ...], workers: Workers) -> None:
    """Figures and report of a run, by the first process."""
    if not workers.first:
        return
    if not made.is_new:
        console.print(f"{made.folder} has its results already; nothing was run again")
    if figures:
        from tl_looped.experiments.drawing import draw_figures

        command = shlex.join(["tl-looped", *sys.argv[1:]])
        draw_figures(made.load(), figures, made.folder / "figures", command, _note)
        from tl_looped.experiments.report import write_report

        write_report(made.folder)
    console.print(f"Results are in [bold]{made.folder.resolve()}[/bold]", soft_wrap=True)


def _note(text: str) -> None:
    console.print(f"[yellow]Note:[/yellow] {text}", soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _counts(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    items = _names(text)
    if not items or not all(item.isdigit() for item in items):
        raise InputError(f"recurrences must be integers such as 8,128, got {text!r}")
    return [int(item) for item in items]


def _at(spec: Any, recurrences: int | None) -> Any:
    from dataclasses import replace

    return replace(spec, recurrences=recurrences)


def _with_metrics(spec: Any, more: tuple[str, ...]) -> Any:
    from dataclasses import replace

    return replace(spec, metrics=tuple(dict.fromkeys((*spec.metrics, *more))))
