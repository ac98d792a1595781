"""TransformerLens's weight surface: ``W_E``, ``W_Q``, ``tl_parameters`` and their kin.

Stacked weights (``W_Q`` …) are over the effective layers, so that ``model.W_Q[i]`` belongs to
``blocks[i]`` as everywhere in TransformerLens. That copies each core weight once a recurrence, and
is refused above ``max_stack_bytes``; ``unique_weights("W_Q")`` stacks each layer once, in the order
prelude, core, coda, and ``unique_layer(i)`` tells which row an effective layer uses.
``tl_parameters`` names effective layers, and its tensors are views of the shared weights (but for
repeated keys and values and folded gains).
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped._compat import FactoredMatrix
from tl_looped.errors import InputError
from tl_looped.model.block import FOLDED, Block, BlockList
from tl_looped.model.devices import beside
from tl_looped.model.geometry import LayerLike
from tl_looped.model.norms import HookedRMSNorm
from tl_looped.transformer.caching import CachingMixin
from tl_looped.transformer.embeddings import Embed, Unembed


class WeightsMixin(CachingMixin):
    """Weights under TransformerLens's names."""

    embed: Embed
    unembed: Unembed
    state_seed: int
    max_stack_bytes: int = 2**30
    """Largest stack of weights over effective layers, in bytes."""

    @property
    def blocks(self) -> BlockList:
        """The effective layers, in order."""
        return cast(BlockList, self._modules["blocks"])

    @property
    def ln_final(self) -> HookedRMSNorm:
        """The norm before the unembedding."""
        return cast(HookedRMSNorm, self._modules["ln_final"])

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Embedding matrix, before the embedding scale."""
        return self.embed.W_E

    def _home(self, x: Tensor) -> Tensor:
        """``x`` on the embedding's device, where a spread model takes and gives everything."""
        return x if self.cfg.n_devices == 1 else beside(x, self.W_E)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding matrix; with the final norm's gain in compatibility mode."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Unembedding bias: zero."""
        return self.unembed.b_U

    def unique_layer(self, layer: LayerLike) -> int:
        """Row of ``unique_weights`` that an effective layer, or (recurrence, layer), uses."""
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

    def unique_weights(self, name: str) -> Float[Tensor, "unique_layer *shape"]:
        """``"W_Q"`` and its kin over the p + k + c layers that have weights of their own."""
        return torch.stack([self._home(_weight(block, name)) for block in self.unique_blocks()])

    def stack_weights(self, name: str) -> Float[Tensor, "n_layers *shape"]:
        """``"W_Q"`` and its kin over the effective layers, as TransformerLens's tools index them.

        Core weights are copied once a recurrence.

        Raises:
            InputError: if that takes more than ``max_stack_bytes``.
        """
        blocks = cast(list[Block], list(self.blocks))
        if not blocks:
            return self.unique_weights(name)[:0]
        one = _weight(blocks[0], name)
        size = len(blocks) * one.numel() * one.element_size()
        if size > self.max_stack_bytes:
            raise InputError(
                f"{name} over {len(blocks)} effective layers would take {size / 2**30:.2f} GiB, "
                f"more than model.max_stack_bytes ({self.max_stack_bytes / 2**30:.2f} GiB). "
                f"unique_weights({name!r}) stacks the {len(self.unique_blocks())} layers that have "
                f"weights of their own, unique_layer(i) gives a layer's row, and "
                "blocks[i] has the weights of one layer without a copy."
            )
        return torch.stack([self._home(_weight(block, name)) for block in blocks])

    @property
    def W_Q(self) -> Float[Tensor, "n_layers n_heads d_model d_head"]:
        """Query weights."""
        return self.stack_weights("W_Q")

    @property
    def W_K(self) -> Float[Tensor, "n_layers n_heads d_model d_head"]:
        """Key weights, repeated for each query head."""
        return self.stack_weights("W_K")

    @property
    def W_V(self) -> Float[Tensor, "n_layers n_heads d_model d_head"]:
        """Value weights, repeated for each query head."""
        return self.stack_weights("W_V")

    @property
    def W_O(self) -> Float[Tensor, "n_layers n_heads d_head d_model"]:
        """Output weights."""
        return self.stack_weights("W_O")

    @property
    def W_gate(self) -> Float[Tensor, "n_layers d_model d_mlp"]:
        """Gate weights."""
        return self.stack_weights("W_gate")

    @property
    def W_in(self) -> Float[Tensor, "n_layers d_model d_mlp"]:
        """Input weights."""
        return self.stack_weights("W_in")

    @property
    def W_out(self) -> Float[Tensor, "n_layers d_mlp d_model"]:
        """Output weights."""
        return self.stack_weights("W_out")

    @property
    def b_Q(self) -> Float[Tensor, "n_layers n_heads d_head"]:
        """Query biases."""
        return self.stack_weights("b_Q")

    @property
    def b_K(self) -> Float[Tensor, "n_layers n_heads d_head"]:
        """Key biases, repeated for each query head."""
        return self.stack_weights("b_K")

    @property
    def b_V(self) -> Float[Tensor, "n_layers n_heads d_head"]:
        """Value biases, repeated for each query head."""
        return self.stack_weights("b_V")

    @property
    def b_O(self) -> Float[Tensor, "n_layers d_model"]:
        """Output biases: zero."""
        return self.stack_weights("b_O")

    @property
    def b_in(self) -> Float[Tensor, "n_layers d_mlp"]:
        """Input biases: zero."""
        return self.stack_weights("b_in")

    @property
    def b_out(self) -> Float[Tensor, "n_layers d_model"]:
        """Output biases: zero."""
        return self.stack_weights("b_out")

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` of every head of the effective layers, factored."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` of every head of the effective layers, factored; positions left out."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def all_head_labels(self) -> list[str]:
        """Labels of all heads, as in ``cache.stack_head_results``: ``r3.l1h2``."""
        places = self.loop.labels()
        return [f"{place}h{head}" for place in places for head in range(self.cfg.n_heads)]

    def blocks_with(self, submodule: str) -> list[tuple[int, Block]]:
        """Effective layers, with their index, that have a submodule such as ``"ln1_post"``."""
        blocks = cast(list[Block], list(self.blocks))
        return [(i, block) for i, block in enumerate(blocks) if submodule in block._modules]

    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """TransformerLens's switch to folded norms, for tools and notebooks that rely on it.

        With ``fold_ln`` the gains of ``ln1``, ``ln2`` and ``ln_final`` count as part of W_Q, W_K,
        W_V, W_gate, W_in and W_U: those are given multiplied, the norms called from outside leave
        them out and report ones, and ``unembed`` called from outside puts them in. It is a matter
        of what the model shows. The forward pass, every activation (``hook_normalized`` never
        includes a gain) and what is saved stay bit for bit the same. Post-norms and norms on the
        stream or the loop have no weights behind them to be folded into.

        Centring is not done: RMSNorm does not allow it for writing weights, and centring W_U would
        shift the logits. Value biases stay where they are.

        Args:
            disable_warnings: There are none.
            no_processing: Fold nothing.
            fold_ln: Fold the gains.
            center_writing_weights, center_unembed, fold_value_biases: Without effect.
            refactor_factored_attn_matrices: Not supported.
        """
        if refactor_factored_attn_matrices and not no_processing:
            raise InputError(
                "refactor_factored_attn_matrices is not supported: rotary queries and keys allow "
                "no such change of basis"
            )
        folded = fold_ln and not no_processing
        self.cfg.normalization_type = FOLDED if folded else "RMS"
        self.ln_final.folded = self.unembed.folded = folded
        for block in self._block_pool.values():
            block.fold_norms(folded)

    def tl_parameters(self) -> dict[str, Tensor]:
        """Weights of every effective layer under TransformerLens's names."""
        out: dict[str, Tensor] = {"embed.W_E": self.W_E}
        by_unique: dict[int, dict[str, Tensor]] = {}
        for i in range(self.loop.n_layers):
            unique = self.unique_layer(i)
            if unique not in by_unique:
                by_unique[unique] = _block_parameters(self.blocks[i])
            out |= {f"blocks.{i}.{name}": value for name, value in by_unique[unique].items()}
        if not self.ln_final.folded:
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


def _weight(block: Block, name: str) -> Tensor:
    owner = block.attn if hasattr(type(block.attn), name) else block.mlp
    return cast(Tensor, getattr(owner, name))


def _block_parameters(block: Block) -> dict[str, Tensor]:
    attn = {f"attn.{n}": getattr(block.attn, n) for n in ("W_Q", "W_K", "W_V", "W_O")}
    biases = {f"attn.{n}": getattr(block.attn, n) for n in ("b_Q", "b_K", "b_V", "b_O")}
    mlp = {f"mlp.{n}": getattr(block.mlp, n) for n in ("W_gate", "W_in", "W_out", "b_in", "b_out")}
    norms = {
        f"{n}.w": getattr(block, n).w
        for n in block.cfg.norm_layout.norm_names
        if not getattr(block, n).folded  # as in TransformerLens, a folded norm has no gain
    }
    return attn | biases | mlp | norms
