"""Every figure of the paper (arXiv 2604.11791) as an entry of a table, and the door to draw it.

``draw(7, data)`` makes Figure 7 from the result of a run. An entry says which variables the figure
draws, with how many recurrences the paper shows it, what draws it and which data it needs. Most
figures are of one model: draw them once for each. Figures of several models take mappings: 6 and 29
to 31 ``{(norm layout, injected): results}``, 10 ``{name: results}``; and ``results`` is one result,
or a list with one per seed. Which model has which figure is in :mod:`tl_looped.paper.plan`.

Left open by the paper, and chosen here: Figures 11 and 12 show the ColSum concentration alone, as
Figure 7 does; 29 shows step norms and cosines of 12 layers, 30 and 31 repeat Figure 6 at 4 and 16
layers; 54 to 56, 57 to 59 and 60 to 62 run through blocks of 4, 8 and 12 layers within each
variant. Figure 1 is a drawing, 53 is not of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import xarray as xr

from tl_looped.errors import InputError
from tl_looped.experiments.spec import Experiment
from tl_looped.metrics.catalogue import SIGNATURE
from tl_looped.plots import grid_recipes, recipes, token_recipes
from tl_looped.plots.recipes import DrawnFigure, DrawOptions, Recipe, Request
from tl_looped.plots.summaries import as_runs, shape_of


@dataclass(frozen=True)
class FigureData:
    """The data that a figure needs.

    Args:
        run: What makes them, for messages; ``{R}`` stands for the recurrences.
        metrics, extras: Those of an experiment that makes them.
        is_ablated: Whether the experiment must take the output of an MLP away.
        elsewhere: Why one run cannot be drawn as the figure; empty if it can.
    """

    run: str
    metrics: tuple[str, ...] = ("signature",)
    extras: tuple[str, ...] = ()
    is_ablated: bool = False
    elsewhere: str = ""


def _streamed(group: str, **more: Any) -> FigureData:
    run = f"stream(model, prompts, '{group}', by='depth', n_recurrences={{R}})"
    return FigureData(run, (group,), **more)


_SIGNATURE, _STEPS, _LAST = map(_streamed, ("signature", "successive", "fixed_point"))
_SIZES, _ABLATED = _streamed("magnitude"), _streamed("signature", is_ablated=True)
_TWO_RUNS = _streamed(
    "signature",
    elsewhere="shows a looped run over a feedforward one: tl-looped compare LOOPED FEEDFORWARD",
)
_PAIRS = FigureData("an experiment with pairwise matrices at {R} recurrences", extras=("pairwise",))
_PATHS = FigureData(
    "an experiment with a PCA path (tl_looped.metrics.trajectories.pca_trajectory)",
    extras=("pca",),
)
_TOKENS = FigureData(
    "an experiment with limiting behaviour at {R} recurrences", extras=("limiting", "tokens")
)
_NEURONS = FigureData(
    "tl_looped.metrics.neurons.prediction_suppression(model)", extras=("neurons",)
)
_BASE_NEURONS = FigureData(
    "tl_looped.metrics.neurons.prediction_suppression(model)", extras=("neurons",)
)
_PATTERNS = FigureData(
    "a run of one prompt that keeps `pattern` (effective_layer, head, query, key)",
    extras=("patterns",),
)
_RANDOM = FigureData(
    "random models of {R} recurrences: fixed_point, successive, one result per seed",
    elsewhere="is of random models of several kinds (Section 4.2), not of one run",
)
_TRAINED = FigureData(
    "models of Section 5.1 trained and run with 'signature' at {R} recurrences, one per seed",
    elsewhere="is of models trained for it (Section 5.1), several seeds of each, not of one run",
)


@dataclass(frozen=True)
class FigureSpec:
    """One figure of the paper.

    Attributes:
        number: In the paper.
        title: What it shows.
        variables: What it draws of a result.
        recipe: What draws it.
        data: What it needs.
        recurrences: The paper's number; None where it could not be read.
        band: Of the lines: see :data:`tl_looped.plots.summaries.Band`.
        least_recurrences: Below this the figure does not apply.
        many: Takes a mapping of several models.
    """

    number: int
    title: str
    variables: tuple[str, ...]
    recipe: Recipe
    data: FigureData
    recurrences: int | None = None
    band: str = "none"
    least_recurrences: int = 1
    many: bool = False


COLSUM = ("colsum_concentration",)
_LOWEST = ("fixed_point_rel", "fixed_point_lowest_cosine")
_PCA = ("pca", "pca_explained")
_CLASSES = ("prediction", "suppression")
_by_layer, _log_by_layer = recipes.by_layer, partial(recipes.by_layer, log=True)
_depth, _realised = recipes.by_recurrence_over_depth, recipes.realised


def _orbit(views: str) -> Recipe:
    return partial(token_recipes.of_strongest_orbit, views=views)


def _steps(number: int, title: str, variables: tuple[str, ...], recipe: Recipe) -> FigureSpec:
    """Steps, or distances to the last state, over the recurrences."""
    data = _STEPS if variables[0].startswith("successive") else _LAST
    return FigureSpec(number, title, variables, recipe, data, 128, "quantiles", 2)


def _blocks(numbers: Iterable[int], recurrences: int) -> list[FigureSpec]:
    """All signature metrics by recurrence over block depth, a figure for each model."""
    title = "signature metrics over block depth"
    return [FigureSpec(n, title, SIGNATURE, _depth, _SIGNATURE, recurrences) for n in numbers]


def _path(number: int, title: str, recurrences: int | None = None) -> FigureSpec:
    return FigureSpec(number, title, _PCA, recipes.path, _PATHS, recurrences, least_recurrences=2)


def _small(first: int, what: str, bare: bool) -> list[FigureSpec]:
    """Small trained models with blocks of 4, 8 and 12 layers."""
    return [
        FigureSpec(
            first + i, f"signature metrics, {what}, block of {block} layers", SIGNATURE,
            partial(grid_recipes.small_model, block=block, bare=bare), _TRAINED, 4, "sd",
        )
        for i, block in enumerate((4, 8, 12))
    ]  # fmt: skip


def _grid(number: int, title: str, variables: tuple[str, ...], layers: int) -> FigureSpec:
    """Random weights in every norm layout."""
    return FigureSpec(
        number, title, variables, partial(grid_recipes.grid, layers=layers), _RANDOM, 128,
        "range", 2, many=True,
    )  # fmt: skip


_SPECS = [
    FigureSpec(2, "distance between attention patterns", ("pairwise_attention_distance",),
               recipes.matrix, _PAIRS, 8),
    _steps(3, "step of the residual stream", ("successive_abs", "successive_rel"), _log_by_layer),
    _steps(4, "distance to the last state", ("fixed_point_abs", "fixed_point_rel"), _log_by_layer),
    _path(5, "path in principal components"),
    _grid(6, "distance to the last state, random weights", _LOWEST, 12),
    FigureSpec(7, "ColSum concentration over realised depth", COLSUM, _realised, _SIGNATURE, 8,
               "sd"),
    FigureSpec(8, "ColSum concentration within a block, and feedforward", COLSUM,
               recipes.over_feedforward, _TWO_RUNS, 8),
    FigureSpec(9, "residual magnitudes", ("residual_mean", "residual_max", "residual_first"),
               recipes.residual_norms, _SIZES, None, "quantiles"),
    FigureSpec(10, "ColSum concentration of small trained models", COLSUM,
               grid_recipes.small_models, _TRAINED, 4, "sd", many=True),
    FigureSpec(11, "ColSum concentration by recurrence", COLSUM, _by_layer, _SIGNATURE, 128, "sd"),
    FigureSpec(12, "ColSum concentration at unseen recurrences", COLSUM, _depth, _SIGNATURE, 128),
    FigureSpec(13, "steps of Algorithm 1", ("token_similarity",), token_recipes.limiting_steps,
               _TOKENS, 128, least_recurrences=2),
    FigureSpec(14, "limiting behaviours at the same token", ("limiting_label",),
               token_recipes.cooccurring, _TOKENS, 128),
    _path(15, "paths with the intermediate layers", 128),
    FigureSpec(16, "signature metrics of the strongest orbit", SIGNATURE, _orbit("N"), _TOKENS,
               128),
    FigureSpec(17, "signature metrics of the strongest orbit, last loops", SIGNATURE, _orbit("R"),
               _TOKENS, 128),
    FigureSpec(18, "signature metrics of the strongest orbit", SIGNATURE, _orbit("NR"), _TOKENS,
               128),
    *(FigureSpec(number, "cosine between residual streams", ("pairwise_residual_cosine",),
                 recipes.matrix, _PAIRS, n) for number, n in ((19, 8), (20, 32))),
    FigureSpec(21, "distance between attention patterns", ("pairwise_attention_distance",),
               recipes.matrix, _PAIRS, 32),
    _steps(22, "cosine with the last state", ("fixed_point_cosine",), _by_layer),
    _steps(23, "distance to the last attention pattern", ("fixed_point_attention",),
           _log_by_layer),
    _steps(24, "cosine of successive states", ("successive_cosine",), _by_layer),
    _steps(25, "distance of successive attention patterns", ("successive_attention",),
           _log_by_layer),
    *(_path(number, "path in principal components") for number in (26, 27, 28)),
    _grid(29, "steps and cosines, random weights", ("successive_abs", "successive_cosine"), 12),
    _grid(30, "distance to the last state, random weights, 4 layers", _LOWEST, 4),
    _grid(31, "distance to the last state, random weights, 16 layers", _LOWEST, 16),
    FigureSpec(32, "prediction and suppression neurons", _CLASSES,
               partial(recipes.neurons, looped=False), _BASE_NEURONS),
    FigureSpec(33, "prediction and suppression neurons", _CLASSES,
               partial(recipes.neurons, looped=True), _NEURONS),
    FigureSpec(34, "signature metrics over realised depth", SIGNATURE, _realised, _SIGNATURE, 8,
               "sd"),
    *_blocks(range(35, 40), 8),
    FigureSpec(40, "halves of the block, and feedforward", SIGNATURE, recipes.halves, _TWO_RUNS, 4),
    FigureSpec(41, "signature metrics over block depth", SIGNATURE, recipes.ablated, _ABLATED, 8),
    *_blocks(range(42, 47), 8),
    *(FigureSpec(number, "signature metrics by recurrence", SIGNATURE, _by_layer, _SIGNATURE, 128,
                 "sd") for number in (47, 48, 49)),
    *_blocks((50, 51, 52), 128),
    *_small(54, "small base model", bare=False),
    *_small(57, "small model with injection", bare=False),
    *_small(60, "small model without prelude and coda", bare=True),
    FigureSpec(63, "every attention map", ("pattern",), recipes.attention_sheet, _PATTERNS),
]  # fmt: skip

FIGURES: Mapping[int, FigureSpec] = {spec.number: spec for spec in _SPECS}
"""All figures by their number in the paper."""


def spec_of(number: int | str) -> FigureSpec:
    """The entry of a figure, ``7`` or ``"7"``.

    Raises:
        InputError: for a number that is not in the table, with the valid ones.
    """
    key = int(number) if str(number).strip().isdecimal() else number
    if key not in FIGURES:
        valid = ", ".join(_ranges(sorted(FIGURES)))
        raise InputError(f"number: there is no Fig. {number} to draw; valid are {valid}")
    return FIGURES[int(key)]


def _ranges(numbers: list[int]) -> list[str]:
    """``[1, 2, 3, 5]`` as ``["1 to 3", "5"]``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return [str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]


