"""TransformerLens's weight surface: ``W_E``, ``W_Q``, ``tl_parameters`` and their kin.

Stacked weights (``W_Q`` …) are over the UNIQUE layers, prelude then core then coda, ``p + k + c``
of them: stacking over effective layers would copy each core weight once a recurrence.
``unique_layer(i)`` tells which row an effective layer uses. ``tl_parameters`` names effective
layers, and its tensors are views of the shared weights (but for repeated keys and values).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_looped._compat import FactoredMatrix
from tl_looped.model.block import Block
from tl_looped.model.config import LoopedConfig
from tl_looped.model.geometry import LayerLike
from tl_looped.model.norms import HookedRMSNorm
from tl_looped.transformer.caching import CachingMixin


class Embed(nn.Module):
    """Token embedding, scaled."""

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model, dtype=cfg.dtype))
        self.scale = cfg.embed_scale

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Embedding of each token, times the embedding scale."""
        embedded = nn.functional.embedding(tokens, self.W_E)
        return embedded if self.scale == 1.0 else embedded * self.scale


class Unembed(nn.Module):
    """Map from the normalised stream to logits; shares the embedding's matrix if tied."""

    weight: nn.Parameter
    _embed: Embed

    def __init__(self, cfg: LoopedConfig, embed: Embed) -> None:
        super().__init__()
        self.cfg = cfg
        object.__setattr__(self, "_embed", embed)
        if not cfg.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model, dtype=cfg.dtype))

    @property
    def matrix(self) -> Float[Tensor, "d_vocab d_model"]:
        """``W_U`` transposed, as it is stored."""
        return self._embed.W_E if self.cfg.tie_embeddings else self.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """TransformerLens's unembedding matrix, a view."""
        return self.matrix.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Unembedding bias: zero."""
        return self.matrix.new_zeros(self.cfg.d_vocab)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits."""
        return nn.functional.linear(x, self.matrix)


class WeightsMixin(CachingMixin):
    """Weights under TransformerLens's names."""

    embed: Embed
    unembed: Unembed

    @property
    def blocks(self) -> nn.ModuleList:
        """The effective layers, in order."""
        return self._modules["blocks"]

    @property
    def ln_final(self) -> HookedRMSNorm:
        """The norm before the unembedding."""
        return self._modules["ln_final"]

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Embedding matrix, before the embedding scale."""
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding matrix; the final norm's gain is not folded in."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Unembedding bias: zero."""
        return self.unembed.b_U

    def unique_layer(self, layer: LayerLike) -> int:
        """Row of the stacked weights that an effective layer, or (recurrence, layer), uses."""
        place = self.loop.locate(self.loop.resolve(layer))
        start = {"prelude": 0, "core": self.loop.p, "coda": self.loop.p + self.loop.k}
        return start[place.stage] + place.layer

    def unique_blocks(self) -> list[Block]:
        """One block of each layer with weights of its own: prelude, core, coda."""
        loop = self.loop.with_recurrences(max(1, self.loop.R))
        core = range(loop.p, loop.p + loop.k)
        coda = range(loop.n_layers - loop.c, loop.n_layers)
        places = [loop.locate(i) for i in (*range(loop.p), *core, *coda)]
        return [self._pooled_block(place) for place in places]

    def _stack(self, get: Callable[[Block], Tensor]) -> Tensor:
        return torch.stack([get(block) for block in self.unique_blocks()])

    @property
    def W_Q(self) -> Float[Tensor, "unique_layer n_heads d_model d_head"]:
        """Query weights of the unique layers."""
        return self._stack(lambda block: block.attn.W_Q)

    @property
    def W_K(self) -> Float[Tensor, "unique_layer n_heads d_model d_head"]:
        """Key weights of the unique layers, repeated for each query head."""
        return self._stack(lambda block: block.attn.W_K)

    @property
    def W_V(self) -> Float[Tensor, "unique_layer n_heads d_model d_head"]:
        """Value weights of the unique layers, repeated for each query head."""
        return self._stack(lambda block: block.attn.W_V)

    @property
    def W_O(self) -> Float[Tensor, "unique_layer n_heads d_head d_model"]:
        """Output weights of the unique layers."""
        return self._stack(lambda block: block.attn.W_O)

    @property
    def W_gate(self) -> Float[Tensor, "unique_layer d_model d_mlp"]:
        """Gate weights of the unique layers."""
        return self._stack(lambda block: block.mlp.W_gate)

    @property
    def W_in(self) -> Float[Tensor, "unique_layer d_model d_mlp"]:
        """Input weights of the unique layers."""
        return self._stack(lambda block: block.mlp.W_in)

    @property
    def W_out(self) -> Float[Tensor, "unique_layer d_mlp d_model"]:
        """Output weights of the unique layers."""
        return self._stack(lambda block: block.mlp.W_out)

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` of every head of the unique layers, factored."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` of every head of the unique layers, factored; positions left out."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    def tl_parameters(self) -> dict[str, Tensor]:
        """Weights of every effective layer under TransformerLens's names."""
        out: dict[str, Tensor] = {"embed.W_E": self.W_E}
        by_unique: dict[int, dict[str, Tensor]] = {}
        for i in range(self.loop.n_layers):
            unique = self.unique_layer(i)
            if unique not in by_unique:
                block = cast(Block, self.blocks[i])
                by_unique[unique] = _block_parameters(block)
            out |= {f"blocks.{i}.{name}": value for name, value in by_unique[unique].items()}
        out["ln_final.w"] = self.ln_final.w
        out["unembed.W_U"], out["unembed.b_U"] = self.W_U, self.b_U
        return out

    def accumulated_bias(
        self, layer: LayerLike, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the output biases up to a layer: zero, the families have none."""
        if layer != self.loop.n_layers:
            self.loop.resolve(layer)
        return self.W_E.new_zeros(self.cfg.d_model)


def _block_parameters(block: Block) -> dict[str, Tensor]:
    attn = {f"attn.{n}": getattr(block.attn, n) for n in ("W_Q", "W_K", "W_V", "W_O")}
    biases = {f"attn.{n}": getattr(block.attn, n) for n in ("b_Q", "b_K", "b_V", "b_O")}
    mlp = {f"mlp.{n}": getattr(block.mlp, n) for n in ("W_gate", "W_in", "W_out", "b_in", "b_out")}
    norms = {f"{n}.w": getattr(block, n).w for n in block.cfg.norm_layout.norm_names}
    return attn | biases | mlp | norms
