"""The curve of a training run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tl_looped.plots.panels import as_written


def loss_curve(
    tokens: Sequence[float],
    train: Sequence[float],
    held_out: Sequence[float],
    caption: str,
    title: str = "Loss",
) -> Figure:
    """Training and held-out loss over training tokens."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    millions = np.asarray(tokens) / 1e6
    axes.plot(millions, train, color="0.55", marker=".", label="training, mean since last point")
    axes.plot(millions, held_out, color="tab:blue", marker="o", markersize=3, label="held out")
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(as_written(title))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.supxlabel(as_written(caption), fontsize=8, color="0.35")
    return figure
