"""What the checks look at: one loaded checkpoint, and the texts or tokens it runs on."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from tl_looped.checkpoints import Checkpoint
from tl_looped.transformer import LoopedTransformer


@dataclass(frozen=True)
class Subject:
    """A checkpoint under examination.

    Args:
        checkpoint: Its files, opened and matched with an adapter.
        model: The model that was loaded of them, in fp32 unless the user asks for another dtype.
        texts: Bundled texts; None for a model without a tokenizer.
        tokens: Tokens of the first texts, equally long, or drawn with ``seed`` without a tokenizer.
        seed: Seed of the tokens that are drawn.
    """

    checkpoint: Checkpoint
    model: LoopedTransformer
    texts: tuple[str, ...] | None
    tokens: Int[Tensor, "batch pos"]
    seed: int = 0
