"""The feedforward model: found, loaded, and looked at without being changed.

Hub ids and folders are read by transformers' own class of the family, from safetensors only and
without any code of the checkpoint; their tensors stay in the files
(``tl_looped.retrofitting.stored``). A model in memory must be of exactly that class; a bridge of
TransformerLens holds one. Nothing of it is changed or shared: the looped model has copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tl_looped.adapters.rope import refuse_contradictions
from tl_looped.adapters.stored import (
    Header,
    TensorReader,
    read_headers,
    refuse_quantised,
    tensor_files,
    wrong_dtypes,
)
from tl_looped.checkpoints import (
    download,
    generation_config_of,
    read_config,
    read_generation_config,
    read_tokenizer,
    without_bars,
)
from tl_looped.errors import CheckpointError, ConfigError, InputError
from tl_looped.retrofitting.families import Family, family_of
from tl_looped.retrofitting.stored import (
    from_files,
    give_rotary_frequencies,
    stored_parameters,
)

# What TransformerLens's bridge inserts into the names of the modules that it wraps.
_WRAPPED = "_original_component."


@dataclass(frozen=True)
class Feedforward:
    """A feedforward model to make a looped one of.

    Args:
        model: Of transformers; maybe inside a bridge of TransformerLens. On the meta device if its
            tensors are still in their files.
        family: Its family.
        tokenizer: Its tokenizer, or None.
        name: What it is called; never a path.
        generation_config: How it generates, as in ``generation_config.json``.
        stored: Parameter -> where it is, of a model whose tensors are still in their files.
    """

    model: Any
    family: Family
    tokenizer: Any
    name: str
    generation_config: dict[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Header] | None = None

    @property
    def n_layers(self) -> int:
        """Number of its layers."""
        return min(len(self.model.model.layers), self.model.config.num_hidden_layers)

    @property
    def on_meta(self) -> bool:
        """Whether it has shapes only."""
        return self.stored is None and any(p.is_meta for p in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where it is run."""
        return self.model.device if self.stored is None else torch.device("cpu")

    def parameters(self) -> dict[str, Tensor]:
        """Its parameters under transformers' names, tied ones once; maybe without values."""
        return {
            name.replace(_WRAPPED, ""): parameter.detach()
            for name, parameter in self.model.named_parameters()
            if self.stored is None or name in self.stored
        }

    def reader(self) -> AbstractContextManager[Callable[[str], Tensor]]:
        """What gives a parameter's values by name, while the context lasts."""
        if self.stored is None:
            return nullcontext(self.parameters().__getitem__)
        return TensorReader(self.stored)

    def runnable(self) -> AbstractContextManager[None]:
        """While it lasts, the model can be run."""
        if self.stored is None:
            return nullcontext()
        return from_files(self.model, self.stored)


def open_feedforward(
    model_or_id: Any,
    dtype: torch.dtype,
    tokenizer: Any = None,
    revision: str | None = None,
    check_layers: Callable[[int], object] = int,
) -> Feedforward:
    """The model behind whatever a user gives.

    Args:
        model_or_id: Hub id, folder, transformers model or TransformerBridge.
        dtype: Of the weights of a loaded one.
        tokenizer: In place of its own.
        revision: Branch, tag or commit, for the hub only.
        check_layers: Called with the number of layers before gigabytes are read for nothing.

    Raises:
        InputError: something else, or a model whose weights TransformerLens has changed.
        CheckpointError: a checkpoint that cannot be read, or does not hold its model.
        ConfigError: a family that does not fit.
    """
    if isinstance(model_or_id, (str, Path)):
        return _load(model_or_id, dtype, tokenizer, revision, check_layers)
    if revision is not None:
        raise InputError(f"revision={revision!r} is for the hub, but a model was given")
    bridge, model = None, model_or_id
    if not isinstance(model, PreTrainedModel) and hasattr(model, "original_model"):
        bridge, model = model, model.original_model
        if getattr(bridge, "compatibility_mode", False) or getattr(
            bridge, "_weights_processed", False
        ):
            raise InputError(
                "the bridge's weights were processed by enable_compatibility_mode, so they are not "
                "the checkpoint's any more; load it anew, or pass its hub id or folder"
            )
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            "retrofit takes a hub id, a folder, a transformers model or a TransformerBridge, got "
            f"{type(model_or_id).__name__}"
        )
    name = _plain_name(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    family = family_of(model.config.model_type, name)
    _check_class(model, family, name)
    if tokenizer is None and bridge is not None:
        tokenizer = bridge.tokenizer
    return Feedforward(model, family, tokenizer, name, generation_config_of(model))


def _load(
    model_name: str | Path,
    dtype: torch.dtype,
    tokenizer: Any,
    revision: str | None,
    check_layers: Callable[[int], object],
) -> Feedforward:
    text = str(model_name)
    if Path(text).is_dir():
        if revision is not None:
            raise CheckpointError(f"revision={revision!r} is for the hub, but {text} is a folder")
        folder = Path(text)
    elif isinstance(model_name, Path) or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text!r} is neither a folder nor a hub id (owner/name)")
    else:
        folder = download(text, revision)
    name = _plain_name(text)
    raw = read_config(folder)
    family = family_of(raw.get("model_type"), name)
    refuse_contradictions(raw)
    if type(raw.get("num_hidden_layers")) is int:
        check_layers(raw["num_hidden_layers"])
    refuse_quantised(raw, name)
    # These say what is wrong with a folder of pickles, a file that is cut off, a quantised tensor.
    headers = read_headers(tensor_files(folder))
    codes = wrong_dtypes(headers, headers)
    if codes:
        raise CheckpointError("\n  ".join((f"{name} is not a checkpoint of weights:", *codes)))
    model = _from_files_of(folder, raw["model_type"], text, dtype, device_map={"": "meta"})
    _check_class(model, family, name)
    stored = None
    # A config may name another file than transformers, and we, look for by themselves.
    if raw.get("transformers_weights") is None and give_rotary_frequencies(model):
        stored = stored_parameters(model, headers)
    if stored is None:
        model = _from_files_of(folder, raw["model_type"], text, dtype)
    own = read_tokenizer(folder) if tokenizer is None else tokenizer
    generation_config = read_generation_config(folder)
    return Feedforward(model.eval(), family, own, name, generation_config, stored)


def _from_files_of(
    folder: Path, model_type: Any, text: str, dtype: torch.dtype, **where: Any
) -> Any:
    """The model of a folder by transformers; every tensor is there, and no other."""
    try:
        with without_bars():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told here, with names
                **where,
            )
    except Exception as error:  # whatever transformers raises about a config or a file
        raise CheckpointError(
            f"transformers cannot load {text} ({type(error).__name__}: {error})"
        ) from error
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if wrong:
        # transformers has filled these in with random values, or left them out.
        listed = "; ".join(f"{kind}: {names}" for kind, names in wrong.items())
        raise CheckpointError(f"{text} does not hold the tensors of a {model_type}: {listed}")
    return model


def _check_class(model: Any, family: Family, name: str) -> None:
    kind = type(model)
    if kind.__name__ != family.model_class or not kind.__module__.startswith("transformers."):
        raise ConfigError(
            f"{name} is a {kind.__module__}.{kind.__name__}; only transformers' own "
            f"{family.model_class} is known to compute what its config says"
        )


def _plain_name(name: str) -> str:
    """A hub id as it is, of a path the last part: a saved model should not tell its owner's."""
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return name if is_hub_id and not Path(name).is_dir() else Path(name).resolve().name
