"""The few numbers that say what a run found: the report's summary table.

Everything is read from ``results.nc``; nothing is run. A number that a result does not hold is
:class:`Missing`, with the reason, and never a guess.

Decisions, ours where arXiv 2604.11791 gives none:

- Verdicts are counted over prompts. Rate and half-life are medians over the prompts that have one;
  an infinite half-life (a loop that does not contract) counts.
- The cyclicity index is that of the mean similarity matrix over prompts, core layers alone.
- A *feedforward* result is one of a core without prelude and coda that ran once. The mirroring score
  of a metric is Pearson's r between the mean curves over prompts (heads averaged first) of
  ``[prelude, block_r, coda]`` and of the feedforward model, both read off at 101 depths as in
  :func:`tl_looped.metrics.mirroring.mirroring_score`, then averaged over the recurrences. Its
  interval is a percentile bootstrap over prompts: it says how the score depends on the prompts, and
  nothing about other checkpoints. Two curves that both rise correlate whatever they mean.
- Where both results name the same prompts, a resample draws the same prompts for both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from tl_looped.errors import DataError, InputError
from tl_looped.metrics.catalogue import OUTPUTS, STAGE
from tl_looped.metrics.convergence import Verdict
from tl_looped.metrics.labels import geometry_of
from tl_looped.metrics.mirroring import GRID_POINTS
from tl_looped.metrics.states import cyclicity_index
from tl_looped.model.geometry import LoopGeometry

FORMAT = 1
"""Version of the result files that this module reads: the attribute ``format``."""

RESULTS = "results.nc"

_AT_A_TIME = 50  # resamples; part of what a seed means

# The first that a result holds stands in the summary: ColSum is what the paper's Figure 8 compares.
MIRRORED = ("colsum_concentration", *(name for name in STAGE if name != "colsum_concentration"))


@dataclass(frozen=True)
class Missing:
    """A number that cannot be given, and why."""

    reason: str


@dataclass(frozen=True)
class Verdicts:
    """Verdicts of a run.

    Args:
        counts: Prompts by verdict, the most frequent first.
        n: Prompts.
        settled_at: Median recurrence, 0-based, at which the prompts that settle do; NaN if none.
        n_settled: How many settle.
    """

    counts: dict[Verdict, int]
    n: int
    settled_at: float
    n_settled: int


@dataclass(frozen=True)
class Median:
    """A median over the prompts that have the number.

    Args:
        value: The median; may be infinite.
        low, high: Quartiles.
        n: Prompts that have it.
        of: Prompts.
    """

    value: float
    low: float
    high: float
    n: int
    of: int


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
    """Scores of one run against one feedforward run, a metric each, the summary's first."""

    against: str
    scores: tuple[Mirroring, ...]
    without: dict[str, Missing]


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


def read_results(path: Path) -> xr.Dataset:
    """A run's results, in memory.

    Raises:
        DataError: if the file is missing, damaged, of another format, or does not say what it is.
    """
    if not path.is_file():
        raise DataError(f"there is no {path}: run the experiment first")
    try:
        with xr.open_dataset(path, engine="h5netcdf") as opened:
            data = opened.load()
    except Exception as error:  # h5py and h5netcdf raise a dozen kinds for a damaged file
        raise DataError(
            f"{path} cannot be read as netCDF ({type(error).__name__}: {error}). Is it damaged or "
            "cut off? Run the experiment again"
        ) from error
    found = data.attrs.get("format")
    if found is None or not np.issubdtype(np.asarray(found).dtype, np.integer):
        raise DataError(f"{path} has no integer attribute 'format': not written by an experiment")
    if int(found) != FORMAT:
        raise DataError(
            f"{path} is of format {int(found)}, and this version reads format {FORMAT}: use the "
            f"version that wrote it ({data.attrs.get('tl_looped', 'unknown')}), or run again"
        )
    try:
        loop = geometry_of(data)
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} does not say the run's shape: attribute {error}") from error
    if "prompt" not in data.dims or data.sizes.get("effective_layer") != loop.n_layers:
        raise DataError(
            f"{path} must be by depth, with prompt and effective_layer ({loop.n_layers} of a run "
            f"of shape {loop}), got {dict(data.sizes)}"
        )
    return data


