"""What makes two runs the same: a hash of everything that decides the numbers.

It covers the specification as resolved, the model's configuration, tokenizer and weights, and the
texts of the chosen prompts; not the names of models and prompt file, and not the device, the batch
size, the number of processes or the versions of libraries (these are recorded beside the results).
Hooks that a caller has put on a model are not seen.

Weights are identified by the sizes of their files, their headers, and eight evenly spaced blocks of
4 KiB of every tensor (files up to 1 MiB whole). Training, however short, changes these; an edit of
a part of one tensor, such as a single head, may escape: save what was edited under another name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_looped.errors import CheckpointError
from tl_looped.experiments.prompts import ChosenPrompts
from tl_looped.experiments.spec import Experiment
from tl_looped.metrics.catalogue import select
from tl_looped.model.config import TRAINED

_BLOCK, _BLOCKS, _WHOLE = 4096, 8, 1 << 20
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def folder_identity(folder: Path) -> str:
    """SHA-256 of a checkpoint's configuration, tokenizer and weights.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    digest = hashlib.sha256()
    names = [name for name in ("config.json", *_TOKENIZER) if (folder / name).is_file()]
    try:
        for path in [*(folder / name for name in names), *sorted(folder.glob("*.safetensors"))]:
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            digest.update(_sampled(path))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return digest.hexdigest()


def _sampled(path: Path) -> bytes:
    """The SHA-256 of a file, or of its header and blocks of each tensor if it is large."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE or path.suffix != ".safetensors":
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            return digest.digest()
        # A safetensors file begins with the length of its header, in eight bytes.
        length = min(int.from_bytes(file.read(8), "little"), size)
        header = file.read(length)
        digest.update(header)
        for begin, end in _tensors(header, size):
            for n in range(_BLOCKS):
                file.seek(8 + length + begin + n * max(0, end - begin - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(min(_BLOCK, end - begin)))
    return digest.digest()


def _tensors(header: bytes, size: int) -> list[tuple[int, int]]:
    """Where each tensor begins and ends behind the header; the whole file if it is damaged."""
    try:
        found = [v["data_offsets"] for k, v in json.loads(header).items() if k != "__metadata__"]
        return sorted((int(begin), int(end)) for begin, end in found)
    except (AttributeError, KeyError, TypeError, ValueError):
        return [(0, size)]


def module_identity(model: nn.Module, cfg: Any) -> str:
    """SHA-256 of a model in memory: configuration, tokenizer, 65,536 values of each weight."""
    values = {k: v for k, v in cfg.to_json().items() if k != TRAINED}  # decides no number
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    digest.update(_of_tokenizer(getattr(model, "tokenizer", None)))
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = -(-len(flat) // 65536) if len(flat) else 1
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[::step].to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def _of_tokenizer(tokenizer: Any) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str()).encode()
    if tokenizer is None:
        return b""
    return json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()


def run_hash(
    spec: Experiment,
    prompts: ChosenPrompts,
    model_identity: str,
    bos: bool | None = None,
    chat_template: str = "",
) -> str:
    """SHA-256 of a resolved experiment, as 64 hexadecimal digits.

    Args:
        spec: With its number of recurrences filled in.
        prompts: The chosen texts.
        model_identity: Of :func:`folder_identity` or :func:`module_identity`.
        bos: Whether prompts begin with BOS, where ``model_identity`` does not tell: only then is it
            part of the hash.
        chat_template: Of the model, where ``model_identity`` does not hold it; with what was said
            about BOS it decides the text of conversations.
    """
    values = spec.to_dict()
    for name in ("model", "revision", "feedforward", "prepend_bos"):
        values.pop(name, None)
    if bos is not None:
        values["prepend_bos"] = bos
    values["metrics"] = sorted(select(spec.metrics))
    values["extras"] = sorted(set(spec.extras))
    values["prompts"] = [prompts.digest, list(prompts.rows), spec.prompts.too_long]
    if prompts.has_chats:
        values["chats"] = [spec.prepend_bos, chat_template]
    values["model_identity"] = model_identity
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
