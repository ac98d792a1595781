"""Metrics of attention patterns.

Patterns are ``[..., head, query, key]``, causal or not, of one whole sequence, with rows that sum
to 1; see ``tl_looped.metrics.inputs`` for masks. Values are per head wherever a head has one:
average over heads, then prompts, afterwards, never the patterns. Sums and their logarithms are in
fp64, entries in fp32, or fp64 if they came so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.checks import checked, number, one_of, whole
from tl_looped.metrics.inputs import (
    BLOCK_BYTES,
    checked_pattern,
    lengths,
    query_mask,
    same_shape,
    token_mean,
)

SINK_THRESHOLD = 0.3
"""The paper's: a head with at least this score at the first key is a sink."""

MixingForm = Literal["raw", "per_token", "per_row", "log_t"]
Denominator = Literal["all", "visible"]

Pattern = Float[Tensor, "*batch query key"]


@dataclass(frozen=True)
class PatternRows:
    """A pattern that was checked: in fp32 or fp64, with padding at zero.

    Args:
        wide: ``[..., head, query, key]``.
        real: Mask of the queries with a dimension of one for the heads; None if all are real.
    """

    wide: Float[Tensor, "*batch query key"]
    real: Bool[Tensor, "*mask query"] | None

    @classmethod
    def of(cls, pattern: Tensor, mask: Tensor | None) -> PatternRows:
        """Check and prepare a pattern."""
        real = query_mask(pattern, mask)
        return cls(checked_pattern(pattern, real), real)

    @property
    def n_tokens(self) -> Int[Tensor, "*lengths"]:
        """Real tokens, broadcastable to one value a head."""
        return lengths(self.wide, self.wide.shape[-1], self.real)

    def received(self) -> Float[Tensor, "*batch key"]:
        """Attention that each key receives from all queries, in fp64."""
        return self.wide.sum(-2, dtype=torch.float64)

    def entropies(self) -> Float[Tensor, "*batch query"]:
        """Entropy of each query's row in nats, in fp64; 0 ln 0 is 0."""
        tiny = torch.finfo(self.wide.dtype).tiny
        # Several times as fast as torch.special.entr; no entry is negative.
        terms = self.wide * self.wide.clamp(min=tiny).log()
        return -terms.sum(-1, dtype=torch.float64)


@checked
def colsum_concentration(
    pattern: Pattern, attention_mask: Tensor | None = None
) -> Float[Tensor, "*batch"]:
    """How unevenly attention falls on the keys: 0 if every key gets the same, 1 if one gets all.

    With the column sums ``c_j = sum_i A_ij`` and ``p = c / T``: ``1 + sum_j p_j ln p_j / ln T``.
    The paper (arXiv 2604.11791, Section 3) prints ``c_j`` where its range [0, 1] needs ``c_j / T``.

    Args:
        pattern: Attention patterns.
        attention_mask: ``[..., pos]``, zero at padding.

    Returns:
        One value a head; NaN for a single token.
    """
    rows = PatternRows.of(pattern, attention_mask)
    return _colsum(rows.received(), rows.n_tokens)


def _colsum(received: Tensor, n_tokens: Tensor) -> Float[Tensor, "*batch"]:
    n = n_tokens.double()
    share = received / n[..., None]
    value = 1.0 - torch.special.entr(share).sum(-1) / n.log()
    return value.masked_fill(n == 1, math.nan)


@checked
def sink_score(
    pattern: Pattern,
    key: int = 0,
    attention_mask: Tensor | None = None,
    denominator: Denominator | str = "all",
    above_uniform: bool = False,
) -> Float[Tensor, "*batch"]:
    """Attention that a key receives, averaged over queries: ``(1 / T) sum_t A_tk``.

    It depends on the length: uniform causal attention scores ``H_T / T`` on the first key (H the
    harmonic number), 0.31 at T = 9 and 0.29 at T = 10. Compare prompts of different lengths with
    ``above_uniform``.

    Args:
        pattern: Attention patterns.
        key: Position of the key (0-based), counted from the first real token.
        attention_mask: ``[..., pos]``, zero at padding.
        denominator: ``"all"`` divides by T as the paper's equation does; ``"visible"`` by
            ``T - k``, the queries that may see the key, as public code of Gu et al. does.
        above_uniform: Subtract the score of uniform causal attention, ``(H_T - H_k) / T``.

    Returns:
        One value a head; NaN for prompts that are not longer than ``key``.

    Raises:
        InputError: if no prompt is longer than ``key``.
    """
    one_of(denominator, "denominator", get_args(Denominator))
    rows = PatternRows.of(pattern, attention_mask)
    longest = int(rows.n_tokens.max())
    whole(key, "key", 0, longest - 1, fix="a token of the longest prompt")
    return _sink(rows.received(), rows, key, denominator, above_uniform)


