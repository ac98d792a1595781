"""How far attention can change from one recurrence to the next: three upper bounds and the truth.

``S = softmax(Q K^T / sqrt(d_head))``, causal, of two successive recurrences t - 1 and t with the
same weights; ``dS = S_t - S_(t-1)`` in the Frobenius norm. Proposition 4.2 of arXiv 2604.11791
bounds it through the change of the attention's input X. All three start from the constant 1/2 of
the softmax, which holds in the Frobenius norm and fails in the spectral one. With
``M = W_Q W_K^T``:

1. ``paper``: ``1/2 * 2 B kappa / sqrt(d_head) * ||dX||_F``, ``B`` the larger ``||X||_F`` and
   ``kappa = ||M||_F`` (all Frobenius, the reading under which it holds);
2. ``spectral``: ``1/2 (||X_t||_2 + ||X_(t-1)||_2) ||M||_2 ||dX||_F / sqrt(d_head)``, tighter;
3. ``queries_keys``: ``1/2 (||dQ||_F ||K_t||_2 + ||Q_(t-1)||_2 ||dK||_F) / sqrt(d_head)`` with the
   queries and keys that attention really multiplies.

Only the third is valid where queries and keys are more than ``X W``: under rotary embeddings, a
query-key norm or biases. Every supported family has rotary embeddings, so the first two are NaN
there unless they are asked for. A causal mask leaves all three valid: a row is then a softmax over
fewer scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.metrics.inputs import mask_of_cache, token_mask
from tl_looped.words import count


@dataclass(frozen=True)
class AttentionLipschitz:
    """The change of attention and what bounds it, a prompt and head, in fp64.

    Args:
        change: ``||dS||_F``.
        paper, spectral, queries_keys: The bounds of the module; NaN where one is not valid.
    """

    change: Float[Tensor, "*batch head"]
    paper: Float[Tensor, "*batch head"]
    spectral: Float[Tensor, "*batch head"]
    queries_keys: Float[Tensor, "*batch head"]

    @property
    def ratios(self) -> dict[str, Float[Tensor, "*batch head"]]:
        """``change / bound`` by the bound's name, at most 1; NaN where nothing changed (0 / 0)."""
        names = ("paper", "spectral", "queries_keys")
        return {name: self.change / getattr(self, name) for name in names}


@checked
def attention_lipschitz_bounds(
    x: Float[Tensor, "*batch pos d_model"],
    x_before: Float[Tensor, "*batch pos d_model"],
    W_Q: Float[Tensor, "head d_model d_head"],
    W_K: Float[Tensor, "head d_model d_head"],
    q: Tensor | None = None,
    k: Tensor | None = None,
    q_before: Tensor | None = None,
    k_before: Tensor | None = None,
    attention_mask: Tensor | None = None,
    assume_plain: bool = False,
) -> AttentionLipschitz:
    """The three bounds of the module, and the change that they bound.

    Args:
        x, x_before: Attention inputs, behind their norm and its gain, at recurrences t and t - 1.
        W_Q, W_K: One matrix a query head; repeat those of grouped keys.
        q, k, q_before, k_before: Queries and keys as attention multiplies them, behind bias, norm
            and rotation, ``[*batch, pos, head, d_head]`` with a key for every query head. All
            four, or none for ``X W``: then all three bounds are valid.
        attention_mask: ``[*batch, pos]``, zero at padding, whose rows and columns are left out.
        assume_plain: Compute the first two bounds with given queries and keys too. They are then
            no bounds, and their ratios may exceed 1.

    Raises:
        InputError: shapes that do not fit; some but not all of queries and keys.
    """
    given = (q, k, q_before, k_before)
    if len({one is None for one in given}) > 1:
        raise InputError("give all of q, k, q_before and k_before, or none of them")
    if x.shape != x_before.shape or W_Q.shape != W_K.shape or W_Q.shape[1] != x.shape[-1]:
        raise InputError(
            f"x and x_before must be of one shape [..., pos, d_model] and W_Q and W_K of one shape "
            f"[head, d_model, d_head], got {[tuple(a.shape) for a in (x, x_before, W_Q, W_K)]}"
        )
    real = token_mask(x, attention_mask)
    plain = q is None
    x, x_before, W_Q, W_K = (a.detach().double() for a in (x, x_before, W_Q, W_K))
    if real is not None:
        x, x_before = (a.masked_fill(~real[..., None], 0.0) for a in (x, x_before))
    if plain:
        q, k = (torch.einsum("...td,hdk->...htk", x, W) for W in (W_Q, W_K))
        q_before, k_before = (torch.einsum("...td,hdk->...htk", x_before, W) for W in (W_Q, W_K))
    else:
        heads = (*x.shape[:-1], W_Q.shape[0], W_Q.shape[2])
        q, k, q_before, k_before = (_heads_first(a, heads, real) for a in given)
    d_head = W_Q.shape[-1]
    by_queries = _norm(q - q_before) * _spectral(k) + _spectral(q_before) * _norm(k - k_before)
    change = _norm(_pattern(q, k, real) - _pattern(q_before, k_before, real))
    queries_keys = by_queries / (2 * math.sqrt(d_head))
    if not (plain or assume_plain):
        undefined = torch.full_like(change, math.nan)
        return AttentionLipschitz(change, undefined, undefined, queries_keys)
    moved = _norm(x - x_before)[..., None] / (2 * math.sqrt(d_head))
    kappa, stretch = _norms_of_product(W_Q, W_K)
    largest = torch.maximum(_norm(x), _norm(x_before))[..., None]
    sizes = (_spectral(x) + _spectral(x_before))[..., None]
    return AttentionLipschitz(
        change,
        paper=2 * largest * kappa * moved,
        spectral=sizes * stretch * moved,
        queries_keys=queries_keys,
    )


