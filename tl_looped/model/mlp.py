"""Gated SiLU MLP of one effective layer: shared weights, own hook points.

TransformerLens's names: ``hook_pre`` is the gate before its activation, ``hook_pre_linear`` the
linear branch, ``hook_post`` their product, the neurons' activations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.model.config import LoopedConfig
from tl_looped.model.hook_points import LoopedHookPoint, QuickModule, parameter
from tl_looped.model.norms import HookedRMSNorm
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


class MLPWeights(StoredWeights):
    """Parameters of an MLP, stored as the checkpoints multiply them.

    Attributes:
        gate_up: ``[2 d_mlp, d_model]``, rows in order gate, up.
        down: ``[d_model, d_mlp]``.
    """

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        assert cfg.d_mlp is not None
        self.d_mlp = cfg.d_mlp
        self.gate_up = nn.Parameter(torch.empty(2 * self.d_mlp, cfg.d_model, dtype=cfg.dtype))
        self.down = nn.Parameter(torch.empty(cfg.d_model, self.d_mlp, dtype=cfg.dtype))


class MLP(ShowsWeights, QuickModule):
    """Hooked MLP on borrowed weights.

    Args:
        weights: Parameters.
        norm: The norm at its input, if there is one: its gain may count as part of W_in, W_gate.
    """

    noted_as = ("hook_post", "input", "output")
    _weights: MLPWeights
    _norm: HookedRMSNorm | None

    def __init__(self, weights: MLPWeights, norm: HookedRMSNorm | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "_weights", weights)
        object.__setattr__(self, "_norm", norm)
        self.hook_pre = LoopedHookPoint()
        self.hook_pre_linear = LoopedHookPoint()
        self.hook_post = LoopedHookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """MLP output of a (normalised) input, before any post-norm."""
        weights = self._weights
        if self._norm is not None:
            x = self._norm.with_folded_gain(x)
        gate, up = F.linear(x, parameter(weights, "gate_up")).chunk(2, -1)
        gate, up = self.hook_pre(gate), self.hook_pre_linear(up)
        return F.linear(self.hook_post(F.silu(gate) * up), parameter(weights, "down"))

    def source(self, name: str) -> Source:
        """Where a weight of TransformerLens's name is stored."""
        weights, d_mlp = self._weights, self._weights.d_mlp
        if name == "W_out":
            return Rows(weights, "down", self._named(name, "down"), _turned)
        if name in ("W_gate", "W_in"):
            rows = slice(0, d_mlp) if name == "W_gate" else slice(d_mlp, 2 * d_mlp)
            norm = self._norm
            gain = norm.weights if norm is not None and norm.folded else None
            stored, arrange = self._named(name, "gate_up"), partial(_turned, rows=rows)
            return Rows(weights, "gate_up", stored, arrange, gain=gain)
        size, hook = (d_mlp, "mlp.hook_pre_linear") if name == "b_in" else (0, "hook_mlp_out")
        zeros = weights.down.new_zeros(size or weights.down.shape[0])
        return Constant(zeros, self._named(name, None), no_bias(hook))

    def _named(self, weight: str, stored: str | None) -> partial[Names]:
        return partial(called, self.hook_post, weight, self._weights, stored)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Gate weights."""
        return show(self.source("W_gate"))

    @W_gate.setter
    def W_gate(self, value: Any) -> None:
        assign(self.source("W_gate"), value)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights of the linear branch."""
        return show(self.source("W_in"))

    @W_in.setter
    def W_in(self, value: Any) -> None:
        assign(self.source("W_in"), value)

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights; row i is neuron i's write direction."""
        return show(self.source("W_out"))

    @W_out.setter
    def W_out(self, value: Any) -> None:
        assign(self.source("W_out"), value)

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input bias: zero."""
        return show(self.source("b_in"))

    @b_in.setter
    def b_in(self, value: Any) -> None:
        assign(self.source("b_in"), value)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias: zero."""
        return show(self.source("b_out"))

    @b_out.setter
    def b_out(self, value: Any) -> None:
        assign(self.source("b_out"), value)


def _turned(matrix: Tensor, rows: slice = slice(None)) -> Tensor:
    return matrix[rows].T
