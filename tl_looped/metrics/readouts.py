"""What the loop would say at each recurrence: exits, divergences, lens trajectories.

Divergences are in nats and from the earlier or intermediate distribution p to a reference q,
``KL(p || q) = sum_v p_v (ln p_v - ln q_v)``, with ``0 ln 0 = 0``, and infinite where q is zero and
p is not. Softmax and sums are in fp64. A NaN among the logits, or +inf, gives NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import checked, whole
from tl_looped.errors import InputError
from tl_looped.metrics.inputs import mask_of_cache
from tl_looped.model.exit_gate import exit_distribution
from tl_looped.model.masks import real_tokens

__all__ = [
    "KLBetweenRecurrences",
    "LensReadout",
    "LensTrajectory",
    "exit_distribution",
    "kl_between_recurrences",
    "kl_divergence",
    "lens_readout",
    "lens_trajectory",
]

_LOGITS_AT_ONCE = 1 << 26  # 256 MiB in fp32


@checked
def kl_divergence(
    logits: Float[Tensor, "*batch d_vocab"], reference: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """``KL(softmax(logits) || softmax(reference))`` in nats, see the module."""
    p, q = (x.double().log_softmax(-1) for x in (logits, reference))
    terms = p.exp() * (p - q)
    # -inf is a probability of zero; without this it would be 0 * inf.
    return terms.masked_fill(p == -math.inf, 0.0).sum(-1)


@dataclass(frozen=True)
class KLBetweenRecurrences:
    """How far the predictions of successive recurrences are apart, in nats.

    Args:
        to_previous: ``KL(p_r || p_(r-1))``, what the public exit rule compares with its threshold;
            NaN at the first recurrence.
        to_last: ``KL(p_r || p_R)``; 0 at the last one.
    """

    to_previous: Float[Tensor, " recurrence *batch"]
    to_last: Float[Tensor, " recurrence *batch"]


@checked
def kl_between_recurrences(
    logits: Float[Tensor, "recurrence *batch d_vocab"],
) -> KLBetweenRecurrences:
    """Divergence of each recurrence's prediction from the previous one and from the last.

    Args:
        logits: Had the loop stopped there: ``model.coda_lens`` of every state.

    Raises:
        InputError: no recurrence.
    """
    n = whole(len(logits), "len(logits)", 1)
    to_last = torch.stack([kl_divergence(x, logits[-1]) for x in logits])
    steps = [kl_divergence(logits[r], logits[r - 1]) for r in range(1, n)]
    return KLBetweenRecurrences(
        torch.stack([torch.full_like(to_last[0], math.nan), *steps]), to_last
    )


@dataclass(frozen=True)
class LensReadout:
    """What some logits say of one token.

    Args:
        rank: How many tokens have a strictly larger logit, from 0 for the top; tokens that tie
            share the best rank. NaN where a logit is NaN.
        probability: Of the token.
        kl_to_final: ``KL(p || p_final)`` in nats.
    """

    rank: Float[Tensor, "*any"]
    probability: Float[Tensor, "*any"]
    kl_to_final: Float[Tensor, "*any"]


@checked
def lens_readout(
    logits: Float[Tensor, "*batch d_vocab"],
    final_logits: Float[Tensor, "*batch d_vocab"],
    token: Int[Tensor, "*batch"],
) -> LensReadout:
    """Rank and probability of a token, and the divergence from the final prediction, in fp64.

    Args:
        logits: Of a lens.
        final_logits: Of the model.
        token: Which one to read.

    Raises:
        InputError: a token outside the vocabulary.
    """
    d_vocab = logits.shape[-1]
    if token.numel() and not (int(token.min()) >= 0 and int(token.max()) < d_vocab):
        raise InputError(
            f"token must be 0..{d_vocab - 1}, got {int(token.min())}..{int(token.max())}"
        )
    index = token.long()[..., None]
    rank = (logits > logits.gather(-1, index)).sum(-1).double()
    return LensReadout(
        rank=rank.masked_fill(logits.isnan().any(-1), math.nan),
        probability=logits.double().softmax(-1).gather(-1, index)[..., 0],
        kl_to_final=kl_divergence(logits, final_logits),
    )


@dataclass(frozen=True)
class LensTrajectory:
    """Both lenses at every layer of the loop, at one position of every prompt.

    Args:
        logit_lens: Readouts ``[recurrence, layer, batch]`` through final norm and unembedding.
        coda_lens: The same as if the loop ended there. At the last recurrence's last layer it is
            the model's own prediction, with a divergence of 0.
        token: The token that was read, ``[batch]``.
        position: Where, ``[batch]``.
    """

    logit_lens: LensReadout
    coda_lens: LensReadout
    token: Int[Tensor, " batch"]
    position: Int[Tensor, " batch"]


@checked
def lens_trajectory(
    cache: LoopedActivationCache,
    token: Int[Tensor, " batch"] | None = None,
    position: int = -1,
    attention_mask: Tensor | None = None,
) -> LensTrajectory:
    """Rank, probability and divergence of one token at every (recurrence, layer) of a run.

    Holds the logits of one layer of a few prompts at a time.

    Args:
        cache: With ``hook_resid_post`` of every core layer, at all positions: the coda attends.
        token: The one to read in each prompt; None reads the model's own top prediction (the
            first of those that tie).
        position: Which of a prompt's real tokens to read from, from the left, or from the right
            if negative; the last one by default.
        attention_mask: The run's ``attention_mask``, ``[batch, pos]``; the cache knows its own.

    Raises:
        MissingActivationError: the cache lacks a state, or the run left the loop early.
        InputError: a position that some prompt does not have; wrong shapes.
    """
    loop, model = cache.loop, cache.model
    if loop.R == 0:
        raise InputError("the run had no recurrence, and no state of the loop to read")
    attention_mask = mask_of_cache(cache, attention_mask)

    def state(r: int, layer: int) -> Tensor:
        x = cache["resid_post", (r, layer)]
        return x if x.ndim == 3 else x[None]

    last = state(loop.R - 1, loop.k - 1)
    real = _real(attention_mask, last)
    where = _positions(real, position)
    rows = torch.arange(len(last), device=last.device)

    def by_logit_lens(x: Tensor) -> Tensor:
        return model.logit_lens(x[rows, where][:, None])[:, 0]

    def by_coda_lens(x: Tensor) -> Tensor:
        size = max(1, _LOGITS_AT_ONCE // (x.shape[1] * model.cfg.d_vocab))
        parts = [
            model.coda_lens(x[part], attention_mask=real[part])[range(len(part)), where[part]]
            for part in rows.split(size)
        ]
        return torch.cat(parts)

    with torch.no_grad():
        final = by_coda_lens(last)
        token = final.argmax(-1) if token is None else token.to(final.device)
        if token.shape != where.shape:
            raise InputError(f"token must be [batch={len(last)}], got shape {tuple(token.shape)}")
        readouts: tuple[list[LensReadout], list[LensReadout]] = ([], [])
        for r in range(loop.R):
            for layer in range(loop.k):
                x = state(r, layer)
                readouts[0].append(lens_readout(by_logit_lens(x), final, token))
                readouts[1].append(lens_readout(by_coda_lens(x), final, token))
    by_logit, by_coda = (_stacked(part, loop.R, loop.k) for part in readouts)
    return LensTrajectory(by_logit, by_coda, token, where)


def _stacked(readouts: list[LensReadout], R: int, k: int) -> LensReadout:
    fields = ("rank", "probability", "kl_to_final")
    columns = [torch.stack([getattr(one, name) for one in readouts]) for name in fields]
    return LensReadout(*(column.unflatten(0, (R, k)) for column in columns))


def _real(mask: Tensor | None, states: Tensor) -> Tensor:
    shape = tuple(states.shape[:2])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=states.device)
    if tuple(mask.shape) != shape:
        raise InputError(f"attention_mask must be [batch, pos] = {shape}, got {tuple(mask.shape)}")
    return real_tokens(mask).to(states.device)


def _positions(real: Tensor, position: int) -> Int[Tensor, " batch"]:
    """Index in the padded batch of the wanted real token of every row."""
    length = real.sum(-1)
    if type(position) is not int or not bool(((-length <= position) & (position < length)).all()):
        raise InputError(
            f"position must be one that every prompt has; the shortest has {int(length.min())} "
            f"tokens, got {position}"
        )
    wanted = torch.where(torch.tensor(position < 0), length + position, position)
    return ((real.cumsum(-1) - 1 == wanted[:, None]) & real).long().argmax(-1)