# Which figures draw the results of other runs; elsewhere they would be left out without a word.
_COMPARISONS = {
    "feedforward": [8, 32, 33, 40],
    "control": [10, *range(54, 63)],
    "baseline": [41],
}


def draw(number: int | str, data: Any, **others: Any) -> list[DrawnFigure]:
    """Draw a figure of the paper from results.

    Args:
        number: In the paper.
        data: A result by depth (``by="depth"``); a list of them, one per seed, where figures show
            several seeds; mappings for Figures 6, 10 and 29 to 31, see the module.
        **others: Fields of :class:`tl_looped.plots.recipes.DrawOptions`.

    Returns:
        The figures, mostly one, each with name, title, caption, the numbers behind it and its
        settings. They are to be saved; nothing is shown.

    Raises:
        InputError: if the number is unknown, the data lack a variable (the message says which run
            makes it), the figure does not apply to the model, or it draws no such other run.
    """
    spec = spec_of(number)
    known = [field.name for field in fields(DrawOptions)]
    unknown = sorted(set(others) - set(known))
    if unknown:
        raise InputError(f"unknown options {', '.join(unknown)}; there are {', '.join(known)}")
    for name, numbers in _COMPARISONS.items():
        if others.get(name) is not None and spec.number not in numbers:
            raise InputError(
                f"Fig. {spec.number} draws no {name}; of figures {', '.join(_ranges(numbers))} "
                "it can be given"
            )
    options = DrawOptions(**others)
    if not spec.many:
        check_data(spec, data)
    request = Request(spec.number, spec.title, spec.variables, spec.recurrences, spec.band, options)
    return spec.recipe(request, data)