def _sink(
    received: Tensor, rows: PatternRows, key: int, denominator: str, above_uniform: bool
) -> Float[Tensor, "*batch"]:
    n, real = rows.n_tokens, rows.real
    if real is None:
        score = received[..., key]
    else:
        is_key = real & (real.cumsum(-1) == key + 1)
        score = received.masked_fill(~is_key, 0.0).sum(-1)
    count = (n if denominator == "all" else n - key).double()
    score = score / count
    if above_uniform:
        length = received.shape[-1]
        terms = torch.arange(1, length + 1, device=received.device, dtype=torch.float64)
        harmonic = torch.cat((terms.new_zeros(1), terms.reciprocal().cumsum(0)))
        score = score - (harmonic[n] - harmonic[key]) / count
    return score.masked_fill(n <= key, math.nan)


@checked
def sink_rate(
    pattern: Float[Tensor, "*batch head query key"],
    threshold: float = SINK_THRESHOLD,
    key: int = 0,
    attention_mask: Tensor | None = None,
    strict: bool = False,
    denominator: Denominator | str = "all",
) -> Float[Tensor, "*batch"]:
    """Fraction of heads whose :func:`sink_score` at ``key`` reaches the threshold.

    Args:
        pattern: Attention patterns.
        threshold: The paper's is 0.3, in [0, 1].
        key, attention_mask, denominator: As in :func:`sink_score`.
        strict: Ask for more than the threshold instead of at least it.

    Returns:
        One value a prompt; NaN if any of its heads has no score.
    """
    number(threshold, "threshold", 0, 1)
    return _rate(sink_score(pattern, key, attention_mask, denominator), threshold, strict)


def _rate(
    score: Float[Tensor, "*batch head"], threshold: float, strict: bool
) -> Float[Tensor, "*batch"]:
    reached = (score > threshold) if strict else (score >= threshold)
    return reached.double().masked_fill(score.isnan(), math.nan).mean(-1)


@checked
def mixing_score(
    pattern: Pattern, form: MixingForm | str = "raw", attention_mask: Tensor | None = None
) -> Float[Tensor, "*batch"]:
    """How widely the queries spread their attention: row entropies ``h_i = -sum_j A_ij ln A_ij``.

    - ``raw``: ``mean_i h_i``, in nats, the paper's equation;
    - ``per_token``: ``raw / T``, which alone fits the axes of the paper's figures;
    - ``per_row``: mean over ``i >= 2`` of ``h_i / ln i``, 1 for uniform causal attention;
    - ``log_t``: ``raw / ln T``.

    Args:
        pattern: Attention patterns.
        form: See above.
        attention_mask: ``[..., pos]``, zero at padding.

    Returns:
        One value a head; for a single token 0, but NaN in the forms ``per_row`` and ``log_t``.
    """
    one_of(form, "form", get_args(MixingForm))
    rows = PatternRows.of(pattern, attention_mask)
    entropies = rows.entropies()
    if form == "per_row":
        return _mixing_per_row(entropies, rows)
    return mixing_in_form(token_mean(entropies, rows.real), form, rows.n_tokens)


def _mixing_per_row(entropies: Tensor, rows: PatternRows) -> Float[Tensor, "*batch"]:
    if rows.real is None:
        position = torch.arange(1, entropies.shape[-1] + 1, device=entropies.device)
    else:
        position = rows.real.cumsum(-1)
    first = (position <= 1).expand(entropies.shape)
    share = entropies / position.clamp(min=2).double().log()
    return token_mean(share, rows.real, left_out=first)


