"""Huginn-0125: (2, 4 x 32, 2), norms on the residual sum, linear injection, tied embeddings.

Choices of the reference that are easy to miss: the embedding scale is ``sqrt(d_model)`` whatever
``init_values.embed_scale`` says; the final norm also stands between loop and coda; rotary pairs are
interleaved, rotated in fp32; queries and keys have a bias, added before the rotation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from tl_looped.adapters.base import Adapter, HubAlias, Source, as_float, given, require
from tl_looped.adapters.raven import (
    HUGINN_TOKENS,
    RAVEN_REFERENCE,
    has_tensor,
    is_raven,
    raven_config,
    raven_duplicates,
    raven_sources,
)
from tl_looped.adapters.registry import register_adapter
from tl_looped.adapters.rope import read_rope
from tl_looped.errors import ConfigError
from tl_looped.model.config import LoopedConfig, NormLayout, RotaryStyle


@register_adapter
class HuginnAdapter(Adapter):
    """tomg-group-umd/huginn-0125."""

    name = "huginn"
    aliases: ClassVar = {"huginn": HubAlias("tomg-group-umd/huginn-0125")}
    special_token_ids: ClassVar = HUGINN_TOKENS
    reference: ClassVar = replace(RAVEN_REFERENCE, rotary="freqs_cis", rotary_is="table")

    def matches(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """Raven with four norms a block."""
        return is_raven(config) and has_tensor(tensor_names, ".norm_3.weight")

    def config(self, config: Mapping[str, Any]) -> LoopedConfig:
        """See the module's docstring. Huginn's code does not read ``initial_state_mode``."""
        config = {key: value for key, value in config.items() if key != "initial_state_mode"}
        d_model, block_size = require(config, "n_embd", "block_size")
        rope_base, scaling = read_rope(config, "rope_base", "rope_theta")
        if rope_base is None:
            require(config, "rope_base")
        if scaling is not None:
            raise ConfigError(
                f"config.json asks for the rotary scaling {scaling!r}; Huginn's code has none"
            )
        return raven_config(
            config,
            architecture=self.name,
            n_ctx=block_size,
            norm_layout=NormLayout.RESIDUAL,
            pre_coda_norm=True,
            qk_bias=given(config, "qk_bias", True),
            rotary_style=RotaryStyle.INTERLEAVED,
            rotary_base=as_float(rope_base),
            rotary_in_fp32=True,
            embed_scale=math.sqrt(d_model),
            # The authors write BOS before a text by hand.
            default_prepend_bos=True,
        )

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """norm_1 and norm_3 stand before the sublayers, norm_2 and norm_4 on the sums."""
        norms = {"ln1": "norm_1", "ln_mid": "norm_2", "ln2": "norm_3", "ln_out": "norm_4"}
        return raven_sources(cfg, norms)

    def ignored(self, cfg: LoopedConfig) -> frozenset[str]:
        """The rotary table, which is computed here."""
        return frozenset({"freqs_cis"})

    def duplicates(self, cfg: LoopedConfig) -> dict[str, str]:
        """A stored copy of the tied unembedding."""
        return raven_duplicates(cfg)
