"""What is called on a looped model and on its bridge gives the same, at one recurrence.

The calls are those of tests/surface, as far as TransformerBridge has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import SIZES, STAGES
from letters import letters

from tl_looped import LoopedConfig, LoopedTransformer

pytestmark = pytest.mark.usefixtures("exact_bridges")
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "grouped": {"n_key_value_heads": 2, "qk_bias": True},
}


def pair(kind: str, folder: Path) -> tuple[LoopedTransformer, Any]:
    stages: dict[str, Any] = {f"n_{stage}": n for stage, n in STAGES.items()}
    cfg = LoopedConfig(
        **SIZES, **stages, **KINDS[kind], eps=1e-5, dtype=torch.float64, device="cpu",
        default_prepend_bos=True, init_mode="fan_in",
    )  # fmt: skip
    model = LoopedTransformer.from_config(cfg, letters(folder))
    bridge = model.to_bridge()
    return model, bridge
