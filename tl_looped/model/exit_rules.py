"""When a token may leave the loop.

A rule looks at a recurrence's state, and at what it keeps of earlier ones, and says for every token
whether it may leave. Rules are values without memory of their own; :class:`ExitTracker` keeps the
history of one run, lets each token leave once, and holds its state at that recurrence.

The rules are public ones: the exit gate of Ouro, the change of the state, of the predicted
distribution, of its entropy and of its argmax as in Huginn's code, and the acceleration of the
state as in Pappone et al. 2025. Choices the sources leave open: norms are over d_model and relative
to the new state; KL is from the new distribution to the previous one, in nats; distributions,
entropies and norms are computed in fp32 or better. ``patience`` asks for so many recurrences in a
row. A rule that compares needs as many recurrences as it compares; before that no token leaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.model.exit_gate import exit_distribution

_State = Float[Tensor, "batch pos d_model"]
Decision = Bool[Tensor, "batch pos"]


@dataclass
class LoopHistory:
    """What a rule may look at, the newest last.

    Args:
        states: The last three states, ``hook_state_out``.
        logits: The last two recurrences' logits, if the rule needs them.
        gates: Gate logits of every recurrence, if the model has a gate.
    """

    states: list[_State] = field(default_factory=list)
    logits: list[Float[Tensor, "batch pos d_vocab"]] = field(default_factory=list)
    gates: list[Float[Tensor, "batch pos"]] = field(default_factory=list)


@dataclass(frozen=True)
class ExitRule(ABC):
    """A rule that ``forward`` and ``generate`` take as ``exit_rule=``."""

    needs_logits: ClassVar[bool] = False
    needs_gate: ClassVar[bool] = False

    @abstractmethod
    def wants(self, history: LoopHistory) -> Decision:
        """Which tokens fulfil the rule at the newest recurrence."""

    @property
    def recurrences_in_a_row(self) -> int:
        """How often in a row the rule must be fulfilled."""
        return 1


@checked
@dataclass(frozen=True)
class _Threshold(ExitRule):
    """A quantity that must fall below a threshold, ``patience`` times in a row."""

    threshold: float
    patience: int = 1

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        if type(self.patience) is not int or self.patience < 1:
            raise InputError(f"patience must be an integer of at least 1, got {self.patience!r}")

    @property
    def recurrences_in_a_row(self) -> int:
        """``patience``."""
        return self.patience

    @abstractmethod
    def measure(self, history: LoopHistory) -> Float[Tensor, "batch pos"] | None:
        """The quantity; None while there is too little history."""

    def wants(self, history: LoopHistory) -> Decision:
        """Whether the quantity is below the threshold."""
        value = self.measure(history)
        if value is None:
            return _never(history)
        return value < self.threshold


@checked
@dataclass(frozen=True)
class GateExit(ExitRule):
    """Ouro's rule: leave when the cumulative exit probability reaches ``threshold``.

    Args:
        threshold: Cumulative probability.
        in_fp32: Compute in fp32. The reference uses the model's dtype; in bf16 a cumulative
            probability above about 0.998 rounds to 1, so that tokens leave at threshold 1.
    """

    threshold: float
    in_fp32: bool = False
    needs_gate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def wants(self, history: LoopHistory) -> Decision:
        """Whether the cumulative probability has reached the threshold."""
        gates = torch.stack(history.gates, -1)
        gates = gates.float() if self.in_fp32 else gates
        # A last column that takes what is left, as in the distribution, and is then left out.
        padded = torch.cat((gates, torch.zeros_like(gates[..., :1])), -1)
        return exit_distribution(padded).cumsum(-1)[..., -2] >= self.threshold


@checked
@dataclass(frozen=True)
class LatentDifference(_Threshold):
    """``|x_r - x_{r-1}| / |x_r|`` below the threshold."""

    threshold: float = 0.03

    def measure(self, history: LoopHistory) -> Float[Tensor, "batch pos"] | None:
        """The relative step."""
        if len(history.states) < 2:
            return None
        previous, state = _floats(history.states[-2:])
        return _norm(state - previous) / _norm(state)


@checked
@dataclass(frozen=True)
class Acceleration(_Threshold):
    """``|(x_r - x_{r-1}) - (x_{r-1} - x_{r-2})| / |x_r|`` below the threshold, twice in a row."""

    threshold: float = 0.03
    patience: int = 2

    def measure(self, history: LoopHistory) -> Float[Tensor, "batch pos"] | None:
        """The relative second difference."""
        if len(history.states) < 3:
            return None
        oldest, previous, state = _floats(history.states[-3:])
        return _norm(state - 2 * previous + oldest) / _norm(state)


@checked
@dataclass(frozen=True)
class KLDivergence(_Threshold):
    """``KL(p_r || p_{r-1})`` of the predicted distributions below the threshold, in nats."""

    threshold: float = 1e-3
    needs_logits: ClassVar[bool] = True

    def measure(self, history: LoopHistory) -> Float[Tensor, "batch pos"] | None:
        """The divergence."""
        if len(history.logits) < 2:
            return None
        previous, now = (x.log_softmax(-1) for x in _floats(history.logits[-2:]))
        return (now.exp() * (now - previous)).sum(-1)


@checked
@dataclass(frozen=True)
class EntropyDifference(_Threshold):
    """``|H(p_r) - H(p_{r-1})|`` of the predicted distributions below the threshold, in nats."""

    threshold: float = 1e-3
    needs_logits: ClassVar[bool] = True

    def measure(self, history: LoopHistory) -> Float[Tensor, "batch pos"] | None:
        """The change of the entropy."""
        if len(history.logits) < 2:
            return None
        logs = (x.log_softmax(-1) for x in _floats(history.logits[-2:]))
        previous, now = (-(x.exp() * x).sum(-1) for x in logs)
        return (now - previous).abs()


@checked
@dataclass(frozen=True)
class ArgmaxStability(ExitRule):
    """The most likely token stayed the same, ``patience`` times in a row."""

    patience: int = 5
    needs_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.patience) is not int or self.patience < 1:
            raise InputError(f"patience must be an integer of at least 1, got {self.patience!r}")

    @property
    def recurrences_in_a_row(self) -> int:
        """``patience``."""
        return self.patience

    def wants(self, history: LoopHistory) -> Decision:
        """Whether the most likely token is the previous one."""
        if len(history.logits) < 2:
            return _never(history)
        previous, now = (x.argmax(-1) for x in history.logits[-2:])
        return now == previous


@checked
@dataclass(frozen=True)
class ExitAt(ExitRule):
    """Leave after recurrence ``recurrence`` (0-based), whatever the state."""

    recurrence: int

    def __post_init__(self) -> None:
        if type(self.recurrence) is not int or self.recurrence < 0:
            raise InputError(
                f"recurrence must be an integer of at least 0, got {self.recurrence!r}"
            )

    @property
    def recurrences_in_a_row(self) -> int:
        """The wanted recurrence, counted from one."""
        return self.recurrence + 1

    def wants(self, history: LoopHistory) -> Decision:
        """Always; the count of recurrences does the rest."""
        return ~_never(history)


class ExitResult(NamedTuple):
    """What a run with an exit rule returns.

    Args:
        output: What the run would return without the rule.
        recurrence: The recurrence (0-based) after which each token left the loop; the last if the
            rule never applied. ``[batch, pos]``, of ``generate`` ``[batch, new]``; -1 at padding.
    """

    output: object
    recurrence: Int[Tensor, "batch pos"]


class ExitTracker:
    """Who has left the loop of one run, where, and with which state.

    Args:
        rule: The rule.
        last_only: Rows leave as a whole, by their last position, as in generation.
        real: False at padding, which leaves at once.
    """

    def __init__(
        self, rule: ExitRule, last_only: bool, real: Bool[Tensor, "batch pos"] | None
    ) -> None:
        self.rule, self.last_only, self.real = rule, last_only, real
        self.history = LoopHistory()
        self.state: _State | None = None
        self.steps: Int[Tensor, "batch pos"] | None = None
        self._streak: Int[Tensor, "batch pos"] | None = None

    @property
    def has_left(self) -> Decision:
        """Tokens that are out."""
        assert self.steps is not None
        return self.steps >= 0

    @property
    def all_left(self) -> bool:
        """Whether no real token is in the loop."""
        return bool((self.has_left if self.real is None else self.has_left | ~self.real).all())

    def update(
        self,
        r: int,
        is_last: bool,
        state: _State,
        logits: Callable[[], Tensor],
        gate: Float[Tensor, "batch pos 1"] | None,
    ) -> None:
        """Recurrence ``r`` is done.

        Args:
            r: Its number.
            is_last: Whoever is still in the loop leaves now.
            state: Its result.
            logits: Computes the logits that the state gives; called only if the rule needs them.
            gate: Gate logits, if the model has a gate.
        """
        history = self.history
        seen = state[:, -1:] if self.last_only else state
        history.states = [*history.states[-2:], seen]
        if self.rule.needs_logits and not is_last:
            history.logits = [*history.logits[-1:], logits()]
        if gate is not None:
            history.gates.append(gate[:, -seen.shape[1] :, 0])
        if self.steps is None:
            self.steps = torch.full(state.shape[:2], -1, device=state.device)
            self._streak = torch.zeros(seen.shape[:2], dtype=torch.long, device=state.device)
            self.state = state
        assert self._streak is not None
        if is_last:
            leaves = torch.ones_like(self.has_left)
        else:
            wants = self.rule.wants(history)
            self._streak = torch.where(wants, self._streak + 1, 0)
            leaves = self._streak >= self.rule.recurrences_in_a_row
        now = leaves & ~self.has_left
        self.steps = torch.where(now, r, self.steps)
        # Whoever is still inside goes on with the newest state.
        assert self.state is not None
        self.state = torch.where((now | ~self.has_left)[..., None], state, self.state)


def _check_threshold(threshold: Any) -> None:
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not number or not threshold >= 0:
        raise InputError(f"threshold must be a number of at least 0, got {threshold!r}")


def _never(history: LoopHistory) -> Decision:
    return torch.zeros_like(history.states[-1][..., 0], dtype=torch.bool)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm


def _floats(tensors: list[Tensor]) -> list[Tensor]:
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]
