"""Metrics of attention patterns.

Patterns are ``[..., head, query, key]``, causal or not, of one whole sequence, with rows that sum
to 1; see ``tl_looped.metrics.inputs`` for masks. Values are per head wherever a head has one:
average over heads, then prompts, afterwards, never the patterns. Sums and their logarithms are in
fp64, entries in fp32, or fp64 if they came so.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.metrics.inputs import (
    at_least_fp32,
    check_choice,
    check_pattern,
    lengths,
    query_mask,
    token_mean,
)

MixingForm = Literal["raw", "per_token", "per_row", "log_t"]
Denominator = Literal["all", "visible"]

Pattern = Float[Tensor, "*batch query key"]


def _checked(
    pattern: Tensor, mask: Tensor | None
) -> tuple[Tensor, Bool[Tensor, "*mask query"] | None]:
    """The pattern in fp32 or fp64 with the rows of padding at zero, and the mask of its queries."""
    real = query_mask(pattern, mask)
    check_pattern(pattern, real)
    wide = at_least_fp32(pattern)
    if real is not None:
        # Not a product: what padding attends to may be anything, NaN included.
        wide = wide.masked_fill(~(real[..., :, None] & real[..., None, :]), 0.0)
    return wide, real


def colsum_concentration(pattern: Pattern, mask: Tensor | None = None) -> Float[Tensor, "*batch"]:
    """How unevenly attention falls on the keys: 0 if every key gets the same, 1 if one gets all.

    With the column sums ``c_j = sum_i A_ij`` and ``p = c / T``: ``1 + sum_j p_j ln p_j / ln T``.
    The paper (arXiv 2604.11791, Section 3) prints ``c_j`` where its range [0, 1] needs ``c_j / T``.

    Args:
        pattern: Attention patterns.
        mask: ``[..., pos]``, zero at padding.

    Returns:
        One value a head; NaN for a single token.
    """
    wide, real = _checked(pattern, mask)
    n = lengths(wide, wide.shape[-1], real).double()
    share = wide.sum(-2, dtype=torch.float64) / n[..., None]
    value = 1.0 - torch.special.entr(share).sum(-1) / n.log()
    return value.masked_fill(n == 1, math.nan)


def sink_score(
    pattern: Pattern,
    key: int = 0,
    mask: Tensor | None = None,
    denominator: Denominator = "all",
    above_uniform: bool = False,
) -> Float[Tensor, "*batch"]:
    """Attention that a key receives, averaged over queries: ``(1 / T) sum_t A_tk``.

    It depends on the length: uniform causal attention scores ``H_T / T`` on the first key (H the
    harmonic number), 0.31 at T = 9 and 0.29 at T = 10. Compare prompts of different lengths with
    ``above_uniform``.

    Args:
        pattern: Attention patterns.
        key: Position of the key (0-based), counted from the first real token.
        mask: ``[..., pos]``, zero at padding.
        denominator: ``"all"`` divides by T as the paper's equation does; ``"visible"`` by
            ``T - k``, the queries that may see the key, as public code of Gu et al. does.
        above_uniform: Subtract the score of uniform causal attention, ``(H_T - H_k) / T``.

    Returns:
        One value a head; NaN for prompts that are not longer than ``key``.

    Raises:
        InputError: if no prompt is longer than ``key``.
    """
    check_choice("denominator", denominator, get_args(Denominator))
    wide, real = _checked(pattern, mask)
    length = wide.shape[-1]
    n = lengths(wide, length, real)
    if not 0 <= key < int(n.max()):
        raise InputError(f"key must be 0..{int(n.max()) - 1} (the longest prompt), got {key}")
    received = wide.sum(-2, dtype=torch.float64)
    if real is None:
        score = received[..., key]
    else:
        # The key-th real token of each prompt; any column where there is none.
        is_key = real & (real.cumsum(-1) == key + 1)
        score = received.masked_fill(~is_key, 0.0).sum(-1)
    count = (n if denominator == "all" else n - key).double()
    score = score / count
    if above_uniform:
        after_key = torch.arange(
            1, length + 1, device=wide.device, dtype=torch.float64
        ).reciprocal()
        harmonic = torch.cat((after_key.new_zeros(1), after_key.cumsum(0)))
        score = score - (harmonic[n] - harmonic[key]) / count
    return score.masked_fill(n <= key, math.nan)


def sink_rate(
    pattern: Float[Tensor, "*batch head query key"],
    threshold: float = 0.3,
    key: int = 0,
    mask: Tensor | None = None,
    strict: bool = False,
    denominator: Denominator = "all",
) -> Float[Tensor, "*batch"]:
    """Fraction of heads whose :func:`sink_score` at ``key`` reaches the threshold.

    Args:
        pattern: Attention patterns.
        threshold: The paper's is 0.3, in [0, 1].
        key, mask, denominator: As in :func:`sink_score`.
        strict: Ask for more than the threshold instead of at least it.

    Returns:
        One value a prompt; NaN if any of its heads has no score.
    """
    if not 0.0 <= threshold <= 1.0:
        raise InputError(f"threshold must be in [0, 1], got {threshold}")
    score = sink_score(pattern, key, mask, denominator)
    reached = (score > threshold) if strict else (score >= threshold)
    return reached.double().masked_fill(score.isnan(), math.nan).mean(-1)


def mixing_score(
    pattern: Pattern, form: MixingForm = "raw", mask: Tensor | None = None
) -> Float[Tensor, "*batch"]:
    """How widely the queries spread their attention: row entropies ``h_i = -sum_j A_ij ln A_ij``.

    - ``raw``: ``mean_i h_i``, in nats, the paper's equation;
    - ``per_token``: ``raw / T``, which alone fits the axes of the paper's figures;
    - ``per_row``: mean over ``i >= 2`` of ``h_i / ln i``, 1 for uniform causal attention;
    - ``log_t``: ``raw / ln T``.

    Args:
        pattern: Attention patterns.
        form: See above.
        mask: ``[..., pos]``, zero at padding.

    Returns:
        One value a head; for a single token 0, but NaN in the forms ``per_row`` and ``log_t``.
    """
    check_choice("form", form, get_args(MixingForm))
    wide, real = _checked(pattern, mask)
    entropy = torch.special.entr(wide).sum(-1, dtype=torch.float64)
    n = lengths(wide, wide.shape[-1], real)
    if form != "per_row":
        return mixing_in_form(token_mean(entropy, real), form, n)
    if real is None:
        position = torch.arange(1, wide.shape[-1] + 1, device=wide.device)
    else:
        position = real.cumsum(-1)
    first = (position <= 1).expand(entropy.shape)
    share = entropy / position.clamp(min=2).double().log()
    return token_mean(share, real, left_out=first)


def mixing_in_form(
    raw: Float[Tensor, "*batch"], form: MixingForm, n_tokens: Tensor
) -> Float[Tensor, "*batch"]:
    """A raw :func:`mixing_score` in another form, all but ``per_row``.

    Args:
        raw: In nats.
        form: ``raw``, ``per_token`` or ``log_t``.
        n_tokens: Real tokens, broadcastable.
    """
    if form == "raw":
        return raw
    n = n_tokens.double()
    return raw / n if form == "per_token" else raw / n.log()


def attention_distance(
    a: Pattern, b: Pattern, mask: Tensor | None = None
) -> Float[Tensor, "*batch"]:
    """Frobenius distance ``||A - B||_F`` between two patterns, head by head.

    From direct differences, which keep what a Gram matrix loses near convergence. Never above
    ``sqrt(2 T)``.

    Args:
        a, b: Attention patterns of the same sequences.
        mask: ``[..., pos]``, zero at padding.
    """
    return pattern_distance(_checked(a, mask)[0], _checked(b, mask)[0])


def pattern_distance(a: Pattern, b: Pattern) -> Float[Tensor, "*batch"]:
    """As :func:`attention_distance`, for patterns that were checked and masked already."""
    return torch.linalg.vector_norm(a - b, dim=(-2, -1), dtype=torch.float64)


def pairwise_attention_distance(
    patterns: Float[Tensor, "layer *batch query key"], mask: Tensor | None = None
) -> Float[Tensor, "layer layer"]:
    """:func:`attention_distance` of every two layers, averaged over heads and prompts.

    Same head to same head (the paper's Figs 2 and 21).

    Args:
        patterns: All layers to compare, stacked: ``cache.stack_activation("pattern")``.
        mask: ``[..., pos]``, zero at padding.
    """
    wide, _ = _checked(patterns, mask)
    layers = wide.flatten(-2).reshape(len(wide), -1, wide.shape[-1] ** 2)
    total = torch.zeros(len(wide), len(wide), dtype=torch.float64, device=wide.device)
    for one in layers.unbind(1):  # one head of one prompt at a time, or all of them in fp64
        total += torch.cdist(
            one.double(), one.double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
    return total / layers.shape[1]