def _heads_first(a: Tensor | None, shape: tuple[int, ...], real: Tensor | None) -> Tensor:
    """``[*batch, head, pos, d_head]`` in fp64, zero at padding."""
    assert a is not None
    if tuple(a.shape) != shape:
        raise InputError(
            f"q, k, q_before and k_before must have shape [..., pos, head, d_head] = {shape}, got "
            f"{tuple(a.shape)}. Repeat grouped keys for each query head."
        )
    a = a.detach().double()
    if real is not None:
        a = a.masked_fill(~real[..., None, None], 0.0)
    return a.transpose(-2, -3)


def _pattern(q: Tensor, k: Tensor, real: Tensor | None) -> Float[Tensor, "*batch head query key"]:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    allowed = torch.ones_like(scores, dtype=torch.bool).tril()
    if real is not None:
        allowed = allowed & real[..., None, None, :]
    scores = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    if real is None:
        return scores
    return scores.masked_fill(~real[..., None, :, None], 0.0)  # a query of padding


def _norm(a: Tensor) -> Tensor:
    return a.flatten(-2).norm(dim=-1)


def _spectral(a: Tensor) -> Tensor:
    finite = a.isfinite().all(-1).all(-1)
    largest = torch.linalg.svdvals(a.nan_to_num(0.0, 0.0, 0.0)).amax(-1)
    return largest.where(finite, math.nan)


def _norms_of_product(W_Q: Tensor, W_K: Tensor) -> tuple[Tensor, Tensor]:
    """Frobenius and spectral norm of ``W_Q W_K^T``, without building it."""
    small = torch.linalg.qr(W_Q).R @ torch.linalg.qr(W_K).R.transpose(-1, -2)
    return _norm(small), _spectral(small)


@checked
def attention_lipschitz_from_cache(
    cache: LoopedActivationCache,
    layer: int,
    recurrence: int,
    attention_mask: Tensor | None = None,
    assume_plain: bool = False,
) -> AttentionLipschitz:
    """:func:`attention_lipschitz_bounds` of a core layer, at a recurrence against the one before.

    Args:
        cache: Of a run with ``attn.hook_rot_q``, ``attn.hook_rot_k`` and the attention's input of
            that layer at both recurrences: ``ln1.hook_normalized``, or ``hook_resid_pre`` in
            families without a norm there (OLMo-2).
        layer: Core layer, 0-based.
        recurrence: At least 1.
        attention_mask: The ``attention_mask`` of the run; the cache knows its own.
        assume_plain: As in :func:`attention_lipschitz_bounds`.

    Raises:
        MissingActivationError: the message names the hook.
        LayerIndexError: no such layer.
        InputError: recurrence 0, which has none before it.
    """
    if cache.loop.R < 2:
        raise InputError(
            f"the run has {count(cache.loop.R, 'recurrence')}: no two in a row to compare"
        )
    if recurrence % cache.loop.R == 0:
        raise InputError(f"recurrence must be 1..{cache.loop.R - 1}, got {recurrence}")
    attention_mask = mask_of_cache(cache, attention_mask)
    now = recurrence % cache.loop.R
    block = cache.model.blocks[cache.loop.index(now, layer)]

    def activations(r: int) -> tuple[Tensor, Tensor, Tensor]:
        place = f"blocks.{cache.loop.index(r, layer)}."
        if hasattr(block, "ln1"):
            # The gain counts, folded into W_Q and W_K or not.
            x = cache[f"{place}ln1.hook_normalized"] * block.ln1.w
        else:
            x = cache[f"{place}hook_resid_pre"]
        queries, keys = (cache[f"{place}attn.hook_rot_{which}"] for which in "qk")
        return x, queries, keys.repeat_interleave(queries.shape[-2] // keys.shape[-2], -2)

    (x, q, k), (x_before, q_before, k_before) = activations(now), activations(now - 1)
    weights = block.attn.W_Q.to(x.device), block.attn.W_K.to(x.device)
    return attention_lipschitz_bounds(
        x, x_before, *weights, q, k, q_before, k_before, attention_mask, assume_plain
    )
