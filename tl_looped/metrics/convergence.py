"""Does the loop converge, and to what: a verdict a prompt.

The distance to the last state tends to zero for any map, a drift included. The verdict therefore
also asks for the residual ``rho_R = ||S(x_R) - x_R|| / ||x_R||`` and for the distance to the state
of a run twice as long (arXiv 2604.11791 studies the distances alone; the verdict is ours).

Everything is decided on :class:`ConvergenceSeries`, a handful of numbers for each recurrence and
prompt, so that a caller that streams over recurrences needs no states:
:func:`tl_looped.metrics.convergence_verdict` takes it, states or a labelled result.

How the verdicts are decided, in this order; ``eps`` is the tolerance, "late" means the last half
of the run:

1. UNDEFINED: a step or a norm is not finite, or the run has fewer than four recurrences.
2. The run *settles* at ``r*``, the first recurrence from which every relative step is at most
   ``eps``, at least three of them. It *converged* if it settled, ``rho_R <= eps`` and the distance
   to the state at 2R is at most ``5 eps``. Without a run of 2R the a-posteriori bound
   ``rate / (1 - rate) ||x_R - x_(R-1)||`` stands in for the last two, and ``confirmed`` is False.
3. It is *projective* if it did not converge, its direction settled (steps of the unit vectors at
   most ``eps``, the last three at least) and its norm grew at every late recurrence, by more than
   ``eps`` in all, in steps that last (see 6) or grow: a norm that is still approaching its limit
   does not count.
4. DEGENERATE: converged or projective, and the lowest cosine between the first and any other
   layer's last state is above 0.999: all layers share one limit. Needs two layers and two
   dimensions.
5. CONVERGED, then PROJECTIVE.
6. ORBIT or DRIFT: the steps *last*, that is, their late rate is between 0.98 and 1 / 0.98 and they
   change by less than a factor of two over the late half. ORBIT: going back from the last state,
   the distance to it falls to at most 0.75 steps at some lag p >= 2 and again near 2 p (a turning
   vector comes back to within 0.71 steps at any phase), and one frequency has at least half of the
   power of the squared late distances, as in :mod:`tl_looped.metrics.limiting`. The late half must
   hold two turns. Also ORBIT, whatever its steps and its harmonics: a run that repeats itself, at
   some lag p >= 2 and again at 2 p back from the last state within a thousandth of the farthest
   that it is away in between, and as far away in both turns, to within a tenth of that distance.
   The run must hold two turns, and one recurrence to compare. DRIFT: it
   is no orbit, the steps last, and the late path is straight: its ends are at least 0.9 of its
   length apart. A random walk and white noise are neither; an arc of less than a quarter of a turn
   in the late half looks straight.
7. NOT_CONVERGED: anything else, a run that is still contracting included.

A loop that contracts to zero has no relative step. Where the last norm is at most ``eps`` times
the largest one, steps, residual and distance are taken relative to that largest norm instead.
A slow contraction (rate above 0.98) looks like a drift; a straight drift becomes projective once
it is so far out that its direction has settled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from scipy.signal import detrend
from torch import Tensor

from tl_looped.checks import checked, number
from tl_looped.errors import InputError
from tl_looped.metrics.limiting import PEAK_SHARE, spectral_peak

_LEAST_STEPS = 3
_DISTANCE_FACTOR = 5.0
_SHARED_COSINE = 0.999
_LASTING_RATE = 0.98
_RETURN_WITHIN_STEPS = 0.75
_STRAIGHT = 0.9
_REPEATS_WITHIN = 1e-3
_AS_FAR = 0.1
_ABOVE_FLOOR = 10.0


class Verdict(IntEnum):
    """What the loop does with a prompt; see the module for how it is decided."""

    CONVERGED = 0
    PROJECTIVE = 1
    DEGENERATE = 2
    ORBIT = 3
    DRIFT = 4
    NOT_CONVERGED = 5
    UNDEFINED = 6


VERDICT_WORDS = {
    Verdict.CONVERGED: "fixed point",
    Verdict.PROJECTIVE: "fixed direction",
    Verdict.DEGENERATE: "shared fixed point",
    Verdict.ORBIT: "orbit",
    Verdict.DRIFT: "drift",
    Verdict.NOT_CONVERGED: "not converged",
    Verdict.UNDEFINED: "undefined",
}
"""What verdicts are called in captions and reports."""

FIXED_POINTS = (Verdict.CONVERGED, Verdict.DEGENERATE)
"""Verdicts of a prompt that reaches a fixed point, and so approaches it at a rate."""


@dataclass(frozen=True)
class ConvergenceSeries:
    """What the verdict is decided on, each a mean over a prompt's tokens (then a layer's maximum).

    Series run over recurrences; where a step is concerned the first value is NaN.

    Args:
        step: ``||x_r - x_(r-1)||``.
        relative_step: The same over ``||x_r||``; NaN where that is zero.
        direction_step: Distance of the two unit vectors, ``sqrt(2 - 2 cos)``, from the vectors and
            not from a cosine, which loses half the digits.
        norm: ``||x_r||``.
        from_last: ``||x_r - x_R||``, with the last state of the run; a stream knows it in a second
            pass.
        dtype: Of the states, for the noise floor and the default tolerance.
        residual: ``rho_R``, see :func:`fixed_point_residual`; None without one more step.
        distance_2r: ``||x_2R - x_R|| / ||x_R||``; None without a run of 2R recurrences.
        min_layer_cosine: Lowest cosine between the first layer's last state and another layer's;
            NaN for a single layer or a single dimension.
    """

    step: Float[Tensor, " recurrence *batch"]
    relative_step: Float[Tensor, " recurrence *batch"]
    direction_step: Float[Tensor, " recurrence *batch"]
    norm: Float[Tensor, " recurrence *batch"]
    from_last: Float[Tensor, " recurrence *batch"]
    dtype: torch.dtype
    residual: Float[Tensor, "*batch"] | None = None
    distance_2r: Float[Tensor, "*batch"] | None = None
    min_layer_cosine: Float[Tensor, "*batch"] | None = None


@dataclass(frozen=True)
class ConvergenceResult:
    """The verdict of every prompt and its numbers.

    Args:
        verdict: Values of :class:`Verdict`.
        settled_at: ``r*``, 0-based; -1 if the run does not settle.
        rate: ``exp`` of the slope of ``ln step`` over the recurrences before the first step below
            ten times the noise floor; NaN with fewer than two such steps. The floor is the rounding
            of the states: the machine epsilon of their dtype times the largest norm.
        relative_rate: The same of the relative steps, in which every token counts alike, where of
            ``step`` a token with a norm far above the others' decides. The floor is that of a norm
            of one.
        half_life: Recurrences in which the step halves, by ``rate``; infinite for a rate of 1 or
            more.
        period: The smallest lag at which an ORBIT repeats itself, in whole recurrences, or comes
            back to within 0.75 steps if it never does; NaN otherwise.
        bound: ``rate / (1 - rate)`` times the last relative step, see :func:`a_posteriori_bound`.
        converged, projective: Steps 2 and 3, of which DEGENERATE hides which one holds.
        confirmed: Whether residual and distance to 2R were given.
        eps: The tolerance.
    """

    verdict: Int[Tensor, "*batch"]
    settled_at: Int[Tensor, "*batch"]
    rate: Float[Tensor, "*batch"]
    relative_rate: Float[Tensor, "*batch"]
    half_life: Float[Tensor, "*batch"]
    period: Float[Tensor, "*batch"]
    bound: Float[Tensor, "*batch"]
    converged: Bool[Tensor, "*batch"]
    projective: Bool[Tensor, "*batch"]
    confirmed: bool
    eps: float


@checked
def fixed_point_residual(
    state: Float[Tensor, "*batch d_model"], next_state: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch"]:
    """``rho_R = ||S(x_R) - x_R|| / ||x_R||`` a token, in fp64; NaN for a zero state.

    Args:
        state: The last state, ``x_R``.
        next_state: The state of one more recurrence, ``S(x_R)``.
    """
    state = state.double()
    return (next_state.double() - state).norm(dim=-1) / state.norm(dim=-1)


@checked
def a_posteriori_bound(
    rate: Float[Tensor, "*batch"], last_step: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """``rate / (1 - rate) * last_step``, the farthest that the fixed point can be from ``x_R``.

    Banach's bound: it holds for a map that contracts by ``rate`` everywhere between. In the units
    of ``last_step = ||x_R - x_(R-1)||``. Infinite for a rate of 1 or more; NaN for a rate that is
    negative or NaN, but zero for a last step of zero.
    """
    rate, last_step = rate.double(), last_step.double()
    bound = torch.where(rate < 1, rate / (1 - rate) * last_step, math.inf)
    bound = torch.where(rate.isnan() | (rate < 0), math.nan, bound)
    return torch.where(last_step == 0, 0.0, bound)


def default_eps(dtype: torch.dtype) -> float:
    """Tolerance of relative steps: 1e-2 for half precision, 1e-4 for fp32 and fp64."""
    return 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4


def decide(series: ConvergenceSeries, eps: float | None = None) -> ConvergenceResult:
    """The verdict of every prompt from its summary series; the module says how it is decided.

    Args:
        series: See :class:`ConvergenceSeries`; :func:`convergence_series` computes it.
        eps: Tolerance of relative steps; :func:`default_eps` of the states' dtype if None.

    Raises:
        InputError: ``eps`` is not between 0 and 1, or only one of residual and distance is there.
    """
    eps = default_eps(series.dtype) if eps is None else eps
    number(eps, "eps", above=0, below=1)
    if (series.residual is None) != (series.distance_2r is None):
        raise InputError("series needs both residual and distance_2r, or neither")
    step, norm = series.step.double(), series.norm.double()
    n = step.shape[0]
    undefined = ~(step[1:].isfinite().all(0) & norm.isfinite().all(0))
    if n < _LEAST_STEPS + 1:
        return _undefined(undefined, series, eps)
    relative, factor = _relative_steps(series, eps)
    settled = _settled_at(relative <= eps)
    rate = _decay_rate(step, norm, series.dtype)
    last_rate = _late_rate(step)
    bound = a_posteriori_bound(rate, relative[-1])
    converged = (settled >= 0) & _arrived(series, factor, bound, eps) & ~undefined
    projective = ~converged & ~undefined & (last_rate >= _least_lasting_rate(n))
    projective &= _is_projective(series.direction_step, norm, eps)
    lowest = series.min_layer_cosine
    shared = torch.zeros_like(converged) if lowest is None else lowest > _SHARED_COSINE
    lasting = _lasts(last_rate, n)
    turn = _return_lag(series.from_last.double(), step[-1])
    cycle = _exact_cycle(series.from_last.double())
    orbit = ~cycle.isnan() | (lasting & ~turn.isnan())
    period = torch.where(cycle.isnan(), turn, cycle)
    straight = lasting & _is_straight(series)
    verdict = torch.full_like(settled, Verdict.NOT_CONVERGED)
    for holds, value in (
        (straight, Verdict.DRIFT),
        (orbit, Verdict.ORBIT),
        (projective, Verdict.PROJECTIVE),
        (converged, Verdict.CONVERGED),
        ((converged | projective) & shared, Verdict.DEGENERATE),
        (undefined, Verdict.UNDEFINED),
    ):
        verdict = torch.where(holds, int(value), verdict)  # the last one that holds wins
    nan = torch.full_like(rate, math.nan)
    return ConvergenceResult(
        verdict=verdict,
        settled_at=torch.where(undefined, -1, settled),
        rate=torch.where(undefined, nan, rate),
        relative_rate=torch.where(
            undefined, nan, _decay_rate(relative, torch.ones_like(norm), series.dtype)
        ),
        half_life=torch.where(undefined, nan, half_life(rate)),
        period=torch.where(verdict == Verdict.ORBIT, period, nan),
        bound=torch.where(undefined, nan, bound),
        converged=converged,
        projective=projective,
        confirmed=series.residual is not None,
        eps=eps,
    )


@checked
def half_life(rate: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Recurrences in which a step halves, ``ln 2 / -ln rate``; infinite for a rate of 1 or more."""
    return torch.where(rate >= 1, math.inf, -math.log(2) / rate.log())


