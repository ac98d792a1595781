"""Every attention map of one prompt on one sheet (Figure 63): a floor plan of the run.

Rows are effective layers, the first at the bottom, columns are heads; prelude rows are framed in
blue and coda rows in red. A run of many layers and few heads goes on in further towers to the
right, so that maps stay large enough to be seen; none parts a recurrence. Within a map the queries
run downwards and the keys to the right. The colour is the square root of the weight, so that small
weights show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tl_looped.errors import InputError
from tl_looped.model.geometry import LoopGeometry
from tl_looped.plots.colours import CODA, PRELUDE
from tl_looped.plots.panels import new_figure, say_undefined

_GAP = 2
_SHEET = (14.0, 13.0)  # inches
_BETWEEN = 0.7  # inches, for the names of storeys
_LARGEST_TILE = 0.6
_MOST_TOWERS = 12
_MOST_PIXELS = 1 << 27


def attention_floor_plan(
    patterns: Float[np.ndarray, "layer head query key"],
    loop: LoopGeometry,
    title: str,
    caption: str = "",
) -> Figure:
    """Draw every map.

    Args:
        patterns: Attention weights, 0 to 1; NaN is grey.
        loop: Geometry of the run.
        title, caption: Of the figure.

    Raises:
        InputError: if the patterns are not those of the run's layers, or too many to draw.
    """
    layers, heads, T = patterns.shape[:3]
    if layers != loop.n_layers or patterns.shape[3] != T or heads == 0 or T == 0:
        raise InputError(
            f"patterns must be [{loop.n_layers}, head, token, token] for shape {loop}, got "
            f"{patterns.shape}"
        )
    side = T + _GAP
    if layers * heads * side * side > _MOST_PIXELS:
        raise InputError(
            f"patterns: {layers} x {heads} maps of {T} tokens are too many for one sheet: take a "
            "shorter prompt or fewer recurrences"
        )
    towers, tile = _arranged(loop, heads)
    rows = max(tower[-1].last - tower[0].first for tower in towers)
    wide = len(towers) * (heads * tile + _BETWEEN)
    figure = new_figure(max(5.0, wide + 1.2), max(3.0, rows * tile + 0.9), title, caption)
    every = list(figure.subplots(1, len(towers), squeeze=False).flat)
    for axes, tower in zip(every, towers, strict=True):
        _draw_tower(axes, patterns, tower, rows, tile)
    every[0].set_ylabel("effective layer, by recurrence (depth upwards)", fontsize=9)
    image = every[0].images[0]
    bar = figure.colorbar(image, ax=every, shrink=0.5, aspect=30, pad=0.02)
    shown = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)
    bar.set_ticks([x**0.5 for x in shown], labels=[f"{x:g}" for x in shown])
    bar.set_label("attention weight (colour: its square root)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if not np.isfinite(patterns).any():
        say_undefined(every[0])
    return figure


@dataclass(frozen=True)
class Tower:
    """Where the maps of some successive layers stand in a floor plan that was drawn.

    Lengths are shares of the figure's width and height, from its upper left corner. The map of
    effective layer ``first + i`` and head ``h``, with half of the gap around it, reaches from
    ``left + h * width`` to the right and from ``bottom - i * height`` upwards.

    Args:
        first, last: Its layers are ``first`` to ``last - 1``.
        left, bottom: The lower left corner of its lowest layer's head 0.
        width, height: Of one map.
    """

    first: int
    last: int
    left: float
    bottom: float
    width: float
    height: float


def towers_of(figure: Figure, loop: LoopGeometry, heads: int, tokens: int) -> list[Tower]:
    """Where the maps stand in a figure of :func:`attention_floor_plan` that was drawn or saved.

    Args:
        figure: The figure.
        loop: Geometry of the run.
        heads, tokens: Of its patterns.
    """
    towers, _ = _arranged(loop, heads)
    rows, side = max(tower[-1].last - tower[0].first for tower in towers), tokens + _GAP
    found = []
    for axes, tower in zip(figure.axes, towers, strict=False):  # the colour bar comes last
        edge = -_GAP / 2 - 0.5
        to_share = axes.transData + figure.transFigure.inverted()
        left, low = to_share.transform((edge, edge + rows * side))
        right, high = to_share.transform((edge + side, edge + (rows - 1) * side))
        found.append(Tower(tower[0].first, tower[-1].last, left, 1 - low, right - left, high - low))
    return found


@dataclass(frozen=True)
class _Storey:
    """Prelude, one recurrence or coda: effective layers ``first`` to ``last - 1``."""

    name: str
    first: int
    last: int


def _storeys(loop: LoopGeometry) -> list[_Storey]:
    core = [
        _Storey(f"r{r}", loop.index(r, 0), loop.index(r, 0) + loop.k)
        for r in range(loop.R)
        if loop.k
    ]
    n = loop.n_layers
    every = [_Storey("prelude", 0, loop.p), *core, _Storey("coda", n - loop.c, n)]
    return [storey for storey in every if storey.last > storey.first]


def _arranged(loop: LoopGeometry, heads: int) -> tuple[list[list[_Storey]], float]:
    """Storeys by tower, and the side of a map in inches: the largest that fits the sheet."""
    storeys, best, size = _storeys(loop), [_storeys(loop)], 0.0
    for n in range(1, _MOST_TOWERS + 1):
        most, towers = -(-loop.n_layers // n), [[storeys[0]]]
        for storey in storeys[1:]:
            if storey.last - towers[-1][0].first <= most:
                towers[-1].append(storey)
            else:
                towers.append([storey])
        rows = max(tower[-1].last - tower[0].first for tower in towers)
        across = (_SHEET[0] - _BETWEEN * len(towers)) / (heads * len(towers))
        tile = min(_LARGEST_TILE, across, _SHEET[1] / rows)
        if tile > size + 1e-9:
            best, size = towers, tile
    return best, size


def _draw_tower(
    axes: Axes,
    patterns: Float[np.ndarray, "layer head query key"],
    tower: list[_Storey],
    rows: int,
    tile: float,
) -> None:
    """One tower, whose lowest layer stands at the bottom of ``rows`` rows."""
    heads, T = patterns.shape[1:3]
    side, first, last = T + _GAP, tower[0].first, tower[-1].last
    sheet = np.full((rows * side - _GAP, heads * side - _GAP), np.nan)
    sheet[: (rows - (last - first)) * side] = 0.0  # the sky: white, where undefined is grey
    for layer, head in np.ndindex(last - first, heads):
        top, left = (rows - 1 - layer) * side, head * side
        sheet[top : top + T, left : left + T] = np.sqrt(patterns[first + layer, head])
    axes.set_facecolor("0.85")
    axes.imshow(np.ma.masked_invalid(sheet), cmap="Greys", vmin=0, vmax=1,
                interpolation="nearest" if tile >= 0.3 else "antialiased")  # fmt: skip
    axes.spines[:].set_visible(False)
    edge = -_GAP / 2 - 0.5
    for storey in tower:
        top, height = (rows - storey.last + first) * side + edge, storey.last - storey.first
        colour = {"prelude": PRELUDE, "coda": CODA}.get(storey.name)
        if colour:
            axes.add_patch(
                Rectangle((edge, top), heads * side, height * side, fill=False, edgecolor=colour,
                          linewidth=2.0, clip_on=False)
            )  # fmt: skip
        elif storey is not tower[-1]:
            axes.axhline(top, color="tab:green", linewidth=0.6)
    _label(axes, tower, heads, side, rows, tile)


def _label(axes: Axes, tower: list[_Storey], heads: int, side: int, rows: int, tile: float) -> None:
    middle, step = side / 2 - _GAP / 2 - 0.5, -(-heads // 20)
    axes.set_xticks(
        [h * side + middle for h in range(0, heads, step)], list(map(str, range(0, heads, step))),
        fontsize=8,
    )  # fmt: skip
    # Every n-th recurrence, where names of 0.16 inches would touch.
    apart = max(1, int(np.ceil(0.16 / (tile * min(s.last - s.first for s in tower)))))
    named = [s for i, s in enumerate(tower) if i % apart == 0 or s.name in ("prelude", "coda")]
    places = [(rows - 0.5 - (s.first + s.last - 1) / 2 + tower[0].first) * side for s in named]
    axes.set_yticks([y - side / 2 + middle for y in places], [s.name for s in named], fontsize=8)
    axes.set_xlabel("head (0-based)", fontsize=9)
