"""What every block of one forward pass needs besides the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_looped.model.config import LoopedConfig
from tl_looped.model.rotary import Rotation, rotation


@dataclass
class RunContext:
    """Positions, rotation and mask of a batch.

    Args:
        rotation: Rotary cosines and sines at the batch's positions.
        positions: Position of every token, counted from its row's first real token.
        attention_mask: True at real tokens; None if there is no padding.
        allowed: Which key each query may attend to; None means plain causal.
        no_key: Queries (of padding) that may attend to nothing; None if there are none.
    """

    rotation: Rotation
    positions: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"] | None
    allowed: Bool[Tensor, "batch 1 query key"] | None
    no_key: Bool[Tensor, "batch 1 query 1"] | None

    @classmethod
    def build(
        cls,
        cfg: LoopedConfig,
        batch: int,
        length: int,
        mask: Bool[Tensor, "batch pos"] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> RunContext:
        """Context of a batch of ``length`` tokens a row, padded where ``mask`` is False."""
        if mask is None or bool(mask.all()):
            positions = torch.arange(length, device=device)[None]
            return cls(rotation(cfg, positions, dtype), positions, None, None, None)
        # A pad token's own position is never read by a real token; 0 keeps it in range.
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        allowed = causal & mask[:, None, None, :]
        no_key = ~allowed.any(-1, keepdim=True)
        return cls(rotation(cfg, positions, dtype), positions, mask, allowed, no_key)

    def blocked(self, length: int) -> Bool[Tensor, "batch 1 query key"]:
        """Where attention is forbidden, as a mask to fill with -inf."""
        if self.allowed is not None:
            return ~self.allowed
        device = self.positions.device
        return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
