"""Golden checkpoints, read and written raw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_looped import LoopedConfig, LoopedTransformer
from tl_looped.adapters import find_adapter


def raw_config(case: str, **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((GOLDEN / case / "config.json").read_text())
    return raw | changes


def tensor_names(case: str) -> set[str]:
    return set(load_file(GOLDEN / case / "model.safetensors"))


def read_config(case: str, **changes: Any) -> LoopedConfig:
    raw = raw_config(case, **changes)
    return find_adapter(raw, tensor_names(case)).config(raw)


def write_checkpoint(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


def load_changed(case: str, folder: Path, **changes: Any) -> LoopedTransformer:
    tensors = load_file(GOLDEN / case / "model.safetensors")
    write_checkpoint(folder, raw_config(case, **changes), tensors)
    return LoopedTransformer.from_pretrained(folder, device="cpu")
