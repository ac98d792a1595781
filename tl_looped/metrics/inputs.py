"""What every metric asks of its input, and how it averages over real tokens.

Conventions of all metrics. Heads stand third from the right of a pattern, ``[..., head, query,
key]``, and ``d_model`` last in a state, ``[..., pos, d_model]``. A mask has one row a prompt,
``[..., pos]``, and is aligned with the batch dimensions before the heads: ``attention_mask`` as the
model takes it. A masked input gives what each unpadded prompt gives alone. A value that is not
finite makes NaN (or, of norms and distances, infinity) of every number that it enters, and of no
other prompt's or head's; a wrong input raises an error that names the argument.

``skip_first`` leaves the first real tokens of every prompt out of means over tokens and of the
entropy of states. In many models the first token, where attention sinks, has a norm hundreds of
times that of the others, and what is averaged over tokens is then mostly its own. Patterns are not
changed by it: their rows must sum to one, and the sink is what they show.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.checks import whole
from tl_looped.errors import InputError
from tl_looped.model.masks import real_tokens

BLOCK_BYTES = 2**24
"""What is copied to fp64 at a time where every two layers are compared."""

# Largest |row sum - 1| of an attention pattern. An entry near one is off by 2^-9 in bf16 and by
# 2^-12 in fp16, and a row adds up several of them.
_ROW_SUM_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3}


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision as fp32; fp32 and fp64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def checked_pattern(
    pattern: Float[Tensor, "*batch query key"], real: Bool[Tensor, "*mask query"] | None
) -> Float[Tensor, "*batch query key"]:
    """The pattern in fp32 or fp64, with padding at zero and undefined rows at NaN.

    TransformerLens makes zeros of NaN scores, so that a row of zeros is what a diverged state
    leaves: it is undefined, not an error.

    Args:
        pattern: Attention patterns.
        real: See :func:`query_mask`.

    Raises:
        InputError: unless the pattern is square, without negative entries, and its real rows sum
            to one.
    """
    queries, keys = pattern.shape[-2:]
    if queries != keys or queries == 0:
        raise InputError(
            f"pattern must be [..., query, key] of one whole sequence, got shape "
            f"{tuple(pattern.shape)}: no position slice, no key-value cache"
        )
    wide = at_least_fp32(pattern)
    if real is not None:
        # Not a product: what padding attends to may be anything, NaN included. What a real query
        # gives to padding is missing from its row then.
        wide = wide.masked_fill(~(real[..., :, None] & real[..., None, :]), 0.0)
    sums = wide.sum(-1)
    tolerance = _ROW_SUM_TOLERANCE.get(pattern.dtype, 1e-5)
    is_off = ((sums - 1).abs() > tolerance) | (wide.amin(-1) < 0)
    if real is not None:
        is_off = is_off & real
    if not bool(is_off.any()):
        return wide
    zero = is_off & (sums == 0)
    # Padding on the left, unlike NaN, leaves rows of zeros before others.
    if bool((is_off & ~zero).any()) or bool((zero[..., 0] & ~zero[..., -1]).any()):
        raise InputError(
            f"pattern: entries must be at least 0 and the rows of real queries must sum to 1 over "
            f"real keys, within {tolerance}; the smallest entry is {float(wide.amin()):.3g}, the "
            f"sums are {float(sums.amin()):.3g} to {float(sums.amax()):.3g}. Scores instead of a "
            "pattern, an edited pattern, or a padded batch without its attention_mask?"
        )
    return wide.masked_fill(zero[..., None], torch.nan)


def query_mask(
    pattern: Float[Tensor, "*batch query key"], mask: Tensor | None
) -> Bool[Tensor, "*mask query"] | None:
    """The mask of a pattern's queries, with a dimension of one for the heads; None if all are real.

    Raises:
        InputError: if the mask does not fit ``[..., pos]`` of the pattern's batch.
    """
    if mask is None:
        return None
    batch = pattern.shape[:-3] if pattern.ndim > 2 else ()
    real = _checked_mask(mask, (*batch, pattern.shape[-1]), "pattern", tuple(pattern.shape))
    return real.unsqueeze(-2) if pattern.ndim > 2 else real


def token_mask(
    states: Float[Tensor, "*batch pos d_model"], mask: Tensor | None
) -> Bool[Tensor, "*mask pos"] | None:
    """The mask of a state's tokens; None if all are real.

    Raises:
        InputError: if the mask does not fit ``[..., pos]`` of the states.
    """
    if states.shape[-2] == 0:
        raise InputError(f"states hold no token: shape {tuple(states.shape)}")
    if mask is None:
        return None
    return _checked_mask(mask, tuple(states.shape[:-1]), "states", tuple(states.shape))


def counted_tokens(
    states: Float[Tensor, "*batch pos d_model"], mask: Tensor | None, skip_first: int = 0
) -> Bool[Tensor, "*mask pos"] | None:
    """Tokens that a mean is of: the real ones without the first ``skip_first``; None if all are.

    Raises:
        InputError: as :func:`token_mask`, or if ``skip_first`` leaves a prompt without a token.
    """
    real = token_mask(states, mask)
    whole(skip_first, "skip_first")
    if skip_first == 0:
        return real
    if real is None:
        real = torch.ones(states.shape[-2], dtype=torch.bool, device=states.device)
    counted = real & (real.cumsum(-1) > skip_first)
    if not bool(counted.any(-1).all()):
        raise InputError(
            f"skip_first={skip_first} leaves no token of a prompt of {int(real.sum(-1).min())}: "
            "leave out fewer, or take longer prompts"
        )
    return counted


def _checked_mask(
    mask: Tensor, batch_and_pos: tuple[int, ...], what: str, shape: tuple[int, ...]
) -> Bool[Tensor, "*mask pos"]:
    fits = 0 < mask.ndim <= len(batch_and_pos)
    if not fits or tuple(mask.shape) != batch_and_pos[len(batch_and_pos) - mask.ndim :]:
        raise InputError(
            f"attention_mask must be [..., pos] with the last dimensions of {batch_and_pos} for "
            f"{what} of shape {shape}, got {tuple(mask.shape)}"
        )
    real = real_tokens(mask, "attention_mask")
    if not bool(real.any(-1).all()):
        raise InputError("attention_mask leaves a prompt without any real token")
    return real


def same_shape(argument: str, a: Tensor, b: Tensor) -> None:
    """Raise unless both have one shape: one of them would be repeated without a word."""
    if a.shape != b.shape:
        raise InputError(
            f"{argument} must have the same shape as what it is compared with, "
            f"{tuple(b.shape)} against {tuple(a.shape)}"
        )


def mask_of_cache(cache: Any, given: Any) -> Bool[Tensor, "prompt pos"] | None:
    """The mask of a cache's run, which a LoopedActivationCache knows, or the given one.

    Raises:
        InputError: if they differ.
    """
    known = getattr(cache, "attention_mask", None)
    if known is not None:
        known = torch.atleast_2d(known) != 0
    if given is None:
        return known
    given = torch.atleast_2d(torch.as_tensor(given)) != 0
    if known is not None and not torch.equal(known.to(given.device), given):
        raise InputError("attention_mask differs from the one that the cache's run had")
    return given


def lengths(
    x: Tensor, length: int, real: Bool[Tensor, "*mask pos"] | None
) -> Int[Tensor, "*lengths"]:
    """Real tokens of each prompt, broadcastable to the batch; ``length`` without a mask."""
    if real is None:
        return torch.tensor(length, device=x.device)
    return real.sum(-1)


def token_mean(
    values: Float[Tensor, "*batch pos"],
    real: Bool[Tensor, "*mask pos"] | None,
    left_out: Bool[Tensor, "*batch pos"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean over the real tokens, in fp64.

    Args:
        values: One value a token.
        real: Which tokens are real; None means all.
        left_out: Tokens for which the value is undefined; NaN if no token is left.
    """
    values = values.double()
    if real is None and (left_out is None or not bool(left_out.any())):
        return values.mean(-1)
    keep = torch.ones_like(values, dtype=torch.bool)
    if real is not None:
        keep = keep & real
    if left_out is not None:
        keep = keep & ~left_out
    count = keep.sum(-1)
    # 0 / 0 is the NaN of a mean over nothing.
    return values.masked_fill(~keep, 0.0).sum(-1) / count
