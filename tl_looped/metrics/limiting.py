"""How a token's state behaves in the limit: fixed point, slider, orbit or none of them.

A reconstruction of Algorithm 1 of arXiv 2604.11791. The paper states the input (the similarity of
each recurrence's state to the last one, per token, at the last core layer), ``tau = 0.05``,
``rho = 0.9``, a window, de-trending and a Fourier transform; order and thresholds of the rest are
ours:

0. the series repeats itself: for some lag k from 2 to ``window``, each of the last ``window + 1``
   values agrees within 1e-5 with the one k before it, if that is among them, and the values of the
   window are at least ``tau`` apart: ORBIT, period the smallest such k. Where k is over half the
   window, so that less than two turns are seen, no two values in a row may be the last one: a
   state that was pushed out of its fixed point once and came back is no orbit. This is ours: what
   repeats is an orbit whatever its shape, and a cycle with strong harmonics, or one that is away
   for a single recurrence in ten, has no single frequency;
1. at least the share ``rho`` of ALL recurrences within ``1 - s <= tau``: FIXED;
2. ``w`` = the last ``window`` values before the last one, which is trivially 1;
3. a line is fitted to ``w`` and taken off, the rest goes through a periodic Hann window and a real
   Fourier transform; the peak ``k`` of its amplitudes, without the constant, and the share of power
   in the bins k - 1 to k + 1;
4. ``amplitude`` of the peak, ``trend = |slope| (window - 1)``, shares ``up`` and ``down`` of the
   rising and the falling steps;
5. ``k >= 2``, share >= 1/2, ``2 amplitude >= tau`` and ``>= trend / 2``: ORBIT, period window / k;
6. ``trend >= tau`` and ``max(up, down) >= rho``: SLIDER;
7. all of ``w`` within ``tau``: FIXED, but late; else UNKNOWN.

Limits. Slow convergence looks like a slider. An orbit that does not repeat within the window (a
rotation by an irrational angle, an exact cycle that is longer or noisier than that) is found by its
strongest frequency alone: its period is that of a Fourier bin, between two bins the amplitude reads
up to 15 % low, and strong harmonics hide it. A circle of radius a around a unit constant is found
where ``2 a^2 / (1 + a^2) > tau``, or where what is read of it is. A cosine is blind to a radial
drift: see :func:`distance_similarity`. Of a cycle longer than half the window less than two turns
are looked at: that the state comes back is taken for proof that it will again, which is so of a map
that depends on the state alone, and its period may be read too short where what would tell two lags
apart was seen once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.signal import detrend
from scipy.signal.windows import hann
from torch import Tensor

from tl_looped.checks import checked, number, whole
from tl_looped.errors import InputError
from tl_looped.metrics.inputs import token_mask

_CHUNK = 1 << 15  # tokens at a time, so that the spectra stay within tens of megabytes
_SMALLEST_WINDOW = 8
_SAME = 1e-5  # above the rounding of similarities of fp32 states
_TREND_PER_AMPLITUDE = 2.0
PEAK_SHARE = 0.5


class LimitingBehavior(IntEnum):
    """What a token's state does in the limit; the values of ``LimitingBehaviors.labels``."""

    FIXED = 0
    SLIDER = 1
    ORBIT = 2
    UNKNOWN = 3
    UNDEFINED = 4
    """The series holds a NaN or an infinity."""


@dataclass(frozen=True)
class LimitingBehaviors:
    """The label of every token, and what it was decided on.

    All floats are fp64, describe the window, and are NaN where the label is UNDEFINED.

    Args:
        labels: Values of :class:`LimitingBehavior`.
        late: FIXED by step 7: settled within the window, but not for the share ``rho`` of the run.
        period: Recurrences per turn; NaN unless the label is ORBIT.
        amplitude: Of the strongest oscillation about the line, in units of the similarity.
        slope: Of the fitted line, a recurrence.
        share: Share of the power in the peak's three bins; NaN for a series without power.
        window, tau, rho: The arguments.
    """

    labels: Int[Tensor, "*batch"]
    late: Bool[Tensor, "*batch"]
    period: Float[Tensor, "*batch"]
    amplitude: Float[Tensor, "*batch"]
    slope: Float[Tensor, "*batch"]
    share: Float[Tensor, "*batch"]
    window: int
    tau: float
    rho: float


