"""A model of transformers that is in memory already, read as a checkpoint is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_looped.adapters import all_aliases, find_adapter
from tl_looped.adapters.stored import Header
from tl_looped.checkpoints import (
    ALLOWED,
    BUNDLED,
    Checkpoint,
    HubOptions,
    download,
    generation_config_of,
)
from tl_looped.checks import described
from tl_looped.errors import InputError
from tl_looped.files import is_folder

_WITHOUT_TENSORS = [pattern for pattern in ALLOWED if pattern != "*.safetensors"]
_STORED = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass
class HeldModel(Checkpoint):
    """A model of transformers in memory, as if it were a checkpoint; see :func:`hold_model`.

    Args:
        tensors: Its weights by name.
        generation: Its own generation config.
        tokenizer_folder: Where its tokenizer is, or None.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    tokenizer_folder: Path | None = None

    def tokenizer(self) -> Any:
        """The tokenizer of its name, where that is a place with one."""
        return None if self.tokenizer_folder is None else self.tokenizer_of(self.tokenizer_folder)

    def generation_config(self) -> dict[str, Any]:
        """What holds of the model's own."""
        return self.adapter.generation_config(self.generation)

    def reader(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """The tensors as they are."""
        return nullcontext(self.tensors.__getitem__)


def hold_model(model_name: str | Path, model: Any, hub: HubOptions) -> HeldModel:
    """A model of transformers in memory as a checkpoint.

    Args:
        model_name: What it is called, and where its tokenizer is: a folder, a bundled name, an
            alias or a hub id. Nothing else of that is read.
        model: Its ``config`` and ``state_dict`` are those of a looped family.
        hub: How the hub is asked for the tokenizer.

    Raises:
        InputError: something else, or a model without its own weights.
        UnknownArchitectureError: no adapter recognises it.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not callable(getattr(config, "to_dict", None)):
        raise InputError(
            "hf_model must be a model of transformers, with its config and its weights, got "
            f"{described(model)}"
        )
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if any("_original_component" in name for name in tensors):
        raise InputError(
            "hf_model is inside a TransformerBridge, which has replaced its modules: load it anew"
        )
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        raise InputError(
            "hf_model has tensors without values (on the meta device, or offloaded by accelerate): "
            "load it on one device, without device_map"
        )
    raw: dict[str, Any] = config.to_dict()
    headers = {
        name: Header(Path(), tuple(tensor.shape), _STORED.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in tensors.items()
    }
    adapter = find_adapter(raw, set(headers))
    return HeldModel(
        Path(),
        str(model_name),
        raw,
        headers,
        adapter,
        tensors=tensors,
        generation=generation_config_of(model),
        tokenizer_folder=_tokenizer_folder(model_name, hub),
    )


def _tokenizer_folder(model_name: str | Path, hub: HubOptions) -> Path | None:
    """Where a tokenizer of that name is; None for a name that is no place."""
    name, alias = str(model_name), all_aliases().get(str(model_name))
    if name in BUNDLED and not isinstance(model_name, Path):
        return BUNDLED[name]
    if is_folder(model_name):
        return Path(model_name)
    if alias is None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        return None
    return download(alias.hub_id if alias else name, None, hub, _WITHOUT_TENSORS)
