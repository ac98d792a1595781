"""Figures of a loop: lines by recurrence and layer, and a layer-by-layer heat map.

Each function returns a Figure and shows nothing. Layers go from blue to green, later layers
greener.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tl_looped.plots.colours import layer_colours


def by_recurrence(
    values: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    title: str,
    label: str,
    caption: str,
    trained: int | None = None,
    log: bool = False,
) -> Figure:
    """One line a layer over the recurrences, with a band.

    Args:
        values: ``[recurrence, layer]``; NaN where undefined.
        low, high: Edges of the band, of the same shape.
        title: What is shown.
        label: Label of the vertical axis, with its unit.
        caption: How it was made: prompts, recurrences, what the band is.
        trained: Number of recurrences the model was trained with; its last one is marked.
        log: Logarithmic vertical axis; zeros are left out.
    """
    n_recurrences, n_layers = values.shape
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    recurrences = np.arange(n_recurrences)
    for layer, colour in enumerate(layer_colours(n_layers)):
        mean, lower, upper = (array[:, layer].copy() for array in (values, low, high))
        if log:
            for array in (mean, lower, upper):
                array[array <= 0] = np.nan
        axes.plot(
            recurrences, mean, color=colour, marker="o", markersize=3, label=f"core layer {layer}"
        )
        axes.fill_between(recurrences, lower, upper, color=colour, alpha=0.15, linewidth=0)
    if trained is not None and trained < n_recurrences:
        axes.axvline(trained - 1, color="0.5", linestyle=":", linewidth=1.2)
        axes.annotate(
            " last trained recurrence", (trained - 1, 0.02), fontsize=8, color="0.35",
            xycoords=axes.get_xaxis_transform(),
        )  # fmt: skip
    if log:
        axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("recurrence r (0-based)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, ncols=min(4, n_layers), fontsize=9)
    figure.supxlabel(caption, fontsize=8, color="0.35")
    return figure


def layer_heat_map(
    matrix: np.ndarray,
    boundaries: Sequence[int],
    stage_labels: Sequence[tuple[float, str]],
    title: str,
    label: str,
    caption: str,
) -> Figure:
    """A square matrix over effective layers.

    Args:
        matrix: ``[layer, layer]``.
        boundaries: Effective layers at which a recurrence or a stage begins; drawn as thin lines.
        stage_labels: Tick position and text, along both axes.
        title: What is shown.
        label: Label of the colour bar.
        caption: How it was made.
    """
    figure = Figure(figsize=(7.2, 6.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="viridis", interpolation="nearest", aspect="equal")
    for edge in boundaries:
        axes.axhline(edge - 0.5, color="white", linewidth=0.25, alpha=0.5)
        axes.axvline(edge - 0.5, color="white", linewidth=0.25, alpha=0.5)
    ticks, names = zip(*stage_labels, strict=True)
    axes.set_xticks(ticks, names, rotation=90, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set_title(title)
    axes.set_xlabel("effective layer, by recurrence")
    axes.set_ylabel("effective layer, by recurrence")
    figure.colorbar(image, ax=axes, shrink=0.82, label=label)
    figure.supxlabel(caption, fontsize=8, color="0.35")
    return figure


def loss_curve(
    tokens: Sequence[float],
    train: Sequence[float],
    held_out: Sequence[float],
    caption: str,
    title: str = "Demo model: loss",
) -> Figure:
    """Training and held-out loss over training tokens."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    millions = np.asarray(tokens) / 1e6
    axes.plot(millions, train, color="0.55", marker=".", label="training, mean since last point")
    axes.plot(millions, held_out, color="tab:blue", marker="o", markersize=3, label="held out")
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.supxlabel(caption, fontsize=8, color="0.35")
    return figure
