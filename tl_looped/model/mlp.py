"""Gated SiLU MLP of one effective layer: shared weights, own hook points.

TransformerLens's names: ``hook_pre`` is the gate before its activation, ``hook_pre_linear`` the
linear branch, ``hook_post`` their product, the neurons' activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped._compat import Module
from tl_looped.model.config import LoopedConfig
from tl_looped.model.hook_points import LoopedHookPoint, QuickModule, parameter
from tl_looped.model.norms import HookedRMSNorm


class MLPWeights(Module):
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


class MLP(QuickModule):
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

    def _folded(self, W: Float[Tensor, "d_model d_mlp"]) -> Float[Tensor, "d_model d_mlp"]:
        return W if self._norm is None else self._norm.fold_into(W)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Gate weights."""
        return self._folded(self._weights.gate_up[: self._weights.d_mlp].T)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights of the linear branch."""
        return self._folded(self._weights.gate_up[self._weights.d_mlp :].T)

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights; row i is neuron i's write direction."""
        return self._weights.down.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input bias: zero."""
        return self._weights.down.new_zeros(self._weights.d_mlp)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias: zero."""
        return self._weights.down.new_zeros(self._weights.down.shape[0])
