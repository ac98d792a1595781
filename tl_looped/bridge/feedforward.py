"""Feedforward models as TransformerBridges, for comparison with looped ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tl_looped.adapters.rope import refuse_contradictions
from tl_looped.checkpoints import read_config, without_bars
from tl_looped.errors import CheckpointError, ConfigError


def load_feedforward(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """A TransformerBridge of a Hugging Face checkpoint, its weights as they are.

    Args:
        folder: With ``config.json``, safetensors and a tokenizer.
        device: Where to put it.
        dtype: Of its weights.

    Raises:
        ConfigError: if the installed TransformerLens has no bridge (before version 4), or two
            places of the config contradict each other.
        CheckpointError: if TransformerLens cannot load the folder.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ConfigError(
            "feedforward models are read by TransformerLens 4 or later: pip install "
            "'transformer-lens>=4.3,<5'"
        ) from error
    refuse_contradictions(read_config(folder))
    try:
        with without_bars():
            bridge = TransformerBridge.boot_transformers(str(folder), device=device, dtype=dtype)
    except Exception as error:  # whatever transformers and TransformerLens raise
        raise CheckpointError(
            f"TransformerLens cannot load {folder} ({type(error).__name__}: {error})"
        ) from error
    return bridge.eval()
