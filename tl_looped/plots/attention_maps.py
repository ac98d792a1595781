"""Every attention map of one prompt on one sheet (Figure 63): a floor plan of the run.

Rows are effective layers, the first at the bottom, columns are heads; prelude rows are framed in
blue and coda rows in red. Within a map the queries run downwards and the keys to the right. The
colour is the square root of the weight, so that small weights show.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tl_looped.errors import InputError
from tl_looped.model.geometry import LoopGeometry
from tl_looped.plots.colours import CODA, PRELUDE
from tl_looped.plots.heat_maps import stage_ticks
from tl_looped.plots.panels import new_figure

_GAP = 2
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
    sheet = np.full((layers * side, heads * side), np.nan)
    for layer, head in np.ndindex(layers, heads):
        top, left = (layers - 1 - layer) * side, head * side
        sheet[top : top + T, left : left + T] = np.sqrt(patterns[layer, head])
    # Tiles are square; the sheet is bounded, so that it fits a page of the report.
    tile = min(0.9, 11.0 / heads, 14.0 / layers)
    figure = new_figure(max(5.0, heads * tile + 2.2), max(3.0, layers * tile + 0.9), title, caption)
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    image = axes.imshow(np.ma.masked_invalid(sheet), cmap="Greys", vmin=0, vmax=1,
                        interpolation="nearest" if tile >= 0.3 else "antialiased")  # fmt: skip
    for first, n, colour in ((0, loop.p, PRELUDE), (layers - loop.c, loop.c, CODA)):
        if n:
            top = (layers - first - n) * side - _GAP / 2 - 0.5
            axes.add_patch(
                Rectangle((-_GAP / 2 - 0.5, top), heads * side, n * side, fill=False,
                          edgecolor=colour, linewidth=2.0, clip_on=False)
            )  # fmt: skip
    for r in range(1, loop.R):
        axes.axhline((layers - loop.index(r, 0)) * side - _GAP / 2 - 0.5, color="tab:green",
                     linewidth=0.5)  # fmt: skip
    _label(axes, loop, heads, side)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=30)
    shown = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)
    bar.set_ticks([x**0.5 for x in shown], labels=[f"{x:g}" for x in shown])
    bar.set_label("attention weight (colour: its square root)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _label(axes, loop: LoopGeometry, heads: int, side: int) -> None:  # type: ignore[no-untyped-def]
    middle = side / 2 - _GAP / 2 - 0.5
    step = -(-heads // 20)
    axes.set_xticks(
        [h * side + middle for h in range(0, heads, step)], list(map(str, range(0, heads, step))),
        fontsize=8,
    )  # fmt: skip
    ticks = stage_ticks(loop)
    rows = [(loop.n_layers - 1 - at) * side + middle for at, _ in ticks]
    axes.set_yticks(rows, [name for _, name in ticks], fontsize=8)
    axes.set_xlabel("head (0-based)", fontsize=9)
    axes.set_ylabel("effective layer, by recurrence (depth upwards)", fontsize=9)
