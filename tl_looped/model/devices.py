"""Tensors follow the weights that they meet.

A model may be spread over several devices, layer by layer (``from_pretrained(device_map=...)``).
Then the residual stream moves to the device of a layer's weights when it enters the layer, and
everything that the layer reads besides it moves too. Moving a tensor changes none of its values
and is differentiable. Where nothing has to move, nothing is copied.
"""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor


def beside(x: Shaped[Tensor, "..."], weights: Shaped[Tensor, "_ ..."]) -> Shaped[Tensor, "..."]:
    """``x`` on the device of ``weights``; ``x`` itself if it is there."""
    return x if x.device == weights.device else x.to(weights.device)
