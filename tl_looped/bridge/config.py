"""The configuration of a bridge: TransformerLens's fields with the looped model's values.

The unrolled model runs by the looped model's configuration, so a field of the bridge's that says
how the model is can be read and not set: nothing would follow from it.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from transformer_lens.config import TransformerBridgeConfig

from tl_looped.bridge.unrolled import UnrolledModel
from tl_looped.errors import ConfigError
from tl_looped.model.tl_fields import FIXED, OF_TOKENIZER, OWN_FIXED

_MADE_OF = (
    "d_model", "d_head", "n_layers", "n_heads", "n_key_value_heads", "d_mlp", "d_vocab", "n_ctx",
    "eps", "act_fn", "gated_mlp", "normalization_type", "rotary_base", "norm_layout",
)  # fmt: skip
"""Fields that the unrolled model was made from."""
_OF_THE_BRIDGE = (
    "architecture", "device", "dtype", "n_devices", "default_prepend_bos", *OF_TOKENIZER,
    "use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in",
)  # fmt: skip
"""Fields that a bridge sets itself."""
_KEPT = (FIXED | set(OWN_FIXED) | set(_MADE_OF)) - set(_OF_THE_BRIDGE)
"""Fields that say how the model is."""


class LoopedBridgeConfig(TransformerBridgeConfig):
    """A bridge's configuration that refuses what its model would not honour."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        """As in TransformerLens; a field that says how the model is keeps its value.

        Raises:
            ConfigError: for another one. A copy of the configuration belongs to no bridge.
        """
        bound = getattr(self, "_bridge_ref", None)
        if name in _KEPT and bound is not None and bound() is not None:
            current = getattr(self, name)
            if type(value) is not type(current) or value != current:
                raise ConfigError(
                    f"{name} of a bridge of a looped model cannot be set to {value!r}: it is "
                    f"{current!r}, as the model that it was made of, and no run would honour "
                    "another"
                )
        super().__setattr__(name, value)


def copy_config(model: UnrolledModel, target: TransformerBridgeConfig) -> None:
    """Give a bridge's configuration everything that the model's own determines."""
    cfg = copy(model.looped_cfg)
    cfg.note(n_recurrences=model.loop.R, n_layers=model.loop.n_layers)
    for name in set(vars(target)) - set(_OF_THE_BRIDGE):
        if hasattr(cfg, name):
            setattr(target, name, getattr(cfg, name))
    # TransformerLens's bridge has no such fields, and tools ask for them.
    target.norm_layout, target.has_loop = cfg.norm_layout, cfg.has_loop
    target.default_prepend_bos = bool(cfg.default_prepend_bos)  # None without a tokenizer
