"""What a training step is: the rows it reads, and the loss of the model at that step."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from tl_looped._compat import Module
from tl_looped.training.losses import training_loss
from tl_looped.training.recurrences import state_seed
from tl_looped.training.spec import TrainSpec
from tl_looped.transformer import LoopedTransformer


class RowsInOrder(Dataset[dict[str, Tensor]]):
    """The rows of a whole run, one after the other: epochs of seeded permutations, joined.

    Args:
        rows: All rows.
        n: How many the run reads.
        seed: Seed of the permutations.
    """

    def __init__(self, rows: Int[Tensor, "row length"], n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        epochs = [torch.randperm(len(rows), generator=generator) for _ in range(-(-n // len(rows)))]
        self.rows, self.order = rows, torch.cat(epochs)[:n]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.rows[self.order[index]]}


class Objective(Module):
    """A model and its loss as the module that the Trainer calls (and wraps, on many devices)."""

    def __init__(self, model: LoopedTransformer, spec: TrainSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec
        self.sampler = spec.sampler_of(model.cfg)
        self.step = 0

    def note_training(self) -> None:
        """From the first step on the model is one that was trained as a loop, and says so."""
        self.model.cfg.trained_recurrences = self.sampler.stated

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> dict[str, Float[Tensor, ""]]:
        """The loss of the current step."""
        spec, step = self.spec, self.step
        now = self.sampler.at(spec.seed, step)
        with self.model.turn, self.model.with_recurrences(now):
            seed = state_seed(spec.seed, step)
            loss = training_loss(self.model, tokens, spec.loss, seed, spec.backprop_last)
        return {"loss": loss}
