"""Does a looped block mirror a feedforward model? Curves over depth, compared and tested.

A metric of the layers of a feedforward model is a curve over depth. Each recurrence r of a looped
model has one too, that of the *virtual feedforward model* ``[prelude, block_r, coda]``. The
mirroring score says how alike the two are, and two null distributions how much of that any order of
the block's layers would give. Beyond arXiv 2604.11791, which compares such curves by eye (Figures
8, 35-40). For activations see :mod:`tl_looped.metrics.alignment`.

Decisions, all ours. Layer i of n stands at ``x = 100 i / (n - 1)`` percent; curves are read off at
x = 0, 1, ..., 100 by linear interpolation (above 101 layers some are not looked at). The score to
test is Pearson's r unless asked otherwise.
Limits: two monotone curves correlate whatever they mean; the shift null has only k - 1 members, so
that its p is at least 1 / k; and it asks about the order of the core alone, since prelude and coda
stay in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from tl_looped.checks import MOST_DRAWS, checked, one_of, whole
from tl_looped.errors import InputError
from tl_looped.metrics.arrays import as_float64
from tl_looped.metrics.bootstrap import Interval, Resampling

Statistic = Literal["pearson", "spearman", "rmse"]

GRID_POINTS = 101
"""Points that curves are resampled to: 0, 1, ..., 100 % of the depth."""

# A spread below this share of the largest value is rounding, and so is a difference of scores.
_CONSTANT = 1e-12
_TIE = 1e-12
_RESAMPLES_AT_A_TIME = 50  # part of what a seed means


@dataclass(frozen=True)
class MirroringScore:
    """How each recurrence's virtual feedforward curve resembles a feedforward curve.

    Attributes:
        pearson: Pearson's r of the resampled curves.
        spearman: Spearman's rank correlation of them, ties averaged.
        rmse: Root mean square difference, in the unit of the metric.
        lag: Shift of the looped curve in % of depth at which Pearson's r is largest; positive if
            its features come later (deeper) than in the feedforward model.
        lag_pearson: Pearson's r at that shift.
        p_shift: p against all circular shifts of the core block.
        p_permutation: p against random orders of the core block.
        statistic: What the two p are of.
        max_lag: Largest shift that was tried, in % of depth.
        n_shifts: Shifts in the first null: k - 1.
        n_permutations: Orders in the second null.
        seed: Of these orders.
    """

    pearson: Float[np.ndarray, " recurrence"]
    spearman: Float[np.ndarray, " recurrence"]
    rmse: Float[np.ndarray, " recurrence"]
    lag: Float[np.ndarray, " recurrence"]
    lag_pearson: Float[np.ndarray, " recurrence"]
    p_shift: Float[np.ndarray, " recurrence"]
    p_permutation: Float[np.ndarray, " recurrence"]
    statistic: str
    max_lag: int
    n_shifts: int
    n_permutations: int
    seed: int


@checked
def mirroring_score(
    core: Float[np.ndarray, "recurrence core"] | Float[Tensor, "recurrence core"],
    feedforward: Float[np.ndarray, " layer"] | Float[Tensor, " layer"],
    *,
    prelude: Float[np.ndarray, " prelude"] | Float[Tensor, " prelude"] | None = None,
    coda: Float[np.ndarray, " coda"] | Float[Tensor, " coda"] | None = None,
    statistic: Statistic | str = "pearson",
    max_lag: int = 20,
    n_permutations: int = 1000,
    seed: int = 0,
) -> MirroringScore:
    """Compare ``[prelude, block_r, coda]`` of each recurrence with a feedforward curve.

    Without ``prelude`` and ``coda`` the block alone is compared, stretched over the whole depth.

    Lag. At a shift of L grid points, 1 % of depth each, ``g(x + L)`` is compared with ``f(x)``
    where both exist: 101 - |L| points, Pearson's r of just those. The largest r over
    ``|L| <= max_lag`` wins; of equal ones (to 1e-12) the smallest |L|, then the positive. Shifts
    where one piece is constant are passed over.

    Nulls. p = (1 + #{null >= observed}) / (1 + N), for the RMSE <=, ties (to 1e-12) counted. Null 1
    are the k - 1 circular shifts of the block's layers, null 2 ``n_permutations`` random orders,
    the same for all recurrences and not excluding the given one. Prelude and coda stay in place. A
    block of one layer has no other order: both p are NaN.

    A curve without spread (to 1e-12 of its largest value) has no correlation: Pearson, Spearman,
    lag and their p are NaN, the RMSE stands. A recurrence with a value that is not finite is NaN in
    every field, and so are all recurrences if such a value stands in one of the shared curves.

    Args:
        core: The metric at every layer of the block, one row a recurrence.
        feedforward: The metric at every layer of the feedforward model.
        prelude: The metric at the layers before the loop.
        coda: The metric at the layers behind it.
        statistic: What the p values are of.
        max_lag: Largest shift in % of depth, 0 to 98.
        n_permutations: Random orders, at least 1.
        seed: Of the orders, a non-negative integer.

    Raises:
        InputError: if a curve has fewer than two layers or an argument is out of range.
    """
    one_of(statistic, "statistic", ("pearson", "spearman", "rmse"))
    _check_draw(max_lag, n_permutations, seed)
    blocks, ends, f = _checked(core, feedforward, prelude, coda)
    k = blocks.shape[1]
    shifts = np.stack([np.roll(np.arange(k), s) for s in range(1, k)]) if k > 1 else None
    orders = _random_orders(k, n_permutations, seed) if k > 1 else None
    rows = []
    for block in blocks:
        g = _virtual(block[None], ends)
        scores = {name: _SCORES[name](g, f)[0] for name in _SCORES}
        observed = scores[statistic]
        p = [
            _p_value(_SCORES[statistic](_virtual(block[null], ends), f), observed, statistic)
            if null is not None
            else math.nan
            for null in (shifts, orders)
        ]
        rows.append([*scores.values(), *_best_lag(g[0], f[0], max_lag), *p])
    columns = np.array(rows, dtype=np.float64).reshape(len(blocks), 7).T
    pearson, spearman, rmse, lag, lag_pearson, p_shift, p_permutation = columns
    return MirroringScore(
        pearson=pearson,
        spearman=spearman,
        rmse=rmse,
        lag=lag,
        lag_pearson=lag_pearson,
        p_shift=p_shift,
        p_permutation=p_permutation,
        statistic=statistic,
        max_lag=max_lag,
        n_shifts=k - 1,
        n_permutations=n_permutations,
        seed=seed,
    )


@dataclass(frozen=True)
class PermutedScore:
    """A mirroring score and what random orders of the core layers would give.

    Attributes:
        score: Mean over recurrences of Pearson's r; NaN if one of them is.
        null: The same under every random order; NaN where an order has no score.
        p: ``(1 + #{null >= score}) / (1 + N)``, ties (to 1e-12) counted. Exact, over all other
            orders, where there are no more than the random ones; never below ``1 / n_orders``.
        n_orders: Different orders that the block has, k!.
        every: The score of every order, the given one first, where p is exact; None otherwise.
        seed: Of the orders.
    """

    score: float
    null: Float[np.ndarray, " permutation"]
    p: float
    n_orders: int
    every: Float[np.ndarray, " order"] | None
    seed: tuple[int, ...]


@checked
def permuted_mirroring(
    core: Float[np.ndarray, "recurrence core"] | Float[Tensor, "recurrence core"],
    feedforward: Float[np.ndarray, " layer"] | Float[Tensor, " layer"],
    *,
    prelude: Float[np.ndarray, " prelude"] | Float[Tensor, " prelude"] | None = None,
    coda: Float[np.ndarray, " coda"] | Float[Tensor, " coda"] | None = None,
    n_permutations: int = 1000,
    seed: tuple[int, ...] = (0,),
) -> PermutedScore:
    """Mean Pearson's r over recurrences of ``[prelude, block_r, coda]``, and its permutation null.

    A null order permutes the core layers in the same way at every recurrence, as these are the same
    layers; prelude and coda stay in place. It says how much of the score any order of the block
    would give. ``null`` allows scores of several models to be tested together.

    Curves without spread, or not finite, have no score: everything is NaN. A block of one layer has
    a score and no other order, and so has one whose layers all have the same value: null and p are
    NaN.

    Args:
        core, feedforward, prelude, coda: As in :func:`mirroring_score`.
        n_permutations: Random orders, at least 1.
        seed: Of the orders, non-negative integers.

    Raises:
        InputError: if a curve has fewer than two layers or an argument is out of range.
    """
    _check_draw(0, n_permutations, min(seed, default=-1))
    blocks, ends, f = _checked(core, feedforward, prelude, coda)
    whole(len(blocks), "len(core)", 1)
    k = blocks.shape[1]

    def score(orders: Int[np.ndarray, "n core"]) -> Float[np.ndarray, " n"]:
        return np.mean([_pearson(_virtual(block[orders], ends), f) for block in blocks], axis=0)

    observed = float(score(np.arange(k)[None])[0])
    null, p, every = np.full(n_permutations, math.nan), math.nan, None
    if not _constant(blocks).all() and not math.isnan(observed):
        drawn = _random_orders(k, n_permutations, seed)
        orders, which = np.unique(drawn, axis=0, return_inverse=True)  # 24 of four layers
        null = score(orders)[which.reshape(-1)]
        p = permutation_p(null, observed)
        if math.factorial(k) <= n_permutations + 1:
            every = score(np.array(list(permutations(range(k)))))  # the first is the given one
            p = permutation_p(every[1:], observed)
    return PermutedScore(observed, null, p, math.factorial(k), every, seed)


def permutation_p(null: Float[np.ndarray, " permutation"], observed: float) -> float:
    """``(1 + #{null >= observed}) / (1 + N)``, ties to 1e-12; what is NaN counts in N alone."""
    return _p_value(null, observed, "pearson")


@dataclass(frozen=True)
class MirroringInterval:
    """A mirroring score and how it depends on the prompts.

    Attributes:
        score: Mean over recurrences of Pearson's r of the mean curves; NaN if one has no spread,
            or no prompt is left.
        by_recurrence: Pearson's r of each recurrence.
        percentile: Percentile bootstrap interval of the score over prompts; NaN with one prompt,
            and where a resample has a curve without spread.
        n_prompts: Prompts of the looped and of the feedforward model that were used.
        left_out: Prompts of either with a value that is not finite.
        paired: Whether a resample drew the same prompts for both.
        resampling: Number of resamples, confidence and seed.
    """

    score: float
    by_recurrence: Float[np.ndarray, " recurrence"]
    percentile: Interval
    n_prompts: tuple[int, int]
    left_out: tuple[int, int]
    paired: bool
    resampling: Resampling


@checked
def mirroring_interval(
    core: Float[np.ndarray, "recurrence core prompt"],
    feedforward: Float[np.ndarray, "layer other_prompt"],
    *,
    prelude: Float[np.ndarray, "prelude prompt"] | None = None,
    coda: Float[np.ndarray, "coda prompt"] | None = None,
    paired: bool = False,
    resampling: Resampling | None = None,
) -> MirroringInterval:
    """Mean Pearson's r over recurrences of the mean curves over prompts, with its interval.

    The interval says how the score depends on the prompts, and nothing about other models. Two
    curves that both rise correlate whatever they mean.

    Args:
        core, feedforward, prelude, coda: As in :func:`mirroring_score`, of every prompt.
        paired: Both models ran the same prompts in the same order: a resample draws the same ones
            for both, and a prompt that is left out of one is left out of the other.
        resampling: Number of resamples, confidence and seed; 1,000 and 95 % if None.

    Raises:
        InputError: if a curve has fewer than two layers, or paired models differ in their prompts.
    """
    resampling = resampling or Resampling()
    blocks, target = as_float64(core), as_float64(feedforward)
    n_recurrences, k, n_prompts = blocks.shape
    ends = [np.zeros((0, n_prompts)) if x is None else as_float64(x) for x in (prelude, coda)]
    first, last = (np.broadcast_to(x, (n_recurrences, *x.shape)) for x in ends)
    looped = np.concatenate((first, blocks, last), axis=1)
    _check_layers(k, looped.shape[1], len(target))
    keep, keep_other = np.isfinite(looped).all((0, 1)), np.isfinite(target).all(0)
    left_out = (int((~keep).sum()), int((~keep_other).sum()))
    if paired:
        if len(keep) != len(keep_other):
            raise InputError(
                f"paired models must run the same prompts, got {len(keep)} and {len(keep_other)}"
            )
        keep = keep_other = keep & keep_other
        left_out = (int((~keep).sum()),) * 2
    looped, target = looped[..., keep], target[:, keep_other]
    n, m = looped.shape[-1], target.shape[-1]
    each = np.full(n_recurrences, math.nan)
    percentile = Interval(math.nan, math.nan)
    if n and m:
        each = _pearson(_resample(looped.mean(-1)), _resample(target.mean(-1)[None]))
    if n > 1 and m > 1 and not np.isnan(each).any():  # one prompt leaves nothing to resample
        percentile = _over_prompts(looped, target, paired, resampling)
    return MirroringInterval(
        score=float(each.mean()) if len(each) else math.nan,
        by_recurrence=each,
        percentile=percentile,
        n_prompts=(n, m),
        left_out=left_out,
        paired=paired,
        resampling=resampling,
    )


def _over_prompts(
    looped: Float[np.ndarray, "recurrence layer prompt"],
    feedforward: Float[np.ndarray, "other_layer other_prompt"],
    paired: bool,
    resampling: Resampling,
) -> Interval:
    rng = np.random.default_rng(resampling.seed)

    def weights(n: int) -> Float[np.ndarray, "{n} resample"]:
        return rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES_AT_A_TIME).T / n

    scores = []
    for _ in range(0, resampling.n_resamples, _RESAMPLES_AT_A_TIME):
        ours, theirs = weights(looped.shape[-1]), weights(feedforward.shape[-1])
        g = rearrange(looped @ ours, "recurrence layer resample -> resample recurrence layer")
        f = rearrange(
            feedforward @ (ours if paired else theirs), "layer resample -> resample 1 layer"
        )
        scores.append(_pearson(_resample(g), _resample(f)).mean(-1))
    return resampling.percentile(np.concatenate(scores)[: resampling.n_resamples])


# -- curves -------------------------------------------------------------------------------------


def _checked(
    core: Any, feedforward: Any, prelude: Any, coda: Any
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Core ``[recurrence, core]``, prelude and coda, and the feedforward curve ``[1, grid]``."""
    blocks, target = as_float64(core), as_float64(feedforward)
    ends = [np.zeros(0) if x is None else as_float64(x) for x in (prelude, coda)]
    k = blocks.shape[1]
    _check_layers(k, k + sum(map(len, ends)), len(target))
    return blocks, ends, _resample(target[None])


def _check_layers(k: int, looped: int, feedforward: int) -> None:
    for name, n in (("core with prelude and coda", looped), ("feedforward", feedforward)):
        if n < 2 or k == 0:
            raise InputError(f"{name} must have at least two layers to be a curve, got {n}")


def _virtual(
    blocks: Float[np.ndarray, "n core"], ends: list[Float[np.ndarray, " _"]]
) -> Float[np.ndarray, "n grid"]:
    """``[prelude, block, coda]`` of every block, resampled."""
    first, last = (np.broadcast_to(x, (len(blocks), len(x))) for x in ends)
    return _resample(np.concatenate((first, blocks, last), axis=1))


def _random_orders(k: int, n: int, seed: int | tuple[int, ...]) -> Int[np.ndarray, "{n} {k}"]:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(k) for _ in range(n)])


def _resample(curves: Float[np.ndarray, "*batch layer"]) -> Float[np.ndarray, "*batch grid"]:
    """Curves at 0, 1, ..., 100 % of their depth; a value that is not finite spoils its curve."""
    last = curves.shape[-1] - 1
    at = np.linspace(0, last, GRID_POINTS)
    below = np.minimum(at.astype(int), max(last - 1, 0))
    share = at - below
    with np.errstate(invalid="ignore"):
        found = (1 - share) * curves[..., below] + share * curves[..., np.minimum(below + 1, last)]
    return np.where(np.isfinite(curves).all(-1, keepdims=True), found, math.nan)


def _constant(curves: Float[np.ndarray, "*batch point"]) -> Bool[np.ndarray, "*batch"]:
    return np.ptp(curves, axis=-1) <= _CONSTANT * np.abs(curves).max(-1)


def _pearson(
    g: Float[np.ndarray, "*batch n point"], f: Float[np.ndarray, "*batch m point"]
) -> Float[np.ndarray, "*batch n"]:
    """Of each row of g with the one row of f, or with its own; NaN where one has no spread."""
    a, b = g - g.mean(-1, keepdims=True), f - f.mean(-1, keepdims=True)
    flat = _constant(g) | _constant(f)
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (x / np.abs(x).max(-1, keepdims=True) for x in (a, b))
        r = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.where(flat, math.nan, r.clip(-1, 1))


def _spearman(
    g: Float[np.ndarray, "n point"], f: Float[np.ndarray, "1 point"]
) -> Float[np.ndarray, " n"]:
    flat = _constant(g) | _constant(f)
    ranks = _pearson(stats.rankdata(g, axis=-1), stats.rankdata(f, axis=-1))
    sane = np.isfinite(g).all(-1) & np.isfinite(f).all(-1)
    return np.where(flat | ~sane, math.nan, ranks)


def _rmse(
    g: Float[np.ndarray, "n point"], f: Float[np.ndarray, "1 point"]
) -> Float[np.ndarray, " n"]:
    return np.sqrt(np.square(g - f).mean(-1))


_SCORES = {"pearson": _pearson, "spearman": _spearman, "rmse": _rmse}


def _p_value(null: Float[np.ndarray, " n"], observed: float, statistic: str) -> float:
    if math.isnan(observed):
        return math.nan
    if statistic == "rmse":
        null, observed = -null, -observed
    # An order without spread (a spike between two grid points) has no score, and does not count.
    scores = null[np.isfinite(null)]
    tie = _TIE * max(abs(observed), np.abs(scores).max(initial=0.0))
    return float(1 + (scores >= observed - tie).sum()) / (1 + len(null))


def _best_lag(
    g: Float[np.ndarray, " grid"], f: Float[np.ndarray, " grid"], max_lag: int
) -> tuple[float, float]:
    best = (math.nan, math.nan)
    for lag in sorted(range(-max_lag, max_lag + 1), key=lambda lag: (abs(lag), -lag)):
        end = GRID_POINTS - abs(lag)
        later, earlier = (g, f) if lag >= 0 else (f, g)
        r = float(_pearson(later[None, abs(lag) :], earlier[None, :end])[0])
        if not math.isnan(r) and not r <= best[1] + _TIE:
            best = (float(lag), r)
    return best


def _check_draw(max_lag: int, n_permutations: int, seed: int) -> None:
    whole(max_lag, "max_lag", 0, GRID_POINTS - 3, fix="in % of the depth")
    whole(n_permutations, "n_permutations", 1, MOST_DRAWS)
    whole(seed, "seed")
