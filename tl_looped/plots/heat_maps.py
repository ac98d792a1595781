"""Matrices between all effective layers (Figs 2, 19-21) and of conditional probabilities (14)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tl_looped.errors import InputError
from tl_looped.model.geometry import LoopGeometry
from tl_looped.plots.colours import CODA, PRELUDE
from tl_looped.plots.panels import new_figure, say_undefined

_MOST_TICKS = 24
_MOST_EDGES = 40


def stage_ticks(loop: LoopGeometry) -> list[tuple[float, str]]:
    """Where prelude, recurrences and coda have their middle; thinned so that labels stay apart.

    Prelude and coda come first, then the recurrences in steps of a power of two.
    """
    n = loop.n_layers
    ends = [(loop.p / 2 - 0.5, "prelude")] if loop.p else []
    ends += [(n - loop.c / 2 - 0.5, "coda")] if loop.c else []
    step = 1
    while loop.R / step > _MOST_TICKS:
        step *= 2
    kept = list(ends)
    for r in range(0, loop.R, step):
        middle = loop.index(r, 0) + (loop.k - 1) / 2
        if all(abs(middle - at) >= n / (_MOST_TICKS + 6) for at, _ in ends):
            kept.append((middle, f"r{r}"))
    return sorted(kept)


def layer_matrix(
    matrix: Float[np.ndarray, "layer layer"],
    loop: LoopGeometry,
    title: str,
    label: str,
    caption: str = "",
    limits: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """A square matrix over effective layers, with recurrences, prelude and coda on both axes.

    Args:
        matrix: NaN where undefined (drawn grey).
        loop: Geometry of the run.
        title, caption: Of the figure.
        label: Of the colour bar, with its unit.
        limits: Of the colours; the data's where None.

    Raises:
        InputError: if the matrix is not of the run's layers.
    """
    n = loop.n_layers
    if matrix.shape != (n, n):
        raise InputError(f"matrix must be [{n}, {n}] for a run of shape {loop}, got {matrix.shape}")
    figure = new_figure(7.4, 6.2, title, caption)
    axes = figure.subplots()
    masked = np.ma.masked_invalid(matrix)
    image = axes.imshow(
        masked, cmap="viridis", interpolation="nearest", vmin=limits[0], vmax=limits[1]
    )
    axes.set_facecolor("0.8")
    if masked.mask.all():
        say_undefined(axes)
    if loop.R <= _MOST_EDGES:
        for r in range(loop.R + 1):
            edge = loop.p + r * loop.k - 0.5
            axes.axhline(edge, color="white", linewidth=0.3, alpha=0.6)
            axes.axvline(edge, color="white", linewidth=0.3, alpha=0.6)
    ticks, names = zip(*stage_ticks(loop), strict=True)
    axes.set_xticks(ticks, names, rotation=90, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_color({"prelude": PRELUDE, "coda": CODA}.get(text.get_text(), "black"))
    axes.set_xlabel("effective layer, by recurrence (0-based)", fontsize=9)
    axes.set_ylabel("effective layer, by recurrence (0-based)", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def matrix_numbers(matrix: Float[np.ndarray, "layer layer"], loop: LoopGeometry) -> pd.DataFrame:
    """A matrix over effective layers, labelled ``prelude.0``, ``r3.l1``, ``coda.0``.

    The labels of the rows are the column ``effective_layer``: files are written without an index.
    """
    labels = loop.labels()
    table = pd.DataFrame(matrix, index=labels, columns=labels)
    return table.rename_axis("effective_layer").reset_index()


def probability_map(
    probabilities: Float[np.ndarray, "given shown"],
    rows: list[str],
    columns: list[str],
    title: str,
    caption: str = "",
) -> Figure:
    """``P(column | row)`` with its numbers; a row that was never seen is grey and says so.

    Args:
        probabilities: 0 to 1, NaN where undefined.
        rows: What is given, with counts.
        columns: What is shown.
        title, caption: Of the figure.
    """
    figure = new_figure(6.4, 4.4, title, caption)
    axes = figure.subplots()
    masked = np.ma.masked_invalid(probabilities)
    image = axes.imshow(masked, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_facecolor("0.88")
    _write_numbers(axes, probabilities)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_xlabel("b: shown by some layer at the same token", fontsize=9)
    axes.set_ylabel("a: shown by some layer", fontsize=9)
    figure.colorbar(image, ax=axes).set_label("P(b | a)", fontsize=9)
    return figure


def _write_numbers(axes: Axes, values: Float[np.ndarray, "given shown"]) -> None:
    for (row, column), value in np.ndenumerate(values):
        text = "none seen" if np.isnan(value) else f"{value:.3g}"
        dark = np.isfinite(value) and value < 0.55
        axes.text(column, row, text, ha="center", va="center", fontsize=9,
                  color="white" if dark else "0.1")  # fmt: skip