@checked
def classify_limiting_behavior(
    similarity: Float[Tensor, "*batch recurrence"],
    window: int = 64,
    tau: float = 0.05,
    rho: float = 0.9,
) -> LimitingBehaviors:
    """Label the limiting behaviour of every series; see the module for the algorithm.

    Args:
        similarity: Similarity of each recurrence's state to the last one's, 1 where they agree:
            :func:`cosine_similarity` (the paper's) or :func:`distance_similarity`.
        window: Recurrences that are looked at, before the last one (64 is the reconstruction's).
        tau: Largest ``1 - s`` that counts as being there (0.05 in the paper).
        rho: Share of recurrences, or of steps in one direction, that is enough (0.9 in the paper).

    Raises:
        InputError: ``window`` below 8, fewer than ``window + 1`` recurrences, ``tau`` or ``rho``
            out of range.
    """
    _check_arguments(similarity, window, tau, rho)
    batch, device = similarity.shape[:-1], similarity.device
    series = similarity.detach().cpu().double().reshape(-1, similarity.shape[-1])
    parts = [_classify(part.numpy(), window, tau, rho) for part in series.split(_CHUNK)]
    if not parts:
        parts = [_classify(np.zeros((0, similarity.shape[-1])), window, tau, rho)]
    labels, late, period, amplitude, slope, share = (
        torch.from_numpy(np.concatenate(column)).reshape(batch).to(device)
        for column in zip(*parts, strict=True)
    )
    return LimitingBehaviors(
        labels, late, period, amplitude, slope, share, window=window, tau=tau, rho=rho
    )


def _check_arguments(similarity: Tensor, window: int, tau: float, rho: float) -> None:
    whole(window, "window", _SMALLEST_WINDOW)
    number(tau, "tau", above=0, below=1)
    number(rho, "rho", above=0.5, most=1)
    if similarity.ndim == 0 or similarity.shape[-1] < window + 1:
        raise InputError(
            f"similarity must have at least window + 1 = {window + 1} recurrences in its last "
            f"dimension, got shape {tuple(similarity.shape)}: run more recurrences or take a "
            "smaller window"
        )


def _classify(s: np.ndarray, window: int, tau: float, rho: float) -> tuple[np.ndarray, ...]:
    """Labels, late, period, amplitude, slope and share of ``[token, recurrence]``."""
    undefined = ~np.isfinite(s).all(-1)
    s = np.where(undefined[:, None], 1.0, s)
    w = s[:, -window - 1 : -1]
    rest = detrend(w, axis=-1)
    slope = ((w - rest)[:, -1] - (w - rest)[:, 0]) / (window - 1)
    k, amplitude, share = spectral_peak(rest, window)
    trend = np.abs(slope) * (window - 1)
    up = (np.diff(w, axis=-1) > 0).mean(-1)
    down = (np.diff(w, axis=-1) < 0).mean(-1)
    early = (1 - s <= tau).mean(-1) >= rho
    orbit = (k >= 2) & (share >= PEAK_SHARE) & (2 * amplitude >= tau)
    orbit &= 2 * amplitude * _TREND_PER_AMPLITUDE >= trend
    slider = (trend >= tau) & (np.maximum(up, down) >= rho)
    settled = (1 - w <= tau).all(-1)
    kind = LimitingBehavior
    cycle = _cycle(s, window)
    cycle = np.where(np.ptp(w, axis=-1) >= tau, cycle, 0)
    labels = np.select(
        [undefined, cycle > 0, early, orbit, slider, settled],
        [kind.UNDEFINED, kind.ORBIT, kind.FIXED, kind.ORBIT, kind.SLIDER, kind.FIXED],
        kind.UNKNOWN,
    ).astype(np.int64)
    late = (labels == kind.FIXED) & ~early
    period = np.where(cycle > 0, cycle, window / np.maximum(k, 1))
    period = np.where(labels == kind.ORBIT, period, np.nan)
    amplitude, slope, share = (np.where(undefined, np.nan, x) for x in (amplitude, slope, share))
    return labels, late, period, amplitude, slope, share


def _cycle(s: np.ndarray, window: int) -> np.ndarray:
    """The smallest lag, 2 to ``window``, at which each series repeats itself; 0 if none does."""
    found = np.zeros(len(s), dtype=np.int64)
    if not s.size:
        return found
    last = s[:, -window - 1 :]
    # A state that stays is at a fixed point, and one way out of it and back is no turn.
    there = np.abs(last - last[:, -1:]) <= _SAME
    stays = (there[:, 1:] & there[:, :-1]).any(-1)
    for lag in range(2, window + 1):
        # Few come back to the last value at all: only these are looked at.
        back = np.abs(last[:, -1 - lag] - last[:, -1]) <= _SAME
        back &= (2 * lag <= window) | ~stays
        rows = np.flatnonzero(back & (found == 0))
        if rows.size:
            apart = np.abs(last[rows, lag:] - last[rows, :-lag])
            found[rows[apart.max(-1) <= _SAME]] = lag
    return found


