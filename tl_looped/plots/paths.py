"""Paths of a state in its first two principal components (Figures 5, 15, 26-28).

The same path is drawn twice, coloured by layer and by recurrence, and a third time for its last
half where there are enough recurrences: the first steps from a random state are often the longest
and hide the rest. Both axes of a panel have one scale, so that a circle looks like one.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure

from tl_looped.errors import InputError
from tl_looped.plots.colours import Colour, layer_colours, recurrence_colours
from tl_looped.plots.panels import as_written, new_figure, say_undefined

_LEAST_FOR_LATE = 8


def pca_path(
    coordinates: Float[np.ndarray, "recurrence layer component"],
    explained: Float[np.ndarray, " component"],
    title: str,
    caption: str = "",
) -> Figure:
    """One token's path through layers and recurrences.

    Args:
        coordinates: In the order of the run; two components at least. NaN are gaps.
        explained: Share of the variance of each component; NaN if unknown.
        title, caption: Of the figure.

    Raises:
        InputError: if there are fewer than two components or no point.
    """
    _check(coordinates, explained)
    R, k = coordinates.shape[:2]
    views = [("by layer", 0, "layer"), ("by recurrence", 0, "recurrence")]
    if R >= _LEAST_FOR_LATE:
        views.append((f"recurrences {R // 2} to {R - 1}", R // 2, "recurrence"))
    figure = new_figure(4.3 * len(views), 3.9, title, caption)
    every = figure.subplots(1, len(views), squeeze=False)[0]
    for axes, (name, first, kind) in zip(every, views, strict=True):
        _draw(axes, coordinates, first, kind)
        _label(axes, explained)
        axes.set_title(as_written(name), fontsize=10)
    _add_legend(every[0])
    _bar(figure, every[0], "core layer (0-based)", layer_colours(k))
    _bar(figure, every[1], "recurrence r (0-based)", recurrence_colours(R))
    return figure


def token_paths(
    coordinates: Float[np.ndarray, "token recurrence layer component"],
    explained: Float[np.ndarray, " component"],
    tokens: list[str],
    title: str,
    caption: str = "",
) -> Figure:
    """One panel per token, coloured by recurrence, with all intermediate layers (Figure 15).

    Args:
        coordinates: In components that were fitted on all tokens.
        explained: As in :func:`pca_path`.
        tokens: Titles of the panels.
        title, caption: Of the figure.
    """
    for path in coordinates:
        _check(path, explained)
    columns = min(4, len(tokens))
    rows = -(-len(tokens) // columns)
    figure = new_figure(2.9 * columns + 0.8, 2.8 * rows, title, caption)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, path, token in zip(every, coordinates, tokens, strict=False):
        _draw(axes, path, 0, "recurrence", size=5.0)
        _label(axes, explained)
        axes.set_title(as_written(token), fontsize=9)
    _add_legend(every[0])
    for axes in every[len(tokens) :]:
        axes.set_visible(False)
    bar_of = every[: len(tokens)]
    _bar(figure, bar_of, "recurrence r (0-based)", recurrence_colours(coordinates.shape[1]))
    return figure


def path_numbers(
    coordinates: Float[np.ndarray, "recurrence layer component"],
) -> pd.DataFrame:
    """A row a point: ``recurrence, layer, pc1, pc2, ...``."""
    R, k, components = coordinates.shape
    r, layer = np.indices((R, k))
    table = pd.DataFrame({"recurrence": r.ravel(), "layer": layer.ravel()})
    for c in range(components):
        table[f"pc{c + 1}"] = coordinates[:, :, c].ravel()
    return table


def _check(path: Float[np.ndarray, "recurrence layer component"], explained: np.ndarray) -> None:
    if path.ndim != 3 or path.shape[2] < 2 or 0 in path.shape:
        raise InputError(
            "coordinates must be [recurrence, layer, component] with at least two components, got "
            f"shape {path.shape}"
        )
    if explained.shape != path.shape[2:]:
        raise InputError(
            f"explained must have one value for each of {path.shape[2]} components, got shape "
            f"{explained.shape}"
        )


def _draw(
    axes: Axes,
    path: Float[np.ndarray, "recurrence layer component"],
    first: int,
    kind: str,
    size: float = 14.0,
) -> None:
    R, k = path.shape[:2]
    shown = path[first:]
    x, y = shown[..., 0].ravel(), shown[..., 1].ravel()
    many = len(x) > 200
    axes.plot(x, y, color="0.7", linewidth=0.3 if many else 0.6, zorder=1)
    scale = layer_colours(k) if kind == "layer" else recurrence_colours(R)
    which = np.tile(np.arange(k), R - first) if kind == "layer" else np.arange(first, R).repeat(k)
    axes.scatter(x, y, c=[scale[i] for i in which], s=size, zorder=2, linewidths=0)
    axes.plot(x[:1], y[:1], "o", mfc="none", mec="black", markersize=8, label="first", zorder=3)
    axes.plot(x[-1:], y[-1:], "*", color="black", markersize=9, label="last", zorder=3)
    if not np.isfinite(x + y).any():
        say_undefined(axes)
    axes.set_aspect("equal", adjustable="datalim")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.22)


def _add_legend(axes: Axes) -> None:
    """What the first and the last state are drawn as: once a figure, where no point is."""
    axes.legend(fontsize=7, loc="best", framealpha=0.8, edgecolor="0.8")


def _label(axes: Axes, explained: Float[np.ndarray, " component"]) -> None:
    shares = [
        "variance undefined" if math.isnan(x) else f"{100 * x:.1f} % of variance" for x in explained
    ]
    axes.set_xlabel(f"component 1 ({shares[0]})", fontsize=8)
    axes.set_ylabel(f"component 2 ({shares[1]})", fontsize=8)


def _bar(figure: Figure, axes: Axes | list[Axes], label: str, colours: list[Colour]) -> None:
    n = len(colours)
    scale: Colormap = ListedColormap(colours)
    few = n <= 16
    norm = BoundaryNorm(np.arange(n + 1) - 0.5, n) if few else Normalize(0, n - 1)
    bar = figure.colorbar(
        ScalarMappable(norm, scale), ax=axes, orientation="vertical", fraction=0.05, pad=0.02
    )
    if few:
        bar.set_ticks(list(range(n)), labels=[str(i) for i in range(n)])
        bar.ax.minorticks_off()
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
