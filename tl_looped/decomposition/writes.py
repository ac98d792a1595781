"""What each layer wrote to the stream, whole or by head or by neuron, as it was added there.

Behind a post-norm (OLMo-2, Ouro) a head's or neuron's write is its output times the post-norm's
gain / scale, so that the heads of a layer sum to ``hook_attn_out`` and its neurons to
``hook_mlp_out`` in every family. Everything is computed in fp32 or better.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped._compat import Slice
from tl_looped.decomposition.closeness import check_close, rounding, unchecked
from tl_looped.decomposition.components import Component
from tl_looped.decomposition.frozen import FrozenLoop
from tl_looped.decomposition.steps import NormPlace, Rescale, Step, Write, block_norm
from tl_looped.errors import MissingActivationError
from tl_looped.model.config import NormLayout

Part = Literal["none", "whole", "parts"]


@dataclass
class WritesWanted:
    """Which writes are wanted, and how finely.

    Args:
        embeds: The embedding and the initial state.
        attn: Attention outputs: none, whole, or by head.
        mlp: MLP outputs: none, whole, or by neuron.
        neurons: Which neurons.
    """

    embeds: bool = True
    attn: Part = "whole"
    mlp: Part = "whole"
    neurons: Slice = field(default_factory=Slice)


class Writes:
    """Reads writes of one run.

    Args:
        cache: A LoopedActivationCache.
        selection: Which writes.
        positions: Positions to read.
        checked: Raise if heads or neurons do not sum to what their layer wrote.
    """

    def __init__(
        self, cache: Any, selection: WritesWanted, positions: Slice, checked: bool = False
    ) -> None:
        self.checked = checked
        self.cache, self.selection, self.positions = cache, selection, positions
        self.model, self.loop = cache.model, cache.loop
        self.posts = self.model.cfg.norm_layout in (NormLayout.POST, NormLayout.SANDWICH)

    def components(self, write: Write) -> list[Component]:
        """The wanted components of a write; none if it is not wanted."""
        cfg, selection = self.model.cfg, self.selection
        if write.layer is None:
            return [Component(write.kind)] if selection.embeds else []
        place = self.loop.locate(write.layer)
        is_attn = write.kind == "attn_out"
        part = selection.attn if is_attn else selection.mlp
        if part == "whole":
            return [Component(write.kind, place)]
        if part == "none":
            return []
        if is_attn:
            return [Component("head", place, head) for head in range(cfg.n_heads)]
        neurons = selection.neurons.apply(torch.arange(cfg.d_mlp), dim=0).tolist()
        return [Component("neuron", place, neuron) for neuron in neurons]

    def values(self, write: Write) -> Float[Tensor, "component *batch_pos d_model"]:
        """The writes of :meth:`components`, in its order."""
        if write.layer is None:
            return self.read(_name(write))[None]
        part = self.selection.attn if write.kind == "attn_out" else self.selection.mlp
        if part == "whole":
            return self.read(_name(write))[None]
        if write.kind == "attn_out":
            values = self._heads(write.layer)
        else:
            values = self.neuron_activations(write.layer)[..., None] * self.neuron_rows(write)
        post = self.post_factor(write)
        values = values if post is None else values * post.unsqueeze(-2)
        if write.kind == "attn_out":
            self._check_parts(write, values.sum(-2), values.square().sum(-2))
        else:
            self._check_neurons(write, post)
        return values.movedim(-2, 0)

    def projected(
        self, write: Write, onto: Float[Tensor, "... d_model out"]
    ) -> Float[Tensor, "component ... out"]:
        """:meth:`values` times ``onto``, without a ``[neuron, d_model]`` array a position.

        ``onto`` may lack the batch and position dimensions: the same directions everywhere.
        """
        part = self.selection.mlp
        if write.kind != "mlp_out" or part != "parts":
            values = self.values(write)
            return (values.unsqueeze(-2) @ onto).squeeze(-2)
        post, neurons = self.post_factor(write), self.neuron_activations(write.layer)
        W_out = self.neuron_rows(write)
        self._check_neurons(write, post)
        onto = onto if post is None else post[..., None] * onto
        return (neurons[..., None] * (W_out @ onto)).movedim(-2, 0)

    def _check_neurons(self, write: Write, post: Tensor | None) -> None:
        """As :meth:`_check_parts`, of all neurons of a layer, even if only some were asked for."""
        if self.checked:
            neurons = self.read(f"blocks.{write.layer}.mlp.hook_post")
            W_out = self.weight(self.model.blocks[write.layer].mlp.W_out)
            post = neurons.new_ones(()) if post is None else post
            squares = neurons.square() @ W_out.square() * post.square()
            self._check_parts(write, neurons @ W_out * post, squares)

    def _check_parts(self, write: Write, total: Tensor, squares: Tensor) -> None:
        """Raise if a layer's heads or neurons do not sum to its cached output."""
        name = _name(write)
        whole = self.cache.cache_dict.get(name)
        if not self.checked or (whole is None and self.cache.edits is not None):
            return
        if whole is None:
            missing = MissingActivationError(f"the cache holds no {name!r}.")
            raise unchecked(missing) from missing
        truth, cfg = self.read(name), self.model.cfg
        n_terms = cfg.d_mlp if write.kind == "mlp_out" else cfg.n_heads * cfg.d_head
        # Each part may have been rounded by itself, and the sum is, before a post-norm and behind.
        spread = squares.sqrt()
        dtypes = self.dtypes([name])
        expected = rounding(spread, dtypes, n_terms).norm(dim=-1)
        expected = expected + rounding(truth, dtypes, n_terms).norm(dim=-1)
        check_close(total, truth, expected, name)

    def dtypes(self, names: Iterable[str]) -> set[torch.dtype]:
        """Precisions of the cached activations of these names."""
        return {self.cache[name].dtype for name in names}

    @staticmethod
    def names(steps: Iterable[Step]) -> list[str]:
        """Hooks of what is written in these steps."""
        return [_name(step) for step in steps if isinstance(step, Write)]

    def neuron_activations(self, layer: int | None) -> Float[Tensor, "*batch_pos neuron"]:
        """``mlp.hook_post`` of the selected neurons."""
        return self.selection.neurons.apply(self.read(f"blocks.{layer}.mlp.hook_post"), dim=-1)

    def neuron_rows(self, write: Write) -> Float[Tensor, "neuron d_model"]:
        """Output directions of the selected neurons."""
        W_out = self.model.blocks[write.layer].mlp.W_out
        return self.selection.neurons.apply(self.weight(W_out), dim=0)

    def _heads(self, layer: int) -> Float[Tensor, "*batch_pos head d_model"]:
        name = f"blocks.{layer}.attn.hook_result"
        if name in self.cache.cache_dict:
            return self._as_float(self.positions.apply(self.cache[name], dim=-3))
        z = self._as_float(self.positions.apply(self.cache[f"blocks.{layer}.attn.hook_z"], dim=-3))
        return torch.einsum("...hk,hkd->...hd", z, self.weight(self.model.blocks[layer].attn.W_O))

    def post_factor(self, write: Write) -> Float[Tensor, "*batch_pos d_model"] | None:
        """What a post-norm multiplies a part of a sublayer's output with; None without one."""
        if not self.posts or write.layer is None:
            return None
        name = "ln1_post" if write.kind == "attn_out" else "ln2_post"
        return self.factor(block_norm(self.model.cfg, self.loop, write.layer, name))

    @cached_property
    def frozen(self) -> FrozenLoop:
        """The loop's cell at the scales of the run."""
        return FrozenLoop(self.model, self.weight, self.read)

    def batch_pos(self, norm: Rescale | NormPlace) -> torch.Size:
        """Batch and positions that are read, as a norm's cached scale has them."""
        scale = norm.scale if isinstance(norm, Rescale) else f"{norm.path}.hook_scale"
        return self.read(scale).shape[:-1]

    def factor(self, norm: Rescale) -> Float[Tensor, "*batch_pos d_model"]:
        """Gain / scale of a norm."""
        return self.weight(self.model.get_submodule(norm.gain).w) / self.read(norm.scale)

    def read(self, name: str) -> Float[Tensor, "*batch_pos d"]:
        """A cached activation at the wanted positions; a missing one is an error that names it."""
        return self._as_float(self.positions.apply(self.cache[name], dim=-2))

    def weight(self, weight: Tensor) -> Tensor:
        """A weight where the cache is, in the precision of the decomposition."""
        like = next(iter(self.cache.cache_dict.values()))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return weight.detach().to(like.device, dtype)

    def _as_float(self, x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()


def _name(write: Write) -> str:
    """The hook of a whole write."""
    return (
        f"hook_{write.kind}" if write.layer is None else f"blocks.{write.layer}.hook_{write.kind}"
    )
