"""The mirroring score of a run against a feedforward result, with its interval over prompts.

Decisions, ours:

- A *feedforward* result is one of a core without prelude and coda that ran once.
- The score of a metric is Pearson's r between the mean curves over prompts (heads averaged first)
  of ``[prelude, block_r, coda]`` and of the feedforward model, both read off at 101 depths as in
  :func:`tl_looped.metrics.mirroring.mirroring_score`, then averaged over the recurrences.
- Its interval is a percentile bootstrap over prompts: it says how the score depends on the prompts,
  and nothing about other checkpoints. Two curves that both rise correlate whatever they mean.
- Where both results are of the same prompts, none left out in one of them alone, a resample draws
  the same prompts for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from jaxtyping import Float

from tl_looped.errors import InputError
from tl_looped.experiments.reading import (
    Missing,
    bos_apart,
    is_feedforward,
    same_prompts,
    specification,
)
from tl_looped.metrics.catalogue import OUTPUTS, STAGE
from tl_looped.metrics.labels import geometry_of
from tl_looped.metrics.mirroring import GRID_POINTS
from tl_looped.model.geometry import LoopGeometry
from tl_looped.words import called

_AT_A_TIME = 50  # resamples; part of what a seed means

# The first that a result holds stands in the summary: ColSum is what the paper's Figure 8 compares.
MIRRORED = ("colsum_concentration", *(name for name in STAGE if name != "colsum_concentration"))


@dataclass(frozen=True)
class Mirroring:
    """Mirroring score of one metric; see the module.

    Args:
        metric: Name of the metric.
        label: What it is called.
        score: Mean over recurrences of Pearson's r.
        low, high: Percentile bootstrap interval over prompts; NaN with one prompt, and where a
            resample has a curve without spread.
        best: Recurrence with the largest r, and that r.
        n_prompts: Prompts of the looped and of the feedforward result, without those left out.
        left_out: Prompts of either that have a value that is not finite.
        paired: Whether both drew the same prompts in a resample.
        confidence, n_resamples, seed: Of the bootstrap.
    """

    metric: str
    label: str
    score: float
    low: float
    high: float
    best: tuple[int, float]
    n_prompts: tuple[int, int]
    left_out: tuple[int, int]
    paired: bool
    confidence: float
    n_resamples: int
    seed: int


@dataclass(frozen=True)
class MirroringTable:
    """Scores of one run against one feedforward run.

    Args:
        against: Name of the feedforward run.
        model: Its model.
        scores: A metric each, the summary's first.
        without: Metrics without a score, and why.
        apart: What must be known to read the scores; empty if nothing.
    """

    against: str
    model: str
    scores: tuple[Mirroring, ...]
    without: dict[str, Missing]
    apart: str = ""


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn."""

    n_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_resamples < 2 or not 0 < self.confidence < 1 or self.seed < 0:
            raise InputError(
                "n_resamples must be at least 2, confidence between 0 and 1, seed not negative; "
                f"got {self}"
            )


def mirroring_of(
    name: str, runs: Mapping[str, xr.Dataset], resampling: Resampling
) -> MirroringTable | Missing:
    """The scores of a run against the feedforward result among the others.

    That is the run which the attribute or specification of this one names as ``feedforward``, by
    its model or its own name; else the only feedforward run of another model. Where several fit,
    one on the same prompts is taken.
    """
    data = runs[name]
    against = _feedforward_of(name, runs)
    if isinstance(against, Missing):
        return against
    other = runs[against]
    paired = same_prompts(data, other)
    scores, without = [], {}
    for metric in MIRRORED:
        if metric not in data or metric not in other:
            which = name if metric not in data else against
            without[metric] = Missing(f"the results of {which} hold no {metric}")
            continue
        score = _score(metric, data, other, paired, resampling)
        if isinstance(score, Missing):
            without[metric] = score
        else:
            scores.append(score)
    if not scores:
        return Missing("; ".join(dict.fromkeys(missing.reason for missing in without.values())))
    model = called(str(other.attrs.get("model", "")) or against)
    return MirroringTable(against, model, tuple(scores), without, bos_apart(data, other))


def _feedforward_of(name: str, runs: Mapping[str, xr.Dataset]) -> str | Missing:
    data = runs[name]
    model = data.attrs.get("model")
    others = {run: d for run, d in runs.items() if is_feedforward(d) and run != name}
    named = data.attrs.get("feedforward") or specification(data).get("feedforward")
    if isinstance(named, str) and named:
        # A folder is named by its path, and its model by the last part of that.
        names = {named, Path(named).name}
        others = {r: d for r, d in others.items() if names & {r, *_names(d)}}
        if not others:
            return Missing(f"the feedforward result {named!r} is not among the runs")
    else:
        others = {run: d for run, d in others.items() if d.attrs.get("model") != model}
    same = {run: d for run, d in others.items() if same_prompts(data, d)}
    found = list(same or others)
    if not found:
        return Missing("no feedforward result among the runs")
    if len(found) > 1:
        return Missing(
            f"{len(found)} feedforward results ({', '.join(found)}): say which with "
            'feedforward = "..." in the specification, or tl-looped report --feedforward'
        )
    return found[0]


