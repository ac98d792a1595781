"""What a training run is: its hyperparameters as one frozen value that is kept beside its weights.

A run is determined by its spec, the model's configuration and the rows. Nothing else is drawn: the
order of rows is a function of ``data_seed``, initial states and recurrences are functions of
``seed`` and the step, and the first weights are ``LoopedConfig.seed``'s.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from tl_looped.errors import ConfigError
from tl_looped.model.config import Injection, LoopedConfig
from tl_looped.training.losses import EveryRecurrence, ExitWeighted, LastState, Loss
from tl_looped.training.recurrences import Constant, Recurrences

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainSpec:
    """Hyperparameters of a run.

    Args:
        steps: Optimiser steps.
        batch_size: Rows per step, over all devices.
        learning_rate: Peak of the schedule.
        warmup: Steps of linear warm-up.
        final_fraction: Learning rate at the end, as a fraction of the peak.
        weight_decay: The optimiser's, on matrices only.
        clip: Largest gradient norm.
        evaluate_every: Steps between held-out losses. Each of them is also a checkpoint.
        bf16: Run matrix products in bfloat16 (autocast).
        seed: Seed of the initial states and of sampled recurrences.
        data_seed: Seed of the order of rows; ``seed`` if None. Runs that share it see the same
            rows at the same steps.
        recurrences: Recurrences of each step; the model's own number if None.
        loss: What is minimised.
        backprop_last: Truncated backpropagation: only the last so many recurrences keep a graph
            (Huginn: 8). All of them if None.
        optimizer: ``"adamw"``, or ``"muon"``: Muon for the matrices of the blocks and the
            injection, AdamW for embeddings, gains, biases and the gate. Muon needs PyTorch 2.9.
        diverged_by: Training stops if the mean training loss between two evaluations lies this
            many nats above the lowest one before. Loss or gradient that is not finite stops it at
            once.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup: int = 200
    final_fraction: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluate_every: int = 200
    bf16: bool = True
    seed: int = 0
    data_seed: int | None = None
    recurrences: Recurrences | None = None
    loss: Loss = field(default_factory=LastState)
    backprop_last: int | None = None
    optimizer: str = "adamw"
    diverged_by: float = 2.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every", "backprop_last"):
            value = getattr(self, name)
            if name == "backprop_last" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("warmup", "seed", "data_seed"):
            value = getattr(self, name)
            if not (name == "data_seed" and value is None) and (
                type(value) is not int or not 0 <= value < 2**32
            ):
                raise ConfigError(f"{name} must be an integer from 0 to 2**32 - 1, got {value!r}")
        for name in ("learning_rate", "clip", "diverged_by"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0 and finite, got {getattr(self, name)!r}")
        for name, most in (("final_fraction", 1.0), ("weight_decay", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must be from 0 to {most}, got {getattr(self, name)!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then cosine decay."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        low = self.final_fraction
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))

    def recurrences_of(self, cfg: LoopedConfig) -> Recurrences:
        """The distribution of recurrences for a model."""
        return Constant(cfg.n_recurrences) if self.recurrences is None else self.recurrences

    def check(self, cfg: LoopedConfig) -> None:
        """Whether a model can be trained like this.

        Raises:
            ConfigError: a gate that is not there, weights of another number of recurrences, a
                truncation that would leave the prelude or the embedding without gradient.
        """
        recurrences = self.recurrences_of(cfg)
        if isinstance(self.loss, ExitWeighted) and not cfg.exit_gate:
            raise ConfigError("ExitWeighted needs a model with an exit gate (exit_gate=True)")
        weights = self.loss.weights if isinstance(self.loss, EveryRecurrence) else None
        if weights is not None and len(weights) != recurrences.most:
            raise ConfigError(
                f"EveryRecurrence has {len(weights)} weights, and recurrences={recurrences}: give "
                "one weight a recurrence and a constant number, or weights=None"
            )
        cut = self.backprop_last
        if cut is None or (recurrences.most is not None and recurrences.most <= cut):
            return
        if cfg.injection is Injection.NONE:
            raise ConfigError(
                f"backprop_last={cut} with {recurrences} cuts the only path from the loss to the "
                "prelude and the embedding: without an injection they are read by recurrence 0 "
                "alone and would not be trained. Use backprop_last=None or an injection."
            )

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values, losses and recurrences with their class's name."""
        out = asdict(self)
        for name in ("recurrences", "loss"):
            value = getattr(self, name)
            if value is not None:
                # Lists, as JSON gives them back.
                fields = {k: list(v) if isinstance(v, tuple) else v for k, v in out[name].items()}
                out[name] = {"kind": type(value).__name__, **fields}
        return out
