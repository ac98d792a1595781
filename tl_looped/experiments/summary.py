"""The few numbers that say what a run found: the report's summary table.

Everything is read from ``results.nc``; nothing is run. A number that a result does not hold is
:class:`Missing`, with the reason, and never a guess.

Decisions, ours where arXiv 2604.11791 gives none:

- Verdicts are counted over prompts. Rate and half-life are medians over the prompts that have one;
  an infinite half-life (a loop that does not contract) counts.
- The cyclicity index is that of the mean similarity matrix over prompts, core layers alone.
- Mirroring scores: see :mod:`tl_looped.experiments.mirrored`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from tl_looped.errors import DataError
from tl_looped.experiments.mirrored import MirroringTable, Resampling, mirroring_of
from tl_looped.experiments.reading import Missing, is_feedforward
from tl_looped.metrics.convergence import Verdict
from tl_looped.metrics.labels import geometry_of
from tl_looped.metrics.states import cyclicity_index
from tl_looped.model.geometry import LoopGeometry


@dataclass(frozen=True)
class Verdicts:
    """Verdicts of a run.

    Args:
        counts: Prompts by verdict, the most frequent first.
        n: Prompts.
        settled_at: Median recurrence, 0-based, at which the prompts that settle do; NaN if none.
        n_settled: How many settle.
        confirmed: Whether a run of twice the recurrences confirmed them; see
            :mod:`tl_looped.metrics.convergence`. None if the results do not say.
    """

    counts: dict[Verdict, int]
    n: int
    settled_at: float
    n_settled: int
    confirmed: bool | None


@dataclass(frozen=True)
class Median:
    """A median over the prompts that have the number.

    Args:
        value: The median; may be infinite.
        low, high: Quartiles, outwards to the next value of the data.
        n: Prompts that have it.
        of: Prompts.
    """

    value: float
    low: float
    high: float
    n: int
    of: int


@dataclass(frozen=True)
class RunSummary:
    """What the table says about one run."""

    run: str
    model: str
    loop: LoopGeometry
    n_prompts: int
    feedforward: bool
    verdicts: Verdicts | Missing
    rate: Median | Missing
    half_life: Median | Missing
    cyclicity: float | Missing
    mirroring: MirroringTable | Missing


def summarise(
    runs: Mapping[str, xr.Dataset], resampling: Resampling | None = None
) -> list[RunSummary]:
    """One row a run, in the order given; ``runs`` are results by name."""
    resampling = resampling or Resampling()
    return [_summary(name, runs, resampling) for name in runs]


def _summary(name: str, runs: Mapping[str, xr.Dataset], resampling: Resampling) -> RunSummary:
    data = runs[name]
    loop, feedforward = geometry_of(data), is_feedforward(data)
    row = partial(
        RunSummary,
        run=name,
        model=str(data.attrs.get("model", "")) or "unnamed model",
        loop=loop,
        n_prompts=data.sizes["prompt"],
        feedforward=feedforward,
    )
    if feedforward:
        no = Missing("no loop: every layer ran once")
        return row(verdicts=no, rate=no, half_life=no, cyclicity=no, mirroring=no)
    return row(
        verdicts=_verdicts(data),
        rate=_median(data, "rate"),
        half_life=_median(data, "half_life"),
        cyclicity=_cyclicity(data, loop),
        mirroring=mirroring_of(name, runs, resampling),
    )


# -- convergence --------------------------------------------------------------------------------


def _lacks(name: str) -> Missing:
    return Missing(f"the results hold no {name}; the specification did not ask for it")


def _per_prompt(data: xr.Dataset, name: str) -> Float[np.ndarray, " prompt"]:
    if data[name].dims != ("prompt",):
        raise DataError(f"{name} must be one number a prompt, got dimensions {data[name].dims}")
    return data[name].to_numpy().astype(np.float64)


def _verdicts(data: xr.Dataset) -> Verdicts | Missing:
    if "verdict" not in data:
        return _lacks("verdict")
    values = _per_prompt(data, "verdict")
    known = {int(verdict) for verdict in Verdict}
    unknown = sorted({str(v) for v in values.tolist() if v not in known})
    if unknown:
        raise DataError(f"verdict holds {', '.join(unknown)}: values are {list(Verdict)}")
    if not len(values):
        return Missing("there is no prompt")
    counts = {verdict: int((values == int(verdict)).sum()) for verdict in Verdict}
    some = sorted((v for v in Verdict if counts[v]), key=lambda v: -counts[v])
    settled = np.zeros(0)
    if "settled_at" in data:
        settled = _per_prompt(data, "settled_at")
        settled = settled[settled >= 0]
    at = float(np.median(settled)) if len(settled) else math.nan
    said = data["verdict"].attrs.get("confirmed", data.attrs.get("confirmed"))
    confirmed = None if said is None else bool(said)
    return Verdicts({v: counts[v] for v in some}, len(values), at, len(settled), confirmed)


def _median(data: xr.Dataset, name: str) -> Median | Missing:
    if name not in data:
        return _lacks(name)
    values = _per_prompt(data, name)
    there = values[~np.isnan(values)]
    if not len(there):
        return Missing(f"{name} is undefined for every prompt: too few steps above the noise")
    # Quartiles that are values of the data, outwards: halfway to infinity is no number.
    low = np.quantile(there, 0.25, method="lower")
    high = np.quantile(there, 0.75, method="higher")
    return Median(float(np.median(there)), float(low), float(high), len(there), len(values))


def _cyclicity(data: xr.Dataset, loop: LoopGeometry) -> float | Missing:
    name = "pairwise_residual_cosine"
    if name not in data:
        return _lacks(name)
    if loop.R < 2 or loop.k < 2:
        return Missing(
            f"undefined for {loop.R} recurrence(s) of {loop.k} core layer(s): needs two of each"
        )
    matrix = data[name]
    if matrix.dims != ("effective_layer", "other_layer") or len(set(matrix.shape)) != 1:
        raise DataError(f"{name} must be (effective_layer, other_layer), got {dict(matrix.sizes)}")
    core = slice(loop.p, loop.p + loop.k * loop.R)
    similarity = torch.from_numpy(matrix.to_numpy()[core, core].astype(np.float64))
    index = float(cyclicity_index(similarity, loop.k))
    if math.isnan(index):
        return Missing("a core layer has no cosine: states of zero, or not finite")
    return index
