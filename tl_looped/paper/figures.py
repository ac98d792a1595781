"""Every figure of the paper (arXiv 2604.11791) as an entry of a table, and the door to draw it.

``draw(7, data)`` makes Figure 7 from the result of a run. An entry says which variables the figure
needs, how it groups them, with how many recurrences the paper shows it, and which run makes the
data. Most figures are of one model: draw them once for each. Figures of several models take
mappings: 6 and 29 to 31 ``{(norm layout, injected): results}``, 10 ``{name: results}``; and
``results`` is one result, or a list with one per seed.

Left open by the paper, and chosen here: Figures 11 and 12 show the ColSum concentration alone, as
Figure 7 does; 29 shows step norms and cosines of 12 layers, 30 and 31 repeat Figure 6 at 4 and 16
layers; 54 to 56, 57 to 59 and 60 to 62 run through blocks of 4, 8 and 12 layers within each
variant. Figure 1 is a drawing, 53 is not of these. Where only one model's data are asked for, the
models of the paper are listed, and any other is drawn all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import xarray as xr

from tl_looped.errors import InputError
from tl_looped.metrics.catalogue import SIGNATURE
from tl_looped.plots import grid_recipes, recipes, token_recipes
from tl_looped.plots.recipes import DrawnFigure, DrawOptions, Recipe, Request
from tl_looped.plots.summaries import as_runs, shape_of

COLSUM = ("colsum_concentration",)
_SIGNATURE_RUN = "stream(model, prompts, 'signature', by='depth', n_recurrences={R})"
_STEPS_RUN = "stream(model, prompts, 'successive', by='depth', n_recurrences={R})"
_FIXED_RUN = "stream(model, prompts, 'fixed_point', by='depth', n_recurrences={R})"
_SIZE_RUN = "stream(model, prompts, 'magnitude', by='depth', n_recurrences={R})"
_PAIR_RUN = "an experiment with pairwise matrices at {R} recurrences"
_PCA_RUN = "an experiment with a PCA path (tl_looped.metrics.trajectories.pca_trajectory)"
_LIMIT_RUN = "an experiment with limiting behaviour at {R} recurrences"
_NEURON_RUN = "tl_looped.metrics.neurons.prediction_suppression(model)"
_BASE_RUN = "tl_looped.metrics.neurons.prediction_suppression(model)"
_PATTERN_RUN = "a run of one prompt that keeps `pattern` (effective_layer, head, query, key)"

_THREE = "Ouro 1.4B, Huginn, r-Llama"
_FOUR = "Huginn, r-Llama, r-OLMo, r-TinyLlama"
_GSM8K = "GSM8K-256"


@dataclass(frozen=True)
class FigureSpec:
    """One figure of the paper.

    Attributes:
        number: In the paper.
        title: What it shows.
        variables: What it needs from a result.
        grouping: ``"L"`` by layer, ``"R"`` by recurrence, ``"N"`` none, ``"N + L"``, or what else.
        models: The paper's models.
        recipe: What draws it.
        run: What makes the data.
        recurrences: The paper's number; None where it could not be read.
        band: Of the lines: see :data:`tl_looped.plots.summaries.Band`.
        prompts: The paper's prompts.
        least_recurrences: Below this the figure does not apply.
        many: Takes a mapping of several models.
    """

    number: int
    title: str
    variables: tuple[str, ...]
    grouping: str
    models: str
    recipe: Recipe
    run: str
    recurrences: int | None = None
    band: str = "none"
    prompts: str = _GSM8K
    least_recurrences: int = 1
    many: bool = False


_by_layer, _log_by_layer = recipes.by_layer, partial(recipes.by_layer, log=True)
_depth, _realised = recipes.by_recurrence_over_depth, recipes.realised


def _blocks(
    first: int, models: tuple[str, ...], prompts: str, recurrences: int = 8
) -> list[FigureSpec]:
    """Figures of all signature metrics by recurrence over block depth, one a model."""
    return [
        FigureSpec(
            first + i, "signature metrics over block depth", SIGNATURE, "R", model, _depth,
            _SIGNATURE_RUN, recurrences, prompts=prompts,
        )
        for i, model in enumerate(models)
    ]  # fmt: skip


_FIVE = ("Ouro 1.4B", "Huginn", "r-Llama", "r-OLMo", "r-TinyLlama")
_GRID_RUN = "random models of {R} recurrences: fixed_point, successive, one result a seed"
_SMALL_RUN = (
    "models of Section 5.1 trained and run with 'signature' at {R} recurrences, one per seed"
)


def _small(first: int, what: str, bare: bool) -> list[FigureSpec]:
    return [
        FigureSpec(
            first + i, f"signature metrics, {what}, block of {block} layers", SIGNATURE, "R",
            "small models", partial(grid_recipes.small_model, block=block, bare=bare),
            _SMALL_RUN, 4, "sd",
        )
        for i, block in enumerate((4, 8, 12))
    ]  # fmt: skip


def _grid(
    number: int, title: str, variables: tuple[str, ...], layers: int, band: str
) -> FigureSpec:
    return FigureSpec(
        number, title, variables, "L", "random initialisation",
        partial(grid_recipes.grid, layers=layers), _GRID_RUN, 128, band, "random", 2, many=True,
    )  # fmt: skip


_LOWEST = ("fixed_point_rel", "fixed_point_lowest_cosine")

_SPECS = [
    FigureSpec(2, "distance between attention patterns", ("pairwise_attention_distance",),
               "heat map", _THREE, recipes.matrix, _PAIR_RUN, 8),
    FigureSpec(3, "step of the residual stream", ("successive_abs", "successive_rel"), "L",
               _THREE, _log_by_layer, _STEPS_RUN, 128, "quantiles", least_recurrences=2),
    FigureSpec(4, "distance to the last state", ("fixed_point_abs", "fixed_point_rel"), "L",
               _THREE, _log_by_layer, _FIXED_RUN, 128, "quantiles", least_recurrences=2),
    FigureSpec(5, "path in principal components", ("pca", "pca_explained"), "path", "r-Llama",
               recipes.path, _PCA_RUN, prompts="test sentence", least_recurrences=2),
    _grid(6, "distance to the last state, random weights", _LOWEST, 12, "range"),
    FigureSpec(7, "ColSum concentration over realised depth", COLSUM, "N + L", "r-Llama",
               _realised, _SIGNATURE_RUN, 8, "sd"),
    FigureSpec(8, "ColSum concentration within a block, and feedforward", COLSUM, "R",
               "Ouro 1.4B, retrofits; Llama, bases", recipes.over_feedforward, _SIGNATURE_RUN, 8),
    FigureSpec(9, "residual magnitudes", ("residual_mean", "residual_max", "residual_first"), "N",
               "several", recipes.magnitudes, _SIZE_RUN, None, "quantiles"),
    FigureSpec(10, "ColSum concentration of small trained models", COLSUM, "R", "small models",
               grid_recipes.small_models, _SMALL_RUN, 4, "sd", many=True),
    FigureSpec(11, "ColSum concentration by recurrence", COLSUM, "L", "r-Llama, Ouro 1.4B",
               _by_layer, _SIGNATURE_RUN, 128, "sd"),
    FigureSpec(12, "ColSum concentration at unseen recurrences", COLSUM, "R", "r-Llama, Ouro 1.4B",
               _depth, _SIGNATURE_RUN, 128),
    FigureSpec(13, "steps of Algorithm 1", ("token_similarity",), "columns", "Huginn",
               token_recipes.limiting_steps, _LIMIT_RUN, 128, least_recurrences=2),
    FigureSpec(14, "limiting behaviours at the same token", ("limiting_label",), "heat map",
               "Huginn", token_recipes.cooccurring, _LIMIT_RUN, 128),
    FigureSpec(15, "paths with the intermediate layers", ("pca", "pca_explained"), "per token",
               "Huginn", recipes.path, _PCA_RUN, 128, least_recurrences=2),
    FigureSpec(16, "signature metrics of the strongest orbit", SIGNATURE, "N + L", "Huginn",
               partial(token_recipes.of_strongest_orbit, views="N"), _LIMIT_RUN, 128),
    FigureSpec(17, "signature metrics of the strongest orbit, last loops", SIGNATURE, "R", "Huginn",
               partial(token_recipes.of_strongest_orbit, views="R"), _LIMIT_RUN, 128),
    FigureSpec(18, "signature metrics of the strongest orbit", SIGNATURE, "N + L; R", "r-Llama",
               partial(token_recipes.of_strongest_orbit, views="NR"), _LIMIT_RUN, 128),
    FigureSpec(19, "cosine between residual streams", ("pairwise_residual_cosine",), "heat map",
               _THREE, recipes.matrix, _PAIR_RUN, 8),
    FigureSpec(20, "cosine between residual streams", ("pairwise_residual_cosine",), "heat map",
               _FOUR, recipes.matrix, _PAIR_RUN, 32),
    FigureSpec(21, "distance between attention patterns", ("pairwise_attention_distance",),
               "heat map", _FOUR, recipes.matrix, _PAIR_RUN, 32),
    FigureSpec(22, "cosine with the last state", ("fixed_point_cosine",), "L", _THREE, _by_layer,
               _FIXED_RUN, 128, "quantiles", least_recurrences=2),
    FigureSpec(23, "distance to the last attention pattern", ("fixed_point_attention",), "L",
               _THREE, _log_by_layer, _FIXED_RUN, 128, "quantiles", least_recurrences=2),
    FigureSpec(24, "cosine of successive states", ("successive_cosine",), "L", _THREE, _by_layer,
               _STEPS_RUN, 128, "quantiles", least_recurrences=2),
    FigureSpec(25, "distance of successive attention patterns", ("successive_attention",), "L",
               _THREE, _log_by_layer, _STEPS_RUN, 128, "quantiles", least_recurrences=2),
    *(FigureSpec(number, "path in principal components", ("pca", "pca_explained"), "path", model,
                 recipes.path, _PCA_RUN, prompts=prompt, least_recurrences=2)
      for number, model, prompt in ((26, "Ouro 1.4B", "test sentence"),
                                    (27, "Huginn", "test sentence"),
                                    (28, "Ouro 1.4B", "The square root of 16 is"))),
    _grid(29, "steps and cosines, random weights", ("successive_abs", "successive_cosine"), 12,
          "range"),
    _grid(30, "distance to the last state, random weights, 4 layers", _LOWEST, 4, "range"),
    _grid(31, "distance to the last state, random weights, 16 layers", _LOWEST, 16, "range"),
    FigureSpec(32, "prediction and suppression neurons", ("prediction", "suppression"), "depth %",
               "feedforward models", partial(recipes.neurons, looped=False), _BASE_RUN),
    FigureSpec(33, "prediction and suppression neurons", ("prediction", "suppression"), "depth %",
               "looped models", partial(recipes.neurons, looped=True), _NEURON_RUN),
    FigureSpec(34, "signature metrics over realised depth", SIGNATURE, "N + L", _THREE, _realised,
               _SIGNATURE_RUN, 8, "sd"),
    *_blocks(35, _FIVE, _GSM8K),
    FigureSpec(40, "halves of the block, and feedforward", SIGNATURE, "R", "Ouro 2.6B, Llama",
               recipes.halves, _SIGNATURE_RUN, 4),
    FigureSpec(41, "signature metrics over block depth", SIGNATURE, "R", "r-Llama", recipes.ablated,
               _SIGNATURE_RUN, 8),
    *_blocks(42, _FIVE, "HellaSwag-256"),
    *(FigureSpec(47 + i, "signature metrics by recurrence", SIGNATURE, "L", model, _by_layer,
                 _SIGNATURE_RUN, 128, "sd") for i, model in enumerate(_THREE.split(", "))),
    *_blocks(50, tuple(_THREE.split(", ")), _GSM8K, 128),
    *_small(54, "small base model", bare=False),
    *_small(57, "small model with injection", bare=False),
    *_small(60, "small model without prelude and coda", bare=True),
    FigureSpec(63, "every attention map", ("pattern",), "floor plan", "r-Llama",
               recipes.floor_plan, _PATTERN_RUN, prompts="test sentence"),
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
            made_by = spec.run.format(R=spec.recurrences or "n")
            raise InputError(
                f"Fig. {spec.number} needs {', '.join(missing)}, which the data do not have. Made "
                f"by: {made_by}"
            )
        if "n_core" in run.attrs and spec.least_recurrences > shape_of(run).R:
            raise InputError(
                f"Fig. {spec.number} compares recurrences, {spec.least_recurrences} at least: it "
                f"does not apply to a run of shape {shape_of(run)}"
            )
