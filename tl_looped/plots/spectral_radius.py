"""The spectral radius of the loop's Jacobian beside the measured rate of convergence.

Two figures that are none of the paper's (their number is 0): every prompt as a point, rate over
radius, and both over a training run. Data are results with the variables of
``tl_looped.metrics.spectrum`` and of ``convergence_verdict``, or datasets made by hand:

- ``spectral_radius``, ``rate``: over any dimensions, all the same ones.
- ``verdict`` (and ``settled_at``), or ``fixed_point_residual``: whether there is a fixed point.
- ``spectral_radius_error``: whether the radius can be trusted; if left out, it is.

A point is full where the radius should predict the rate: the run ended at a fixed point (verdict
CONVERGED, or DEGENERATE of a run that settled; without verdicts, a residual of at most ``eps``) and
the radius's error is at most 1 % of it. Other points are open, and no part of the correlations.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import pearsonr, spearmanr

from tl_looped.errors import InputError
from tl_looped.metrics.convergence import Verdict, default_eps
from tl_looped.model.config import parse_dtype
from tl_looped.plots.colours import NEUTRAL, SEVERAL, Colour, recurrence_colours
from tl_looped.plots.panels import (
    Line,
    Panel,
    as_written,
    draw_panels,
    new_figure,
    numbers_of,
    say_undefined,
)
from tl_looped.plots.recipes import DrawnFigure
from tl_looped.plots.summaries import summary_of, without_band

NO_NUMBER = 0
LARGEST_ERROR = 0.01
_MARKERS = "os^Dv<>P"
_LEAST_POINTS = 3  # below this a correlation says nothing
_AXES = ("spectral radius of the loop's Jacobian at $x_R$", "measured rate of convergence")
_RADIUS, _RATE = SEVERAL[3], SEVERAL[2]
_EXPLAINED = (
    "Rate: factor by which the steps between successive states shrank in the run, a fit over all "
    "steps above the noise floor. Radius: factor by which small deviations from the last state "
    "shrink in the long run"
)


def agreement_points(groups: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """What :func:`radius_against_rate` draws: a row per point, undefined ones included.

    Args:
        groups: Data of each condition by its name; see the module.

    Returns:
        ``group, spectral_radius, rate, at_fixed_point, full``.

    Raises:
        InputError: no group, or one without a variable that is needed.
    """
    if not groups:
        raise InputError("groups must hold at least one dataset by its name, got none")
    tables = []
    for name, data in groups.items():
        _check(name, data)
        radius, rate = _flat(data, "spectral_radius"), _flat(data, "rate")
        fixed = _at_fixed_point(name, data)
        sure = np.ones_like(fixed)
        if "spectral_radius_error" in data:
            sure = _flat(data, "spectral_radius_error") <= LARGEST_ERROR * radius
        table = {"group": name, "spectral_radius": radius, "rate": rate}
        tables.append(pd.DataFrame(table | {"at_fixed_point": fixed, "full": fixed & sure}))
    return pd.concat(tables, ignore_index=True)


def agreement(points: pd.DataFrame) -> dict[str, float]:
    """Numbers of the agreement of rate and radius, over full points with both.

    Args:
        points: Of :func:`agreement_points`.

    Returns:
        ``n``, ``pearson``, ``spearman``, ``median_difference`` (of ``|rate - radius|``) and
        ``median_signed_difference`` (of ``rate - radius``). NaN for fewer than three points, and
        correlations also where one of both is the same everywhere.
    """
    used = points[points["full"] & np.isfinite(points["rate"] + points["spectral_radius"])]
    radius, rate = (used[name].to_numpy(dtype=np.float64) for name in ("spectral_radius", "rate"))
    out = {
        "n": float(len(used)),
        **dict.fromkeys(("pearson", "spearman", "median_difference"), np.nan),
        "median_signed_difference": np.nan,
    }
    if len(used) < _LEAST_POINTS:
        return out
    out["median_difference"] = float(np.median(np.abs(rate - radius)))
    out["median_signed_difference"] = float(np.median(rate - radius))
    if np.ptp(radius) > 0 and np.ptp(rate) > 0:
        out["pearson"] = float(pearsonr(radius, rate).statistic)
        out["spearman"] = float(spearmanr(radius, rate).statistic)
    return out


def radius_against_rate(
    groups: Mapping[str, xr.Dataset],
    about: str = "",
    title: str = "Does the spectral radius predict the rate of convergence?",
    ordered: bool = False,
    unit: str = "prompts",
) -> DrawnFigure:
    """Measured rate over spectral radius, a point per prompt, with the diagonal.

    Args:
        groups: Data of each condition by its name, see the module. One colour and marker each.
        about: First sentences of the caption, without the last full stop: models, prompts,
            recurrences.
        title: Of the figure.
        ordered: The groups are stages of something, for instance training steps: colours of a
            scale in place of different ones.
        unit: What a point is.

    Returns:
        The figure; its numbers are the points, its settings the numbers of :func:`agreement`.

    Raises:
        InputError: as :func:`agreement_points`.
    """
    points = agreement_points(groups)
    found = agreement(points)
    caption = _scatter_caption(points, found, about, unit)
    styles = _styles(list(groups), ordered)
    beside = 2.3 * (len(groups) > 1)  # inches of the legend
    figure = new_figure(5.4 + beside, 5.0, title, caption, beside)
    axes = figure.subplots()
    for name, rows in points.groupby("group", sort=False):
        colour, marker = styles[str(name)]
        for full, part in rows.groupby("full"):
            axes.plot(
                part["spectral_radius"], part["rate"], marker, color=colour,
                mfc=colour if full else "none", markersize=5, alpha=0.8, linestyle="",
            )  # fmt: skip
    _dress_scatter(axes, points)
    if found["n"] >= _LEAST_POINTS:
        axes.annotate(
            f"Pearson {_two(found['pearson'])}, Spearman {_two(found['spearman'])}",
            (0.97, 0.03), xycoords="axes fraction", ha="right", va="bottom", fontsize=8,
        )  # fmt: skip
    _legend(figure, axes, styles, points)
    return DrawnFigure(
        NO_NUMBER, "spectral_radius_against_rate", title, caption, figure, points, dict(found)
    )


def radius_over_training(
    data: xr.Dataset,
    about: str = "",
    title: str = "Spectral radius and rate of convergence over training",
) -> DrawnFigure:
    """Spectral radius and measured rate over training steps, and the held-out loss below.

    Args:
        data: ``spectral_radius`` and ``rate`` over ``step`` and ``prompt``: lines are medians and
            bands quartiles over prompts. With a dimension ``seed`` too: means over prompts, then
            mean and one standard deviation (divisor n - 1) over seeds. ``held_out_loss`` (nats a
            token) over ``step``, and ``seed``, is drawn where it is there.
        about: As in :func:`radius_against_rate`.
        title: Of the figure.

    Returns:
        The figure and its numbers.

    Raises:
        InputError: if a variable or the dimension ``step`` is missing.
    """
    _check("data", data)
    if "step" not in data["spectral_radius"].dims:
        raise InputError(
            f"data must be over step, got dimensions {data['spectral_radius'].dims}: one result a "
            "snapshot, joined along step"
        )
    steps = data["step"].to_numpy().astype(np.float64)
    lines = (
        Line(
            "1: deviations neither shrink nor grow",
            steps,
            without_band(np.ones(len(steps))),
            NEUTRAL,
            style=":",
        ),
        Line("measured rate", steps, _summary(data["rate"]), _RATE, style="--", marker="s"),
        Line("spectral radius", steps, _summary(data["spectral_radius"]), _RADIUS, marker="o"),
    )
    x = "training step"
    panels = [Panel("", x, "factor per recurrence", lines, integer_x=True)]
    if "held_out_loss" in data:
        loss = Line("held-out loss", steps, _loss(data["held_out_loss"]), SEVERAL[1], marker="o")
        panels.append(Panel("", x, "held-out loss (nats per token)", (loss,), integer_x=True))
    caption = _training_caption(data, about)
    figure = draw_panels(panels, title, caption, columns=1, size=(6.0, 3.2))
    settings = {"steps": [int(step) for step in steps]}
    numbers = numbers_of(panels)
    return DrawnFigure(
        NO_NUMBER, "spectral_radius_over_training", title, caption, figure, numbers, settings
    )


# -- data ---------------------------------------------------------------------------------------


def _check(name: str, data: xr.Dataset) -> None:
    missing = [v for v in ("spectral_radius", "rate") if v not in data]
    if missing:
        raise InputError(
            f"{name} lacks {', '.join(missing)}: run the experiment with the extras convergence "
            "and spectrum"
        )
    if data["rate"].dims != data["spectral_radius"].dims:
        raise InputError(
            f"{name}: rate is over {data['rate'].dims} and spectral_radius over "
            f"{data['spectral_radius'].dims}; both must be over the same"
        )


def _flat(data: xr.Dataset, name: str) -> Float[np.ndarray, " point"]:
    values = data[name].broadcast_like(data["rate"]).transpose(*data["rate"].dims)
    return values.to_numpy().astype(np.float64).ravel()


def _at_fixed_point(name: str, data: xr.Dataset) -> Bool[np.ndarray, " point"]:
    if "verdict" in data:
        verdict = _flat(data, "verdict")
        settled = _flat(data, "settled_at") >= 0 if "settled_at" in data else False
        degenerate = (verdict == Verdict.DEGENERATE) & settled
        return np.asarray((verdict == Verdict.CONVERGED) | degenerate)
    if "fixed_point_residual" not in data:
        raise InputError(
            f"{name} has neither verdict nor fixed_point_residual, one of which tells where there "
            "is a fixed point: run the experiment with the extras convergence and spectrum"
        )
    dtype = parse_dtype(str(data.attrs.get("dtype", "float32")).removeprefix("torch."))
    eps = float(data.attrs.get("eps", default_eps(dtype)))
    return np.asarray(_flat(data, "fixed_point_residual") <= eps)


def _summary(values: xr.DataArray) -> pd.DataFrame:
    """Median and quartiles over prompts, or mean and deviation over the seeds' means."""
    finite = values.where(np.isfinite(values))
    if "seed" in finite.dims:
        rest = [dim for dim in finite.dims if dim not in ("step", "seed")]
        return summary_of(finite.mean(rest).transpose("step", "seed").to_numpy())
    rows = finite.transpose("step", ...).to_numpy().reshape(finite.sizes["step"], -1)
    n = np.isfinite(rows).sum(1)
    edges = np.full((3, len(rows)), np.nan)
    if (n > 0).any():
        edges[:, n > 0] = np.nanquantile(rows[n > 0], (0.5, 0.25, 0.75), axis=1)
    edges[1:, n < 2] = np.nan
    return pd.DataFrame(dict(zip(("mean", "low", "high"), edges, strict=True)) | {"n": n})


