"""The layers of one prompt in one tensor, as a run goes by, and matrices over every two of them.

A cache of thousands of small tensors takes up to twice their size: between those that stay, the
allocator keeps the holes of those that went.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tl_looped.metrics.attention_patterns import distances_of_layers
from tl_looped.metrics.catalogue import Reads
from tl_looped.metrics.inputs import BLOCK_BYTES
from tl_looped.metrics.states import cosines_of_layers

_HOOKS: dict[Reads, str] = {"resid_post": "hook_resid_post", "pattern": "attn.hook_pattern"}


def layer_hook(i: int, name: Reads) -> str:
    """The hook of an activation of effective layer ``i``."""
    return f"blocks.{i}.{_HOOKS[name]}"


class Stacked:
    """Activations of all layers of one prompt.

    Args:
        n_layers: Effective layers of the run.
    """

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers
        self._kept: dict[Reads, Tensor] = {}

    def put(self, i: int, name: Reads, x: Float[Tensor, "one ..."]) -> None:
        """Keep an activation of layer ``i``."""
        if name not in self._kept:
            self._kept[name] = x.new_empty(self.n_layers, *x.shape[1:])
        self._kept[name][i] = x[0]

    def hooks(self) -> list[tuple[str, Callable[[Tensor, Any], None]]]:
        """Names and functions for ``LoopedTransformer.readers``."""

        def reader(i: int, name: Reads) -> Callable[[Tensor, Any], None]:
            return lambda x, hook: self.put(i, name, x)

        return [(layer_hook(i, n), reader(i, n)) for i in range(self.n_layers) for n in _HOOKS]

    def __getitem__(self, name: Reads) -> Float[Tensor, "layer ..."]:
        return self._kept[name]

    def matrices(self) -> xr.Dataset:
        """Attention distance and residual cosine, as ``tl_looped.metrics.pairwise_from_cache``."""
        dims = ("effective_layer", "other_layer", "prompt")
        unmasked = [None] * self.n_layers
        found = {
            "pairwise_attention_distance": distances_of_layers(self["pattern"].unbind(), unmasked),
            "pairwise_residual_cosine": cosines_of_layers(self["resid_post"].unbind(), unmasked),
        }
        each = {name: (dims, matrix.cpu().numpy()[..., None]) for name, matrix in found.items()}
        layers = np.arange(self.n_layers)
        return xr.Dataset(each, coords={"effective_layer": layers, "other_layer": layers})


def bytes_of_matrices(n_layers: int, n_heads: int, d_model: int, length: int, size: int) -> int:
    """Memory that :class:`Stacked` and its matrices take, beside the model's run.

    Args:
        n_layers: Effective layers.
        n_heads: Heads of a layer.
        d_model: Width of the states.
        length: Tokens.
        size: Bytes of a number.
    """
    kept = n_layers * length * (n_heads * length + d_model) * size
    # At most seven matrices at a time, in fp64, and two blocks of rows.
    return kept + 7 * 8 * n_layers**2 + 2 * BLOCK_BYTES
