"""What each figure of arXiv 2604.11791 needs of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tl_looped.errors import InputError
from tl_looped.experiments.spec import Experiment

SIGNATURE = ("signature",)


@dataclass(frozen=True)
class Needs:
    """Metrics, extras and ablations of a figure."""

    metrics: tuple[str, ...] = SIGNATURE
    extras: tuple[str, ...] = ()
    is_ablated: bool = False


_STEPS, _DISTANCES = Needs(("successive",)), Needs(("fixed_point",))
_MATRICES, _PATH = Needs(extras=("pairwise",)), Needs(extras=("pca",))
_NEURONS, _TOKENS = Needs(extras=("neurons",)), Needs(extras=("limiting", "tokens"))

FIGURES: dict[int, Needs] = {
    **dict.fromkeys((2, 19, 20, 21), _MATRICES),
    **dict.fromkeys((3, 24, 25), _STEPS),
    **dict.fromkeys((4, 22, 23), _DISTANCES),
    **dict.fromkeys((5, 15, 26, 27, 28), _PATH),
    **dict.fromkeys((7, 11, 12, *range(34, 40), *range(42, 53)), Needs()),
    9: Needs(("magnitude",)),
    **dict.fromkeys((13, 14, 16, 17, 18), _TOKENS),
    **dict.fromkeys((32, 33), _NEURONS),
    41: Needs(is_ablated=True),
    63: Needs(extras=("patterns",)),
}
"""Figures that one run can be drawn as."""

_TWO_RUNS = "shows a looped run over a feedforward one: tl-looped compare LOOPED FEEDFORWARD"
_RANDOM = "is of random models of several kinds (Section 4.2), not of one run"
_TRAINED = "is of models trained for it (Section 5.1), several seeds of each, not of one run"
ELSEWHERE = {
    **dict.fromkeys((8, 40), _TWO_RUNS),
    **dict.fromkeys((6, 29, 30, 31), _RANDOM),
    **dict.fromkeys((10, *range(54, 63)), _TRAINED),
}
"""The other figures, and why one run cannot be drawn as them."""


def parse_figures(text: str) -> tuple[int, ...]:
    """Numbers from ``"2,4,7"``.

    Raises:
        InputError: for a figure that one run cannot be drawn as; the message lists those it can.
    """
    numbers = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        if not item.isdecimal() or int(item) not in FIGURES:
            why = ELSEWHERE.get(int(item) if item.isdecimal() else 0, "")
            raise InputError(
                (f"figures: Fig. {item} {why}. " if why else f"figures: there is no {item!r}. ")
                + f"One run can be drawn as {', '.join(map(str, sorted(FIGURES)))}"
            )
        numbers.append(int(item))
    return tuple(dict.fromkeys(numbers))


def with_needs(spec: Experiment, figures: Iterable[int]) -> Experiment:
    """The experiment with what the figures need as well.

    Raises:
        InputError: for a figure of an ablation, if the experiment has none.
    """
    figures = tuple(figures)
    needs = [FIGURES[number] for number in figures]
    if any(need.is_ablated for need in needs) and not spec.ablate_mlp:
        raise InputError(
            "figures: Fig. 41 is of a run without the MLP output of the second layer: add "
            "--ablate-mlp prelude.1 (or core.1 for a model without prelude)"
        )
    metrics = [*spec.metrics, *(m for need in needs for m in need.metrics)]
    extras = {*spec.extras, *(e for need in needs for e in need.extras)}
    return replace(spec, metrics=tuple(dict.fromkeys(metrics)), extras=tuple(sorted(extras)))