def _loss(values: xr.DataArray) -> pd.DataFrame:
    rows = values.expand_dims("seed") if "seed" not in values.dims else values
    return summary_of(rows.transpose("step", "seed").to_numpy().astype(np.float64))


# -- captions -----------------------------------------------------------------------------------


def _scatter_caption(points: pd.DataFrame, found: dict[str, float], about: str, unit: str) -> str:
    radius, rate = (np.isfinite(points[name]) for name in ("spectral_radius", "rate"))
    drawn, n = int((radius & rate).sum()), int(found["n"])
    is_open = points[radius & rate & ~points["full"]]
    numbers = f"{drawn} {unit} are drawn"
    if len(is_open):
        away = int((~is_open["at_fixed_point"]).sum())
        parts = [f"{away} where the run did not end at a fixed point"] * bool(away)
        rest = len(is_open) - away
        parts += [f"{rest} where the radius has an error above 1 %"] * bool(rest)
        numbers += f", {len(is_open)} of them open: {', '.join(parts)}"
    if n < _LEAST_POINTS:
        numbers += f". Too few full points ({n}) for a correlation"
    else:
        numbers += (
            f". Over the {n} full ones: Pearson {_two(found['pearson'])}, Spearman "
            f"{_two(found['spearman'])}, median |rate - radius| {found['median_difference']:.3f}, "
            f"median of rate - radius {found['median_signed_difference']:+.3f}"
        )
    missing = []
    if without := int((radius & ~rate).sum()):
        missing.append(f"{without} without a rate (too few steps above the noise floor)")
    if without := int((~radius).sum()):
        missing.append(f"{without} without a radius (not computed, or not finite)")
    left = f"Not drawn: {'; '.join(missing)}" if missing else ""
    return _sentences(about, _EXPLAINED, "On the dashed line both agree", numbers, left)


