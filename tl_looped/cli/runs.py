"""``tl-looped analyze``, ``run`` and ``reproduce``: what computes."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_looped.cli.console import console
from tl_looped.cli.execution import carry_out, run_all, write_reports
from tl_looped.errors import InputError

if TYPE_CHECKING:
    from tl_looped.experiments.runner import Run
    from tl_looped.experiments.spec import Experiment

Out = Annotated[Path, typer.Option(help="Folder of runs; each gets a folder in it.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, mps; auto, balanced, balanced_low_0 or sequential spread a model "
        "that is too large for one device over all of them."
    ),
]
Dtype = Annotated[str, typer.Option(help="Precision of the weights: float32, bfloat16, float16.")]
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
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]
StateSeed = Annotated[int, typer.Option(help="Seed of a random initial state.")]
SubsetSeed = Annotated[int, typer.Option(help="Seed of the subset.")]
Subset = Annotated[int, typer.Option(help="Number of prompts, chosen by seed; 0 for all.")]
TooLong = Annotated[
    str, typer.Option(help="What to do with prompts beyond the context: skip or truncate.")
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin every prompt with BOS, or do not; as the model or its tokenizer does if left "
        "out.",
    ),
]


SkipFirst = Annotated[
    int,
    typer.Option(
        help="Tokens at the beginning of prompts that norms, steps, entropy, verdicts and rates "
        "leave out."
    ),
]


def analyze(
    model: Annotated[str, typer.Argument(help="demo, an alias, a hub id or a folder.")],
    prompts: Prompts = "bundled",
    recurrences: Annotated[
        str | None, typer.Option(help="One or several, 8,128; the model's own number if left out.")
    ] = None,
    figures: Annotated[str, typer.Option(help="Numbers of figures, 2,4,7; none if empty.")] = "4,7",
    out: Out = Path("runs"),
    metrics: Annotated[
        str, typer.Option(help="Further metrics and groups: all, step, mixing_raw, ...")
    ] = "",
    extras: Annotated[
        str | None,
        typer.Option(
            help="confirm, convergence, limiting, neurons, pairwise, patterns, pca, spectrum, "
            "tokens; convergence if left out, none for a feedforward model."
        ),
    ] = None,
    feedforward: Annotated[
        bool, typer.Option("--feedforward", help="A model without a loop, for comparison.")
    ] = False,
    ablate_mlp: Annotated[
        str, typer.Option(help="Layers whose MLP output is set to zero: prelude.1,core.2.")
    ] = "",
    subset: Subset = 256,
    seed: SubsetSeed = 0,
    state_seed: StateSeed = 0,
    too_long: TooLong = "skip",
    bos: Bos = None,
    skip_first: SkipFirst = 0,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = "auto",
) -> None:
    """Measure a model on prompts. What was stopped goes on; what was finished is not run again."""
    from tl_looped.experiments.spec import Experiment, PromptSet
    from tl_looped.paper.figures import parse_figures, with_needs

    numbers = parse_figures(figures)
    if extras is None:
        extras = "" if feedforward else "convergence"
    spec = Experiment(
        model,
        kind="feedforward" if feedforward else "looped",
        revision=revision,
        prompts=PromptSet.parse(prompts, subset=subset, seed=seed, too_long=too_long),
        extras=_names(extras),
        ablate_mlp=_names(ablate_mlp),
        state_seed=state_seed,
        dtype=dtype,
        prepend_bos=bos,
        skip_first=skip_first or None,
    )
    spec = with_needs(_with_metrics(spec, _names(metrics)), numbers)
    specs = [_at(spec, n) for n in parse_counts(recurrences)]
    _report_each(run_all([(one, numbers) for one in specs], out, device, batch_size), numbers)


def run(
    experiment: Annotated[list[Path], typer.Argument(help="TOML files.")],
    figures: Annotated[str, typer.Option(help="Numbers of figures, 2,4,7.")] = "",
    out: Out = Path("runs"),
    bos: Bos = None,
    device: Device = None,
    batch_size: BatchSize = "auto",
) -> None:
    """Run experiments that are written down as TOML."""
    from tl_looped.experiments.spec import Experiment
    from tl_looped.paper.figures import parse_figures, with_needs

    numbers = parse_figures(figures)
    specs = [with_needs(Experiment.read(path), numbers) for path in experiment]
    if bos is not None:
        specs = [replace(spec, prepend_bos=bos) for spec in specs]
    _report_each(run_all([(spec, numbers) for spec in specs], out, device, batch_size), numbers)


def _report_each(made: dict[Experiment, Run], figures: tuple[int, ...]) -> None:
    for sentence in dict.fromkeys(one.load().attrs.get("bos") for one in made.values()):
        if sentence:
            console.print(f"In these runs {sentence}", highlight=False, soft_wrap=True)
    if figures:
        for one in made.values():
            write_reports(one.folder)


_OF_SECTION = {
    None: ("models", "prompts", "hellaswag", "feedforward", "checkpoint", "subset", "bos", "out",
           "device", "dtype", "batch_size"),
    "4.2": ("section", "seeds", "workers", "out"),
    "5.1": ("section", "runs", "prompts", "subset", "out", "device", "batch_size"),
}  # fmt: skip
"""Options of ``reproduce`` that count, by section."""


def reproduce(
    models: Annotated[str, typer.Option(help="demo, names from the paper, or all.")] = "demo",
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts in place of GSM8K (bundled for the demo); as in analyze."),
    ] = None,
    hellaswag: Annotated[
        str | None,
        typer.Option(help="Prompts in place of HellaSwag from the hub: hellaswag:FILE.jsonl."),
    ] = None,
    feedforward: Annotated[
        str | None,
        typer.Option(help="A hub id or folder in place of the paper's feedforward model."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="A hub id or folder in place of the one model that --models names."),
    ] = None,
    subset: Subset = 256,
    section: Annotated[
        str | None,
        typer.Option(
            help="4.2 (a grid of random models) or 5.1 (small models, trained before) in place of "
            "models."
        ),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Section 5.1: the folder of tl-looped train-section51.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Section 4.2: seeds of every condition; contrasts need 6 or more.")
    ] = 5,
    workers: Annotated[
        int | None, typer.Option(help="Section 4.2: processes; one per core if left out.")
    ] = None,
    bos: Bos = None,
    out: Out = Path("reproduction"),
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = "auto",
) -> None:
    """Run the paper's experiments, draw its figures, and write one report of all."""
    _refuse_idle_options(section, dict(locals()))
    if section is not None:
        from tl_looped.cli.sections import reproduce_section42, reproduce_section51

        if section == "4.2":
            reproduce_section42(out, seeds, workers)
        else:
            reproduce_section51(runs, out, prompts, subset, device, batch_size)
        return
    from tl_looped.experiments.spec import PromptSet
    from tl_looped.paper.plan import paper_plan, parse_models

    plans = []
    names = parse_models(models)
    if checkpoint is not None and len(names) > 1:
        raise InputError(f"checkpoint is for one model, and --models names {len(names)}")
    for name in names:
        main = PromptSet.parse(prompts or ("bundled" if name == "demo" else "gsm8k"), subset=subset)
        other = None
        if name != "demo" or hellaswag is not None:
            other = PromptSet.parse(hellaswag or "hellaswag", subset=subset)
        plan = paper_plan(
            name, main, other, dtype, feedforward, checkpoint=checkpoint, prepend_bos=bos
        )
        plans.append(plan)
    carry_out(plans, out, device, batch_size)


