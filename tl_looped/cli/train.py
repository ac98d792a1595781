"""``tl-looped train``, ``train-demo`` and ``train-section51``."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tl_looped.cli.console import bar, console, progress_bars, stoppable
from tl_looped.cli.options import options_of, with_options
from tl_looped.errors import ConfigError
from tl_looped.training.spec import Shape, TrainSpec

_STOPPED = "The same command goes on from the last checkpoint, if there is one."


class LossName(str, Enum):
    """Losses of ``tl-looped train``."""

    LAST = "last"
    EVERY = "every"
    EXIT = "exit"


_SHOWN = {
    "recurrences": f"{Shape.recurrences}, or the model's own with --from",
    "context": f"{Shape.context}; no more than the model's context",
}
_SPEC = ("steps", "batch_size", "learning_rate", "warmup", "evaluate_every", "bf16", "seed",
         "data_seed", "backprop_last", "optimizer")  # fmt: skip


@with_options(
    shape=options_of(Shape, shown=_SHOWN),
    spec=options_of(
        TrainSpec, *_SPEC, defaults={"steps": 1000, "warmup": 100, "evaluate_every": 100}
    ),
)
def train_command(
    data: Annotated[str, typer.Argument(help=".txt or .jsonl, a folder of them, or hub:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted one goes on.")],
    shape: dict[str, Any],
    spec: dict[str, Any],
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Go on training this looped model (folder, hub id or bundled name) with its own "
            "tokenizer, for instance a retrofit; a new one of the sizes below if left out.",
        ),
    ] = None,
    sampled: Annotated[
        float | None, typer.Option(help="Sample recurrences: 1 + Poisson of this mean rate.")
    ] = None,
    sigma: Annotated[float, typer.Option(help="Sigma of the log-normal rate.")] = 0.5,
    loss: Annotated[LossName, typer.Option(help="What is minimised.")] = LossName.LAST,
    beta: Annotated[float, typer.Option(help="Entropy weight of --loss exit.")] = 0.1,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer.")] = None,
    held_out: Annotated[int, typer.Option(help="Documents that are set aside.")] = 100,
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
    from tl_looped.training.texts import train_model_on_texts, train_on_texts
    from tl_looped.transformer import LoopedTransformer

    losses: dict[str, Any] = {
        "last": LastState(),
        "every": EveryRecurrence(),
        "exit": ExitWeighted(beta),
    }
    sampler = None if sampled is None else PoissonLogNormal(sampled, sigma)
    run = TrainSpec(**spec, recurrences=sampler, loss=losses[loss])
    check_vacant(out)
    sizes = {name: value for name, value in shape.items() if value is not None}
    with stoppable(_STOPPED), progress_bars(_is_first()) as bars:
        rest = (bar(bars, "training", run.steps, "preparing"), snapshots)
        if start is None:
            of = Shape(**sizes)
            log, _ = train_on_texts(data, out, of, run, held_out, tokenizer, device, *rest)
        else:
            _refuse_sizes(
                start, [n for n in sizes if n not in _SHOWN] + ["tokenizer"] * bool(tokenizer)
            )
            recurrences = shape["recurrences"]
            model = LoopedTransformer.from_pretrained(
                start, n_recurrences=recurrences, device=device
            )
            log, _ = train_model_on_texts(
                model, data, out, run, shape["context"], held_out, *rest, fresh=True
            )
    if _is_first():
        shown = data.encode("utf-8", "replace").decode("utf-8")
        _write_loss_plot(log, out, f"{shown}, seed {run.seed}")
        made = "is" if bars.tasks[0].completed else "was finished before, and is"
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
    from tl_looped.paper.section51.training import SECTION51_SPEC, run_section51
    from tl_looped.training.log import read_log

    with stoppable(_STOPPED), progress_bars(_is_first()) as bars:
        folders = run_section51(
            data, out, progress=lambda run: bar(bars, run, SECTION51_SPEC.steps, "preparing")
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
    from tl_looped.training.demo import DEMO_SPEC, train_demo

    make_folder(out)
    with stoppable(_STOPPED), progress_bars(_is_first()) as bars:
        train_demo(data, out, DEMO_SPEC, bar(bars, "training", DEMO_SPEC.steps, "preparing"))
    bundle = bundle_demo(out, data, DEMO_SPEC, out / "bundle")
    console.print(
        f"The model and its card are in [bold]{escape(str(bundle.resolve()))}[/bold]",
        soft_wrap=True,
    )


def _is_first() -> bool:
    """Whether this process prints and draws; ``accelerate launch`` starts one per device."""
    return os.environ.get("RANK", "0") == "0"


def _write_loss_plot(log: list[dict[str, Any]], out: Path, caption: str) -> None:
    from tl_looped.experiments.files import write_figure
    from tl_looped.plots import loss_curve

    tokens, train, held_out = (
        [float(e[name]) for e in log] for name in ("tokens", "train_loss", "held_out_loss")
    )
    figure = loss_curve(tokens, train, held_out, caption, f"{out.name}: loss")
    write_figure(figure, out / "loss.png")
