"""What ``from_pretrained`` may be asked for, in TransformerLens's words and in ours.

TransformerLens hands what it does not know itself to transformers. Checkpoints are read here
without transformers' model classes, so a keyword of theirs is one of three things: one of the
hub's, which is passed on; one whose value changes nothing here, which is taken; or one that is
refused with the reason. None is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tl_looped.checkpoints import HubOptions
from tl_looped.checks import described, one_of, shown, whole
from tl_looped.errors import ArgumentTypeError, InputError
from tl_looped.model.config import parse_dtype
from tl_looped.transformer.processing import Processing, say_once
from tl_looped.transformer.spreading import DeviceMap, memory_of_gpus

_ATTENTION = "attention is computed here, with hooks; 'eager' says that and is taken"
_QUANTISED = (
    "quantised weights are not read; load the checkpoint dequantised, dtype='bfloat16' is the "
    "smallest"
)
_STEPS = (
    "TransformerLens knows the steps of some of its own models' trainings; of a looped model give "
    "the step's folder, or its branch or tag on the hub as revision="
)
_NO_CODE = "no code of a checkpoint is run"
_ADAPTER = (
    "the checkpoint's config.json decides; change cfg in a saved folder, or load and set what can "
    "be set: n_recurrences=, n_ctx="
)

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "first_n_layers": (
        (None,),
        "a looped model without some of its layers is another model, since its loop runs over all "
        "of them: interventions.SkipLayers leaves layers out of runs, n_recurrences= shortens it, "
        "tl_looped.retrofit(core=[...]) takes some layers of a feedforward model",
    ),
    "checkpoint_index": ((None,), _STEPS),
    "checkpoint_value": ((None,), _STEPS),
    "checkpoint_label": ((None,), _STEPS),
    "load_in_4bit": ((False, None), _QUANTISED),
    "load_in_8bit": ((False, None), _QUANTISED),
    "quantization_config": ((None,), _QUANTISED),
    "attn_implementation": (("eager", None), _ATTENTION),
    "use_safetensors": ((True, None), "weights are read from safetensors alone"),
    "low_cpu_mem_usage": (
        (True, False, None),
        "every tensor goes straight to its device, one at a time",
    ),
    "load_weights": (
        (True,),
        "device='meta' loads shapes without values, and LoopedTransformer.from_config(cfg) draws "
        "random weights",
    ),
    "offload_folder": ((None,), "weights are not offloaded to the disk; see device_map="),
    "offload_state_dict": ((False, None), "weights are not offloaded; see device_map="),
    "hf_config_overrides": ((None,), _ADAPTER),
    "config": ((None,), _ADAPTER),
    "model_class": ((None,), "the checkpoint's family has one; see tl_looped.register_adapter"),
    "code_revision": ((None,), _NO_CODE),
    "subfolder": (("", None), "give the folder itself, or a hub id whose root has the checkpoint"),
    "use_auth_token": ((None,), "transformers calls it token="),
    "use_fast": ((True, None), "tokenizer.json is read; give another tokenizer as tokenizer="),
    "add_bos_token": ((None,), "default_prepend_bos= says whether text gets a BOS token"),
    "tokenizer_name": ((None,), "give the tokenizer itself as tokenizer="),
}
"""Keywords of TransformerLens and transformers -> the values that change nothing, and why not."""

_HUB: dict[str, tuple[type, ...]] = {
    "cache_dir": (str, Path, type(None)),
    "token": (str, bool, type(None)),
    "local_files_only": (bool,),
    "force_download": (bool,),
}
"""Fields of :class:`HubOptions` -> what they may be."""

_TAKEN = ("trust_remote_code", "torch_dtype", *_HUB)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What a model is loaded with; see :meth:`LoopedTransformer.from_pretrained`.

    Raises:
        InputError: what excludes each other, or is refused.
    """

    model_name: str | Path
    processing: Processing
    hub: HubOptions
    n_recurrences: int | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype = torch.float32
    revision: str | None = None
    device_map: DeviceMap | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    tokenizer: Any = None
    hf_model: Any = None
    default_prepend_bos: bool | None = None
    default_padding_side: str | None = None
    n_ctx: int | None = None
    n_devices: int = 1
    move_to_device: bool = True

    def __post_init__(self) -> None:
        if self.device is not None and self.device_map is not None:
            raise InputError(
                f"device={str(self.device)!r} and device_map={self.device_map!r} exclude each "
                "other: one puts all weights on one device, the other spreads them"
            )
        if self.device_map is None and self.max_memory is not None:
            raise InputError("max_memory is for a device_map: give device_map='auto' with it")
        if self.hf_model is not None and self.revision is not None:
            raise InputError(
                f"revision={self.revision!r} is for the hub, but the weights are those of hf_model"
            )
        if self.default_padding_side is not None:
            one_of(self.default_padding_side, "default_padding_side", ("left", "right"))
        if self.n_ctx is not None:
            whole(self.n_ctx, "n_ctx", 1, 2**31)
        self._check_devices()

    def _check_devices(self) -> None:
        n = whole(self.n_devices, "n_devices", 1)
        if self.spread and not self.move_to_device:
            raise InputError(
                "move_to_device=False leaves all weights on the CPU, and device_map or n_devices "
                "spreads them: leave one of them out"
            )
        if n == 1:
            return
        if self.device_map is not None:
            raise InputError(
                f"n_devices={n} and device_map={self.device_map!r} exclude each other: one spreads "
                "over the first n GPUs, the other as it says"
            )
        if self.device is not None and not str(self.device).startswith("cuda"):
            raise InputError(
                f"n_devices={n} spreads over GPUs, and device is {str(self.device)!r}: "
                "device_map= names other devices"
            )

    @property
    def spread(self) -> bool:
        """Whether the weights go to several devices."""
        return self.device_map is not None or self.n_devices > 1

    @property
    def plan(self) -> tuple[DeviceMap | None, Mapping[int | str, int | str] | None]:
        """``device_map`` and ``max_memory``, given, or as ``n_devices`` says."""
        if self.n_devices > 1:
            return "balanced", memory_of_gpus(self.n_devices)
        return self.device_map, self.max_memory


