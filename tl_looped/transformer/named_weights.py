"""The second storey: weights under TransformerLens's names, and what is computed of them alone."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from tl_looped._compat import FactoredMatrix
from tl_looped.checks import checked
from tl_looped.decomposition.labels import HeadLabels
from tl_looped.model.block import Block
from tl_looped.model.geometry import LayerLike
from tl_looped.model.shown import ShowsWeights
from tl_looped.transformer import composition, weight_map, weights
from tl_looped.transformer.pool import Pool
from tl_looped.transformer.weight_map import StoredRows


@checked
class NamedWeights(ShowsWeights, Pool):
    """TransformerLens's names of weights over the effective layers."""

    max_stack_bytes: int = 2**30
    """Largest stack of weights over effective layers, in bytes."""

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Embedding matrix, before the embedding scale."""
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding matrix; with the final norm's gain in compatibility mode."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Unembedding bias: zero."""
        return self.unembed.b_U

    @checked
    def unique_layer(self, layer: LayerLike) -> int:
        """Row of ``unique_weights`` that an effective layer, or (recurrence, layer), uses."""
        return weights.unique_layer(self.cfg, self.loop, layer)

    def unique_blocks(self) -> list[Block]:
        """One block of each layer with weights of its own: prelude, core, coda."""
        return weights.unique_blocks(self)

    @checked
    def unique_weights(self, name: str) -> Float[Tensor, " unique_layer *shape"]:
        """``"W_Q"`` and its kin over the p + k + c layers that have weights of their own."""
        return weights.unique_stack(self, name)

    @checked
    def stack_weights(self, name: str) -> Float[Tensor, " n_layers *shape"]:
        """``"W_Q"`` and its kin over the effective layers, as TransformerLens's tools index them.

        Core weights are copied once per recurrence.

        Raises:
            InputError: if that takes more than ``max_stack_bytes``.
        """
        return weights.stack(self, name)

    @property
    def W_Q(self) -> Float[Tensor, "n_layers n_heads d_model d_head"]:
        """Query weights."""
        return weights.stack(self, "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "n_layers n_heads d_model d_head"]:
        """Key weights, repeated for each query head."""
        return weights.stack(self, "W_K")

    @property
    def W_V(self) -> Float[Tensor, "n_layers n_heads d_model d_head"]:
        """Value weights, repeated for each query head."""
        return weights.stack(self, "W_V")

    @property
    def W_O(self) -> Float[Tensor, "n_layers n_heads d_head d_model"]:
        """Output weights."""
        return weights.stack(self, "W_O")

    @property
    def W_gate(self) -> Float[Tensor, "n_layers d_model d_mlp"]:
        """Gate weights."""
        return weights.stack(self, "W_gate")

    @property
    def W_in(self) -> Float[Tensor, "n_layers d_model d_mlp"]:
        """Input weights."""
        return weights.stack(self, "W_in")

    @property
    def W_out(self) -> Float[Tensor, "n_layers d_mlp d_model"]:
        """Output weights."""
        return weights.stack(self, "W_out")

    @property
    def b_Q(self) -> Float[Tensor, "n_layers n_heads d_head"]:
        """Query biases."""
        return weights.stack(self, "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "n_layers n_heads d_head"]:
        """Key biases, repeated for each query head."""
        return weights.stack(self, "b_K")

    @property
    def b_V(self) -> Float[Tensor, "n_layers n_heads d_head"]:
        """Value biases, repeated for each query head."""
        return weights.stack(self, "b_V")

    @property
    def b_O(self) -> Float[Tensor, "n_layers d_model"]:
        """Output biases: zero."""
        return weights.stack(self, "b_O")

    @property
    def b_in(self) -> Float[Tensor, "n_layers d_mlp"]:
        """Input biases: zero."""
        return weights.stack(self, "b_in")

    @property
    def b_out(self) -> Float[Tensor, "n_layers d_model"]:
        """Output biases: zero."""
        return weights.stack(self, "b_out")

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` of every head of the effective layers, factored."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` of every head of the effective layers, factored; positions left out."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def all_head_labels(self) -> HeadLabels:
        """Labels of all heads, as in ``cache.stack_head_results``: ``r3.l1h2``, or ``L7H2``.

        A list, as in TransformerLens 4, and a method, as in 3: ``all_head_labels()``,
        ``all_head_labels(labels="transformer_lens")``. See ``tl_looped.decomposition.labels``.
        """
        return HeadLabels(self.loop, self.cfg.n_heads, self.cfg)

    @property
    def attn_head_labels(self) -> HeadLabels:
        """As in TransformerLens 4, those of the layers that have attention: all."""
        return self.all_head_labels

    @checked
    def all_composition_scores(
        self, mode: str
    ) -> Float[Tensor, "n_layers n_heads n_layers n_heads"]:
        """Composition scores of all pairs of heads, as in TransformerLens, by effective layer.

        In compatibility mode the gains of the norms count, as in a folded HookedTransformer. Norms
        on the stream, and the injection, stand between the layers of a loop, and no score knows
        of them.

        Args:
            mode: What the later head composes with: ``"Q"``, ``"K"`` or ``"V"``.

        Returns:
            Zero unless the second layer is later. It has ``layer_indices``, ``head_labels`` and
            ``scores``, as in TransformerLens 4.

        Raises:
            InputError: another mode, or more than ``max_stack_bytes``.
        """
        return composition.all_composition_scores(self, mode)

    @checked
    def blocks_with(self, submodule: str) -> list[tuple[int, Block]]:
        """Effective layers, with their index, that have a submodule such as ``"ln1_post"``."""
        return [(i, block) for i, block in enumerate(self.blocks) if submodule in block._modules]

    def tl_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """As in TransformerLens 4: the items of :meth:`tl_parameters`."""
        return iter(self.tl_parameters().items())

    @checked
    def parameter_of(self, name: str) -> StoredRows | None:
        """Where a weight of TransformerLens's name is stored.

        Args:
            name: Such as ``"blocks.3.attn.W_Q"``, ``"unembed.W_U"``, ``"ln_final.w"``; of keys and
                values also HookedTransformer's ``"blocks.3.attn._W_K"``.

        Returns:
            The parameter's name among ``named_parameters()`` and its rows; None for a bias that
            the model does not have, which is zero. ``tl_looped.transformer.weight_map`` has the
            whole table.

        Raises:
            InputError: TransformerLens has no such weight, or the model does not.
            LayerIndexError: there is no such layer at the present number of recurrences.
        """
        return weight_map.parameter_of(self, name)

    @checked
    def transformer_lens_names(self, name: str) -> list[str]:
        """TransformerLens's names of all weights that a parameter holds, the inverse of the above.

        Of core layers they name every recurrence, at the present number of them: who edits one
        edits all.

        Args:
            name: Name among ``named_parameters()``, such as ``"core.1.attn.qkv"``.

        Returns:
            The names in the order of the layers; none for what TransformerLens does not have, such
            as the adapter of an injection.

        Raises:
            InputError: the model has no such parameter.
        """
        return weight_map.transformer_lens_names(self, name)

    def tl_parameters(self) -> dict[str, Tensor]:
        """Weights of every effective layer under TransformerLens's names."""
        return weights.tl_parameters(self)

    @checked
    def accumulated_bias(
        self, layer: LayerLike, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the output biases up to a layer: zero, the families have none."""
        self.loop.resolve_or_end(layer)
        return self.W_E.new_zeros(self.cfg.d_model)
