"""Lets ``TransformerBridge.boot_transformers`` load folders written by ``save_pretrained``.

TransformerLens 4.3 finds our adapter by its entry point, but ``boot_transformers`` does not get so
far by itself. It first asks ``transformers`` for the folder's configuration class, and
``transformers`` has no entry points. Then ``determine_architecture_from_hf_config`` looks the
architecture up in the module's table ``SUPPORTED_ARCHITECTURES``, which neither entry points nor
``ArchitectureAdapterFactory.register_adapter`` add to. :func:`enable_boot_transformers` makes both
entries. No code of the folder is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, no_type_check

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tl_looped.adapters.native import MODEL_TYPE
from tl_looped.bridge import ARCHITECTURE
from tl_looped.errors import ConfigError
from tl_looped.model.config import LoopedConfig
from tl_looped.transformer import LoopedTransformer

if TYPE_CHECKING:  # transformers' own has a __getattribute__, so that any name passes

    class PreTrainedConfig:  # noqa: D101
        architectures: list[str] | None

        def __post_init__(self, **kwargs: Any) -> None: ...
else:
    from transformers import PreTrainedConfig

# n_layers follows n_recurrences; the others are the load's, and not the file's.
_FREE = ("n_recurrences", "n_layers", "dtype", "model_name")
_PLACEMENT = ("device_map", "max_memory", "offload_folder", "quantization_config")


@no_type_check  # its __init__ is transformers' own, which takes more than it declares
class LoopedPretrainedConfig(PreTrainedConfig):
    """``config.json`` of the native format, as ``transformers`` reads it.

    Attributes:
        n_recurrences: Recurrences of the bridge; ``hf_config_overrides={"n_recurrences": 8}``.
        state_seed: Seed of the random initial state; likewise.
    """

    model_type = MODEL_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        """Name the class that the table of architectures knows."""
        kwargs.setdefault("state_seed", 0)
        kwargs.pop("rope_scaling", None)  # another format's field to transformers
        super().__post_init__(**kwargs)
        self.architectures = [ARCHITECTURE]


class LoopedForCausalLM:
    """What ``AutoModelForCausalLM`` calls for a folder of the native format."""

    config_class = LoopedPretrainedConfig

    @staticmethod
    def from_pretrained(
        model_name: str,
        *,
        config: Any,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        **others: Any,
    ) -> Any:
        """The unrolled model on the CPU.

        Args:
            model_name: See :meth:`LoopedTransformer.from_pretrained`.
            config: A :class:`LoopedPretrainedConfig`.
            torch_dtype, dtype: fp32 if both are None.
            revision: Branch, tag or commit on the hub.
            others: What the ``Auto`` class adds; nothing here depends on it.

        Raises:
            ConfigError: for a request to place or change the weights that would have no effect.
        """
        from tl_looped.bridge.unrolled import UnrolledModel

        refused = sorted(set(_PLACEMENT) & set(others))
        if refused:
            raise ConfigError(
                f"{refused} have no effect on a looped model; move it with bridge.to(device)"
            )
        looped = LoopedTransformer.from_pretrained(
            model_name,
            n_recurrences=config.n_recurrences,
            device="cpu",
            dtype=torch_dtype or dtype,
            revision=revision,
        )
        _refuse_overrides(config, looped.cfg)
        return UnrolledModel(looped, looped.loop, config.state_seed)

    @staticmethod
    def _from_config(config: Any, **others: Any) -> NoReturn:
        # Behind load_weights=False.
        raise ConfigError(
            "a model without the folder's weights is made by LoopedTransformer.from_config(cfg), "
            "and its bridge by to_bridge()"
        )


def _refuse_overrides(config: Any, cfg: LoopedConfig) -> None:
    """Raise for a changed field that the model does not take from ``hf_config_overrides``."""
    of_the_file = cfg.to_json()
    changed = {
        name: getattr(config, name)
        for name, value in of_the_file.items()
        if name not in _FREE and getattr(config, name, value) != value
    }
    if changed:
        raise ConfigError(
            f"hf_config_overrides changes {changed}; only n_recurrences and state_seed can be "
            "changed here. Load the model with LoopedTransformer, and call to_bridge()."
        )


def enable_boot_transformers() -> None:
    """Make ``TransformerBridge.boot_transformers(folder)`` work in this process.

    The folder must hold a tokenizer, or one must be passed. May be called more than once.
    """
    from transformer_lens.factories import architecture_adapter_factory as factory

    from tl_looped.bridge.adapter import LoopedArchitectureAdapter
    from tl_looped.bridge.build import register_bridge_adapter

    AutoConfig.register(MODEL_TYPE, LoopedPretrainedConfig, exist_ok=True)
    AutoModelForCausalLM.register(LoopedPretrainedConfig, LoopedForCausalLM, exist_ok=True)
    factory.SUPPORTED_ARCHITECTURES[ARCHITECTURE] = LoopedArchitectureAdapter
    register_bridge_adapter()
