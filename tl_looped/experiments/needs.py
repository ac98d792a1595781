"""What each figure of arXiv 2604.11791 needs of a run, and which runs reproduce the paper.

Numbers of figures, models, prompts and recurrences are the paper's (see its captions); where it
does not state the recurrences of a path or a step size, 128 is taken.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tl_looped.errors import InputError
from tl_looped.experiments.spec import Experiment, PromptSet

STAGES = ("stage",)


@dataclass(frozen=True)
class Needs:
    """Metrics and extras of a figure."""

    metrics: tuple[str, ...] = STAGES
    extras: tuple[str, ...] = ()


_STEPS, _DISTANCES = Needs(("successive",)), Needs(("fixed_point",))
_MATRICES, _PATH = Needs(extras=("pairwise",)), Needs(extras=("pca",))
_NEURONS, _TOKENS = Needs(extras=("neurons",)), Needs(extras=("limiting", "tokens"))

FIGURES: dict[int, Needs] = {
    **dict.fromkeys((2, 19, 20, 21), _MATRICES),
    **dict.fromkeys((3, 24, 25), _STEPS),
    **dict.fromkeys((4, 22, 23), _DISTANCES),
    **dict.fromkeys((5, 15, 26, 27, 28), _PATH),
    **dict.fromkeys((7, 8, 11, 12, *range(34, 40), *range(42, 53)), Needs()),
    9: Needs(("magnitude",)),
    **dict.fromkeys((13, 14, 16, 17, 18), _TOKENS),
    **dict.fromkeys((32, 33), _NEURONS),
}
"""Figures that one run can be drawn as."""


def parse_figures(text: str) -> tuple[int, ...]:
    """Numbers from ``"2,4,7"``.

    Raises:
        InputError: for a figure that one run cannot be drawn as; the message lists those it can.
    """
    numbers = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        if not item.isdigit() or int(item) not in FIGURES:
            raise InputError(
                f"figures: {item!r} is no figure that can be drawn from one run; there are "
                f"{', '.join(map(str, sorted(FIGURES)))}"
            )
        numbers.append(int(item))
    return tuple(dict.fromkeys(numbers))


def with_needs(spec: Experiment, figures: Iterable[int]) -> Experiment:
    """The experiment with what the figures need as well."""
    needs = [FIGURES[number] for number in figures]
    metrics = [*spec.metrics, *(m for need in needs for m in need.metrics)]
    extras = {*spec.extras, *(e for need in needs for e in need.extras)}
    return replace(spec, metrics=tuple(dict.fromkeys(metrics)), extras=tuple(sorted(extras)))


# -- the paper ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaperRun:
    """A run of the paper and the figures that are drawn from it."""

    spec: Experiment
    figures: tuple[int, ...]


@dataclass(frozen=True)
class _Figures:
    """Figures of one model: at 8, 32, 128 recurrences, and on its other prompts."""

    eight: tuple[int, ...]
    thirty_two: tuple[int, ...] = ()
    many: tuple[int, ...] = ()
    sentence: tuple[int, ...] = ()
    hellaswag: tuple[int, ...] = ()
    root: tuple[int, ...] = ()


_LONG = (3, 4, 22, 23, 24, 25)
PAPER: dict[str, _Figures] = {
    "demo": _Figures((2, 7, 19, 33, 34, 37), (20, 21), (*_LONG, 9, 11, 12, 13, 14, 49, 52), (5,)),
    "ouro-1.4b": _Figures((2, 19, 33, 34, 35), (), (*_LONG, 11, 12, 47, 50), (26,), (42,), (28,)),
    "huginn": _Figures(
        (2, 19, 33, 34, 36), (20, 21), (*_LONG, 13, 14, 16, 17, 48, 51), (15, 27), (43,)
    ),
    "recurrent-llama-3.2": _Figures(
        (2, 7, 19, 33, 34, 37), (20, 21), (*_LONG, 9, 11, 12, 18, 49, 52), (5,), (44,)
    ),
    "recurrent-olmo-2": _Figures((33, 38), (20, 21), hellaswag=(45,)),
    "recurrent-tinyllama-3t": _Figures((33, 39), (20, 21), hellaswag=(46,)),
}


def parse_models(text: str) -> tuple[str, ...]:
    """Models from ``"demo,huginn"`` or ``"all"``.

    Raises:
        InputError: for a model that the paper's figures do not name.
    """
    if text == "all":
        return tuple(PAPER)
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    for name in names:
        if name not in PAPER:
            near = difflib.get_close_matches(name, PAPER, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(
                f"models: {name!r} is none of {', '.join(PAPER)}, all{hint} (tl-looped analyze "
                "takes any model)"
            )
    if not names:
        raise InputError(f"models: none was given; there are {', '.join(PAPER)}, all")
    return names


def paper_runs(
    model: str, prompts: PromptSet, hellaswag: PromptSet | None, dtype: str = "float32"
) -> list[PaperRun]:
    """The runs of one model.

    Args:
        model: One of ``PAPER``.
        prompts: GSM8K, or what takes its place.
        hellaswag: HellaSwag; its runs are left out if None.
        dtype: Of the weights.
    """
    figures = PAPER[model]
    sentence = PromptSet("sentence")
    root = PromptSet("text", texts=("The square root of 16 is",))
    verdicts = ("convergence",)
    wanted = [
        (8, prompts, figures.eight, ()),
        (32, prompts, figures.thirty_two, ()),
        (128, prompts, figures.many, verdicts),
        (128, sentence, figures.sentence, ()),
        (128, root, figures.root, ()),
        (8, hellaswag, figures.hellaswag, ()),
    ]
    return [
        PaperRun(
            with_needs(
                Experiment(model, prompts=on, recurrences=n, extras=extras, dtype=dtype), numbers
            ),
            numbers,
        )
        for n, on, numbers, extras in wanted
        if numbers and on is not None
    ]
