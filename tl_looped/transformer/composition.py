"""Composition scores of heads: how much of what one head writes the next one's matrices read.

See https://transformer-circuits.pub/2021/framework/index.html. Layers that share weights have the
same scores, so each pair of layers with weights of its own is computed once, whatever the number of
recurrences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_looped._compat import FactoredMatrix, composition_scores
from tl_looped.checks import one_of
from tl_looped.errors import InputError

if TYPE_CHECKING:
    from tl_looped.model.block import Block
    from tl_looped.transformer.named_weights import NamedWeights

_torch: Any = torch


class CompositionScores(Tensor):
    """``[layer, head, later_layer, head]``, zero where the second layer is not later.

    A tensor, as in TransformerLens 3, with what TransformerLens 4 gives besides; whatever is
    computed of it is a plain tensor.

    Attributes:
        layer_indices: Effective layer of each row.
        head_labels: Labels of all heads, in order.
    """

    __torch_function__ = _torch._C._disabled_torch_function_impl
    layer_indices: list[int]
    head_labels: list[str]

    @property
    def scores(self) -> Tensor:
        """The plain tensor."""
        return self.as_subclass(Tensor)


def all_composition_scores(model: NamedWeights, mode: str) -> CompositionScores:
    """Scores of all pairs of heads of the effective layers."""
    one_of(mode, "mode", ("Q", "K", "V"))
    blocks, loop, heads = model.unique_blocks(), model.loop, model.cfg.n_heads
    size = (loop.n_layers * heads) ** 2 * model.W_E.element_size()
    if size > model.max_stack_bytes:
        raise InputError(
            f"composition scores of {loop.n_layers} effective layers of {heads} heads would take "
            f"{size / 2**30:.2f} GiB, more than model.max_stack_bytes "
            f"({model.max_stack_bytes / 2**30:.2f} GiB): they repeat every recurrence, take fewer"
        )
    unique = torch.stack(
        [torch.stack([_scores(model, a, b, mode) for b in blocks], 1) for a in blocks]
    )
    rows = torch.tensor([model.unique_layer(i) for i in range(loop.n_layers)], device=unique.device)
    order = torch.arange(loop.n_layers, device=unique.device)
    later = order[:, None, None, None] < order[None, None, :, None]
    every = unique[rows][:, :, rows]
    scores = torch.where(later, every, torch.zeros_like(every)).as_subclass(CompositionScores)
    scores.layer_indices = list(range(loop.n_layers))
    scores.head_labels = list(model.all_head_labels)
    return scores


def _scores(model: NamedWeights, first: Block, second: Block, mode: str) -> Tensor:
    """``[head, head]`` of one layer and a later one."""
    right = second.attn.OV if mode == "V" else second.attn.QK
    if mode == "K":
        right = right.T
    found: Tensor = composition_scores(_home(model, first.attn.OV), _home(model, right))
    return found


def _home(model: NamedWeights, factored: FactoredMatrix) -> FactoredMatrix:
    """With plain tensors, on one device."""
    A, B = (model._home(part.as_subclass(Tensor)) for part in (factored.A, factored.B))
    return FactoredMatrix(A, B)
