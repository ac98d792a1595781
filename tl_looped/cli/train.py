"""``tl-looped train``, ``train-demo`` and ``train-section51``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tl_looped.cli.console import console, note, stoppable
from tl_looped.errors import ConfigError

_STOPPED = "The same command goes on from the last checkpoint, if there is one."


class LossName(str, Enum):
    """Losses of ``tl-looped train``."""

    LAST = "last"
    EVERY = "every"
    EXIT = "exit"


def train_command(
    data: Annotated[str, typer.Argument(help=".txt or .jsonl, a folder of them, or hub:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted one goes on.")],
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Go on training this looped model (folder, hub id or bundled name) with its own "
            "tokenizer, for instance a retrofit; a new one of the sizes below if left out.",
        ),
    ] = None,
    prelude: Annotated[
        int | None, typer.Option(help="Layers before the loop.", show_default="2")
    ] = None,
    core: Annotated[int | None, typer.Option(help="Layers of the loop.", show_default="4")] = None,
    coda: Annotated[
        int | None, typer.Option(help="Layers after the loop.", show_default="2")
    ] = None,
    recurrences: Annotated[
        int | None,
        typer.Option(help="Recurrences.", show_default="4, or the model's own with --from"),
    ] = None,
    sampled: Annotated[
        float | None, typer.Option(help="Sample recurrences: 1 + Poisson of this mean rate.")
    ] = None,
    sigma: Annotated[float, typer.Option(help="Sigma of the log-normal rate.")] = 0.5,
    backprop_last: Annotated[
        int | None, typer.Option(help="Backpropagate through the last n recurrences.")
    ] = None,
    injection: Annotated[
        bool | None, typer.Option(help="Inject the prelude's output.", show_default="no-injection")
    ] = None,
    loss: Annotated[LossName, typer.Option(help="What is minimised.")] = LossName.LAST,
    beta: Annotated[float, typer.Option(help="Entropy weight of --loss exit.")] = 0.1,
    d_model: Annotated[int | None, typer.Option(help="Dimensions.", show_default="128")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.", show_default="4")] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens per row.", show_default="256; no more than the model's context"),
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="Tokens of the new tokenizer.", show_default="2048")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer.")] = None,
    held_out: Annotated[int, typer.Option(help="Documents that are set aside.")] = 100,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.")] = 100,
    evaluate_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    optimizer: Annotated[str, typer.Option(help="adamw or muon.")] = "adamw",
    bf16: Annotated[bool, typer.Option(help="bfloat16 matrix products.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of weights, states, recurrences.")] = 0,
    data_seed: Annotated[int | None, typer.Option(help="Seed of the order of rows.")] = None,
    snapshots: Annotated[
        int | None,
        typer.Option(
            help="Keep the weights at every so many evaluations, for the view over training "
            "(tl-looped spectrum); none if left out."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train a looped model; run the same command again to go on after an interruption.

    A new one: tl-looped train texts.jsonl --out runs/mine --core 4 --injection

    A retrofit: tl-looped train texts.jsonl --from looped --out runs/healed --learning-rate 1e-4
    """
    from tl_looped.training.losses import EveryRecurrence, ExitWeighted, LastState
    from tl_looped.training.record import check_vacant
    from tl_looped.training.recurrences import PoissonLogNormal
    from tl_looped.training.spec import TrainSpec
    from tl_looped.training.texts import Shape, train_model_on_texts, train_on_texts
    from tl_looped.transformer import LoopedTransformer

    losses: dict[str, Any] = {
        "last": LastState(),
        "every": EveryRecurrence(),
        "exit": ExitWeighted(beta),
    }
    spec = TrainSpec(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        evaluate_every=evaluate_every,
        bf16=bf16,
        seed=seed,
        data_seed=data_seed,
        recurrences=None if sampled is None else PoissonLogNormal(sampled, sigma),
        loss=losses[loss],
        backprop_last=backprop_last,
        optimizer=optimizer,
    )
    check_vacant(out)
    of_a_new_model: dict[str, Any] = {
        name: value
        for name, value in {
            "prelude": prelude,
            "core": core,
            "coda": coda,
            "injection": injection,
            "d_model": d_model,
            "heads": heads,
            "vocabulary": vocabulary,
        }.items()
        if value is not None
    }
    of_any: dict[str, Any] = {"recurrences": recurrences, "context": context}
    with stoppable(_STOPPED), _training_progress() as progress:
        report, tick = _reports(progress, steps, "training")
        if start is None:
            given = {name: value for name, value in of_any.items() if value is not None}
            shape = Shape(**of_a_new_model, **given)
            log, _ = train_on_texts(
                data, out, shape, spec, held_out, tokenizer, device, report, tick, snapshots, note
            )
        else:
            _refuse_sizes(start, [*of_a_new_model, *(["tokenizer"] if tokenizer else [])])
            model = LoopedTransformer.from_pretrained(start, recurrences, device=device)
            log, _ = train_model_on_texts(
                model, data, out, spec, context, held_out, report, tick, snapshots, note, fresh=True
            )
    if _is_main_process():
        shown = data.encode("utf-8", "replace").decode("utf-8")
        _write_loss_plot(log, out, f"{shown}, seed {seed}")
        made = "is" if progress.tasks[0].completed else "was finished before, and is"
        folder = escape(str(out.resolve()))
        console.print(f"The run {made} in [bold]{folder}[/bold]", soft_wrap=True)


