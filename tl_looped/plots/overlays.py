"""Looped blocks over feedforward models: halves of a long block (Figure 40), neurons (32, 33)."""

from __future__ import annotations

import numpy as np
import xarray as xr

from tl_looped.errors import InputError
from tl_looped.plots.colours import FEEDFORWARD, Colour, recurrence_colours
from tl_looped.plots.groupings import label_of, percent_of_depth
from tl_looped.plots.panels import Line, Panel, Span, Style, stage_spans
from tl_looped.plots.summaries import (
    Band,
    Runs,
    as_runs,
    name_of,
    shape_of,
    summary,
    without_band,
)

_CLASS_COLOURS: dict[str, Colour] = {
    "prediction": (0.20, 0.45, 0.70),
    "suppression": (0.85, 0.45, 0.10),
}


def block_halves(
    runs: Runs, feedforward: Runs, name: str, band: Band | str = "none", title: str = ""
) -> Panel:
    """Both halves of the block, each over 0 to 100 %, and a feedforward model over its depth.

    The first ``k // 2`` layers are drawn solid, the rest dashed; prelude and coda are left out.

    Raises:
        InputError: if the block has fewer than four layers.
    """
    run, loop = as_runs(runs)[0], shape_of(runs)
    if loop.k < 4 or loop.R < 1:
        raise InputError(
            f"data: halves of a block need four core layers and a recurrence, got shape {loop}"
        )
    values, half = summary(runs, name, band), loop.k // 2
    lines = []
    for r, colour in enumerate(recurrence_colours(loop.R)):
        start = loop.index(r, 0)
        for which, style, first, last in _halves(half, loop.k):
            label = f"recurrence {r}, {which} half"
            part = values.iloc[start + first : start + last]
            x = percent_of_depth(last - first)
            lines.append(Line(label, x, part, colour, "recurrence", r, style))
    nothing = without_band(np.zeros(0))
    for which, style, _, _ in _halves(half, loop.k):  # for the legend
        label = f"{which} half of the block"
        lines.append(Line(label, np.zeros(0), nothing, (0.5, 0.5, 0.5), style=style))
    base, of_base = as_runs(feedforward)[0], summary(feedforward, name, band)
    lines.append(
        Line(
            f"feedforward: {name_of(base)}",
            percent_of_depth(len(of_base)), of_base, FEEDFORWARD, style=":", width=1.8,
        )
    )  # fmt: skip
    return Panel(title, "% of half a block, or of the feedforward model's depth",
                 label_of(run, name), tuple(lines))  # fmt: skip


def _halves(half: int, k: int) -> tuple[tuple[str, Style, int, int], ...]:
    return ("first", "-", 0, half), ("second", "--", half, k)


def neuron_panel(data: xr.Dataset, feedforward: xr.Dataset | None = None) -> Panel:
    """Percent of prediction and suppression neurons of every weight-distinct layer over depth.

    Args:
        data: ``prediction`` and ``suppression``, fractions over ``unique_layer`` or ``layer``, as
            :func:`tl_looped.metrics.neurons.prediction_suppression` returns them or as a
            result holds them.
        feedforward: The same of a feedforward model, drawn dashed.
    """
    lines = _neuron_lines(data, "-", "")
    if feedforward is not None:
        lines += _neuron_lines(feedforward, "--", f", feedforward: {name_of(feedforward)}")
    return Panel(
        "", "% of depth, each layer once", "neurons of the layer's MLP (%)", tuple(lines),
        spans=_neuron_spans(data),
    )  # fmt: skip


def _neuron_lines(data: xr.Dataset, style: Style, suffix: str) -> list[Line]:
    lines: list[Line] = []
    for name, colour in _CLASS_COLOURS.items():
        if name not in data or data[name].ndim != 1:
            raise InputError(
                f"data must hold {name!r} over layers; it has {', '.join(map(str, data))}"
            )
        values = 100 * data[name].to_numpy().astype(np.float64)
        x, shown = percent_of_depth(len(values)), without_band(values)
        # Where both are equal, zero mostly, the first shows on both sides of the second.
        width = 1.1 if lines else 3.0
        lines.append(Line(name + suffix, x, shown, colour, style=style, width=width, marker="o"))
    return lines


def _neuron_spans(data: xr.Dataset) -> tuple[Span, ...]:
    """Prelude and coda of a result, or of what ``prediction_suppression`` returns."""
    n = len(data["prediction"])
    if "n_core" in data.attrs:
        loop = shape_of(data)
        p, c = loop.p, loop.c
        if loop.p + loop.k + loop.c != n:
            raise InputError(
                f"data: {n} layers of neurons do not fit the shape {loop}: p + k + c are wanted"
            )
    else:
        stages = [str(s) for s in data["stage"].to_numpy()] if "stage" in data.coords else []
        p, c = stages.count("prelude"), stages.count("coda")
    step = 100.0 / max(1, n - 1)
    return stage_spans((0.0, (p - 0.5) * step, (n - c - 0.5) * step if c else 100.0, 100.0))
