"""Panels of lines, drawn one way: axes, bands, legends or colour bars, and a caption underneath.

A figure is described by frozen ``Panel``s of ``Line``s first and drawn afterwards, so that the
numbers behind it are those that were drawn. Decisions: up to eight recurrences or layers get a
legend, more a colour bar; a logarithmic axis leaves out what is not positive and stays linear where
nothing is; a defined value between two undefined ones is a dot; the more lines a panel has, the
thinner they and the fainter their bands are.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogFormatter, MaxNLocator

from tl_looped.errors import InputError
from tl_looped.plots.colours import CODA, PRELUDE, Colour

Key = Literal["recurrence", "layer", "other"]
Style = Literal["-", "--", ":", "-."]

MOST_IN_LEGEND = 8
_MARKED = 16  # lines of so many points, and panels of so many lines, have markers
_KEY_TITLES = {"recurrence": "recurrence", "layer": "core layer"}
_TITLE_SIZE, _CAPTION_SIZE = 11, 8  # points
_LEGEND_LINE = 26  # characters
_BAR_WIDTH = 0.7  # inches, with its label
_STEPS = (1, 2, 4, 5, 10)
_MARK: dict[str, Any] = {"color": "0.45", "linestyle": ":", "linewidth": 1.2}


@dataclass(frozen=True)
class Line:
    """One line.

    Args:
        label: What it is, for legends and tables.
        x: Where its values stand.
        values: ``mean``, ``low``, ``high`` and ``n``, one row per place, see
            :func:`tl_looped.plots.summaries.summary_of`.
        colour: Its colour.
        key: What its colour means.
        index: The recurrence or layer that its colour stands for.
        style: matplotlib's line style.
        width: In points.
        marker: matplotlib's marker, or "" to leave the choice to the number of points.
    """

    label: str
    x: Float[np.ndarray, " site"]
    values: pd.DataFrame
    colour: Colour
    key: Key = "other"
    index: int = 0
    style: Style = "-"
    width: float = 1.3
    marker: str = ""


@dataclass(frozen=True)
class Span:
    """A shaded range of the horizontal axis, labelled."""

    start: float
    end: float
    colour: Colour
    label: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        title: Of the panel; empty for a figure of one.
        x_label, y_label: With units.
        lines: What is drawn, the last on top.
        log: Logarithmic vertical axis.
        spans: Shaded ranges.
        verticals: Thin vertical lines.
        integer_x: Ticks at whole numbers only.
        marked_x: A dotted line and what stands at it.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log: bool = False
    spans: tuple[Span, ...] = ()
    verticals: tuple[float, ...] = ()
    integer_x: bool = False
    marked_x: tuple[float, str] | None = None


def stage_spans(ends: tuple[float, float, float, float]) -> tuple[Span, ...]:
    """Prelude from ``ends[0]`` to ``ends[1]`` and coda from ``ends[2]`` to ``ends[3]``, if any."""
    spans = (Span(ends[0], ends[1], PRELUDE, "prelude"), Span(ends[2], ends[3], CODA, "coda"))
    return tuple(span for span in spans if span.end > span.start)


def draw_panels(
    panels: Sequence[Panel],
    title: str,
    caption: str,
    columns: int = 2,
    size: tuple[float, float] = (4.6, 3.1),
    share_y: bool = False,
) -> Figure:
    """Draw panels in reading order.

    Args:
        panels: At least one.
        title: Of the figure.
        caption: Text underneath; wrapped. Empty for none.
        columns: Most panels in a row.
        size: Width and height of a panel in inches; a single one is drawn larger.
        share_y: One vertical scale for all panels.
    """
    if not panels:
        raise InputError("panels: there is nothing to draw")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width, height = (6.0, 4.1) if len(panels) == 1 else size
    handles, bars = _keys(panels)
    beside = _legend_width(handles) if handles else 0.0
    whole = columns * width + len(bars) * _BAR_WIDTH + beside
    figure = new_figure(whole, rows * height, title, caption, beside)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    every = list(grid.flat)
    for axes, panel in zip(every, panels, strict=False):
        draw_panel(axes, panel, int(12.5 * height))
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    for key, colours in bars.items():
        _add_bar(figure, every[: len(panels)], f"{_KEY_TITLES[key]} (0-based)", colours)
    if handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def as_written(text: str) -> str:
    """A text for matplotlib in which ``$``, of a model's name or a token, begins no mathematics."""
    return text.replace("$", r"\$")


