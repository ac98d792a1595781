"""The paper's groupings of a metric's values, as panels of lines.

- by layer (L): one line per core layer over the recurrences, blue to green;
- by recurrence (R): one line per recurrence over the depth of ``[prelude, block, coda]`` in
  percent, green to yellow; layer i of n stands at ``x = 100 i / (n - 1)``, a single layer at 0;
- none (N): the whole run over its effective layers; ``N + L`` with a coloured line a core layer.

Where a loop norm (Ouro) follows the last layer of the block, the values of the layer are those
before the norm; the grouping by layer adds a dashed line for those behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from tl_looped.errors import InputError
from tl_looped.model.geometry import LoopGeometry
from tl_looped.plots.colours import FEEDFORWARD, NEUTRAL, SEVERAL, layer_colours, recurrence_colours
from tl_looped.plots.panels import Line, Panel, Span, Style, stage_spans
from tl_looped.plots.summaries import (
    Band,
    Runs,
    as_runs,
    name_of,
    shape_of,
    summary,
)

_STATE_OUT = "_state_out"
RECURRENCE_AXIS = "recurrence r (0-based)"
DEPTH_AXIS = "% of block depth (prelude and coda included)"
LAYER_AXIS = "effective layer (0-based)"


_AXIS_LABELS = {
    "sink_rate": "sink rate (share of heads)",
    "mixing_per_token": "mixing score / T (nats)",
    "colsum_concentration": "ColSum concentration (0 to 1)",
    "entropy_bits": "residual entropy (bits)",
    "residual_mean": "mean over tokens",
    "residual_max": "largest token",
    "residual_first": "first token",
    "successive_abs": "step (norm)",
    "successive_rel": "step / norm of the state",
    "successive_cosine": "cosine of successive states",
    "successive_attention": "step of the pattern (Frobenius)",
    "fixed_point_abs": "distance to the last state (norm)",
    "fixed_point_rel": "distance / norm of the last state",
    "fixed_point_cosine": "cosine with the last state",
    "fixed_point_attention": "distance to the last pattern (Frobenius)",
    "fixed_point_lowest_cosine": "lowest cosine with a last state",
}
"""Short labels of what has a figure of its own; a panel of two inches has no room for more."""


def label_of(data: xr.Dataset, name: str) -> str:
    """A variable's label with its unit, as axes show it: a short one, or its ``long_name``."""
    if name in _AXIS_LABELS:
        return _AXIS_LABELS[name]
    attributes = data[name].attrs
    label, unit = str(attributes.get("long_name", name)), str(attributes.get("units", "1"))
    return label if unit in ("1", "") else f"{label} ({unit})"


def percent_of_depth(n: int) -> Float[np.ndarray, " layer"]:
    """``100 i / (n - 1)`` of n layers; 0 for a single one."""
    return 100.0 * np.arange(n) / max(1, n - 1)


def _looped(runs: Runs) -> tuple[xr.Dataset, LoopGeometry]:
    run, loop = as_runs(runs)[0], shape_of(runs)
    if loop.R < 1 or loop.k < 1:
        raise InputError(f"data: the run of shape {loop} has no recurrence to group by")
    return run, loop


def over_recurrences(
    runs: Runs,
    name: str,
    band: Band | str = "sd",
    log: bool = False,
    title: str = "",
    trained: int | float | None = None,
) -> Panel:
    """Grouping L: one line per core layer; a variable without layers gives one line.

    Args:
        runs: Results by depth.
        name: A variable over effective layers, or over recurrences.
        band: Over prompts, or over seeds.
        log: Logarithmic vertical axis.
        title: Of the panel.
        trained: Recurrences of the training, whose last one is marked; nothing is if 0 or None. A
            float is the mean of numbers that were drawn anew for each step.
    """
    run, loop = _looped(runs)
    values, x = summary(runs, name, band), np.arange(loop.R, dtype=float)
    if "effective_layer" in run[name].dims:
        lines = [
            Line(f"core layer {l}", x, values.iloc[_every(loop, l)], colour, "layer", l)
            for l, colour in enumerate(layer_colours(loop.k))  # noqa: E741
        ]
        if name + _STATE_OUT in run:
            out = summary(runs, name + _STATE_OUT, band)
            lines.append(Line("after the loop norm", x, out, (0.0, 0.0, 0.0), style="--"))
    else:
        lines = [Line(name.replace("_", " "), x, values, NEUTRAL)]
    marked = None
    if trained and trained < loop.R:
        which = "trained mean" if isinstance(trained, float) else "last trained"
        marked = (trained - 1.0, f"{which}: r = {trained - 1:g}")
    return Panel(
        title, RECURRENCE_AXIS, label_of(run, name), tuple(lines), log,
        integer_x=True, marked_x=marked,
    )  # fmt: skip


