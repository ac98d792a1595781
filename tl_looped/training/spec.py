"""What a training run is: its hyperparameters as one frozen value, kept beside its weights.

A run is determined by its spec, the model's configuration and the rows. Nothing else is drawn: the
order of rows is a function of ``data_seed``, initial states and recurrences are functions of
``seed`` and the step, and the first weights are ``LoopedConfig.seed``'s.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from tl_looped.checks import checked, number, one_of, whole
from tl_looped.errors import ConfigError
from tl_looped.model.cells import injects
from tl_looped.model.config import InitialState, Injection, LoopedConfig
from tl_looped.training.losses import EveryRecurrence, ExitWeighted, LastState, Loss
from tl_looped.training.recurrences import Constant, RecurrenceSampler

OPTIMIZERS = ("adamw", "muon")


CONTEXT = 256
LEAST_VOCABULARY = 259
"""Every byte, and BOS, EOS and PAD."""
MOST_VOCABULARY = 2**20
_LEAST = {
    "prelude": 0,
    "core": 1,
    "coda": 0,
    "recurrences": 0,
    "d_model": 2,
    "heads": 1,
    "context": 2,
}


@checked
@dataclass(frozen=True)
class Shape:
    """Sizes of a small pre-norm model with tied embeddings and N(0, 0.02²) weights.

    Args:
        prelude: Layers before the loop.
        core: Layers of the loop.
        coda: Layers after the loop.
        recurrences: Recurrences, also of the evaluation where training samples them.
        injection: Linear injection of the prelude's output, and a random initial state of Huginn's
            scale.
        d_model: Dimensions, an even multiple of the heads.
        heads: Attention heads.
        context: Tokens per row.
        vocabulary: Tokens of the new tokenizer, 259 (every byte, BOS, EOS and PAD) to 1,048,576.

    Raises:
        ConfigError: for another vocabulary, and for sizes that no model has.
    """

    prelude: int = 2
    core: int = 4
    coda: int = 2
    recurrences: int = 4
    injection: bool = False
    d_model: int = 128
    heads: int = 4
    context: int = CONTEXT
    vocabulary: int = 2048

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            whole(getattr(self, name), name, least, error=ConfigError)
        whole(self.vocabulary, "vocabulary", LEAST_VOCABULARY, MOST_VOCABULARY, ConfigError)

    def config(self, d_vocab: int, seed: int, exit_gate: bool, device: str) -> LoopedConfig:
        """The configuration of a model of this shape.

        Raises:
            ConfigError: if the sizes do not fit together.
        """
        if self.d_model % (2 * self.heads):
            raise ConfigError(
                f"d_model ({self.d_model}) must be an even multiple of heads ({self.heads})"
            )
        return LoopedConfig(
            architecture="tl_looped",
            d_model=self.d_model,
            d_head=self.d_model // self.heads,
            n_heads=self.heads,
            d_mlp=8 * math.ceil(self.d_model / 3),
            n_ctx=self.context,
            d_vocab=d_vocab,
            n_prelude=self.prelude,
            n_core=self.core,
            n_coda=self.coda,
            n_recurrences=self.recurrences,
            injection=Injection.LINEAR if self.injection else Injection.NONE,
            initial_state=InitialState.RANDOM if self.injection else InitialState.PRELUDE,
            initial_state_std=math.sqrt(2 / 5) if self.injection else 0.0,
            exit_gate=exit_gate,
            tie_embeddings=True,
            initializer_range=0.02,
            default_prepend_bos=True,
            seed=seed,
            device=device,
        )


@checked
@dataclass(frozen=True)
class TrainSpec:
    """Hyperparameters of a run.

    Args:
        steps: Optimiser steps.
        batch_size: Rows per step, over all devices.
        learning_rate: Peak learning rate.
        warmup: Steps of linear warm-up.
        final_fraction: Learning rate at the end, as a fraction of the peak.
        weight_decay: The optimiser's, on matrices only.
        clip: Largest gradient norm.
        evaluate_every: Steps between checkpoints, each with a held-out loss.
        bf16: Matrix products in bfloat16 (autocast).
        seed: Seed of a new model's weights, of initial states and of sampled recurrences.
        data_seed: Seed of the order of rows; that of the run if left out. Runs that share it see
            the same rows at the same steps.
        recurrences: Recurrences of each step; the model's own number if None.
        loss: What is minimised.
        backprop_last: Recurrences at the end that are backpropagated through (Huginn: 8); all of
            them if left out.
        optimizer: ``"adamw"`` or ``"muon"``. Muon is for the matrices of the blocks and the
            injection, with AdamW for embeddings, gains, biases and the gate, and needs PyTorch 2.9.
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
    recurrences: RecurrenceSampler | None = None
    loss: Loss = field(default_factory=LastState)
    backprop_last: int | None = None
    optimizer: str = "adamw"
    diverged_by: float = 2.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every", "backprop_last"):
            self._check_whole(name, 1, None)
        for name in ("warmup", "seed", "data_seed"):
            self._check_whole(name, 0, 2**32 - 1)
        for name in ("learning_rate", "clip", "diverged_by"):
            number(getattr(self, name), name, above=0, error=ConfigError)
        number(self.final_fraction, "final_fraction", 0, 1, error=ConfigError)
        number(self.weight_decay, "weight_decay", 0, error=ConfigError)
        one_of(self.optimizer, "optimizer", OPTIMIZERS, ConfigError)

    def _check_whole(self, name: str, least: int, most: int | None) -> None:
        value = getattr(self, name)
        if value is not None or name not in ("backprop_last", "data_seed"):
            object.__setattr__(self, name, whole(value, name, least, most, ConfigError))

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then cosine decay."""
        whole(step, "step")
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        low = self.final_fraction
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))

    def sampler_of(self, cfg: LoopedConfig) -> RecurrenceSampler:
        """How many recurrences each step runs; the model's own number if the spec says nothing."""
        return Constant(cfg.n_recurrences) if self.recurrences is None else self.recurrences

    def check(self, cfg: LoopedConfig) -> None:
        """Whether a model can be trained like this.

        Raises:
            ConfigError: a gate that is not there, weights of another number of recurrences, a
                truncation that would leave the prelude or the embedding without gradient.
        """
        sampler = self.sampler_of(cfg)
        if isinstance(self.loss, ExitWeighted) and not cfg.exit_gate:
            raise ConfigError("ExitWeighted needs a model with an exit gate (exit_gate=True)")
        weights = self.loss.weights if isinstance(self.loss, EveryRecurrence) else None
        if weights is not None and len(weights) != sampler.most:
            raise ConfigError(
                f"EveryRecurrence has {len(weights)} weights, and recurrences={sampler}: give "
                "one weight per recurrence and a constant number, or weights=None"
            )
        cut = self.backprop_last
        if cut is None or (sampler.most is not None and sampler.most <= cut):
            return
        if not injects(cfg):
            raise ConfigError(
                f"backprop_last={cut} with {sampler} cuts the only path from the loss to the "
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