def dtype_of(dtype: str | torch.dtype | None, keywords: Mapping[str, Any]) -> torch.dtype:
    """The dtype of ``dtype=`` and of transformers' ``torch_dtype=``, fp32 if there is neither.

    Raises:
        InputError: they differ.
        ConfigError: no floating point type.
    """
    old = keywords.get("torch_dtype")
    given = [parse_dtype(each) for each in (dtype, old) if each is not None]
    if len(set(given)) == 2:
        raise InputError(f"dtype={dtype!r} and torch_dtype={old!r} differ: give one of them")
    return given[0] if given else torch.float32


def hub_options(keywords: Mapping[str, Any]) -> HubOptions:
    """What of further keywords is for the hub; all others are looked at.

    Raises:
        InputError: one that is refused, with the reason.
        ArgumentTypeError: one that nobody has.
    """
    for name, value in keywords.items():
        if name in _TAKEN:
            continue
        if name not in REFUSED:
            raise ArgumentTypeError(
                f"from_pretrained has no keyword {name!r}. Of transformers' own it takes "
                f"{', '.join(_TAKEN)}; help(LoopedTransformer.from_pretrained) shows the others"
            )
        neutral, reason = REFUSED[name]
        if not any(value is each or (type(value) is str and value == each) for each in neutral):
            raise InputError(f"from_pretrained cannot have {name}={shown(value)}: {reason}")
    if keywords.get("trust_remote_code"):
        say_once(f"trust_remote_code=True changes nothing: {_NO_CODE}")
    asked = {name: keywords[name] for name in _HUB if name in keywords}
    for name, value in asked.items():
        if not isinstance(value, _HUB[name]):
            what = " or ".join(
                "None" if kind is type(None) else kind.__name__ for kind in _HUB[name]
            )
            given = "something else" if name == "token" else described(value)  # a secret
            raise ArgumentTypeError(f"{name} must be {what}, got {given}")
    return HubOptions(**asked)


def _kind_name(kind: type) -> str:
    return "None" if kind is type(None) else kind.__name__
