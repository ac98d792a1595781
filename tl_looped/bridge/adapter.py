"""How TransformerLens wraps an unrolled looped model.

``LoopedArchitectureAdapter`` is announced to TransformerLens by an entry point. What it maps
depends on the model (norm layout, biases, boundaries), and TransformerLens gives it the model in
``prepare_model`` only, so the mapping is made there.

Weights cannot be processed (folded, centred): one weight serves R layers, and the norms of a loop
are not final norms. Key-value caches are off, since nothing here stores one a recurrence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from transformer_lens import ActivationCache
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from tl_looped.bridge.cache import LoopedBridgeCache
from tl_looped.bridge.config import LoopedBridgeConfig, copy_config
from tl_looped.bridge.unrolled import UnrolledModel
from tl_looped.errors import InvalidDecompositionError
from tl_looped.model.config import LoopedConfig, NormLayout
from tl_looped.model.masks import real_tokens


class LoopedBridge(TransformerBridge):
    """A TransformerBridge that refuses what a looped model's stream and weights do not allow."""

    if TYPE_CHECKING:
        __getattr__: None  # type: ignore[assignment, misc] # see tl_looped._compat

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; the cache also takes (recurrence, layer).

        It refuses sums of residual writes where the stream is no such sum.
        """
        mask = kwargs.get("attention_mask")
        output, cache = super().run_with_cache(*args, **kwargs)
        if isinstance(cache, ActivationCache):
            unrolled = self.original_model
            assert isinstance(unrolled, UnrolledModel)
            cache = LoopedBridgeCache(
                cache.cache_dict,
                self,
                cache.has_batch_dim,
                loop=unrolled.loop,
                state_seed=unrolled.state_seed if unrolled.is_seeded else None,
                attention_mask=None if mask is None else real_tokens(mask),
            )
        return output, cache

    def process_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: one weight serves several layers."""
        raise InvalidDecompositionError(
            "process_weights and enable_compatibility_mode rewrite each layer's weights, but here "
            "one weight serves the same layer of every recurrence, and the looped model itself"
        )

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: one weight serves several layers."""
        self.process_weights()


class LoopedArchitectureAdapter(ArchitectureAdapter):
    """TransformerLens's view of an :class:`~tl_looped.bridge.unrolled.UnrolledModel`."""

    supports_kv_cache = False
    supports_compatibility_mode = False
    supports_hf_output_attentions = False

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        self.supports_fold_ln = False
        self.supports_center_writing_weights = False
        self.weight_processing_conversions = dict[str, Any]()
        self.component_mapping = dict[str, Any]()

    def prepare_model(self, hf_model: UnrolledModel) -> None:
        """Take the configuration and the component mapping from the model."""
        copy_config(hf_model, self.cfg)
        submodules = self._block_parts(hf_model.looped_cfg)
        aliases: dict[str, Any] = {"hook_resid_mid": "resid_mid.hook_out"}
        if hf_model.has_boundaries:
            submodules["boundary"] = GeneralizedComponent(name="boundary", config=self.cfg)
        if hf_model.why_not_additive() is not None:
            aliases |= _attn_out_alias(hf_model.looped_cfg)
        self.component_mapping = {
            "embed": EmbeddingBridge(name="tok_embed", config=self.cfg),
            "blocks": BlockBridge(
                name="layers",
                config=self.cfg,
                submodules=submodules,
                hook_alias_overrides=aliases,
            ),
            "ln_final": self._norm("norm"),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }

    def setup_hook_compatibility(self, bridge: TransformerBridge) -> None:
        """Give the bridge its refusals, whoever made it.

        ``boot_transformers`` and ``build_bridge_from_module`` make a plain TransformerBridge and
        offer no choice of class; this is the one call in which an adapter sees it.
        """
        bridge.__class__ = LoopedBridge
        bridge.cfg.__class__ = LoopedBridgeConfig

    def _norm(self, name: str) -> RMSNormalizationBridge:
        return RMSNormalizationBridge(name=name, config=self.cfg)

    def _block_parts(self, cfg: LoopedConfig) -> dict[str, GeneralizedComponent]:
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
        parts: dict[str, Any] = {key: LinearBridge(name=name) for key, name in names.items()}
        if cfg.qk_norm:
            parts |= {name: self._norm(name) for name in ("q_norm", "k_norm")}
        attn = PositionEmbeddingsAttentionBridge(name="attn", config=self.cfg, submodules=parts)
        norms = {name: self._norm(name) for name in cfg.norm_layout.norm_names}
        resid_mid = GeneralizedComponent(name="resid_mid", config=self.cfg)
        return {**norms, "attn": attn, "resid_mid": resid_mid, "mlp": self._gated_mlp()}


def _attn_out_alias(cfg: LoopedConfig) -> dict[str, Any]:
    """The alias ``hook_attn_out``, so that direct-path and edge methods refuse.

    They refuse a block whose alias leads to another component than ``attn``: there, head outputs do
    not reach the end of the stream as they were written. The first target names the obstacle and is
    no hook, so the hook itself is that of the second, the attention output.
    """
    if cfg.norm_layout in (NormLayout.POST, NormLayout.SANDWICH):
        return {}  # TransformerLens already leads it to ln1_post.
    owner = "ln_mid" if cfg.norm_layout is NormLayout.RESIDUAL else "boundary"
    return {"hook_attn_out": [f"{owner}.(rescales earlier writes)", "attn.hook_out"]}
