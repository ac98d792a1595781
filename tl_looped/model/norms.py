"""RMSNorm, its weight and its hooks.

TransformerLens's convention: ``hook_scale`` is the denominator (the root mean square, epsilon
included), ``hook_normalized`` the quotient without the gain. Both are in fp32 or better. The
quotient is cast to the input's dtype first and multiplied by the gain then, as the checkpoints'
own code does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.model.devices import beside
from tl_looped.model.hook_points import LoopedHookPoint, QuickModule, parameter
from tl_looped.model.shown import ShowsWeights, assign, show
from tl_looped.model.weight_sources import (
    Constant,
    Rows,
    Source,
    StoredWeights,
    called,
)

FOLDED_GAIN = (
    "is one: the gain is folded into the weights behind the norm (compatibility mode). Edit those, "
    "or unfold it first: enable_compatibility_mode(fold_ln=False)"
)


class NormWeights(StoredWeights):
    """The gain of an RMSNorm over ``d`` features."""

    def __init__(self, d: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(d, dtype=dtype))
        self.eps = eps


def rms_scale(x: Float[Tensor, "... d"], eps: float) -> Float[Tensor, "... 1"]:
    """Root mean square over the last dimension, in fp32 or better."""
    return (_wide(x).pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _wide(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    # The test first: a conversion to the dtype that it has already costs as much as an addition.
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rms_norm(x: Float[Tensor, "... d"], weights: NormWeights) -> Float[Tensor, "... d"]:
    """RMSNorm without hooks, on the device of its weight."""
    x = beside(x, weights.w)
    scale = rms_scale(x, weights.eps)
    return (x.to(scale.dtype) / scale).to(x.dtype) * weights.w


class HookedRMSNorm(ShowsWeights, QuickModule):
    """RMSNorm with hook points, on borrowed weights."""

    noted_as = ("hook_scale", "hook_normalized", "hook_normalized")
    weights: NormWeights

    def __init__(self, weights: NormWeights, pos_dim: int = -2) -> None:
        super().__init__()
        # Past nn.Module.__setattr__: a borrowed module must not be registered a second time.
        object.__setattr__(self, "weights", weights)
        # Whether the gain counts as part of the weights behind the norm, see
        # `enable_compatibility_mode`.
        self.folded = False
        self.hook_scale = LoopedHookPoint(pos_dim)
        self.hook_normalized = LoopedHookPoint(pos_dim)

    @property
    def w(self) -> Float[Tensor, " d"]:
        """The gain; ones where it is folded into the weights behind the norm."""
        return show(self.source("w")) if self.folded else self.weights.w

    @w.setter
    def w(self, value: Any) -> None:
        assign(self.source("w"), value)

    def source(self, name: str) -> Source:
        """Where the gain is stored."""
        if not self.folded:
            named = partial(called, self.hook_scale, name, self.weights, "w")
            return Rows(self.weights, "w", named, torch.Tensor.detach)
        ones = torch.ones_like(self.weights.w, requires_grad=False)
        return Constant(
            ones, partial(called, self.hook_scale, name, self.weights, None), FOLDED_GAIN
        )

    def with_folded_gain(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """What the norm gave, with its gain where that is folded."""
        return x * self.weights.w if self.folded else x

    def silent(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """As a call, and no hook fires."""
        scale = rms_scale(x, self.weights.eps)
        normalized = (x.to(scale.dtype) / scale).to(x.dtype)
        return normalized if self.folded else normalized * self.weights.w

    @property
    def eps(self) -> float:
        """Epsilon inside the square root."""
        return self.weights.eps

    def forward(
        self, x: Float[Tensor, "... d"], also: HookedRMSNorm | None = None
    ) -> Float[Tensor, "... d"]:
        """Normalise; a folded gain is left to what stands behind the norm.

        ``also`` names a second set of hook points for the same computation. In a model whose last
        loop norm is its final norm (Ouro) the one computation is both ``recurrence.{R-1}.ln_loop``
        and ``ln_final``, and the hooks of both see it and may edit it.
        """
        weights, wide = self.weights, _wide(x)
        scale = self.hook_scale(rms_scale(wide, weights.eps))
        if also is not None:
            scale = also.hook_scale(scale)
        normalized = self.hook_normalized(wide / scale)
        if also is not None:
            normalized = also.hook_normalized(normalized)
        if normalized.dtype != x.dtype:
            normalized = normalized.to(x.dtype)
        if self.folded:
            return normalized
        return normalized * parameter(weights, "w")


class HookedStreamNorm(HookedRMSNorm):
    """A norm between blocks: its weight may be on another device than what comes before it."""

    def forward(
        self, x: Float[Tensor, "... d"], also: HookedRMSNorm | None = None
    ) -> Float[Tensor, "... d"]:
        """As :class:`HookedRMSNorm`, on the device of the weight."""
        return super().forward(beside(x, parameter(self.weights, "w")), also)
