"""Verdicts and limiting behaviours of runs: from states, or from a labelled result.

A result of ``stream`` or ``from_cache`` holds the summary series that
``tl_looped.metrics.convergence`` decides on, so that a stream of 128 recurrences gets its verdicts
without any state. They are of whole prompts: of each quantity the largest over layers, as there.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tl_looped.checks import checked, one_of
from tl_looped.errors import InputError
from tl_looped.metrics.catalogue import LOWEST_COSINE
from tl_looped.metrics.convergence import (
    ConvergenceResult,
    ConvergenceSeries,
    Verdict,
    decide,
)
from tl_looped.metrics.convergence_states import convergence_series
from tl_looped.metrics.inputs import counted_tokens
from tl_looped.metrics.labels import by_recurrence, geometry_of
from tl_looped.metrics.limiting import (
    LimitingBehavior,
    LimitingBehaviors,
    classify_limiting_behavior,
    cosine_similarity,
    distance_similarity,
)
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
"""What :func:`convergence_verdict` reads of a result: give it to ``stream`` or ``from_cache``."""

Similarity = Literal["cosine", "distance"]

_SIMILARITIES = {"cosine": "token_cosine", "distance": "token_distance_similarity"}


@checked
@overload
def convergence_verdict(
    run: Float[Tensor, "recurrence layer *batch pos d_model"],
    longer: Float[Tensor, "recurrence2 layer *batch pos d_model"] | None = None,
    attention_mask: Tensor | None = None,
    eps: float | None = None,
    skip_first: int = 0,
    per_token: bool = False,
) -> ConvergenceResult: ...


@checked
@overload
def convergence_verdict(
    run: ConvergenceSeries, *, eps: float | None = None
) -> ConvergenceResult: ...


@checked
@overload
def convergence_verdict(
    run: xr.Dataset,
    longer: xr.Dataset | None = None,
    *,
    eps: float | None = None,
    same_start: bool = False,
) -> xr.Dataset: ...


@checked
def convergence_verdict(
    run: Tensor | xr.Dataset | ConvergenceSeries,
    longer: Any = None,
    attention_mask: Tensor | None = None,
    eps: float | None = None,
    skip_first: int = 0,
    per_token: bool = False,
    same_start: bool = False,
) -> ConvergenceResult | xr.Dataset:
    """The convergence verdict of every prompt; ``metrics.convergence`` says how it is decided.

    Args:
        run: States of R recurrences, ``[recurrence, layer, ..., pos, d_model]``, as
            ``cache.stack_recurrences("resid_post")`` gives them; a result with the metrics
            ``CONVERGENCE``, which has its own mask and skipped tokens; or a series.
        longer: The same of a run with 2R recurrences on the same prompts and from the same start;
            without it the a-posteriori bound stands in. Of results the residual ``rho_R`` and the
            distance to ``x_2R`` are ratios of means over tokens, of states means of ratios.
        attention_mask: Mask of states, ``[*batch, pos]``, zero at padding.
        eps: Tolerance of relative steps, between 0 and 1; by the states' dtype if None.
        skip_first: Real tokens at the beginning that are left out of means of states.
        per_token: Judge each token of states by itself: results are ``[*batch, pos]``, UNDEFINED at
            padding and at the tokens that are skipped.
        same_start: That both results start alike is known. Otherwise it is checked by the norms and
            steps that both have, which a chaotic loop and other kernels can set apart as well.

    Returns:
        A :class:`ConvergenceResult`; of a result a dataset over ``prompt``: ``verdict`` (values of
        :class:`Verdict`; ``verdict_name`` spells them), ``settled_at``, ``rate``,
        ``relative_rate``, ``half_life``, ``period``, ``bound``.

    Raises:
        InputError: wrong shapes; if a result lacks a metric or compares with another reference than
            its own last recurrence; if ``longer`` has not twice the recurrences and the same
            prompts; for arguments that do not belong to what is given.
    """
    of_states = {
        "attention_mask": attention_mask is not None,
        "skip_first": skip_first != 0,
        "per_token": per_token,
    }
    if isinstance(run, Tensor):
        _only("states", same_start=same_start)
        return _of_states(run, longer, attention_mask, eps, skip_first, per_token)
    if isinstance(run, xr.Dataset):
        _only("a result", **of_states)
        return _of_result(run, longer, eps, same_start)
    _only("a series", longer=longer is not None, same_start=same_start, **of_states)
    return decide(run, eps)


def _only(what: str, **given: bool) -> None:
    """Refuse arguments that belong to another kind of run."""
    if wrong := [name for name, there in given.items() if there]:
        raise InputError(f"{', '.join(wrong)} cannot be given with {what}")


def _of_states(
    states: Tensor,
    longer: Tensor | None,
    attention_mask: Tensor | None,
    eps: float | None,
    skip_first: int,
    per_token: bool,
) -> ConvergenceResult:
    if not per_token:
        return decide(convergence_series(states, longer, attention_mask, skip_first), eps)
    counted = counted_tokens(states[0], attention_mask, skip_first)

    def alone(x: Tensor) -> Tensor:
        if counted is not None:
            x = x.masked_fill(~counted[..., None], math.nan)
        return x.unsqueeze(-2)

    return decide(convergence_series(alone(states), None if longer is None else alone(longer)), eps)


def _of_result(
    data: xr.Dataset, longer: xr.Dataset | None, eps: float | None, same_start: bool
) -> xr.Dataset:
    if data["prompt"].ndim != 1:
        raise InputError("data must have a dimension prompt: select with a list, isel(prompt=[0])")
    series = _series(data, CONVERGENCE)
    residual = distance = None
    if longer is not None:
        residual, distance = _of_longer(data, longer, same_start)
    lowest = series[LOWEST_COSINE][-1]
    # One layer agrees with itself.
    alone = geometry_of(data).k == 1
    result = decide(
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


@checked
@overload
def limiting_behavior(
    run: Float[Tensor, "recurrence *batch pos d_model"],
    on: Similarity | str = "cosine",
    window: int = 64,
    tau: float = 0.05,
    rho: float = 0.9,
) -> LimitingBehaviors: ...


@checked
@overload
def limiting_behavior(
    run: xr.Dataset,
    on: Similarity | str = "cosine",
    window: int = 64,
    tau: float = 0.05,
    rho: float = 0.9,
) -> xr.Dataset: ...


@checked
def limiting_behavior(
    run: Tensor | xr.Dataset,
    on: Similarity | str = "cosine",
    window: int = 64,
    tau: float = 0.05,
    rho: float = 0.9,
) -> LimitingBehaviors | xr.Dataset:
    """:func:`classify_limiting_behavior` of every token: of a layer's states, or of a result.

    Args:
        run: States of one layer, the last core layer in the paper,
            ``[recurrence, ..., pos, d_model]``; or a result with the metrics of the group
            ``"token"``, of all core layers.
        on: ``"cosine"``, the paper's :func:`cosine_similarity`, or ``"distance"``,
            :func:`distance_similarity`, its twin that also sees the norm.
        window, tau, rho: See :func:`classify_limiting_behavior`.

    Returns:
        :class:`LimitingBehaviors`; of a result a dataset over ``layer, token, prompt``:
        ``limiting_label`` (values of :class:`LimitingBehavior`, UNDEFINED at padding),
        ``limiting_late``, ``limiting_period``, ``limiting_amplitude``. ``cooccurrence`` takes the
        labels as ``prompt, layer, token``, ``label_percentages`` as ``layer, prompt, token``;
        tokens count from the first real one, so that ``arange(token) < n_tokens`` is the mask of
        both.

    Raises:
        InputError: wrong shapes, a result without the similarities, or fewer than ``window + 1``
            recurrences.
    """
    one_of(on, "on", get_args(Similarity))
    if isinstance(run, xr.Dataset):
        return _limiting_of_result(run, on, window, tau, rho)
    similarity = cosine_similarity if on == "cosine" else distance_similarity
    return classify_limiting_behavior(similarity(run), window, tau, rho)


def _limiting_of_result(
    data: xr.Dataset, on: str, window: int, tau: float, rho: float
) -> xr.Dataset:
    name = _SIMILARITIES[on]
    if name not in data.data_vars:
        raise InputError(f"data lacks {name}: compute the group 'token'")
    if "reference_recurrences" in data.attrs:
        raise InputError(
            "data compares with a longer run, where the algorithm takes the run's own last state: "
            "leave reference_recurrences out"
        )
    similarity = by_recurrence(data[[name]])[name]
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
    settings: dict[str, Any] = {"limiting_on": name, "window": window, "tau": tau, "rho": rho}
    out["limiting_label"].attrs["labels"] = " ".join(
        f"{kind.value}:{kind.name}" for kind in LimitingBehavior
    )
    return out.assign_attrs(settings)
