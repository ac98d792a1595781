"""Attention of one effective layer: shared weights, own hook points.

Shapes are TransformerLens's: queries and z ``[batch, pos, n_heads, d_head]``, keys and values with
``n_kv_heads``, scores and pattern ``[batch, n_heads, query, key]`` after the key-value heads are
repeated. Scores are masked with -inf; rows without any allowed key (padding) give a zero pattern.
While nothing listens to scores or pattern, PyTorch's fused attention computes z.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.attention_weights import AttentionWeights, NamedAttention
from tl_looped.model.config import LoopedConfig
from tl_looped.model.context import RunContext, check_stream
from tl_looped.model.geometry import LayerLocation
from tl_looped.model.hook_points import PER_HEAD_POS_DIM, LoopedHookPoint, parameter
from tl_looped.model.norms import HookedRMSNorm
from tl_looped.model.rotary import rotate

_REFUSED = {
    "past_kv_cache_entry": "run the model with past_kv_cache=",
    "additive_attention_mask": "edit attn.hook_attn_scores instead",
    "position_bias": "positions are rotations of queries and keys",
}
"""Arguments of TransformerLens's attention that are refused, and what there is instead."""


class Attention(NamedAttention):
    """Hooked attention on borrowed weights.

    Args:
        cfg: The model's configuration.
        weights: Parameters.
        location: Effective layer, for the key-value cache.
        norm: The norm at its input, if there is one: its gain may count as part of W_Q, W_K, W_V.
    """

    noted_as = ("hook_z", "input", "output")
    _weights: AttentionWeights
    _norm: HookedRMSNorm | None
    hook_q_input: LoopedHookPoint  # of the block, for those who look for them here
    hook_k_input: LoopedHookPoint
    hook_v_input: LoopedHookPoint

    def __init__(
        self,
        cfg: LoopedConfig,
        weights: AttentionWeights,
        location: LayerLocation,
        norm: HookedRMSNorm | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.location = location
        object.__setattr__(self, "_weights", weights)
        object.__setattr__(self, "_norm", norm)
        per_head = PER_HEAD_POS_DIM
        self.hook_q = LoopedHookPoint(per_head)
        self.hook_k = LoopedHookPoint(per_head)
        self.hook_v = LoopedHookPoint(per_head)
        if cfg.qk_norm:
            pos_dim = per_head if cfg.qk_norm_per_head else -2
            self.q_norm = HookedRMSNorm(weights.q_norm, pos_dim)
            self.k_norm = HookedRMSNorm(weights.k_norm, pos_dim)
        self.hook_rot_q = LoopedHookPoint(per_head)
        self.hook_rot_k = LoopedHookPoint(per_head)
        self.hook_attn_scores = LoopedHookPoint()
        self.hook_pattern = LoopedHookPoint()
        self.hook_z = LoopedHookPoint(per_head)
        self.hook_result = LoopedHookPoint(per_head)

    def forward(
        self,
        query_input: Any,
        key_input: RunContext | Any = None,
        value_input: Any = None,
        past_kv_cache_entry: Any = None,
        additive_attention_mask: Any = None,
        attention_mask: Tensor | None = None,
        position_bias: Any = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Attention output of (normalised) inputs, before any post-norm.

        Within a run it gets one input, and the run's context in the place of a second. Called by
        itself, as TransformerLens's code calls it, it gets the inputs of queries, keys and values,
        one for all heads or one each; positions count from each row's first real token.

        Args:
            query_input: What queries are made of, ``[batch, pos, d_model]``, or
                ``[batch, pos, head, d_model]`` with one for each head.
            key_input: What keys are made of, of as many positions; or the context of the run that
                calls it, in which ``query_input`` makes all of them.
            value_input: What values are made of.
            past_kv_cache_entry: Refused: run the model with ``past_kv_cache``.
            additive_attention_mask: Refused: hook ``hook_attn_scores``.
            attention_mask: ``[batch, pos]``, zero at padding.
            position_bias: Refused: positions are rotations.

        Raises:
            InputError: for what is refused, and inputs of other shapes.
        """
        if type(key_input) is not RunContext:
            refused = past_kv_cache_entry, additive_attention_mask, position_bias
            inputs = query_input, key_input, value_input
            return self._alone(inputs, attention_mask, dict(zip(_REFUSED, refused, strict=True)))
        weights, x = self._weights, query_input
        if self._norm is not None:
            x = self._norm.with_folded_gain(x)
        n_q, n_kv, d = weights.n_heads, weights.n_kv_heads, weights.d_head
        heads = F.linear(x, parameter(weights, "qkv")).unflatten(-1, (-1, d))
        q, k, v = heads.split_with_sizes((n_q, n_kv, n_kv), 2)
        return self.attend(q, k, v, key_input)

    def _alone(
        self, inputs: tuple[Any, ...], attention_mask: Any, refused: dict[str, Any]
    ) -> Float[Tensor, "batch pos d_model"]:
        """As called by TransformerLens's users, outside a run."""
        for name, given in refused.items():
            if given is not None:
                raise InputError(f"attention takes no {name}: {_REFUSED[name]}")
        cfg, n = self.cfg, self.cfg.n_hooked_kv_heads
        names = "query_input", "key_input", "value_input"
        for name, given, heads in zip(names, inputs, (cfg.n_heads, n, n), strict=True):
            check_stream(cfg, name, given, heads)
        if len({given.shape[:2] for given in inputs}) > 1:
            shapes = ", ".join(str(tuple(given.shape)) for given in inputs)
            raise InputError(f"inputs of attention must have the same batch and pos, got {shapes}")
        run = RunContext.alone(cfg, inputs[0], attention_mask)
        q, k, v = inputs
        if q.ndim == k.ndim == v.ndim == 3:
            if q is k is v:
                return self.forward(q, run)
            return self.attend(*self._projected(q, k, v), run)
        q, k, v = (
            given if given.ndim == 4 else given[:, :, None].expand(-1, -1, heads, -1)
            for given, heads in ((q, cfg.n_heads), (k, n), (v, n))
        )
        return self.forward_split(q, k, v, run)

    def _projected(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each of an input of its own."""
        weights, d = self._weights, self._weights.d_head
        sizes = (weights.n_heads * d, weights.n_kv_heads * d, weights.n_kv_heads * d)
        matrices = parameter(weights, "qkv").split_with_sizes(sizes)
        gain = (lambda x: x) if self._norm is None else self._norm.with_folded_gain
        q, k, v = (
            F.linear(gain(x), matrix).unflatten(-1, (-1, d))
            for x, matrix in zip(inputs, matrices, strict=True)
        )
        return q, k, v

    def forward_from(
        self,
        q_input: Float[Tensor, "batch pos d_model"],
        kv_input: Float[Tensor, "batch pos d_model"],
        run: RunContext,
    ) -> Float[Tensor, "batch pos d_model"]:
        """As :meth:`forward`, queries of one input, and keys and values of another."""
        weights = self._weights
        if self._norm is not None:
            gain = self._norm.with_folded_gain
            q_input, kv_input = gain(q_input), gain(kv_input)
        n_kv, d = weights.n_kv_heads, weights.d_head
        matrix, n_q = parameter(weights, "qkv"), weights.n_heads * weights.d_head
        q = F.linear(q_input, matrix[:n_q]).unflatten(-1, (-1, d))
        heads = F.linear(kv_input, matrix[n_q:]).unflatten(-1, (-1, d))
        k, v = heads.split_with_sizes((n_kv, n_kv), 2)
        return self.attend(q, k, v, run)

    def forward_split(
        self,
        q_input: Float[Tensor, "batch pos n_heads d_model"],
        k_input: Float[Tensor, "batch pos kv_head d_model"],
        v_input: Float[Tensor, "batch pos kv_head d_model"],
        run: RunContext,
    ) -> Float[Tensor, "batch pos d_model"]:
        """As :meth:`forward`, each head with an input of its own."""
        if self._norm is not None:
            gain = self._norm.with_folded_gain
            q_input, k_input, v_input = gain(q_input), gain(k_input), gain(v_input)
        q, k, v = (
            torch.einsum("bthd,hkd->bthk", inputs, self._weights_for(which, inputs.shape[2]))
            for inputs, which in ((q_input, "q"), (k_input, "k"), (v_input, "v"))
        )
        return self.attend(q, k, v, run)

    def attend(
        self,
        q: Float[Tensor, "batch pos n_heads d_head"],
        k: Float[Tensor, "batch pos kv_head d_head"],
        v: Float[Tensor, "batch pos kv_head d_head"],
        run: RunContext,
    ) -> Float[Tensor, "batch pos d_model"]:
        """From raw queries, keys and values to the attention output.

        Hooks see the new tokens' own queries, keys and values; scores and pattern have the keys of
        earlier tokens too, if there is a key-value cache.
        """
        weights, cfg = self._weights, self.cfg
        if cfg.ungroup_grouped_query_attention:
            q, k, v = self._ungrouped(q, k, v)
        else:
            if cfg.qk_bias:
                q, k = q + weights.q_bias, k + weights.k_bias
            if cfg.v_bias:
                v = v + weights.v_bias
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        if cfg.qk_norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        elif cfg.qk_norm:
            q = self.q_norm(q.flatten(-2)).unflatten(-1, q.shape[-2:])
            k = self.k_norm(k.flatten(-2)).unflatten(-1, k.shape[-2:])
        q = self.hook_rot_q(rotate(q, run.rotation))
        k = self.hook_rot_k(rotate(k, run.rotation))
        k, v = run.with_past(self.location, k, v)
        z = self.hook_z(self._mix(q, k, v, run))
        if cfg.use_attn_result:
            W_O = weights.out_heads(parameter(weights, "out"))
            return self.hook_result(torch.einsum("bthk,hkd->bthd", z, W_O)).sum(-2)
        return F.linear(z.flatten(-2), parameter(weights, "out"))

    def _ungrouped(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With keys and values for each query head, and the biases."""
        weights, cfg = self._weights, self.cfg
        repeats = weights.n_heads // weights.n_kv_heads
        if k.shape[2] < weights.n_heads:  # split inputs are one a query head already
            k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
        if cfg.qk_bias:
            q, k = q + weights.q_bias, k + weights.k_bias.repeat_interleave(repeats, 0)
        if cfg.v_bias:
            v = v + weights.v_bias.repeat_interleave(repeats, 0)
        return q, k, v

    def _weights_for(self, which: str, n: int) -> Float[Tensor, "n d_head d_model"]:
        """Weights of the heads of so many inputs; more than there are share their group's."""
        heads = self._weights.head_weights(which)
        return heads if heads.shape[0] == n else heads.repeat_interleave(n // heads.shape[0], 0)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, run: RunContext) -> Tensor:
        """Values averaged by the attention pattern, ``[batch, pos, n_heads, d_head]``."""
        repeats = q.shape[2] // k.shape[2]
        # [batch, pos, head, d_head] -> [batch, head, pos, d_head], one key-value head a query head
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if not (self.hook_attn_scores.is_active or self.hook_pattern.is_active):
            return _fused(q, k, v, run).transpose(1, 2)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(run.blocked(q.shape[2], k.shape[2]), -torch.inf)
        scores = self.hook_attn_scores(scores)
        work = scores if scores.dtype == torch.float64 else scores.float()
        pattern = work.softmax(-1).to(v.dtype)
        # A query that may attend to nothing gives NaN.
        pattern = self.hook_pattern(pattern.nan_to_num(nan=0.0))
        return (pattern @ v).transpose(1, 2)


def _fused(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch head key d_head"],
    v: Float[Tensor, "batch head key d_head"],
    run: RunContext,
) -> Float[Tensor, "batch head query d_head"]:
    """PyTorch's fused attention; queries that may attend to nothing get zero."""
    if run.allowed is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
    if run.no_key is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=run.allowed)
    # Backends differ on rows without any key, and their gradient may be NaN: give such a row all
    # keys, then discard it.
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=run.allowed | run.no_key)
    return z.masked_fill(run.no_key, 0.0)