def is_feedforward(data: xr.Dataset) -> bool:
    """Whether a result is of a core without prelude and coda that ran once."""
    loop = geometry_of(data)
    return loop.p == loop.c == 0 and loop.R == 1


def summarise(
    runs: Mapping[str, xr.Dataset], resampling: Resampling | None = None
) -> list[RunSummary]:
    """One row a run, in the order given.

    The feedforward result that a looped run is compared with is the run that its attribute or
    specification names as ``feedforward``, else the only feedforward run of another model.
    """
    resampling = resampling or Resampling()
    return [_summary(name, runs, resampling) for name in runs]


def _summary(name: str, runs: Mapping[str, xr.Dataset], resampling: Resampling) -> RunSummary:
    data = runs[name]
    loop, feedforward = geometry_of(data), is_feedforward(data)
    common = {
        "run": name,
        "model": str(data.attrs.get("model", "")) or "unnamed model",
        "loop": loop,
        "n_prompts": data.sizes["prompt"],
        "feedforward": feedforward,
    }
    if feedforward:
        no = Missing("no loop: every layer ran once")
        return RunSummary(**common, verdicts=no, rate=no, half_life=no, cyclicity=no, mirroring=no)
    return RunSummary(
        **common,
        verdicts=_verdicts(data),
        rate=_median(data, "rate"),
        half_life=_median(data, "half_life"),
        cyclicity=_cyclicity(data, loop),
        mirroring=_mirroring(name, runs, resampling),
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
    return Verdicts({v: counts[v] for v in some}, len(values), at, len(settled))


def _median(data: xr.Dataset, name: str) -> Median | Missing:
    if name not in data:
        return _lacks(name)
    values = _per_prompt(data, name)
    there = values[~np.isnan(values)]
    if not len(there):
        return Missing(f"{name} is undefined for every prompt: too few steps above the noise")
    # Quartiles that are values of the data: halfway to infinity is no number.
    low, high = np.quantile(there, (0.25, 0.75), method="closest_observation")
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


# -- mirroring ----------------------------------------------------------------------------------


def _mirroring(
    name: str, runs: Mapping[str, xr.Dataset], resampling: Resampling
) -> MirroringTable | Missing:
    data = runs[name]
    against = _feedforward_of(name, runs)
    if isinstance(against, Missing):
        return against
    other = runs[against]
    paired = _same_prompts(data, other)
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
    return MirroringTable(against, tuple(scores), without)


def _feedforward_of(name: str, runs: Mapping[str, xr.Dataset]) -> str | Missing:
    data = runs[name]
    named = data.attrs.get("feedforward") or specification(data).get("feedforward")
    if isinstance(named, str) and named:
        if named not in runs or not is_feedforward(runs[named]):
            return Missing(f"the feedforward result {named!r} is not among the runs")
        return named
    model = data.attrs.get("model")
    others = [run for run, d in runs.items() if is_feedforward(d) and d.attrs.get("model") != model]
    if not others:
        return Missing("no feedforward result among the runs")
    if len(others) > 1:
        return Missing(
            f"{len(others)} feedforward results ({', '.join(others)}): name one as 'feedforward' "
            "in the specification"
        )
    return others[0]


def specification(data: xr.Dataset) -> dict[str, Any]:
    """The specification that a result carries as JSON; empty if it carries none.

    Raises:
        DataError: if it is no JSON object.
    """
    text = data.attrs.get("spec", "{}")
    try:
        found = json.loads(text)
    except (TypeError, ValueError) as error:
        raise DataError(f"the attribute spec is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"the attribute spec must be a JSON object, got {type(found).__name__}")
    return found


def _same_prompts(data: xr.Dataset, other: xr.Dataset) -> bool:
    mine, theirs = (specification(d).get("prompts") for d in (data, other))
    return mine is not None and mine == theirs and data.sizes["prompt"] == other.sizes["prompt"]


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
