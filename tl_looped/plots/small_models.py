"""Curves of the small models of Section 5.1: losses over tokens and recurrences, steps of the loop.

One line per configuration: the mean over seeds, with a band of one standard deviation (n - 1) where
there are two seeds or more. These figures are none of the paper's and have no number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr

from tl_looped.errors import InputError
from tl_looped.metrics.labels import geometry_of
from tl_looped.plots.colours import FEEDFORWARD, SEVERAL, Colour
from tl_looped.plots.panels import Line, Panel, draw_panels, numbers_of
from tl_looped.plots.recipes import DrawnFigure
from tl_looped.plots.summaries import summary_of

_COLOURS: tuple[Colour, ...] = (*SEVERAL[1:], (0.13, 0.55, 0.33), (0.60, 0.45, 0.10), SEVERAL[0])
_BANDS = "Lines are means over seeds, bands one standard deviation (n - 1)"


def training_curves(curves: pd.DataFrame, control: str | None = None) -> DrawnFigure:
    """Held-out loss over training tokens.

    Args:
        curves: ``configuration, seed, tokens, held_out_loss``; the last in nats per token.
        control: The configuration that is drawn dashed and black.
    """
    table = curves.assign(millions=curves["tokens"] / 1e6)
    lines = _lines(table, "millions", "held_out_loss", control)
    panel = Panel("", "training tokens (millions)", "held-out loss (nats per token)", lines)
    caption = f"Held-out loss during training, at the trained recurrences. {_BANDS}. {_n(curves)}."
    return _drawn("fig_curves", "Training curves", caption, [panel], {"band": "sd"})


def loss_over_recurrences(
    evaluation: pd.DataFrame, trained: int | None = None, control: str | None = None
) -> DrawnFigure:
    """Held-out loss of the final models at other recurrences than they were trained with.

    Args:
        evaluation: ``configuration, seed, recurrences, held_out_loss``.
        trained: Recurrences of the training, marked.
        control: The configuration with a single recurrence: a dashed line over the whole width.
    """
    lines = _lines(evaluation, "recurrences", "held_out_loss", control)
    wide = max(float(line.x.max()) for line in lines)
    lines = tuple(_across(line, wide) if line.label == control else line for line in lines)
    marked = None if trained is None else (float(trained), "trained")
    axis = "held-out loss (nats per token)"
    panel = Panel("", "recurrences", axis, lines, integer_x=True, marked_x=marked)
    caption = (
        f"Held-out loss of the final models by recurrences"
        f"{'' if trained is None else f'; dotted: the {trained} of the training'}. {_BANDS}. "
        f"{_n(evaluation)}."
    )
    settings: dict[str, object] = {"band": "sd", "trained": trained}
    return _drawn("fig_loss", "Loss by recurrences", caption, [panel], settings)


def steps_over_recurrences(runs: Mapping[str, Sequence[xr.Dataset]]) -> DrawnFigure:
    """The relative step of the last core layer over recurrences, on a logarithmic axis.

    Args:
        runs: Results by depth with ``successive_rel``, one per seed, by configuration.
    """
    lines = []
    for (name, seeds), colour in zip(runs.items(), _COLOURS, strict=False):
        if not seeds:
            continue
        loop = geometry_of(seeds[0])
        last = [loop.index(r, loop.k - 1) for r in range(1, loop.R)]
        rows = []
        for data in seeds:
            values = data["successive_rel"]
            values = values.mean("prompt") if "prompt" in values.dims else values
            rows.append(values.to_numpy()[last])
        x = np.arange(1, loop.R, dtype=np.float64)
        lines.append(Line(name, x, summary_of(np.stack(rows, 1)), colour))
    if not lines:
        raise InputError("runs hold no result")
    axis = "step of the last core layer, relative to the norm"
    panel = Panel("", "recurrence (0-based)", axis, tuple(lines), log=True, integer_x=True)
    n = "; ".join(f"{name}: {len(seeds)}" for name, seeds in runs.items())
    caption = f"Steps of the loop, those of the training and beyond. {_BANDS}. Seeds: {n}."
    return _drawn("fig_steps", "Steps of the loop", caption, [panel], {"band": "sd"})


def _lines(table: pd.DataFrame, x: str, y: str, control: str | None) -> tuple[Line, ...]:
    names = list(dict.fromkeys(table["configuration"]))
    if not names:
        raise InputError("the table holds no configuration")
    colours = iter(_COLOURS * len(names))
    lines = []
    for name in names:
        mine = table[table["configuration"] == name]
        wide = mine.pivot(index=x, columns="seed", values=y).sort_index()
        values = summary_of(wide.to_numpy(dtype=np.float64))
        at = wide.index.to_numpy(dtype=np.float64)
        if name == control:
            lines.append(Line(name, at, values, FEEDFORWARD, style="--"))
        else:
            lines.append(Line(name, at, values, next(colours)))
    return tuple(lines)


def _across(line: Line, end: float) -> Line:
    values = line.values.loc[line.values.index.repeat(2)]
    return replace(line, x=np.array([1.0, end]), values=values)


def _n(table: pd.DataFrame) -> str:
    seeds = table.groupby("configuration", sort=False)["seed"].nunique()
    return "Seeds: " + "; ".join(f"{name}: {n}" for name, n in seeds.items())


def _drawn(
    name: str, title: str, caption: str, panels: list[Panel], settings: dict[str, object]
) -> DrawnFigure:
    figure = draw_panels(panels, title, caption)
    return DrawnFigure(0, name, title, caption, figure, numbers_of(panels), dict(settings))
