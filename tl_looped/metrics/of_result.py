"""Verdicts and limiting behaviours from a labelled result, by whichever door it came.

A result of ``stream_metrics`` or ``over_cache`` holds the summary series that
``tl_looped.metrics.convergence`` decides on, so that a stream of 128 recurrences gets its verdicts
without any state. They are of whole prompts: of each quantity the largest over layers, as there.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from tl_looped.words import count

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


HEAVY_SHARE = 0.5
"""Share of the summed norm above which one token decides what is averaged over tokens."""

FEWEST_TOKENS = 4
"""Of a prompt that :func:`heavy_token` looks at: of two, one always holds half."""


def convergence_of_result(
    data: xr.Dataset,
    longer: xr.Dataset | None = None,
    eps: float | None = None,
    same_start: bool = False,
) -> xr.Dataset:
    """The convergence verdict of every prompt, from a result with the metrics ``CONVERGENCE``.

    Args:
        data: Of a run with R recurrences.
        longer: Of a run with 2R recurrences on the same prompts and from the same start; without it
            the a-posteriori bound stands in. The residual ``rho_R`` and the distance to ``x_2R``
            are then ratios of means over tokens, where states give means of ratios.
        eps: Tolerance of relative steps; by the states' dtype if None.
        same_start: That both runs start alike is known. Otherwise it is checked by the norms and
            steps that both have, which a chaotic loop and other kernels can set apart as well.

    Returns:
        Over ``prompt``: ``verdict`` (values of :class:`Verdict`; ``verdict_name`` spells them),
        ``settled_at``, ``rate``, ``relative_rate``, ``half_life``, ``period``, ``bound``.

    Raises:
        InputError: if a result lacks a metric, compares with another reference than its own last
            recurrence, or ``longer`` has not twice the recurrences and the same prompts.
    """
    if data["prompt"].ndim != 1:
        raise InputError("data must have a dimension prompt: select with a list, isel(prompt=[0])")
    series = _series(data, CONVERGENCE)
    residual = distance = None
    if longer is not None:
        residual, distance = _of_longer(data, longer, same_start)
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
    names = ("verdict", "settled_at", "rate", "relative_rate", "half_life", "period", "bound")
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
    data = by_recurrence(data)
    if data.sizes["recurrence"] != geometry_of(data).R:
        raise InputError(
            f"data has {data.sizes['recurrence']} of its run's "
            f"{count(geometry_of(data).R, 'recurrence')}, and the verdict is of the whole run"
        )
    for name, values in data[list(names)].items():
        if "layer" in values.dims:
            values = values.max("layer", skipna=False)
        found[str(name)] = torch.from_numpy(values.transpose("recurrence", "prompt").values.copy())
    return found


def _of_longer(data: xr.Dataset, longer: xr.Dataset, same_start: bool) -> tuple[Tensor, Tensor]:
    """Residual and distance to the state at 2R, relative to the norm at R, largest over layers."""
    n = geometry_of(data).R
    same = geometry_of(longer) == geometry_of(data).with_recurrences(2 * n)
    if not same or longer["prompt"].values.tolist() != data["prompt"].values.tolist():
        raise InputError(
            f"longer must be of a run with {2 * n} recurrences of the same model and prompts, got "
            f"{geometry_of(longer)} with {count(longer.sizes['prompt'], 'prompt')}"
        )
    _series(longer, ("successive_abs", "fixed_point_abs", "residual_mean"))  # checks it
    here, there = by_recurrence(data), by_recurrence(longer)
    norm = here["residual_mean"]
    start = [d.attrs.get(name) for d in (data, longer) for name in ("state_seed", "initial_state")]
    if data.attrs.get("skip_first") != longer.attrs.get("skip_first"):
        raise InputError(
            f"longer leaves out {longer.attrs.get('skip_first', 0)} tokens (skip_first), data "
            f"{data.attrs.get('skip_first', 0)}: give both the same"
        )
    off = max(
        float((np.abs(here[name] - there[name].isel(recurrence=slice(n))) / norm).max())
        for name in ("residual_mean", "successive_abs")
    )
    if start[:2] != start[2:] or (off > 1e-2 and not same_start):
        raise InputError(
            f"longer belongs to another run: state_seed and initial_state are {start[:2]} and "
            f"{start[2:]}, norms and steps of the first {count(n, 'recurrence')} are off by up to "
            f"{off:.3g} of the norm. Give both the same prompts and state_seed"
        )
    last = norm.isel(recurrence=n - 1)

    def largest(values: xr.DataArray) -> Tensor:
        worst = (values / last).max("layer", skipna=False)
        return torch.from_numpy(worst.values.copy())

    step = there["successive_abs"].isel(recurrence=n)
    return largest(step), largest(there["fixed_point_abs"].isel(recurrence=n - 1))


@dataclass(frozen=True)
class HeavyToken:
    """That one token of a prompt holds most of the norm of its states.

    Args:
        prompts: In how many prompts it does.
        of: Prompts with at least ``FEWEST_TOKENS`` tokens.
        most: Largest share of the summed norm that one token holds.
        is_first: Whether it is the first token in all of them.
    """

    prompts: int
    of: int
    most: float
    is_first: bool


def heavy_token(data: xr.Dataset) -> HeavyToken | None:
    """Whether means over tokens are mostly one token's; None if not, or if the data do not say.

    So it is said where one token's norm is more than half (``HEAVY_SHARE``) of the sum of all
    tokens' norms, at some core layer and recurrence. Steps and residual entropy are then mostly its
    own too: ``skip_first`` leaves it out. Read from ``residual_mean`` and ``residual_max``.
    """
    names = ("residual_mean", "residual_max")
    if not {*names, "n_tokens"} <= {*data.variables} or "prompt" not in data.dims:
        return None
    loop = geometry_of(data)
    core = slice(loop.p, loop.p + loop.k * loop.R)
    if "effective_layer" in data.dims:
        data = data.isel(effective_layer=core)
    n = data["n_tokens"] - int(data.attrs.get("skip_first", 0))
    enough = (n >= FEWEST_TOKENS).to_numpy()
    data, n = data.isel(prompt=enough), n.isel(prompt=enough)
    largest = data["residual_max"]
    share = (largest / (data["residual_mean"] * n)).where(np.isfinite(largest))
    places = [dim for dim in share.dims if dim != "prompt"]
    heavy = share > HEAVY_SHARE
    prompts = int(heavy.any(places).sum())
    if not prompts:
        return None
    is_first = False
    if "residual_first" in data:
        is_first = bool((np.isclose(data["residual_first"], largest) | ~heavy).all())
    return HeavyToken(prompts, data.sizes["prompt"], float(share.max()), is_first)


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
        UNDEFINED at padding), ``limiting_late``, ``limiting_period``, ``limiting_amplitude``.
        ``cooccurrence`` takes the labels as ``prompt, layer, token``, ``label_percentages`` as
        ``layer, prompt, token``; tokens count from the first real one, so that
        ``arange(token) < n_tokens`` is the mask of both.

    Raises:
        InputError: without the similarities, or with fewer than ``window + 1`` recurrences.
    """
    if on not in TOKEN or on not in data.data_vars:
        raise InputError(
            f"on must be one of {', '.join(TOKEN)} and in the data, got {on!r}: compute the group "
            "'token'"
        )
    if "reference_recurrences" in data.attrs:
        raise InputError(
            "data compares with a longer run, where the algorithm takes the run's own last state: "
            "leave reference_recurrences out"
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