def _refuse_sizes(start: str, given: list[str]) -> None:
    """A model that is there has its sizes and its tokenizer.

    Raises:
        ConfigError: an option of a new model beside ``--from``.
    """
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(
            f"--from {start} takes that model's sizes and tokenizer, so leave out {options}; "
            "without --from a new model is trained"
        )


def train_section51_command(
    data: Annotated[
        Path, typer.Argument(help="jsonl with question and answer, GSM8K's train split.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs/section51"),
) -> None:
    """Train the small models of Section 5.1, three seeds each (about six hours on one core)."""
    from tl_looped.paper.section51.training import SPEC, run_section51
    from tl_looped.training.trainer import read_log

    with stoppable(_STOPPED), _training_progress() as progress:
        reports: dict[str, Any] = {}

        def of(run: str) -> Any:
            if run not in reports:
                reports[run] = _reports(progress, SPEC.steps, run)
            return reports[run]

        folders = run_section51(
            data,
            out,
            report=lambda run, entry: of(run)[0](entry),
            tick=lambda run, value: of(run)[1](value),
            say=note,
        )
    for folder in folders:
        _write_loss_plot(read_log(folder / "log.csv"), folder, folder.name)
    console.print(f"The runs are in [bold]{escape(str(out.resolve()))}[/bold]", soft_wrap=True)


def train_demo_command(
    data: Annotated[
        Path, typer.Argument(help="jsonl with question and answer, GSM8K's train split.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the log, the best model and the shipped one.")
    ] = Path("runs/demo"),
) -> None:
    """Train the demo model again (about an hour on two cores)."""
    from tl_looped.experiments.bundle import bundle_demo
    from tl_looped.files import make_folder
    from tl_looped.training.demo import SPEC, train_demo

    make_folder(out)
    with stoppable(_STOPPED), _training_progress() as progress:
        report, tick = _reports(progress, SPEC.steps, "training")
        train_demo(data, out, SPEC, report, tick, note)
    bundle = bundle_demo(out, data, SPEC, out / "bundle")
    console.print(
        f"The model and its card are in [bold]{escape(str(bundle.resolve()))}[/bold]",
        soft_wrap=True,
    )


@contextmanager
def _training_progress() -> Iterator[Progress]:
    """Bars of runs; of one that made no step, refused or finished before, nothing stays."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    numbers = TextColumn("{task.fields[numbers]}")
    disable = not _is_main_process()
    bars = Progress(*columns, numbers, TimeRemainingColumn(), console=console, disable=disable)
    with bars as progress:
        try:
            yield progress
        finally:
            for task in progress.tasks:
                progress.update(task.id, visible=bool(task.completed))


def _is_main_process() -> bool:
    """Whether this process prints and draws; ``accelerate launch`` starts one per device."""
    return os.environ.get("RANK", "0") == "0"


def _reports(progress: Progress, steps: int, name: str) -> Any:
    """Callbacks of a run: a line at every evaluation, and the bar at every step."""
    task = progress.add_task(name, total=steps, numbers="preparing")

    def report(entry: dict[str, Any]) -> None:
        losses = f"train {entry['train_loss']:.3f}, held out {entry['held_out_loss']:.3f}"
        progress.console.print(f"{name}, step {entry['step']}: {losses}", highlight=False)

    def tick(value: Any) -> None:
        numbers = f"loss {value.loss:.3f}, {value.tokens_per_second:.0f} tokens/s"
        progress.update(task, completed=value.step, numbers=numbers)

    return report, tick


def _write_loss_plot(log: list[dict[str, Any]], out: Path, caption: str) -> None:
    from tl_looped.experiments.files import write_figure
    from tl_looped.plots import loss_curve

    tokens, train, held_out = (
        [float(e[name]) for e in log] for name in ("tokens", "train_loss", "held_out_loss")
    )
    figure = loss_curve(tokens, train, held_out, caption, f"{out.name}: loss")
    write_figure(figure, out / "loss.png")