def check_data(spec: FigureSpec, data: Any) -> None:
    """Whether results of one model hold what a figure needs.

    Raises:
        InputError: if not; the message names what is missing and the run that makes it.
    """
    if isinstance(data, Mapping) and not isinstance(data, xr.Dataset):
        raise InputError(f"Fig. {spec.number} is of one model: data must be its result")
    for run in as_runs(data):
        missing = [name for name in spec.variables if name not in run]
        if missing:
            made_by = spec.data.run.format(R=spec.recurrences or "n")
            raise InputError(
                f"Fig. {spec.number} needs {', '.join(missing)}, which the data do not have. Made "
                f"by: {made_by}"
            )
        if "n_core" in run.attrs and spec.least_recurrences > shape_of(run).R:
            raise InputError(
                f"Fig. {spec.number} compares recurrences, {spec.least_recurrences} at least: it "
                f"does not apply to a run of shape {shape_of(run)}"
            )


def parse_figures(text: str) -> tuple[int, ...]:
    """Numbers from ``"2,4,7"``.

    Raises:
        InputError: for a figure that one run cannot be drawn as; the message lists those it can.
    """
    alone = [str(number) for number, spec in FIGURES.items() if not spec.data.elsewhere]
    numbers = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item not in alone:
            spec = FIGURES.get(int(item)) if item.isdecimal() else None
            raise InputError(
                (f"figures: Fig. {item} {spec.data.elsewhere}" if spec else
                 f"figures: there is no {item!r}")
                + f". One run can be drawn as {', '.join(alone)}"
            )  # fmt: skip
        numbers.append(int(item))
    return tuple(dict.fromkeys(numbers))


def with_needs(spec: Experiment, figures: Iterable[int]) -> Experiment:
    """The experiment with what the figures need as well.

    Raises:
        InputError: for a figure of an ablation, if the experiment has none.
    """
    needs = [FIGURES[number].data for number in figures]
    if any(need.is_ablated for need in needs) and not spec.ablate_mlp:
        raise InputError(
            "figures: Fig. 41 is of a run without the MLP output of the second layer: add "
            "--ablate-mlp prelude.1 (or core.1 for a model without prelude)"
        )
    metrics = [*spec.metrics, *(m for need in needs for m in need.metrics)]
    extras = {*spec.extras, *(e for need in needs for e in need.extras)}
    return replace(spec, metrics=tuple(dict.fromkeys(metrics)), extras=tuple(sorted(extras)))
