"""What a training step minimises, as a value.

Every loss is a next-token cross entropy in nats over rows without padding, in fp32 or better
whatever the model's dtype, and under autocast. The states of all recurrences go through the model's
own coda, final norm and unembedding. With truncated backpropagation the loss keeps its value; the
states of earlier recurrences, after their loop norm, are constants to autograd, so a loss on one
of them still trains the coda, the head and the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.checks import checked, number
from tl_looped.errors import ConfigError
from tl_looped.model.context import LoopRun
from tl_looped.model.exit_gate import exit_distribution
from tl_looped.transformer import LoopedTransformer
from tl_looped.words import count


@dataclass(frozen=True)
class LastState:
    """Cross entropy of the last state's logits."""


@checked
@dataclass(frozen=True)
class EveryRecurrence:
    """Weighted mean of the cross entropies after every recurrence, ``sum_r w_r L_r / sum_r w_r``.

    Args:
        weights: One weight per recurrence, none below 0 and not all 0; equal weights if None.
            Needs a constant number of recurrences.
    """

    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        weights = tuple(number(w, "weights", 0, error=ConfigError) for w in self.weights)
        number(sum(weights), "sum of weights (not all 0)", above=0, error=ConfigError)
        object.__setattr__(self, "weights", weights)


@checked
@dataclass(frozen=True)
class ExitWeighted:
    """Ouro's first-stage loss (Zhu et al. 2025, arXiv 2510.25741, entropy-regularised objective).

    ``mean over tokens of [ sum_r p_r L_r - beta H(p) ]``, where ``p`` is the exit gate's
    distribution at the token, ``L_r`` its cross entropy after recurrence r and ``H`` the entropy
    in nats. Needs a model with an exit gate.

    Args:
        beta: Weight of the entropy, at least 0. The paper trains with 0.1 and later 0.05.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        number(self.beta, "beta", 0, error=ConfigError)


Loss = LastState | EveryRecurrence | ExitWeighted


def training_loss(
    model: LoopedTransformer,
    tokens: Int[Tensor, "batch pos"],
    loss: Loss,
    state_seed: int,
    backprop_last: int | None = None,
) -> Float[Tensor, ""]:
    """The loss of a batch at the model's current number of recurrences.

    Args:
        model: The model.
        tokens: Rows without padding, at least two tokens each.
        loss: What is minimised.
        state_seed: Seed of the random initial state.
        backprop_last: See :meth:`LoopedTransformer.unroll`; all recurrences if None.

    Raises:
        ConfigError: if the loss does not fit the model or its recurrences.
    """
    x, run = model.start_run(tokens, state_seed)
    if isinstance(loss, LastState):
        for last in model.unroll(x, run, backprop_last):
            state = last
        return _cross_entropy(model, state, run, tokens).mean()
    if isinstance(loss, ExitWeighted) and not model.cfg.exit_gate:
        raise ConfigError("ExitWeighted needs a model with an exit gate (exit_gate=True)")
    losses, gates = [], []
    for state in model.unroll(x, run, backprop_last):
        gates.append(run.gate)
        losses.append(_cross_entropy(model, state, run, tokens))
    by_recurrence = torch.stack(losses, -1)
    if isinstance(loss, EveryRecurrence):
        # No dot product: autocast would round it to half precision.
        return (by_recurrence.mean((0, 1)) * _normalised(loss, by_recurrence)).sum()
    gate = torch.cat([g for g in gates if g is not None], -1)[:, :-1]
    return exit_weighted(by_recurrence, gate, loss.beta)


def exit_weighted(
    losses: Float[Tensor, "batch pos recurrence"],
    gate_logits: Float[Tensor, "batch pos recurrence"],
    beta: float,
) -> Float[Tensor, ""]:
    """See :class:`ExitWeighted`; ``0 ln 0`` is 0, also in its gradient."""
    p = exit_distribution(gate_logits.to(losses.dtype))
    # The product rule would meet 0 * inf at p = 0.
    tiny = torch.finfo(p.dtype).tiny
    entropy = -(p * p.clamp_min(tiny).log()).sum(-1)
    return ((p * losses).sum(-1) - beta * entropy).mean()


def _cross_entropy(
    model: LoopedTransformer, state: Tensor, run: LoopRun, tokens: Tensor
) -> Float[Tensor, "batch predicted"]:
    """Loss of every next token, ``pos - 1`` of them per row."""
    per_token: Tensor = model.loss_fn(model.read_out(state, run), tokens, per_token=True)
    return per_token


def _normalised(loss: EveryRecurrence, losses: Tensor) -> Float[Tensor, " recurrence"]:
    n = losses.shape[-1]
    weights = (1.0,) * n if loss.weights is None else loss.weights
    if len(weights) != n:
        raise ConfigError(
            f"weights has {len(weights)} entries, and the step ran {count(n, 'recurrence')}"
        )
    return losses.new_tensor(weights) / sum(weights)
