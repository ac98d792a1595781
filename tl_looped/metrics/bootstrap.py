"""Confidence intervals of a mean over few runs: bootstrap, t-interval and exact sign-flip test.

A run is one trained model (a seed), and the unit that is resampled: prompts of one model are not
independent evidence about models. With n runs there are few distinct resamples (n = 5: 126), so
read the three answers together. At n = 5 percentile and BCa intervals are known to be too narrow,
the t-interval assumes normal runs, and the sign-flip p cannot fall below 2 / 2^n = 0.0625.

Decisions: the statistic is the mean. The same seed, n and number of resamples draw the same runs,
so that the points of a curve may be done one at a time and belong together. Every result is in the
unit of the values and records seed, resamples and n.

What the paper (arXiv 2604.11791) does not say: it shows bands over seeds without a method.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from tl_looped.checks import MOST_DRAWS, checked, number, whole
from tl_looped.errors import InputError
from tl_looped.metrics.arrays import as_float64, check_finite

MAX_SIGN_FLIP_RUNS = 20
"""Most runs whose 2^n sign flips are enumerated."""

_DRAWN_AT_A_TIME = 2**20  # prompts; part of what a seed means

_Values = Float[np.ndarray, " run"] | Float[Tensor, " run"]
_OtherValues = Float[np.ndarray, " other_run"] | Float[Tensor, " other_run"]  # compared with words


@dataclass(frozen=True)
class Interval:
    """A confidence interval, in the unit of the values; NaN where it is undefined."""

    low: float
    high: float


@checked
@dataclass(frozen=True)
class Resampling:
    """How a bootstrap draws.

    Args:
        n_resamples: Number of resamples, at least 2.
        confidence: Of the intervals, between 0 and 1.
        seed: A non-negative integer.
    """

    n_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        _check_draw(self.n_resamples, self.confidence, self.seed)

    def percentile(self, resampled: Float[np.ndarray, " resample"]) -> Interval:
        """Percentile interval of a resampled statistic; NaN if a resample has none."""
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(resampled, [tail, 1 - tail])
        return Interval(float(low), float(high))


@dataclass(frozen=True)
class BootstrapCI:
    """A mean over runs and how far it can be trusted.

    Attributes:
        mean: Mean of the runs.
        bootstrap_mean: Mean of the resampled means.
        bootstrap_sd: Their standard deviation (divisor n_resamples - 1): a standard error.
        ideal_sd: What ``bootstrap_sd`` tends to: ``sqrt(sum (x - mean)^2) / n``.
        percentile: Percentile bootstrap interval.
        bca: Bias-corrected and accelerated bootstrap interval.
        t: Student's t-interval, ``mean +- t_(n-1) s / sqrt(n)``.
        sign_flip_p: Exact two-sided p of :func:`sign_flip_p`; NaN above 20 runs.
        null: The mean that ``sign_flip_p`` tests.
        confidence: Of all three intervals.
        n: Number of runs.
        n_resamples: Bootstrap resamples.
        seed: Of the resamples.
    """

    mean: float
    bootstrap_mean: float
    bootstrap_sd: float
    ideal_sd: float
    percentile: Interval
    bca: Interval
    t: Interval
    sign_flip_p: float
    null: float
    confidence: float
    n: int
    n_resamples: int
    seed: int


@dataclass(frozen=True)
class HierarchicalCI:
    """A mean over runs and prompts with its percentile bootstrap interval.

    Attributes:
        mean: Mean of the runs' means.
        bootstrap_mean: Mean of the resampled means.
        bootstrap_sd: Their standard deviation (divisor n_resamples - 1).
        percentile: Percentile bootstrap interval.
        shared_prompts: One draw of prompts for all runs of a resample, or one for each.
        confidence: Of the interval.
        n: Number of runs.
        n_prompts: Prompts of each run.
        n_resamples: Bootstrap resamples.
        seed: Of the resamples.
    """

    mean: float
    bootstrap_mean: float
    bootstrap_sd: float
    percentile: Interval
    shared_prompts: bool
    confidence: float
    n: int
    n_prompts: tuple[int, ...]
    n_resamples: int
    seed: int


_NOTHING = Interval(math.nan, math.nan)


@checked
def bootstrap_ci(
    values: _Values,
    *,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    null: float = 0.0,
    seed: int = 0,
) -> BootstrapCI:
    """Intervals of the mean over runs: percentile and BCa bootstrap (scipy), t, exact sign flips.

    Degenerate input. One run says nothing about the spread of runs: all intervals and standard
    deviations are NaN. Runs that are all equal: the percentile and t-intervals are that one point,
    the standard deviations 0, and BCa, whose acceleration is 0 / 0, is NaN.

    Args:
        values: One number a run.
        n_resamples: Bootstrap resamples.
        confidence: Of the intervals, between 0 and 1.
        null: The mean that the sign-flip test takes for its hypothesis.
        seed: Of the resamples, a non-negative integer.

    Raises:
        InputError: if there is no run, a value is not finite, or another argument out of range.
    """
    x = _runs("values", values)
    _check_draw(n_resamples, confidence, seed)
    null = number(null, "null")
    mean, sd, percentile, bca = _resampled(x, n_resamples, confidence, seed)
    return BootstrapCI(
        mean=_mean(x),
        bootstrap_mean=mean,
        bootstrap_sd=sd,
        ideal_sd=_ideal_sd(x),
        percentile=percentile,
        bca=bca,
        t=t_interval(x, confidence),
        sign_flip_p=sign_flip_p(x - null) if len(x) <= MAX_SIGN_FLIP_RUNS else math.nan,
        null=null,
        confidence=float(confidence),
        n=len(x),
        n_resamples=n_resamples,
        seed=seed,
    )


@checked
def paired_contrast(
    first: _Values,
    second: _OtherValues,
    *,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapCI:
    """:func:`bootstrap_ci` of ``first - second``, run by run, against a difference of 0.

    Runs are paired by their place: the same seed, data order or prompts under two conditions.
    Pairing removes what the two runs have in common; without a pairing do not use this.

    Raises:
        InputError: as :func:`bootstrap_ci`, or if the numbers of runs differ.
    """
    a, b = _runs("first", first), _runs("second", second)
    if len(a) != len(b):
        raise InputError(
            f"first and second must hold the same runs in the same order, got {len(a)} and {len(b)}"
        )
    return bootstrap_ci(a - b, n_resamples=n_resamples, confidence=confidence, seed=seed)


@checked
def t_interval(values: _Values, confidence: float = 0.95) -> Interval:
    """Student's t-interval of the mean, ``mean +- t_(n-1) s / sqrt(n)`` with the unbiased s.

    NaN for one run, a single point for runs that are all equal.

    Raises:
        InputError: if there is no run, a value is not finite, or ``confidence`` is not in (0, 1).
    """
    x = _runs("values", values)
    _check_confidence(confidence)
    if len(x) == 1:
        return _NOTHING
    if _all_equal(x):
        return Interval(float(x[0]), float(x[0]))
    low, high = stats.t.interval(confidence, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
    return Interval(float(low), float(high))


@checked
def sign_flip_p(values: _Values) -> float:
    """Exact two-sided p that the mean is 0, if each value were as likely with the other sign.

    The fraction of the 2^n sign assignments with ``|sum s_i x_i| >= |sum x_i|``, ties counted (to
    1e-12 of ``sum |x_i|``). Never below ``2 / 2^n``: .0625 for 5 runs, so that 5 runs alone cannot
    reach p < .05. Values that are all 0 give 1.

    Raises:
        InputError: if there is no run, a value is not finite, or there are more than 20 runs.
    """
    x = _runs("values", values)
    n = len(x)
    if n > MAX_SIGN_FLIP_RUNS:
        raise InputError(
            f"values must hold at most {MAX_SIGN_FLIP_RUNS} runs for an exact test, got {n}: use "
            "scipy.stats.permutation_test with random flips"
        )
    scale = np.abs(x).max()
    if scale == 0:
        return 1.0
    x = x / scale
    # Sums under all assignments, one value at a time. The first sign is fixed: the negative of an
    # assignment has the same absolute sum.
    sums = x[:1]
    for value in x[1:]:
        sums = np.concatenate((sums + value, sums - value))
    tolerance = 1e-12 * np.abs(x).sum()
    return float(np.mean(np.abs(sums) >= abs(x.sum()) - tolerance))


@checked
def hierarchical_bootstrap_ci(
    values: Sequence[Float[np.ndarray, " _"]]
    | Sequence[Float[Tensor, " _"]]
    | Float[np.ndarray, "run prompt"]
    | Float[Tensor, "run prompt"],
    *,
    shared_prompts: bool = False,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> HierarchicalCI:
    """Percentile interval of the mean over runs and, within them, prompts.

    A resample draws n runs with replacement, then for each drawn run as many prompts as it has,
    with replacement; a run that is drawn twice gets two draws of prompts. Its statistic is the mean
    of the runs' means, so that every run counts the same, whatever its number of prompts.

    ``shared_prompts=False`` treats every run's prompts as a sample of its own. Where all runs saw
    the same prompts, part of the prompts' variation is common to all runs, and independent draws
    average it away: ``shared_prompts=True`` draws one set of prompts a resample for all its runs.

    The ideal variance with independent draws is ``var(run means) / n + mean_i(var_i / m_i) / n``
    (divisors n and m_i). It is a little more than the truth needs, since the run means already vary
    by their prompts. One run: the interval says how the prompts vary, nothing about runs. All
    values equal: a single point.

    Args:
        values: A row of prompts for each run: an array, or one array a run.
        shared_prompts: All runs saw the same prompts, in the same order.
        n_resamples, confidence, seed: As in :func:`bootstrap_ci`.

    Raises:
        InputError: if there is no run or a run without prompts, a value is not finite, prompts are
            shared but runs differ in their number, or another argument is out of range.
    """
    runs = [_runs(f"values[{i}]", row) for i, row in enumerate(values)]
    if not runs:
        raise InputError("values hold no run")
    sizes = tuple(len(run) for run in runs)
    if shared_prompts and len(set(sizes)) > 1:
        raise InputError(f"shared_prompts: runs must have the same prompts, got {sizes} of them")
    resampling = Resampling(n_resamples, confidence, seed)
    means = _resampled_prompts(runs, shared_prompts, n_resamples, seed)
    return HierarchicalCI(
        mean=_mean([_mean(run) for run in runs]),
        bootstrap_mean=_mean(means),
        bootstrap_sd=_sd(means),
        percentile=resampling.percentile(means),
        shared_prompts=shared_prompts,
        confidence=float(confidence),
        n=len(runs),
        n_prompts=sizes,
        n_resamples=n_resamples,
        seed=seed,
    )


def _resampled(
    x: Float[np.ndarray, " run"], n_resamples: int, confidence: float, seed: int
) -> tuple[float, float, Interval, Interval]:
    """Mean, standard deviation, percentile and BCa interval of the resampled means."""
    if len(x) == 1:
        return float(x[0]), math.nan, _NOTHING, _NOTHING
    if _all_equal(x):
        point = float(x[0])
        return point, 0.0, Interval(point, point), _NOTHING
    with warnings.catch_warnings():
        # Where BCa is undefined scipy warns and gives NaN, which the docstring explains.
        warnings.simplefilter("ignore")
        found: Any = stats.bootstrap(
            (x,),
            np.mean,
            n_resamples=n_resamples,
            confidence_level=confidence,
            method="percentile",
            random_state=np.random.default_rng(seed),
        )
        bca = stats.bootstrap(
            (x,),
            np.mean,
            n_resamples=0,  # the same resamples
            bootstrap_result=found,
            confidence_level=confidence,
            method="BCa",
        ).confidence_interval
    means = found.bootstrap_distribution
    low, high = found.confidence_interval
    return (
        float(means.mean()),
        _sd(means),
        Interval(float(low), float(high)),
        Interval(float(bca.low), float(bca.high)),
    )


def _resampled_prompts(
    runs: list[Float[np.ndarray, " _"]], shared: bool, n_resamples: int, seed: int
) -> Float[np.ndarray, " resample"]:
    """Means of resampled runs and prompts, drawn in parts that fit the memory."""
    n, longest = len(runs), max(len(run) for run in runs)
    if all(_all_equal(run) and run[0] == runs[0][0] for run in runs):
        return np.full(n_resamples, runs[0][0])  # sums would round it
    rng = np.random.default_rng(seed)
    part = max(1, _DRAWN_AT_A_TIME // (n * longest))
    means = []
    for start in range(0, n_resamples, part):
        drawn = rng.integers(n, size=(min(part, n_resamples - start), n))
        if shared:
            prompts = rng.integers(longest, size=(len(drawn), 1, longest))
            means.append(np.stack(runs)[drawn[:, :, None], prompts].mean((1, 2)))
            continue
        of_run = np.empty(drawn.shape)
        for i, run in enumerate(runs):
            here = drawn == i
            of_run[here] = run[rng.integers(len(run), size=(int(here.sum()), len(run)))].mean(-1)
        means.append(of_run.mean(-1))
    return np.concatenate(means)


def _all_equal(x: Float[np.ndarray, " n"]) -> bool:
    return bool((x == x[0]).all())


def _mean(values: Any) -> float:
    # The mean of equal numbers is that number; a sum would round it.
    x = np.asarray(values)
    return float(x[0]) if _all_equal(x) else float(x.mean())


def _sd(x: Float[np.ndarray, " n"]) -> float:
    return 0.0 if _all_equal(x) else float(x.std(ddof=1))


def _ideal_sd(x: Float[np.ndarray, " run"]) -> float:
    if len(x) == 1:
        return math.nan
    return 0.0 if _all_equal(x) else float(x.std() / math.sqrt(len(x)))


def _runs(argument: str, values: Any) -> Float[np.ndarray, " run"]:
    x = as_float64(values)
    if x.ndim != 1 or x.size == 0:
        raise InputError(
            f"{argument} must be one number a run (or prompt), at least one, got shape {x.shape}"
        )
    check_finite(argument, x)
    return x


def _check_confidence(confidence: float) -> None:
    number(confidence, "confidence", above=0, below=1, fix="0.95 for 95 %")


def _check_draw(n_resamples: int, confidence: float, seed: int) -> None:
    _check_confidence(confidence)
    whole(n_resamples, "n_resamples", 2, MOST_DRAWS)
    whole(seed, "seed")
