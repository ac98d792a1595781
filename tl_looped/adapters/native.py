"""tl_looped's own format: what ``save_pretrained`` writes.

``config.json`` holds ``model_type``, ``format_version`` and the fields of :class:`LoopedConfig`;
tensors have the parameters' own names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from tl_looped.adapters.base import Adapter, Source, trained_recurrences_of
from tl_looped.adapters.registry import register_adapter
from tl_looped.errors import ConfigError
from tl_looped.model.config import TRAINED, LoopedConfig
from tl_looped.model.parameters import parameter_names

MODEL_TYPE = "tl_looped"
FORMAT_VERSION = 1
_OWN_KEYS = ("model_type", "format_version", "tl_looped_version")


def native_config(cfg: LoopedConfig, version: str) -> dict[str, Any]:
    """The ``config.json`` of a model."""
    head = dict(zip(_OWN_KEYS, (MODEL_TYPE, FORMAT_VERSION, version), strict=True))
    return head | cfg.to_json()


@register_adapter
class NativeAdapter(Adapter):
    """Folders written by ``LoopedTransformer.save_pretrained``."""

    name = "tl_looped"

    def matches(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """By ``model_type``."""
        return config.get("model_type") == MODEL_TYPE

    def config(self, config: Mapping[str, Any]) -> LoopedConfig:
        """The fields as they were saved."""
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version {version!r} of this checkpoint is not {FORMAT_VERSION}, "
                "the one that this version of tl_looped reads"
            )
        fields = {key: value for key, value in config.items() if key not in _OWN_KEYS}
        fields.pop("n_layers", None)  # derived
        fields[TRAINED] = trained_recurrences_of(config, config.get("n_recurrences"))
        return LoopedConfig.from_json(fields | {"dtype": torch.float32, "device": "meta"})

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Every parameter under its own name."""
        return {name: Source((name,)) for name in parameter_names(cfg)}