def _every(loop: LoopGeometry, layer: int) -> slice:
    """Effective layers of one core layer."""
    return slice(loop.p + layer, loop.p + loop.k * loop.R, loop.k)


def over_depth(
    runs: Runs,
    name: str,
    band: Band | str = "none",
    title: str = "",
    recurrences: Sequence[int] | None = None,
    feedforward: Runs | None = None,
    log: bool = False,
) -> Panel:
    """Grouping R: one line per recurrence over ``[prelude, block, coda]``, in percent.

    Args:
        runs: Results by depth.
        name: A variable over effective layers.
        band: Over prompts or seeds; none by default, for many bands hide each other.
        title: Of the panel.
        recurrences: Which ones; all if None. Their colours run over those shown.
        feedforward: Results of a feedforward model, drawn dashed and black over its own depth.
        log: Logarithmic vertical axis.
    """
    run, loop = _looped(runs)
    chosen = range(loop.R) if recurrences is None else list(recurrences)
    values = summary(runs, name, band)
    x = percent_of_depth(loop.p + loop.k + loop.c)
    lines = []
    for r, colour in zip(chosen, recurrence_colours(len(chosen)), strict=True):
        start = loop.index(r, 0)
        block = slice(start, start + loop.k)
        coda = slice(loop.n_layers - loop.c, loop.n_layers)
        whole = pd.concat([values.iloc[where] for where in (slice(0, loop.p), block, coda)])
        lines.append(Line(f"recurrence {r}", x, whole, colour, "recurrence", r))
    if feedforward is not None:
        lines.append(_feedforward_line(feedforward, name, band))
    return Panel(title, DEPTH_AXIS, label_of(run, name), tuple(lines), log, _spans_in_percent(loop))


def _feedforward_line(runs: Runs, name: str, band: Band | str) -> Line:
    run, values = as_runs(runs)[0], summary(runs, name, band)
    label = f"feedforward: {name_of(run)}"
    x = percent_of_depth(len(values))
    return Line(label, x, values, FEEDFORWARD, style="--", width=1.6)


def _spans_in_percent(loop: LoopGeometry) -> tuple[Span, ...]:
    n = loop.p + loop.k + loop.c
    step = 100.0 / max(1, n - 1)
    # Without a coda its span must be empty for a single layer too, where a step is the whole axis.
    coda = (n - loop.c - 0.5) * step if loop.c else 100.0
    return stage_spans((0.0, (loop.p - 0.5) * step, coda, 100.0))


def over_realised_depth(
    runs: Runs,
    names: str | Sequence[str],
    band: Band | str = "sd",
    title: str = "",
    by_layer: bool = True,
    log: bool = False,
) -> Panel:
    """Grouping N over all effective layers; ``by_layer`` adds a coloured line a core layer (N + L).

    Args:
        runs: Results by depth.
        names: A variable over effective layers, or several on one axis (then without colours).
        band: Over prompts or seeds.
        title: Of the panel.
        by_layer: Add the lines of the core layers.
        log: Logarithmic vertical axis.
    """
    run, loop = as_runs(runs)[0], shape_of(runs)
    names = [names] if isinstance(names, str) else list(names)
    x = np.arange(loop.n_layers, dtype=float)
    lines: list[Line] = []
    width = 0.6 if loop.n_layers > 100 else 1.3
    if len(names) == 1:
        values = summary(runs, names[0], band)
        colour = (0.62, 0.62, 0.62) if by_layer else NEUTRAL
        lines.append(Line("all layers in order", x, values, colour, width=width))
        bare = values.assign(low=np.nan, high=np.nan)
        for l, colour in enumerate(layer_colours(loop.k) if by_layer and loop.R else []):  # noqa: E741
            where = _every(loop, l)
            marker, own = "o" if loop.R <= 32 else "", bare.iloc[where]
            lines.append(Line(f"core layer {l}", x[where], own, colour, "layer", l, marker=marker))
        label = label_of(run, names[0])
    else:
        # Where lines coincide, as those of the first and of the largest token do, both show.
        looks: tuple[tuple[Style, float], ...] = (
            ("-", width),
            ("-", width + 1.5),
            ("--", max(width, 0.9)),
        )
        for i, name in enumerate(names):
            colour, (style, thick) = SEVERAL[i % len(SEVERAL)], looks[i % len(looks)]
            values = summary(runs, name, band)
            label = label_of(run, name)
            lines.append(Line(label, x, values, colour, style=style, width=thick))
        label = "norm of the residual stream"
    ends = (-0.5, loop.p - 0.5, loop.n_layers - loop.c - 0.5, loop.n_layers - 0.5)
    starts = [loop.index(r, 0) - 0.5 for r in range(loop.R)] if loop.R <= 32 else []
    return Panel(
        title, LAYER_AXIS, label, tuple(lines), log, stage_spans(ends), tuple(starts),
        integer_x=True,
    )  # fmt: skip
