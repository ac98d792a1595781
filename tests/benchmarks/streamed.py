"""The model of the streaming benchmarks, and the forward pass that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_looped import LoopedConfig, LoopedTransformer

METRICS = ("signature", "successive", "fixed_point")


@dataclass(frozen=True)
class Wide:
    """(2, 4 x R, 2) without injection."""

    d_model: int
    pos: int

    def model(self, n_recurrences: int) -> LoopedTransformer:
        cfg = LoopedConfig(
            d_model=self.d_model,
            d_head=64,
            n_heads=self.d_model // 64,
            d_mlp=self.d_model * 11 // 4,
            n_ctx=512,
            d_vocab=1000,
            n_prelude=2,
            n_core=4,
            n_coda=2,
            n_recurrences=n_recurrences,
            init_mode="fan_in",
            device="cpu",
            default_prepend_bos=False,
        )
        return LoopedTransformer.from_config(cfg)

    def tokens(self) -> Tensor:
        return torch.randint(0, 1000, (1, self.pos), generator=torch.Generator().manual_seed(0))


WIDE = Wide(512, 128)


def explicit_forward(model: LoopedTransformer, tokens: Tensor) -> Any:
    """A run that computes every pattern: something looks at each, and does nothing."""

    def look(x: Tensor, hook: Any) -> None:
        pass

    with model.readers([(lambda name: name.endswith("hook_pattern"), look)]):
        return model(tokens)