def _refuse_idle_options(section: str | None, values: dict[str, Any]) -> None:
    """An option that would change nothing is a mistake, and not to be passed over in silence."""
    if section not in _OF_SECTION:
        raise InputError(f"section must be 4.2 or 5.1, got {section!r}")
    defaults = {name: one.default for name, one in signature(reproduce).parameters.items()}
    given = [name for name, value in values.items() if value != defaults[name]]
    idle = [_option(name) for name in given if name not in _OF_SECTION[section]]
    if idle:
        what = "without --section" if section is None else f"with --section {section}"
        known = ", ".join(map(_option, _OF_SECTION[section]))
        raise InputError(f"{', '.join(idle)} changes nothing {what}, where there are {known}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def parse_counts(text: str | None) -> list[int | None]:
    """``"8,128"`` as numbers of recurrences; the model's own, None, if there is no text."""
    if text is None:
        return [None]
    items = _names(text)
    if not items or not all(item.isascii() and item.isdecimal() for item in items):
        raise InputError(f"recurrences must be integers such as 8,128, got {text!r}")
    return [int(item) for item in items]


def _at(spec: Any, recurrences: int | None) -> Any:
    return replace(spec, recurrences=recurrences)


def _with_metrics(spec: Any, more: tuple[str, ...]) -> Any:
    return replace(spec, metrics=tuple(dict.fromkeys((*spec.metrics, *more))))
