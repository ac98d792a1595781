"""Retrofitted Llama-3.2 and TinyLlama: (4, 6 x R, 4) and (4, 8 x R, 4), pre-norm, injection.

TinyLlama is the same code without ``rope_scaling``. ``rope_theta`` counts (``rope_base`` is stale),
as does ``max_position_embeddings`` (``block_size`` is stale). No norm between loop and coda.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from tl_looped.adapters.base import Adapter, HubAlias, Source, as_float, given, require
from tl_looped.adapters.raven import (
    RAVEN_REFERENCE,
    has_tensor,
    init_values,
    is_raven,
    raven_config,
    raven_duplicates,
    raven_raw_config,
    raven_sources,
    retrofit_generation_config,
)
from tl_looped.adapters.registry import register_adapter
from tl_looped.adapters.rope import read_rope
from tl_looped.model.config import LoopedConfig, NormLayout

TRAINED_RECURRENCES = (4, 8, 16, 32)


def retrofit_aliases(alias: str, hub_name: str) -> dict[str, HubAlias]:
    """``{alias}-r4`` to ``-r32`` and ``{alias}`` itself, which the paper uses at 32."""
    made = {
        f"{alias}-r{r}": HubAlias(f"smcleish/{hub_name}-train-recurrence-{r}", r)
        for r in TRAINED_RECURRENCES
    }
    return made | {alias: made[f"{alias}-r32"]}


def retrofit_config(config: Mapping[str, Any], **family: Any) -> LoopedConfig:
    """The part of the configuration that all retrofits share."""
    (n_ctx,) = require(config, "max_position_embeddings")
    theta, scaling = read_rope(config)
    if theta is None:
        require(config, "rope_theta")
    values: dict[str, Any] = {
        "n_ctx": n_ctx,
        "rotary_base": as_float(theta),
        "rope_scaling": scaling,
        "embed_scale": as_float(given(init_values(config), "embed_scale", 1.0)),
    }
    return raven_config(config, **(values | family))


@register_adapter
class RetrofitLlamaAdapter(Adapter):
    """smcleish/Recurrent-Llama-3.2-train-recurrence-R and the same for TinyLlama-3T."""

    name = "retrofit-llama"
    aliases = retrofit_aliases("recurrent-llama-3.2", "Recurrent-Llama-3.2") | retrofit_aliases(
        "recurrent-tinyllama-3t", "Recurrent-TinyLlama-3T"
    )
    reference: ClassVar = RAVEN_REFERENCE

    def matches(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """Raven with two norms a block and none on queries."""
        return (
            is_raven(config)
            and has_tensor(tensor_names, ".norm_1.weight")
            and not has_tensor(tensor_names, ".norm_3.weight")
            and not has_tensor(tensor_names, ".attn.q_norm.weight")
        )

    def config(self, config: Mapping[str, Any]) -> LoopedConfig:
        """See the module's docstring. The Llama code ignores ``initial_state_mode``."""
        config = {key: value for key, value in config.items() if key != "initial_state_mode"}
        return retrofit_config(
            config,
            architecture=self.name,
            norm_layout=NormLayout.PRE,
        )

    def generation_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See :func:`retrofit_generation_config`."""
        return retrofit_generation_config(config)

    def raw_config(self, cfg: LoopedConfig) -> dict[str, Any]:
        """As the published files have it."""
        return raven_raw_config(cfg, "raven_modeling_minimal_llama")

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """norm_1 and norm_2 stand before the sublayers."""
        return raven_sources(cfg, {"ln1": "norm_1", "ln2": "norm_2"})

    def duplicates(self, cfg: LoopedConfig) -> dict[str, str]:
        """A stored copy of a tied unembedding."""
        return raven_duplicates(cfg)
