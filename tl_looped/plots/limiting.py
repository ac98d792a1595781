"""The steps of Algorithm 1 on single tokens (Figure 13), for example one of each behaviour.

A row per token, in columns: the similarity of each recurrence's state to the last one, with
``1 - tau`` and the window; the window without its line, under a Hann window; the amplitudes of its
Fourier transform, with the peak and the smallest amplitude that counts. The decision itself is
:func:`tl_looped.metrics.limiting.classify_limiting_behavior`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.signal import detrend
from scipy.signal.windows import hann

from tl_looped.errors import InputError
from tl_looped.metrics.limiting import (
    LimitingBehavior,
    LimitingBehaviors,
    classify_limiting_behavior,
)
from tl_looped.plots.panels import as_written, new_figure

_COLOURS = {
    LimitingBehavior.FIXED: "tab:blue",
    LimitingBehavior.SLIDER: "tab:orange",
    LimitingBehavior.ORBIT: "tab:purple",
    LimitingBehavior.UNKNOWN: "0.4",
    LimitingBehavior.UNDEFINED: "0.7",
}


def amplitudes(
    series: Float[np.ndarray, " recurrence"], window: int
) -> tuple[Float[np.ndarray, " window"], Float[np.ndarray, " bin"]]:
    """The windowed rest and the amplitude of each Fourier bin, the constant set to 0.

    In units of the similarity: a cosine of amplitude a on a bin has amplitude a. The last value of
    the series, trivially 1, is left out.
    """
    shape = hann(window, sym=False)
    rest = detrend(series[-window - 1 : -1]) * shape
    spectrum = np.abs(np.fft.rfft(rest)) * 2 / shape.sum()
    spectrum[0] = 0.0
    if window % 2 == 0:
        spectrum[-1] /= 2
    return rest, spectrum


def algorithm_steps(
    similarity: Float[np.ndarray, "token recurrence"],
    names: Sequence[str],
    title: str,
    caption: str = "",
    window: int = 64,
    tau: float = 0.05,
    rho: float = 0.9,
) -> Figure:
    """Draw the steps for a few tokens.

    Args:
        similarity: To the last recurrence's state.
        names: What each token is.
        title, caption: Of the figure.
        window, tau, rho: Of the algorithm.

    Raises:
        InputError: if there is no token, or an argument does not suit the algorithm.
    """
    if len(similarity) == 0 or len(names) != len(similarity):
        raise InputError(
            f"similarity and names must hold the same tokens, one at least, got {len(similarity)} "
            f"and {len(names)}"
        )
    found = classify_limiting_behavior(torch.from_numpy(similarity), window, tau, rho)
    figure = new_figure(11.5, 2.3 * len(names), title, caption)
    grid = figure.subplots(len(names), 3, squeeze=False)
    for i, row in enumerate(grid):
        label = LimitingBehavior(int(found.labels[i]))
        _draw_similarity(row[0], similarity[i], window, tau, _COLOURS[label])
        said = f"{names[i]}: {label.name.lower()}{_detail(found, i)}"
        row[0].set_title(as_written(said), fontsize=9)
        rest, spectrum = amplitudes(np.nan_to_num(similarity[i]), window)
        row[1].plot(np.arange(-window, 0), rest, color=_COLOURS[label], linewidth=1.1)
        row[1].set_title("window without its line, under a Hann window", fontsize=9)
        row[1].set_xlabel("recurrences before the last", fontsize=8)
        row[1].set_ylabel("similarity", fontsize=8)
        _draw_spectrum(row[2], spectrum, tau, _COLOURS[label])
        for axes in row:
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.22)
    figure.align_ylabels(grid)
    return figure


def _detail(found: LimitingBehaviors, i: int) -> str:
    period = float(found.period[i])
    if np.isfinite(period):
        return f", period {period:.3g} recurrences"
    return " (late)" if bool(found.late[i]) else ""


def _draw_similarity(
    axes: Axes, series: Float[np.ndarray, " recurrence"], window: int, tau: float, colour: str
) -> None:
    n = len(series)
    axes.axvspan(n - 1 - window, n - 2, color="0.9", linewidth=0)
    axes.plot(np.arange(n), series, color=colour, linewidth=1.1)
    axes.axhline(1 - tau, color="0.3", linestyle="--", linewidth=0.9)
    _name_line(axes, r"$1-\tau$", 1 - tau)
    axes.set_xlabel("recurrence r (0-based); window grey", fontsize=8)
    axes.set_ylabel("similarity to the\nlast state", fontsize=8)


def _name_line(axes: Axes, name: str, y: float) -> None:
    """Name a horizontal line outside of the axes, where it covers no data."""
    axes.annotate(name, (1.01, y), fontsize=7, ha="left", va="center",
                  xycoords=axes.get_yaxis_transform(), annotation_clip=False)  # fmt: skip


def _draw_spectrum(
    axes: Axes, spectrum: Float[np.ndarray, " bin"], tau: float, colour: str
) -> None:
    axes.vlines(np.arange(len(spectrum)), 0, spectrum, color=colour, linewidth=1.4)
    axes.axhline(tau / 2, color="0.3", linestyle="--", linewidth=0.9)
    _name_line(axes, r"$\tau/2$", tau / 2)
    axes.set_ylim(0, 1.15 * max(tau / 2, float(spectrum.max())))
    axes.set_title("amplitude by frequency", fontsize=9)
    axes.set_xlabel("turns in the window", fontsize=8)
    axes.set_ylabel("amplitude\n(similarity)", fontsize=8)


def algorithm_numbers(
    similarity: Float[np.ndarray, "token recurrence"],
    names: Sequence[str],
    window: int = 64,
    tau: float = 0.05,
    rho: float = 0.9,
) -> pd.DataFrame:
    """A row per token: ``token, label, period, amplitude, slope, share, late``.

    As :func:`tl_looped.metrics.limiting.classify_limiting_behavior` finds them.
    """
    found = classify_limiting_behavior(torch.from_numpy(similarity), window, tau, rho)
    return pd.DataFrame(
        {
            "token": list(names),
            "label": [LimitingBehavior(int(x)).name for x in found.labels],
            **{
                field: getattr(found, field).numpy()
                for field in ("period", "amplitude", "slope", "share", "late")
            },
        }
    )
