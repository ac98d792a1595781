"""Recipes for figures of several models: Section 4.2 (6, 29-31) and Section 5.1 (10, 54-62)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tl_looped.errors import InputError
from tl_looped.plots.grids import (
    LOWEST,
    check_block,
    check_grid,
    condition_panels,
    grid_panels,
    model_panels,
    split_control,
)
from tl_looped.plots.recipes import (
    DrawnFigure,
    Request,
    band_of,
    by_recurrence_over_depth,
    of_panels,
)
from tl_looped.plots.summaries import Runs, as_runs, shape_of

_WHAT = {"successive_abs": ", step norms", "successive_cosine": ", cosines of successive states"}


def grid(request: Request, data: Any, layers: int) -> list[DrawnFigure]:
    """Section 4.2: the distance to the fixed point of every condition and the lowest cosine.

    Fig. 29, which has no lowest cosine, is a figure for each variable. ``data`` is a
    :data:`tl_looped.plots.grids.ConditionRuns`.
    """
    _, _, loop = check_grid(data)
    if loop.k != layers or loop.p or loop.c:
        raise InputError(
            f"Fig. {request.number} shows {layers} layers without prelude and coda, the runs have "
            f"shape {loop}"
        )
    for condition, runs in data.items():
        _check_has(request, runs, f"condition {condition}")
    first = next(iter(data.values()))
    extra = [f"random weights of shape {loop}, {_seeds(data.values())} a condition"]
    added = f", {request.options.subtitle}" if request.options.subtitle else ""
    if LOWEST in request.variables:
        panels, columns = grid_panels(data, request.variables[0], band_of(request), log=True)
        extra.append("right: lowest cosine of the first layer's state to any layer's fixed point")
        size = (3.4, 2.8)
        return [of_panels(request, first, panels, columns, extra, size, what=added, several=True)]
    out = []
    for name in request.variables:
        log = "cosine" not in name
        panels = condition_panels(data, name, band_of(request), log)
        columns = len({norm for norm, _ in data})
        drawn = of_panels(
            request, first, panels, columns, extra, (3.4, 2.8), suffix=f"_{name}",
            what=_WHAT.get(name, f", {name}") + added, several=True,
        )  # fmt: skip
        out.append(drawn)
    return out


def small_models(request: Request, data: Any) -> list[DrawnFigure]:
    """Fig. 10: one panel per small model, each with the control's curve."""
    models, control = split_control(data)
    control = request.options.control if control is None else control
    if control is None:
        raise InputError("Fig. 10 needs the feedforward control, in data or as control=")
    for name, runs in {**models, "control": control}.items():
        _check_has(request, runs, name)
    panels = model_panels(models, request.variables[0], band_of(request), control)
    shapes = "; ".join(
        f"{name} {shape_of(runs)}, {_seeds([runs])}" for name, runs in models.items()
    )
    first = next(iter(models.values()))
    extra = [f"models: {shapes}", "dashed: the feedforward control over its own depth"]
    return [of_panels(request, first, panels, 3, extra, (3.6, 3.0), True, several=True)]


def small_model(request: Request, data: Runs, block: int, bare: bool | None) -> list[DrawnFigure]:
    """Figs 54 to 62: the signature metrics of one small model, with the control if given."""
    check_block(data, block, bare, f"Fig. {request.number}")
    return by_recurrence_over_depth(request, data, feedforward=request.options.control)


def _seeds(models: Iterable[Runs]) -> str:
    """``"3 seeds"``, or ``"2 to 3 seeds"``."""
    found = sorted({len(as_runs(runs)) for runs in models})
    text = " to ".join(map(str, dict.fromkeys((found[0], found[-1]))))
    return f"{text} seed{'s' * (found[-1] != 1)}"


def _check_has(request: Request, runs: Runs, what: str) -> None:
    for run in as_runs(runs):
        missing = [name for name in request.variables if name not in run]
        if missing:
            raise InputError(f"Fig. {request.number}: {what} has no {', '.join(missing)}")