def _names(data: xr.Dataset) -> set[str]:
    """What the model of a result is called; in results of earlier versions by a path."""
    model = str(data.attrs.get("model", ""))
    return {model, called(model)}


def _score(
    metric: str, data: xr.Dataset, other: xr.Dataset, paired: bool, resampling: Resampling
) -> Mirroring | Missing:
    loop = geometry_of(data)
    looped = np.stack([_curve(data, metric, _virtual(loop, r)) for r in range(loop.R)])
    feedforward = _curve(other, metric, np.arange(geometry_of(other).n_layers))[None]
    if min(looped.shape[-1], feedforward.shape[-1]) < 1 or loop.R == 0:
        return Missing("there is no prompt or no recurrence")
    keep, keep_other = (np.isfinite(x).all((0, 1)) for x in (looped, feedforward))
    if paired:
        keep = keep_other = keep & keep_other
    n, m = int(keep.sum()), int(keep_other.sum())
    if not n or not m:
        return Missing("every prompt has a value that is not finite")
    looped, feedforward = looped[..., keep], feedforward[..., keep_other]
    each = _pearson(looped.mean(-1), feedforward.mean(-1))
    if np.isnan(each).any():
        return Missing(f"a curve of {metric} is constant over depth: no correlation")
    low = high = math.nan
    if n > 1 and m > 1:  # one prompt has a score, but nothing to resample
        low, high = _interval(looped, feedforward, paired, resampling)
    best = int(each.argmax())
    return Mirroring(
        metric=metric,
        label=OUTPUTS[metric].label,
        score=float(each.mean()),
        low=low,
        high=high,
        best=(best, float(each[best])),
        n_prompts=(n, m),
        left_out=(len(keep) - n, len(keep_other) - m),
        paired=paired,
        confidence=resampling.confidence,
        n_resamples=resampling.n_resamples,
        seed=resampling.seed,
    )


def _virtual(loop: LoopGeometry, r: int) -> np.ndarray:
    """Effective layers of ``[prelude, block_r, coda]``."""
    first = loop.p + r * loop.k
    end = loop.n_layers
    return np.r_[0 : loop.p, first : first + loop.k, end - loop.c : end]


def _curve(data: xr.Dataset, metric: str, layers: np.ndarray) -> Float[np.ndarray, "grid prompt"]:
    """A metric over depth at 0, 1, ..., 100 %, for each prompt; heads are averaged first."""
    values = data[metric]
    if "head" in values.dims:
        values = values.mean("head", skipna=False)
    rows = values.transpose("effective_layer", "prompt").to_numpy()[layers].astype(np.float64)
    at = np.linspace(0, 1, GRID_POINTS) * (len(layers) - 1)
    below = np.minimum(at.astype(int), max(len(layers) - 2, 0))
    above = np.minimum(below + 1, len(layers) - 1)
    share = (at - below)[:, None]
    with np.errstate(invalid="ignore"):  # what is not finite is left out by the caller
        between = (1 - share) * rows[below] + share * rows[above]
    return np.where(share == 0, rows[below], between)


def _pearson(
    g: Float[np.ndarray, "*batch recurrence grid"], f: Float[np.ndarray, "*batch 1 grid"]
) -> Float[np.ndarray, "*batch recurrence"]:
    """NaN where a curve has no spread, to 1e-12 of its largest value."""
    flat = [np.ptp(x, axis=-1) <= 1e-12 * np.abs(x).max(-1) for x in (g, f)]
    a, b = (x - x.mean(-1, keepdims=True) for x in (g, f))
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    safe = np.where(flat[0] | flat[1] | (size == 0), math.nan, size)
    return ((a * b).sum(-1) / safe).clip(-1, 1)


def _interval(
    looped: np.ndarray, feedforward: np.ndarray, paired: bool, resampling: Resampling
) -> tuple[float, float]:
    """Percentile interval of the score over resampled prompts."""
    rng = np.random.default_rng(resampling.seed)
    scores = []
    for _ in range(0, resampling.n_resamples, _AT_A_TIME):
        ours, theirs = (_draws(rng, x.shape[-1]) for x in (looped, feedforward))
        g = np.moveaxis(looped @ ours, -1, 0)  # [resample, recurrence, grid]
        f = np.moveaxis(feedforward @ (ours if paired else theirs), -1, 0)
        scores.append(_pearson(g, f).mean(-1))
    tail = (1 - resampling.confidence) / 2
    drawn = np.concatenate(scores)[: resampling.n_resamples]
    low, high = np.quantile(drawn, [tail, 1 - tail])  # NaN if a resample has no score
    return float(low), float(high)


def _draws(rng: np.random.Generator, n: int) -> Float[np.ndarray, "prompt resample"]:
    """Weights of the prompts in some resamples."""
    return rng.multinomial(n, np.full(n, 1 / n), size=_AT_A_TIME).T / n
