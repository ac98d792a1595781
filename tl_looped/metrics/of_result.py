"""Verdicts and limiting behaviours from a labelled result, by whichever door it came.

A result of ``stream_metrics`` or ``over_cache`` holds the summary series that
``tl_looped.metrics.convergence`` decides on, so that a stream of 128 recurrences gets its verdicts
without any state. They are of whole prompts: of each quantity the largest over layers, as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.metrics.catalogue import LOWEST_COSINE
from tl_looped.metrics.convergence import ConvergenceSeries, Verdict, convergence_verdict
from tl_looped.metrics.labels import by_recurrence, geometry_of
from tl_looped.metrics.limiting import LimitingBehavior, classify_limiting_behavior
from tl_looped.model.config import parse_dtype

CONVERGENCE = (
    "successive_abs",
    "successive_rel",
    "successive_direction",
    "residual_mean",
    "fixed_point_abs",
    LOWEST_COSINE,
)
"""What :func:`convergence_of_result` reads; give it to ``stream_metrics`` or ``over_cache``."""

TOKEN = ("token_cosine", "token_distance_similarity")
"""What :func:`limiting_of_result` reads, one or the other."""


def convergence_of_result(
    data: xr.Dataset, longer: xr.Dataset | None = None, eps: float | None = None
) -> xr.Dataset:
    """The convergence verdict of every prompt, from a result with the metrics ``CONVERGENCE``.

    Args:
        data: Of a run with R recurrences.
        longer: Of a run with 2R recurrences on the same prompts and from the same start; without it
            the a-posteriori bound stands in. The residual ``rho_R`` and the distance to ``x_2R``
            are then ratios of means over tokens, where states give means of ratios.
        eps: Tolerance of relative steps; by the states' dtype if None.

    Returns:
        Over ``prompt``: ``verdict`` (values of :class:`Verdict`; ``verdict_name`` spells them),
        ``settled_at``, ``rate``, ``half_life``, ``period``, ``bound``.

    Raises:
        InputError: if a result lacks a metric, compares with another reference than its own last
            recurrence, or ``longer`` has not twice the recurrences and the same prompts.
    """
    series = _series(data, CONVERGENCE)
    residual = distance = None
    if longer is not None:
        residual, distance = _of_longer(data, series["residual_mean"][-1], longer)
    lowest = series[LOWEST_COSINE][-1]
    # One layer agrees with itself.
    alone = geometry_of(data).k == 1
    result = convergence_verdict(
        ConvergenceSeries(
            step=series["successive_abs"],
            relative_step=series["successive_rel"],
            direction_step=series["successive_direction"],
            norm=series["residual_mean"],
            from_last=series["fixed_point_abs"],
            dtype=parse_dtype(str(data.attrs["dtype"]).removeprefix("torch.")),
            residual=residual,
            distance_2r=distance,
            min_layer_cosine=torch.full_like(lowest, torch.nan) if alone else lowest,
        ),
        eps,
    )
    names = ("verdict", "settled_at", "rate", "half_life", "period", "bound")
    found = {name: ("prompt", getattr(result, name).numpy()) for name in names}
    spelled = [Verdict(value).name for value in result.verdict.tolist()]
    found["verdict_name"] = ("prompt", np.array(spelled))
    units = {"settled_at": "recurrences", "half_life": "recurrences", "period": "recurrences"}
    out = xr.Dataset(found, coords={"prompt": data["prompt"]}, attrs=data.attrs)
    for name in names:
        out[name].attrs["units"] = units.get(name, "1")
    return out.assign_attrs(eps=result.eps, confirmed=int(result.confirmed))


def _series(data: xr.Dataset, names: tuple[str, ...]) -> dict[str, Tensor]:
    """``[recurrence, prompt]`` of every metric: the largest over layers, NaN if one has it."""
    missing = [name for name in names if name not in data.data_vars]
    if missing:
        raise InputError(
            f"data lacks {', '.join(missing)}: compute tl_looped.metrics.CONVERGENCE as well"
        )
    if "reference_recurrences" in data.attrs:
        raise InputError(
            "data compares with a longer run, where the verdict needs the run's own last "
            "recurrence: leave reference_recurrences out, and give the longer run as longer="
        )
    found = {}
    for name, values in by_recurrence(data)[list(names)].items():
        if "layer" in values.dims:
            values = values.max("layer", skipna=False)
        found[str(name)] = torch.from_numpy(values.transpose("recurrence", "prompt").values.copy())
    return found


def _of_longer(data: xr.Dataset, norm: Tensor, longer: xr.Dataset) -> tuple[Tensor, Tensor]:
    """Residual and distance to the state at 2R, relative to the norm at R."""
    n = geometry_of(data).R
    same = geometry_of(longer) == geometry_of(data).with_recurrences(2 * n)
    if not same or longer["prompt"].values.tolist() != data["prompt"].values.tolist():
        raise InputError(
            f"longer must be of a run with {2 * n} recurrences of the same model and prompts, got "
            f"{geometry_of(longer)} with {longer.sizes['prompt']} prompts"
        )
    names = ("successive_abs", "fixed_point_abs", "residual_mean")
    series = _series(longer, names)
    off = (series["residual_mean"][n - 1] - norm).abs() / norm
    if bool((off > 1e-2).any()):
        raise InputError(
            f"longer belongs to another run: its norm after {n} recurrences is off by "
            f"{float(off.max()):.3g}. Give both the same prompts and state_seed"
        )
    return series["successive_abs"][n] / norm, series["fixed_point_abs"][n - 1] / norm


def limiting_of_result(
    data: xr.Dataset,
    on: str = "token_cosine",
    window: int = 64,
    tau: float = 0.05,
    rho: float = 0.9,
) -> xr.Dataset:
    """The limiting behaviour of every token at every core layer, from per-token similarities.

    Args:
        data: With ``token_cosine`` (the paper's) or ``token_distance_similarity``, its twin that
            also sees the norm; see ``tl_looped.metrics.limiting``.
        on: Which of the two.
        window, tau, rho: See :func:`classify_limiting_behavior`.

    Returns:
        Over ``layer, token, prompt``: ``limiting_label`` (values of :class:`LimitingBehavior`,
        UNDEFINED at padding), ``limiting_late``, ``limiting_period``, ``limiting_amplitude``. The
        labels' last two dimensions swapped are what ``cooccurrence`` and ``label_percentages``
        take, with a mask from ``n_tokens``.

    Raises:
        InputError: without the similarities, or with fewer than ``window + 1`` recurrences.
    """
    if on not in TOKEN or on not in data.data_vars:
        raise InputError(
            f"on must be one of {', '.join(TOKEN)} and in the data, got {on!r}: compute the group "
            "'token'"
        )
    similarity = by_recurrence(data[[on]])[on]
    similarity = similarity.transpose("layer", "token", "prompt", "recurrence")
    result = classify_limiting_behavior(
        torch.from_numpy(similarity.values.copy()), window, tau, rho
    )
    dims = ("layer", "token", "prompt")
    found = {
        "limiting_label": (dims, result.labels.numpy().astype(np.int8)),
        "limiting_late": (dims, result.late.numpy()),
        "limiting_period": (dims, result.period.numpy()),
        "limiting_amplitude": (dims, result.amplitude.numpy()),
    }
    coords = {dim: similarity[dim] for dim in dims} | {"n_tokens": data["n_tokens"]}
    out = xr.Dataset(found, coords=coords, attrs=data.attrs)
    settings: dict[str, Any] = {"limiting_on": on, "window": window, "tau": tau, "rho": rho}
    out["limiting_label"].attrs["labels"] = " ".join(
        f"{kind.value}:{kind.name}" for kind in LimitingBehavior
    )
    return out.assign_attrs(settings)