def new_figure(
    width: float, height: float, title: str, caption: str, beside: float = 0.0
) -> Figure:
    """An empty figure with a title above and a wrapped caption below, both within its size.

    Args:
        width, height: In inches; title and caption come on top.
        title: In one line, or wrapped.
        caption: Empty for none.
        beside: Inches in the upper right corner that the title leaves to a legend.
    """
    heading = _wrapped(title, width - beside, _TITLE_SIZE)
    text = _wrapped(caption, width, _CAPTION_SIZE)
    extra = 0.16 * (text.count("\n") + 1) * bool(text) + 0.2 * (heading.count("\n") + 1)
    figure = Figure(figsize=(width, height + extra), layout="constrained")
    figure.suptitle(as_written(heading), fontsize=_TITLE_SIZE, x=0.01, ha="left")
    if text:
        figure.supxlabel(as_written(text), fontsize=_CAPTION_SIZE, color="0.3", x=0.01, ha="left")
    return figure


def _wrapped(text: str, width: float, size: int) -> str:
    """Lines of at most ``width`` inches, as the font has it; a longer word has its own line."""
    lines: list[str] = []
    filled, space = 0.0, _width(" ", size)
    for word in text.split():
        taken = _width(word, size)
        # Renderers round the widths of letters: a little room for that, and the margin.
        if lines and filled + space + taken <= 0.95 * width:
            lines[-1] += f" {word}"
            filled += space + taken
        else:
            lines.append(word)
            filled = taken
    return "\n".join(lines)


@lru_cache(maxsize=4096)
def _width(text: str, size: int) -> float:
    """Inches of a word."""
    font = FontProperties(size=size)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 72


def draw_panel(axes: Axes, panel: Panel, label_width: int = 42) -> None:
    """Draw one panel into axes; legends and colour bars are the figure's.

    Args:
        axes: Where.
        panel: What.
        label_width: Characters that fit along the vertical axis.
    """
    for span in panel.spans:
        axes.axvspan(span.start, span.end, color=span.colour, alpha=0.07, linewidth=0)
        # Above the axes, where no line passes.
        axes.annotate(
            span.label, ((span.start + span.end) / 2, 1.01), fontsize=7, color=span.colour,
            xycoords=axes.get_xaxis_transform(), ha="center", va="bottom",
        )  # fmt: skip
    for x in panel.verticals:
        axes.axvline(x, color="0.85", linewidth=0.7, zorder=0)
    log = panel.log and any(_positive(line.values["mean"].to_numpy()).any() for line in panel.lines)
    banded = sum(bool(np.isfinite(line.values["low"]).any()) for line in panel.lines)
    for line in panel.lines:
        _draw_line(axes, line, log, len(panel.lines), banded)
    if log:
        axes.set_yscale("log")
        _plain_ticks(axes)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if panel.log and not log and all_zero(panel):
        axes.text(0.5, 0.5, "0 everywhere", transform=axes.transAxes, ha="center", va="bottom")
    _limit(axes, panel, log)
    if panel.marked_x is not None:
        axes.axvline(panel.marked_x[0], **_MARK)
    if panel.integer_x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=_STEPS))
        every = np.concatenate([line.x for line in panel.lines])
        if every.size and every.min() == every.max():
            axes.set_xticks([every[0]])
    if not any(np.isfinite(line.values["mean"]).any() for line in panel.lines):
        say_undefined(axes)
    # Above the names of prelude and coda, which wide spans bring to the middle.
    axes.set_title(as_written(panel.title), fontsize=10, pad=13 if panel.spans else 6)
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(textwrap.fill(panel.y_label, label_width), fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.22)


def say_undefined(axes: Axes) -> None:
    """Say in the middle of axes that nothing is defined there."""
    axes.text(0.5, 0.5, "undefined throughout", transform=axes.transAxes, ha="center",
              color="0.35", fontsize=10)  # fmt: skip


