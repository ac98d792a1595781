"""Figures of several models: random initialisations (Section 4.2) and small models (Section 5.1).

Section 4.2: models of random weights in every norm layout, with and without injection, several
seeds each. Section 5.1: small trained models with a feedforward control. Bands are over seeds where
a model comes as several results, over prompts where it comes as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from tl_looped.errors import InputError
from tl_looped.model.geometry import LoopGeometry
from tl_looped.plots.colours import Colour
from tl_looped.plots.groupings import over_depth, over_recurrences
from tl_looped.plots.panels import Line, Panel
from tl_looped.plots.summaries import Band, Runs, shape_of

Condition: TypeAlias = tuple[str, bool]
"""A norm layout (a value of :class:`tl_looped.model.config.NormLayout`), and whether the prelude's
output or the input is injected."""

ConditionRuns: TypeAlias = Mapping[Condition, Runs]

NORM_NAMES = {
    "pre": "pre-norm",
    "residual": "Huginn norm",
    "sandwich": "Ouro norm",
    "post": "post-norm",
}
_NORM_COLOURS: dict[str, Colour] = {
    "pre": (0.20, 0.45, 0.70),
    "residual": (0.85, 0.45, 0.10),
    "sandwich": (0.55, 0.25, 0.60),
    "post": (0.35, 0.35, 0.35),
}
LOWEST = "fixed_point_lowest_cosine"


def check_grid(grid: Any) -> tuple[list[str], list[bool], LoopGeometry]:
    """Norm layouts and injections of a grid, in the paper's order, and its one shape.

    Raises:
        InputError: if a key is no condition, a combination is missing or the shapes differ.
    """
    if not isinstance(grid, Mapping) or not grid:
        raise InputError(
            "data must map (norm layout, injected) to a result or to one per seed, for instance "
            f"{{('pre', True): [run0, run1, run2]}}, got {type(grid).__name__}"
        )
    for key in grid:
        if not isinstance(key, tuple) or len(key) != 2 or key[0] not in NORM_NAMES:
            raise InputError(
                f"data: a condition is (norm layout, injected) with one of {list(NORM_NAMES)}, got "
                f"{key!r}"
            )
    norms = [norm for norm in NORM_NAMES if any(key[0] == norm for key in grid)]
    injections = [flag for flag in (True, False) if any(key[1] is flag for key in grid)]
    missing = [(n, i) for i in injections for n in norms if (n, i) not in grid]
    if missing:
        raise InputError(f"data: conditions without a run: {missing}")
    shapes = sorted({str(shape_of(runs)) for runs in grid.values()})
    if len(shapes) > 1:
        raise InputError(f"data: all conditions must have one shape, got {', '.join(shapes)}")
    return norms, injections, shape_of(next(iter(grid.values())))


def condition_name(condition: Condition) -> str:
    """``"Ouro norm + injection"``."""
    return f"{NORM_NAMES[condition[0]]} {'+' if condition[1] else 'without'} injection"


def condition_panels(grid: ConditionRuns, name: str, band: Band | str, log: bool) -> list[Panel]:
    """One panel per condition, injections in rows and norms in columns: layers over recurrences.

    Args:
        grid: The runs.
        name: A variable over effective layers.
        band: Over the seeds.
        log: Logarithmic vertical axes.
    """
    norms, injections, _ = check_grid(grid)
    return [
        over_recurrences(grid[norm, flag], name, band, log, condition_name((norm, flag)))
        for flag in injections
        for norm in norms
    ]


def lowest_cosine_panel(grid: ConditionRuns, injected: bool, band: Band | str) -> Panel:
    """The right frame of Figure 6: the lowest cosine of the first layer to any fixed point.

    A limit of 1 means one fixed point that all layers share.
    """
    norms, _, _ = check_grid(grid)
    lines: list[Line] = []
    for norm in norms:
        panel = over_recurrences(grid[norm, injected], LOWEST, band)
        line = panel.lines[0]
        lines.append(Line(NORM_NAMES[norm], line.x, line.values, _NORM_COLOURS[norm]))
    title = f"lowest cosine, {'with' if injected else 'without'} injection"
    return Panel(title, panel.x_label, panel.y_label, tuple(lines), integer_x=True)


def grid_panels(
    grid: ConditionRuns, name: str, band: Band | str, log: bool
) -> tuple[list[Panel], int]:
    """Panels of :func:`condition_panels` with the lowest cosine at the end of each row.

    Returns:
        The panels in reading order and the number of columns.
    """
    norms, injections, _ = check_grid(grid)
    panels = condition_panels(grid, name, band, log)
    n, out = len(norms), []
    for row, flag in enumerate(injections):
        out += [*panels[row * n : (row + 1) * n], lowest_cosine_panel(grid, flag, band)]
    return out, n + 1


def check_block(runs: Runs, block: int, bare: bool | None, figure: str) -> None:
    """Whether a run is of the shape that a figure of Section 5.1 shows.

    Args:
        runs: The run, or one per seed.
        block: Core layers that the figure is about.
        bare: Without prelude and coda; either if None.
        figure: For the message.

    Raises:
        InputError: if it is not.
    """
    loop = shape_of(runs)
    if loop.k != block or (bare is not None and bare is not (loop.p == 0 and loop.c == 0)):
        ends = {True: "without", False: "with", None: "with or without"}[bare]
        raise InputError(
            f"{figure} shows a model of {block} core layers {ends} prelude and coda; the run has "
            f"shape {loop}"
        )


def model_panels(
    models: Mapping[str, Runs], name: str, band: Band | str, control: Runs | None
) -> list[Panel]:
    """One panel per model, by recurrence over block depth, each with the control's curve.

    Raises:
        InputError: if there is no model.
    """
    if not models:
        raise InputError("data holds no looped model")
    return [
        over_depth(runs, name, band, title, feedforward=control) for title, runs in models.items()
    ]


def split_control(arms: Any) -> tuple[dict[str, Runs], Runs | None]:
    """The looped models, and the feedforward control if one has a single recurrence, bare.

    Raises:
        InputError: if ``arms`` maps no names to results, or holds two controls.
    """
    if not isinstance(arms, Mapping) or not arms:
        raise InputError(
            "data must map names of models to results, or to one per seed, "
            f"got {type(arms).__name__}"
        )
    controls = {n: runs for n, runs in arms.items() if _is_feedforward(shape_of(runs))}
    if len(controls) > 1:
        raise InputError(f"data holds more than one feedforward control: {list(controls)}")
    looped = {name: runs for name, runs in arms.items() if name not in controls}
    return looped, next(iter(controls.values()), None)


def _is_feedforward(loop: LoopGeometry) -> bool:
    return loop.p == 0 and loop.c == 0 and loop.R == 1