def _undefined(undefined: Tensor, series: ConvergenceSeries, eps: float) -> ConvergenceResult:
    nan = torch.full(undefined.shape, math.nan, dtype=torch.float64, device=undefined.device)
    whole = torch.full_like(undefined, -1, dtype=torch.long)
    no = torch.zeros_like(undefined)
    return ConvergenceResult(
        whole + 1 + Verdict.UNDEFINED, whole, nan, nan, nan, nan, nan, no, no,
        series.residual is not None, eps,
    )  # fmt: skip


def _relative_steps(series: ConvergenceSeries, eps: float) -> tuple[Tensor, Tensor]:
    """Relative steps, and the factor that rescales quantities relative to the last norm.

    Relative to the largest norm of the run where the state vanishes.
    """
    norm, step = series.norm.double(), series.step.double()
    largest = norm.max(0).values
    vanishes = norm[-1] <= eps * largest
    per_largest = torch.where(step == 0, 0.0, step / largest)
    relative = torch.where(vanishes, per_largest, series.relative_step.double())
    factor = torch.where(vanishes, norm[-1] / largest, 1.0)
    return relative, torch.where(vanishes & (norm[-1] == 0), 0.0, factor)


def _arrived(series: ConvergenceSeries, factor: Tensor, bound: Tensor, eps: float) -> Tensor:
    """The second half of convergence: nothing moves any more, however long the run."""
    if series.residual is None or series.distance_2r is None:
        return bound <= _DISTANCE_FACTOR * eps
    near = series.residual.double() * factor <= eps
    near = near & (series.distance_2r.double() * factor <= _DISTANCE_FACTOR * eps)
    # A run that ended in zero exactly has no relative residual; its steps of zero say it all.
    return torch.where(factor == 0, bound <= _DISTANCE_FACTOR * eps, near)