def _training_caption(data: xr.Dataset, about: str) -> str:
    if "seed" in data["rate"].dims:
        lines = f"Lines: mean over {data.sizes['seed']} seeds of means over prompts, bands one SD"
    else:
        lines = "Lines are medians over prompts, bands the middle half of the prompts"
    gone = int((~np.isfinite(data["rate"]) & np.isfinite(data["spectral_radius"])).sum())
    left = f"{gone} rates are undefined and left out (too few steps above the noise floor)"
    missing = int((~np.isfinite(data["spectral_radius"])).sum())
    radii = f"{missing} radii were not computed, or are not finite: they are over fewer prompts"
    away = ""
    if {"verdict", "fixed_point_residual"} & set(data):
        fixed = _at_fixed_point("data", data)
        if "verdict" not in data:  # known where it was computed
            fixed = fixed[np.isfinite(_flat(data, "fixed_point_residual"))]
        away = f"{int((~fixed).sum())} of {fixed.size} runs did not end at a fixed point"
    return _sentences(
        about, _EXPLAINED, lines, away, left if gone else "", radii if missing else ""
    )


def _sentences(*parts: str) -> str:
    return ". ".join(part for part in parts if part) + "."


def _two(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.2f}"


# -- drawing ------------------------------------------------------------------------------------