def spectral_peak(
    rest: Float[np.ndarray, "series window"], window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Strongest bin, its amplitude, and the share of power in it and its two neighbours.

    Of series without their trend, under a periodic Hann window. The share is NaN without power.
    """
    # A residue of rounding is no oscillation: it has no power, and its share is undefined.
    rest = np.where(np.abs(rest).max(-1, keepdims=True, initial=0.0) > 1e-12, rest, 0.0)
    shape = hann(window, sym=False)
    spectrum = np.abs(np.fft.rfft(rest * shape))
    spectrum[:, 0] = 0.0
    k = spectrum.argmax(-1)
    peak = np.take_along_axis(spectrum, k[:, None], -1)[:, 0]
    # Every bin stands for a pair of frequencies but the last one of an even window.
    amplitude = np.where(2 * k == window, 1.0, 2.0) * peak / shape.sum()
    power = np.pad(spectrum**2, ((0, 0), (1, 1)))
    near = sum(np.take_along_axis(power, (k + i)[:, None], -1)[:, 0] for i in range(3))
    total = power.sum(-1)
    share = np.divide(near, total, out=np.full_like(total, np.nan), where=total > 0)
    return k, amplitude, share


@checked
def cosine_similarity(
    states: Float[Tensor, "recurrence *batch pos d_model"],
) -> Float[Tensor, "*batch pos recurrence"]:
    """Cosine of each recurrence's state with the last one, in fp64; NaN for a zero vector."""
    last = _last(states)
    unit = last / last.norm(dim=-1, keepdim=True)
    rows = (x.double() for x in states)
    return torch.stack([(x / x.norm(dim=-1, keepdim=True) * unit).sum(-1) for x in rows], -1)


@checked
def distance_similarity(
    states: Float[Tensor, "recurrence *batch pos d_model"],
) -> Float[Tensor, "*batch pos recurrence"]:
    """``1 - d^2 / 2`` with ``d = ||x_r - x_R|| / ||x_R||``, in fp64; NaN for a zero last state.

    The twin of the cosine that also sees the norm. For states of equal norm it IS the cosine, so
    that ``tau`` means the same for both; with ``g = ||x_r|| / ||x_R||`` it is
    ``1 - g (1 - cos) - (1 - g)^2 / 2``. It has no lower bound. This form is our choice.
    """
    last = _last(states)
    norm = last.norm(dim=-1)
    rows = [((x.double() - last).norm(dim=-1) / norm).square() for x in states]
    return 1.0 - torch.stack(rows, -1) / 2


def _last(states: Tensor) -> Tensor:
    whole(len(states), "len(states)", 1)
    return states[-1].double()


def _one_hot(labels: Tensor) -> Bool[Tensor, "*any label"]:
    kinds = torch.arange(len(LimitingBehavior), device=labels.device)
    if labels.numel() and not bool(((labels >= 0) & (labels < len(kinds))).all()):
        raise InputError(
            f"labels must be values of LimitingBehavior, 0..{len(kinds) - 1}, got "
            f"{int(labels.min())}..{int(labels.max())}"
        )
    return labels[..., None] == kinds


def _real_tokens(labels: Tensor, mask: Tensor | None) -> Tensor:
    """True at real tokens, of the shape of ``labels``."""
    real = token_mask(labels[..., None].float(), mask)
    return torch.ones_like(labels, dtype=torch.bool) if real is None else real.expand(labels.shape)


@checked
def cooccurrence(
    labels: Int[Tensor, "*batch layer token"], attention_mask: Tensor | None = None
) -> Float[Tensor, "label label"]:
    """P(some layer shows b | some layer shows a, at the same token), Fig. 14 of the paper.

    Args:
        labels: Values of :class:`LimitingBehavior` at several layers; all batches are pooled.
        attention_mask: ``[*batch, token]``, zero at padding.

    Returns:
        Row a, column b, both indexed by :class:`LimitingBehavior`. A row of NaN where no token
        shows a at any layer (0 / 0). The diagonal is 1 elsewhere.
    """
    shown = _one_hot(labels).any(-3) & _real_tokens(labels[..., 0, :], attention_mask)[..., None]
    shown = shown.reshape(-1, len(LimitingBehavior)).double()
    both = shown.T @ shown
    return both / both.diagonal()[:, None]


@dataclass(frozen=True)
class LabelPercentages:
    """How frequent each behaviour is; the last dimension is indexed by :class:`LimitingBehavior`.

    Args:
        tokens: Percent of all real tokens, prompts pooled. Adds up to 100.
        examples: Percent of prompts of which any real token shows the behaviour. Adds up to more.
    """

    tokens: Float[Tensor, "*rest label"]
    examples: Float[Tensor, "*rest label"]


@checked
def label_percentages(
    labels: Int[Tensor, "*rest batch token"], attention_mask: Tensor | None = None
) -> LabelPercentages:
    """Percent of tokens and of prompts that show each behaviour (Tables 3 and 4 of the paper).

    Args:
        labels: Values of :class:`LimitingBehavior`; leading dimensions (layers) are kept apart.
        attention_mask: ``[batch, token]``, zero at padding.
    """
    real = _real_tokens(labels, attention_mask)
    shown = _one_hot(labels) & real[..., None]
    count = real.sum((-2, -1)).double()[..., None]
    return LabelPercentages(
        tokens=100 * shown.sum((-3, -2)) / count,
        examples=100 * shown.any(-2).double().mean(-2),
    )