class _Plain(LogFormatter):
    """Ticks of a logarithmic axis as plain numbers, where the formatter shows any."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.4g}" if super().__call__(x, pos) else ""


def _plain_ticks(axes: Axes) -> None:
    """Plain numbers on a short logarithmic axis; powers of ten stay on a long one."""
    low, high = axes.get_ylim()
    if high / low < 100 and low >= 1e-4 and high < 1e5:
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(_Plain(minor_thresholds=(2, 0.5)))


def all_zero(panel: Panel) -> bool:
    """Whether every value is zero: a logarithmic axis has no room for them."""
    values = np.concatenate([line.values["mean"] for line in panel.lines])
    finite = values[np.isfinite(values)]
    return bool(finite.size) and not finite.any()


def _limit(axes: Axes, panel: Panel, log: bool) -> None:
    """The whole run on the horizontal axis, undefined or not; shares of 0 not below 0."""
    x = np.concatenate([line.x for line in panel.lines])
    ends = [edge for span in panel.spans for edge in (span.start, span.end)]
    low, high = min([*x, *ends]), max([*x, *ends])
    margin = 0.04 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    means = np.concatenate([line.values["mean"] for line in panel.lines])
    finite = means[np.isfinite(means)]
    if finite.size and not finite.any() and not log:
        axes.set_ylim(-0.05, 1.0)


def _positive(values: Float[np.ndarray, " n"]) -> np.ndarray:
    return np.isfinite(values) & (values > 0)


def _draw_line(axes: Axes, line: Line, log: bool, n_lines: int, banded: int) -> None:
    mean, low, high = (
        np.where(_positive(y), y, np.nan) if log else y
        for y in line.values[["mean", "low", "high"]].to_numpy().T
    )
    few = len(mean) <= _MARKED and n_lines <= 2 * _MARKED
    marker = line.marker or ("o" if few else "")
    label = as_written(line.label) if line.key == "other" else "_"
    thin = 0.55 if n_lines > 2 * _MARKED else 0.75 if n_lines > _MARKED else 1.0
    width = line.width * (1.0 if line.key == "other" else thin)
    axes.plot(
        line.x, mean, color=line.colour, linestyle=line.style, linewidth=width,
        marker=marker, markersize=3, label=label, gid=line.label,
    )  # fmt: skip
    alone = np.isfinite(mean)
    alone &= ~np.isfinite(np.r_[np.nan, mean[:-1]]) & ~np.isfinite(np.r_[mean[1:], np.nan])
    if alone.any() and not marker:
        axes.plot(line.x[alone], mean[alone], ".", color=line.colour, markersize=4, label="_")
    if np.isfinite(low).any():
        alpha = min(0.16, max(0.02, 0.7 / banded))
        axes.fill_between(line.x, low, high, color=line.colour, alpha=alpha, linewidth=0)


def _keys(panels: Sequence[Panel]) -> tuple[list[Line2D], dict[Key, dict[int, Colour]]]:
    """Entries of the figure's legend, and what has too many for it and gets a colour bar."""
    lines = [line for panel in panels for line in panel.lines]
    handles: list[Line2D] = []
    bars: dict[Key, dict[int, Colour]] = {}
    keys: tuple[Key, Key] = ("recurrence", "layer")
    for key in keys:
        colours = {line.index: line.colour for line in lines if line.key == key}
        if len(colours) > MOST_IN_LEGEND:
            bars[key] = dict(sorted(colours.items()))
        else:
            handles += [
                Line2D([], [], color=colours[i], label=f"{_KEY_TITLES[key]} {i}")
                for i in sorted(colours)
            ]
    others = {line.label: line for line in lines if line.key == "other"}
    handles += [
        Line2D([], [], color=line.colour, linestyle=line.style, linewidth=line.width,
               marker=line.marker, markersize=3,
               label=as_written(textwrap.fill(name, _LEGEND_LINE)))
        for name, line in others.items()
    ]  # fmt: skip
    marks = {panel.marked_x[1]: None for panel in panels if panel.marked_x is not None}
    handles += [
        Line2D([], [], label=as_written(textwrap.fill(text, _LEGEND_LINE)), **_MARK)
        for text in marks
    ]
    return (handles if len(handles) > 1 or others else []), bars


def _legend_width(handles: Sequence[Line2D]) -> float:
    """Inches that a legend takes at 8 points."""
    words = [part for handle in handles for part in str(handle.get_label()).split("\n")]
    return 0.55 + 0.07 * max(map(len, words))


def _add_bar(figure: Figure, axes: list[Axes], label: str, colours: dict[int, Colour]) -> None:
    """A colour bar with a block of one unit, its number in its middle, for every entry."""
    first, last = next(iter(colours)), next(reversed(colours))
    scale = ScalarMappable(Normalize(first - 0.5, last + 0.5), ListedColormap([*colours.values()]))
    bar = figure.colorbar(scale, ax=axes, fraction=0.04, pad=0.02, aspect=30)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=_STEPS))


def numbers_of(panels: Sequence[Panel]) -> pd.DataFrame:
    """What the panels show: a row per point, ``panel, line, x, mean, low, high, n``."""
    tables = [
        line.values.assign(panel=panel.title or panel.y_label, line=line.label, x=line.x)
        for panel in panels
        for line in panel.lines
    ]
    columns = ["panel", "line", "x", "mean", "low", "high", "n"]
    return pd.concat(tables, ignore_index=True)[columns]
