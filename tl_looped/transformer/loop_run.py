"""What one forward pass carries besides the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from tl_looped.model.context import RunContext

Stream = Float[Tensor, "batch pos d_model"]


@dataclass
class LoopRun:
    """What one forward pass carries besides the residual stream.

    Args:
        context: Positions, rotation and mask.
        initial_state: The state that recurrence 0 starts from; None draws or derives it.
        state_seed: Seed of a random initial state.
        prelude_output: ``e``, what is injected; set when the loop is entered.
        gate: Gate logits of the newest recurrence, in models with a gate.
        repeats: How many times more a recurrence is run; none where it is missing.
        skipped: Recurrences that the state passes by.
        injection_factors: Factor on ``e`` where a recurrence injects it; one where it is missing.
        enters_loop: Whether the run passes the start of the loop.
        trains_gate: Whether the gate keeps a graph where its state has none (truncation).
        borrowed: Effective layers that run with another layer's weights.
    """

    context: RunContext
    initial_state: Stream | None
    state_seed: int
    prelude_output: Stream | None = None
    gate: Float[Tensor, "batch pos 1"] | None = None
    repeats: dict[int, int] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)
    injection_factors: dict[int, float] = field(default_factory=dict)
    enters_loop: bool = True
    trains_gate: bool = False
    borrowed: set[int] = field(default_factory=set)

    @property
    def first(self) -> int:
        """The first recurrence that acts on the state."""
        return next(r for r in range(len(self.skipped) + 1) if r not in self.skipped)