def _settled_at(small: Bool[Tensor, " recurrence *batch"]) -> Tensor:
    """First recurrence from which on all are small, three at least; -1 if there is none."""
    run = small.flip(0).long().cumprod(0).sum(0)  # length of the run of small ones at the end
    return torch.where(run >= _LEAST_STEPS, small.shape[0] - run, -1)


def _decay_rate(step: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    floor = _ABOVE_FLOOR * torch.finfo(dtype).eps * norm.max(0).values
    above = (step[1:] > floor).long().cumprod(0).bool()
    return _slope(step[1:], above).exp()


def _late_rate(step: Tensor) -> Tensor:
    late = step[step.shape[0] // 2 :] if step.shape[0] > 4 else step[1:]
    return _slope(late, late > 0).exp()


def _slope(step: Tensor, use: Tensor) -> Tensor:
    """Least-squares slope of ``ln step`` over the recurrences in use; NaN for fewer than two."""
    r = torch.arange(step.shape[0], dtype=torch.float64, device=step.device)
    r = r.reshape(-1, *[1] * (step.ndim - 1)).expand(step.shape)
    y = torch.where(use, step, 1.0).log()
    weight = use.double()
    n = weight.sum(0)
    x = (r - (weight * r).sum(0) / n) * weight
    return (x * y).sum(0) / x.square().sum(0)  # 0 / 0 for a single one


def _least_lasting_rate(n: int) -> float:
    return float(max(_LASTING_RATE, 0.5 ** (2.0 / n)))


def _lasts(rate: Tensor, n: int) -> Tensor:
    least = _least_lasting_rate(n)
    return (rate >= least) & (rate <= 1 / least)


def _is_projective(direction_step: Tensor, norm: Tensor, eps: float) -> Tensor:
    settled = _settled_at(direction_step.double() <= eps) >= 0
    late = norm[norm.shape[0] // 2 :]
    growing = (late[1:] > late[:-1]).all(0) & (late[-1] > late[0] * (1 + eps))
    return settled & growing


def _return_lag(from_last: Tensor, last_step: Tensor) -> Tensor:
    """The lag, in recurrences, at which the state comes back turn after turn; NaN if it does not.

    If p is the first lag within 0.75 steps, the period lies between p - 1/4 and p + 3/4.
    """
    distance = from_last.flip(0)[: (len(from_last) + 1) // 2 + 1]  # the index is the lag
    near = distance <= _RETURN_WITHIN_STEPS * last_step
    lag = torch.full_like(last_step, math.nan)
    for p in range(2, (len(distance) - 1) // 2 + 1):
        comes_back = near[p] & ~near[2:p].any(0) & near[2 * p - 1 : 2 * p + 3].any(0)
        nearest = p + (distance[p + 1] < distance[p]).double()
        lag = torch.where(comes_back, nearest, lag)
    return torch.where(_has_one_frequency(distance[1:]), lag, math.nan)


def _exact_cycle(from_last: Float[Tensor, " recurrence *batch"]) -> Tensor:
    """The smallest lag at which a run repeats itself, twice; NaN if it does not."""
    distance = from_last.flip(0)  # the index is the lag
    lag = torch.full_like(distance[0], math.nan)
    for p in range(2, (len(distance) - 1) // 2 + 1):
        away = distance[1:p].max(0).values
        close = _REPEATS_WITHIN * away
        back = (distance[p] <= close) & (distance[2 * p] <= close) & (close > 0)
        # A fixed point that was left once also has the same state at p and 2 p.
        back &= (distance[p + 1 : 2 * p] - distance[1:p]).abs().max(0).values <= _AS_FAR * away
        lag = torch.where(back & lag.isnan(), float(p), lag)
    return lag


def _has_one_frequency(distance: Float[Tensor, " lag *batch"]) -> Bool[Tensor, "*batch"]:
    """Whether one frequency and its neighbours have half of the power of the squares."""
    n, batch = distance.shape[0], distance.shape[1:]
    squares = distance.detach().nan_to_num(0.0, 0.0, 0.0).square().cpu().reshape(n, -1).T.numpy()
    _, _, share = spectral_peak(detrend(squares, axis=-1), n)
    return torch.from_numpy(share >= PEAK_SHARE).reshape(batch).to(distance.device)


def _is_straight(series: ConvergenceSeries) -> Tensor:
    step, from_last = series.step.double(), series.from_last.double()
    start = step.shape[0] // 2
    return from_last[start] >= _STRAIGHT * step[start + 1 :].sum(0)