def _styles(names: list[str], ordered: bool) -> dict[str, tuple[Colour, str]]:
    if ordered or len(names) > 10:
        colours = recurrence_colours(len(names))
    elif len(names) == 1:
        colours = [_RADIUS]
    else:
        colours = [colormaps["tab10"](i)[:3] for i in range(len(names))]
    marks = ["o" if ordered else _MARKERS[i % len(_MARKERS)] for i in range(len(names))]
    return dict(zip(names, zip(colours, marks, strict=True), strict=True))


def _dress_scatter(axes: Axes, points: pd.DataFrame) -> None:
    both = points[["spectral_radius", "rate"]].to_numpy(dtype=np.float64)
    both = both[np.isfinite(both).all(1)]
    if not len(both):
        say_undefined(axes)
    low, high = (both.min(), both.max()) if len(both) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.05
    ends = (max(0.0, low - margin), high + margin)
    axes.plot(ends, ends, "--", color="0.45", linewidth=1.2, zorder=0)
    if ends[1] > 1:
        for line in (axes.axvline, axes.axhline):
            line(1.0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_aspect("equal")
    axes.set_xlabel(_AXES[0], fontsize=9)
    axes.set_ylabel(_AXES[1], fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.22)


def _legend(
    figure: Figure, axes: Axes, styles: dict[str, tuple[Colour, str]], points: pd.DataFrame
) -> None:
    handles = [Line2D([], [], color="0.45", linestyle="--", label="rate = radius")]
    if len(styles) > 1:
        handles += [
            Line2D(
                [],
                [],
                color=colour,
                marker=marker,
                linestyle="",
                markersize=5,
                label=as_written(name),
            )
            for name, (colour, marker) in styles.items()
        ]
    if not points["full"].all():
        handles.append(
            Line2D([], [], color="0.3", marker="o", mfc="none", linestyle="", markersize=5,
                   label="no fixed point, or unsure radius")
        )  # fmt: skip
    if len(styles) > 1:
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    else:
        axes.legend(handles=handles, loc="upper left", fontsize=8, framealpha=0.8)
