"""Retrofitted OLMo-2: (4, 6 x R, 4), norms on sublayer outputs, QK-norm, injection.

Queries and keys are normalised over all heads together, before the heads are split and rotated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from tl_looped.adapters.base import Adapter, Source
from tl_looped.adapters.raven import (
    RAVEN_REFERENCE,
    has_tensor,
    is_raven,
    raven_duplicates,
    raven_raw_config,
    raven_sources,
    retrofit_generation_config,
)
from tl_looped.adapters.registry import register_adapter
from tl_looped.adapters.retrofit_llama import retrofit_aliases, retrofit_config
from tl_looped.model.config import LoopedConfig, NormLayout


@register_adapter
class RetrofitOlmoAdapter(Adapter):
    """smcleish/Recurrent-OLMo-2-0425-train-recurrence-R."""

    name = "retrofit-olmo"
    aliases = retrofit_aliases("recurrent-olmo-2", "Recurrent-OLMo-2-0425")
    reference: ClassVar = RAVEN_REFERENCE

    def matches(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """Raven with a norm on queries."""
        return is_raven(config) and has_tensor(tensor_names, ".attn.q_norm.weight")

    def config(self, config: Mapping[str, Any]) -> LoopedConfig:
        """See the module's docstring."""
        return retrofit_config(
            config,
            architecture=self.name,
            norm_layout=NormLayout.POST,
            qk_norm=True,
        )

    def generation_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :func:`retrofit_generation_config`."""
        return retrofit_generation_config(config)

    def raw_config(self, cfg: LoopedConfig) -> dict[str, Any]:
        """As the published files have it."""
        return raven_raw_config(cfg, "raven_modeling_minimal_olmo")

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """norm_1 and norm_2 stand on the sublayers' outputs."""
        return raven_sources(cfg, {"ln1_post": "norm_1", "ln2_post": "norm_2"})

    def duplicates(self, cfg: LoopedConfig) -> dict[str, str]:
        """A stored copy of a tied unembedding."""
        return raven_duplicates(cfg)
