"""Weights of an attention layer: as they are stored, and under TransformerLens's names."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped._compat import FactoredMatrix
from tl_looped.model.config import LoopedConfig
from tl_looped.model.hook_points import LoopedHookPoint, QuickModule
from tl_looped.model.norms import HookedRMSNorm, NormWeights
from tl_looped.model.shown import ShowsWeights, assign, show
from tl_looped.model.weight_sources import (
    Constant,
    Names,
    Rows,
    Source,
    StoredWeights,
    called,
    no_bias,
)


class AttentionWeights(StoredWeights):
    """Parameters of an attention layer, stored as the checkpoints multiply them.

    Attributes:
        qkv: ``[(n_heads + 2 n_kv_heads) d_head, d_model]``, rows in order q, k, v.
        out: ``[d_model, n_heads d_head]``.
        q_bias, k_bias: ``[heads, d_head]``, only with ``cfg.qk_bias``.
        v_bias: ``[n_kv_heads, d_head]``, only with ``cfg.v_bias``.
        q_norm, k_norm: RMSNorm over all heads together, or over each with
            ``cfg.qk_norm_per_head``; only with ``cfg.qk_norm``.
    """

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
        q_size, kv_size = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        dtype = cfg.dtype
        self.qkv = nn.Parameter(torch.empty(q_size + 2 * kv_size, cfg.d_model, dtype=dtype))
        self.out = nn.Parameter(torch.empty(cfg.d_model, q_size, dtype=dtype))
        if cfg.qk_bias:
            self.q_bias = nn.Parameter(torch.zeros(self.n_heads, self.d_head, dtype=dtype))
            self.k_bias = nn.Parameter(torch.zeros(self.n_kv_heads, self.d_head, dtype=dtype))
        if cfg.v_bias:
            self.v_bias = nn.Parameter(torch.zeros(self.n_kv_heads, self.d_head, dtype=dtype))
        if cfg.qk_norm:
            sizes = (self.d_head,) * 2 if cfg.qk_norm_per_head else (q_size, kv_size)
            self.q_norm = NormWeights(sizes[0], cfg.eps, dtype)
            self.k_norm = NormWeights(sizes[1], cfg.eps, dtype)

    def head_weights(self, which: str) -> Float[Tensor, "head d_head d_model"]:
        """Rows of ``qkv`` that make the ``"q"``, ``"k"`` or ``"v"`` heads, as a view."""
        return self.heads_of(self.qkv, which)

    def heads_of(
        self, qkv: Float[Tensor, "rows d_model"], which: str
    ) -> Float[Tensor, "head d_head d_model"]:
        """The same rows of a tensor like ``qkv``."""
        q, kv = self.n_heads, self.n_kv_heads
        start, n = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}[which]
        rows = qkv[start * self.d_head : (start + n) * self.d_head]
        heads: Tensor = rows.unflatten(0, (n, self.d_head))
        return heads

    def out_heads(
        self, out: Float[Tensor, "d_model heads"]
    ) -> Float[Tensor, "n_heads d_head d_model"]:
        """Columns of a tensor like ``out`` by head, as a view."""
        heads: Tensor = out.unflatten(1, (self.n_heads, self.d_head))
        return heads.permute(1, 2, 0)


class NamedAttention(ShowsWeights, QuickModule):
    """TransformerLens's names for borrowed weights; see ``tl_looped.model.shown`` for edits."""

    cfg: LoopedConfig
    hook_z: LoopedHookPoint
    _weights: AttentionWeights
    _norm: HookedRMSNorm | None

    def source(self, name: str) -> Source:
        """Where a weight of TransformerLens's name is stored."""
        weights, kind, letter = self._weights, name.strip("_")[0], name[-1].lower()
        repeats = 1 if name[0] == "_" or letter == "q" else weights.n_heads // weights.n_kv_heads
        if name == "W_O":
            return Rows(weights, "out", self._named(name, "out"), weights.out_heads)
        if kind == "W":
            norm = self._norm
            return Rows(
                weights,
                "qkv",
                self._named(name, "qkv"),
                partial(_turned, weights, letter),
                repeats,
                norm.weights if norm is not None and norm.folded else None,
            )
        stored = f"{letter}_bias"
        if name != "b_O" and (self.cfg.v_bias if letter == "v" else self.cfg.qk_bias):
            return Rows(weights, stored, self._named(name, stored), _itself, repeats)
        shape = (self.cfg.n_heads, self.cfg.d_head)
        if name[0] == "_":
            shape = (self.cfg.n_kv_heads, self.cfg.d_head)
        zeros = weights.out.new_zeros(self.cfg.d_model if name == "b_O" else shape)
        hook = "hook_attn_out" if name == "b_O" else f"attn.hook_{letter}"
        return Constant(zeros, self._named(name, None), no_bias(hook))

    def _named(self, weight: str, stored: str | None) -> partial[Names]:
        return partial(called, self.hook_z, weight, self._weights, stored)

    @property
    def W_Q(self) -> Float[Tensor, "n_heads d_model d_head"]:
        """Query weights."""
        return show(self.source("W_Q"))

    @W_Q.setter
    def W_Q(self, value: Any) -> None:
        assign(self.source("W_Q"), value)

    @property
    def W_K(self) -> Float[Tensor, "n_heads d_model d_head"]:
        """Key weights, repeated for each query head."""
        return show(self.source("W_K"))

    @W_K.setter
    def W_K(self, value: Any) -> None:
        assign(self.source("W_K"), value)

    @property
    def W_V(self) -> Float[Tensor, "n_heads d_model d_head"]:
        """Value weights, repeated for each query head."""
        return show(self.source("W_V"))

    @W_V.setter
    def W_V(self, value: Any) -> None:
        assign(self.source("W_V"), value)

    @property
    def _W_K(self) -> Float[Tensor, "n_kv_heads d_model d_head"]:
        """Key weights as they are stored, once: HookedTransformer's name."""
        return show(self.source("_W_K"))

    @_W_K.setter
    def _W_K(self, value: Any) -> None:
        assign(self.source("_W_K"), value)

    @property
    def _W_V(self) -> Float[Tensor, "n_kv_heads d_model d_head"]:
        """Value weights as they are stored, once."""
        return show(self.source("_W_V"))

    @_W_V.setter
    def _W_V(self, value: Any) -> None:
        assign(self.source("_W_V"), value)

    @property
    def W_O(self) -> Float[Tensor, "n_heads d_head d_model"]:
        """Output weights."""
        return show(self.source("W_O"))

    @W_O.setter
    def W_O(self, value: Any) -> None:
        assign(self.source("W_O"), value)

    @property
    def b_Q(self) -> Float[Tensor, "n_heads d_head"]:
        """Query bias, zero where the model has none."""
        return show(self.source("b_Q"))

    @b_Q.setter
    def b_Q(self, value: Any) -> None:
        assign(self.source("b_Q"), value)

    @property
    def b_K(self) -> Float[Tensor, "n_heads d_head"]:
        """Key bias, zero where the model has none, repeated for each query head."""
        return show(self.source("b_K"))

    @b_K.setter
    def b_K(self, value: Any) -> None:
        assign(self.source("b_K"), value)

    @property
    def b_V(self) -> Float[Tensor, "n_heads d_head"]:
        """Value bias, zero where the model has none, repeated for each query head."""
        return show(self.source("b_V"))

    @b_V.setter
    def b_V(self, value: Any) -> None:
        assign(self.source("b_V"), value)

    @property
    def _b_K(self) -> Float[Tensor, "n_kv_heads d_head"]:
        """Key bias of each key-value head, once."""
        return show(self.source("_b_K"))

    @_b_K.setter
    def _b_K(self, value: Any) -> None:
        assign(self.source("_b_K"), value)

    @property
    def _b_V(self) -> Float[Tensor, "n_kv_heads d_head"]:
        """Value bias of each key-value head, once."""
        return show(self.source("_b_V"))

    @_b_V.setter
    def _b_V(self, value: Any) -> None:
        assign(self.source("_b_V"), value)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias: zero."""
        return show(self.source("b_O"))

    @b_O.setter
    def b_O(self, value: Any) -> None:
        assign(self.source("b_O"), value)

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` of every head, factored."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` of every head, factored; positions left out."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))


def _turned(weights: AttentionWeights, which: str, qkv: Tensor) -> Tensor:
    return weights.heads_of(qkv, which).transpose(1, 2)


def _itself(bias: Tensor) -> Tensor:
    return bias.view_as(bias)