def mixing_in_form(
    raw: Float[Tensor, "*batch"], form: MixingForm | str, n_tokens: Tensor
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


def all_of_pattern(rows: PatternRows) -> dict[str, Float[Tensor, "*values"]]:
    """Every metric of one pattern at its default arguments, by name.

    Sums and entropies are computed once for all of them.
    """
    received, entropies = rows.received(), rows.entropies()
    score = _sink(received, rows, 0, "all", above_uniform=False)
    return {
        "colsum_concentration": _colsum(received, rows.n_tokens),
        "sink_score": score,
        "sink_score_above_uniform": _sink(received, rows, 0, "all", above_uniform=True),
        "sink_rate": _rate(score, SINK_THRESHOLD, strict=False),
        "mixing_raw": token_mean(entropies, rows.real),
        "mixing_per_row": _mixing_per_row(entropies, rows),
    }


@checked
def attention_distance(
    a: Pattern, b: Pattern, attention_mask: Tensor | None = None
) -> Float[Tensor, "*batch"]:
    """Frobenius distance ``||A - B||_F`` between two patterns, head by head.

    From direct differences, which keep what a Gram matrix loses near convergence. Never above
    ``sqrt(2 T)``.

    Args:
        a, b: Attention patterns of the same sequences.
        attention_mask: ``[..., pos]``, zero at padding.
    """
    return rows_distance(PatternRows.of(a, attention_mask), PatternRows.of(b, attention_mask))


def rows_distance(a: PatternRows, b: PatternRows) -> Float[Tensor, "*batch"]:
    """As :func:`attention_distance`."""
    same_shape("b", a.wide, b.wide)
    difference = (a.wide - b.wide).flatten(-2)
    return torch.linalg.vector_norm(difference, dim=-1, dtype=torch.float64)


@checked
def pairwise_attention_distance(
    patterns: Float[Tensor, "layer *batch query key"], attention_mask: Tensor | None = None
) -> Float[Tensor, "layer layer"]:
    """:func:`attention_distance` of every two layers, averaged over heads and prompts.

    Same head to same head (the paper's Figs 2 and 21).

    Args:
        patterns: All layers to compare, stacked: ``cache.stack_activation("pattern")``.
        attention_mask: ``[..., pos]``, zero at padding.
    """
    real = query_mask(patterns, attention_mask)
    if real is None or real.ndim < patterns.ndim - 1:
        return distances_of_layers(patterns.unbind(), [real] * len(patterns))
    return distances_of_layers(patterns.unbind(), real.unbind())  # a mask for every layer


def distances_of_layers(
    layers: Sequence[Tensor], real: Sequence[Tensor | None]
) -> Float[Tensor, "layer layer"]:
    """As :func:`pairwise_attention_distance`, of layers that need not be copied into one tensor.

    Works through a few rows of one head at a time: beside the patterns it takes some matrices of
    ``layer x layer`` and ``BLOCK_BYTES``.

    Args:
        layers: ``[*batch, query, key]`` each.
        real: Of each layer, see ``tl_looped.metrics.inputs.query_mask``.
    """
    shape, device, n_layers = layers[0].shape, layers[0].device, len(layers)
    # A row that is undefined, or not finite, makes NaN of every distance that it enters.
    undefined, masks = [], []
    for layer, mask in zip(layers, real, strict=True):
        undefined.append(checked_pattern(layer, mask).isnan().any(-1).reshape(-1, shape[-1]))
        masks.append(None if mask is None else mask.expand(shape[:-1]).reshape(-1, shape[-1]))
    flat = [layer.reshape(-1, *shape[-2:]) for layer in layers]
    step = max(1, BLOCK_BYTES // (8 * n_layers * shape[-1]))
    total = torch.zeros(n_layers, n_layers, dtype=torch.float64, device=device)
    for head in range(len(flat[0])):  # of all prompts
        squares = torch.zeros_like(total)
        for start in range(0, shape[-2], step):
            rows = slice(start, start + step)
            block = total.new_empty(n_layers, len(flat[0][head, rows]), shape[-1])
            for i, layer in enumerate(flat):
                block[i] = layer[head, rows]
                if (mask := masks[i]) is not None:
                    block[i].masked_fill_(~(mask[head, rows, None] & mask[head, None]), 0.0)
                block[i].masked_fill_(undefined[i][head, rows, None], torch.nan)
            one = block.flatten(1)
            for i in range(n_layers):
                squares[i, i:] += (one[i:] - one[i]).square_().sum(-1)
        total += squares.sqrt_()
    return (total + total.triu(1).T) / len(flat[0])
