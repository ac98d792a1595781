"""The state at the start of the loop and at its recurrences, and what is injected into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.checks import Seed, checked, number, whole
from tl_looped.errors import InputError
from tl_looped.interventions.selection import Recurrences, members
from tl_looped.metrics.inputs import at_least_fp32
from tl_looped.model.cells import injects, refuse_zeros_for_the_prompt
from tl_looped.model.config import InitialState
from tl_looped.model.context import LoopRun
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.model.initial_state import draw_initial_state
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.intervening import Changes, Intervention


@checked
@dataclass(frozen=True, eq=False)
class ReplaceInitialState(Intervention):
    """The loop starts from another state, as with ``initial_state=`` or ``state_seed=`` of a run.

    Args:
        state: ``"zeros"``; an integer, the seed of another random state; or a tensor
            ``[batch, pos, d_model]`` or ``[1, pos, d_model]``, for instance another prompt's fixed
            point (:func:`tl_looped.interventions.fixed_point`).

    Raises:
        InputError: ``"zeros"`` in a model without injection, whose prompt reaches the loop by the
            initial state alone; if a tensor does not fit the run, or a seed is given to a model
            whose initial state is not random, or the run has an ``initial_state=`` of its own.
    """

    state: str | Seed | Float[Tensor, "batch pos d_model"]

    def __post_init__(self) -> None:
        seed = type(self.state) is int
        if not (seed or isinstance(self.state, Tensor) or self.state == "zeros"):
            raise InputError(
                f"state must be a tensor [batch, pos, d_model], a seed (an integer) or 'zeros', "
                f"got {self.state!r}"
            )

    @property
    def across_rows(self) -> bool:
        """A state for each row belongs to that row."""
        return isinstance(self.state, Tensor) and self.state.shape[0] > 1

    def __repr__(self) -> str:
        shown = tuple(self.state.shape) if isinstance(self.state, Tensor) else self.state
        return f"ReplaceInitialState({shown!r})"

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Set the run's initial state, or its seed."""
        cfg, shape = model.cfg, (*run.context.positions.shape, model.cfg.d_model)
        if run.initial_state is not None:
            raise InputError(
                f"{self}: the run has an initial state already, given to it or by an outer "
                "intervention; leave one out"
            )
        if not run.enters_loop:
            raise InputError(f"{self}: the run starts within the loop and has no initial state")
        if isinstance(self.state, Tensor):
            if self.state.ndim != 3 or self.state.shape[1:] != shape[1:]:
                raise InputError(
                    f"{self}: the state must be [batch, pos, d_model], here [batch, {shape[1]}, "
                    f"{shape[2]}]"
                )
            run.initial_state = self.state
        elif isinstance(self.state, str):
            refuse_zeros_for_the_prompt(cfg, str(self))
            run.initial_state = torch.zeros(1, *shape[1:])
        elif cfg.initial_state is not InitialState.RANDOM:
            raise InputError(
                f"{self}: {cfg.model_name} starts from its prelude's output, not from a random "
                "state: give a tensor or 'zeros'"
            )
        else:
            run.state_seed = self.state
        return Changes()


@checked
@dataclass(frozen=True)
class AddNoise(Intervention):
    """Noise on the state as it enters these recurrences.

    ``state_in + std * rms(state_in) * n``; ``n`` is a normal that is cut at three standard
    deviations, drawn from the seed, the recurrence and the position alone, as the random initial
    state is, so that batching and padding change nothing. The root mean square is each token's own.

    Args:
        std: Standard deviation, relative to the token's root mean square.
        recurrences: Where.
        seed: From 0 to 2**64 - 1.
        relative: False: ``std`` is the absolute standard deviation.

    Raises:
        InputError: for a ``std`` that is negative or not finite, or a seed out of range.
    """

    std: float
    recurrences: Recurrences = None
    seed: Seed = 0
    relative: bool = True

    def __post_init__(self) -> None:
        number(self.std, "std", 0)
        whole(self.seed, "seed", 0, 2**64 - 1)

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Add the noise at ``hook_state_in``."""

        def disturb(x: Tensor, hook: LoopedHookPoint) -> Tensor:
            assert hook.recurrence is not None
            # Each recurrence has a stream of its own, none of which is an initial state's.
            key = self.seed + (hook.recurrence + 1) * 2**64
            wide = at_least_fp32(x)
            noise = draw_initial_state(
                key, run.context.positions, x.shape[-1], float(self.std), wide.dtype
            ).to(x.device)
            if self.relative:
                noise = noise * wide.square().mean(-1, keepdim=True).sqrt()
            return (wide + noise).to(x.dtype)

        where = members(self.recurrences, model.loop.R, "recurrence", self)
        return Changes(edits=[(f"recurrence.{r}.hook_state_in", disturb) for r in where])


@checked
@dataclass(frozen=True)
class SwapStates(Intervention):
    """The rows of a batch exchange their states at the start of these recurrences.

    A row goes on with another prompt's state, while what is injected, and the positions, stay its
    own.

    Args:
        recurrences: Where.
        rows: Row i gets the state of row ``rows[i]``; in reverse order if None, which swaps a pair.

    Raises:
        InputError: if the batch has one row or rows of unequal length, or ``rows`` does not name
            one row for each.
    """

    recurrences: Recurrences
    rows: Sequence[int] | None = None

    @property
    def across_rows(self) -> bool:
        """It is about rows."""
        return True

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Exchange rows at ``hook_state_in``."""
        if run.context.positions.shape[0] > 1:  # one row of them serves rows of equal length
            raise InputError(f"{self}: the rows have padding; give prompts of equal length")

        def swap(x: Tensor, hook: LoopedHookPoint) -> Tensor:
            n = x.shape[0]
            rows = list(range(n))[::-1] if self.rows is None else list(self.rows)
            if n < 2 or len(rows) != n or not all(0 <= i < n for i in rows):
                raise InputError(
                    f"{self}: a batch of {n} rows needs at least two rows and one entry from 0 to "
                    f"{n - 1} for each"
                )
            return x.index_select(0, torch.tensor(rows).to(x.device))

        where = members(self.recurrences, model.loop.R, "recurrence", self)
        return Changes(edits=[(f"recurrence.{r}.hook_state_in", swap) for r in where])


@checked
@dataclass(frozen=True)
class ScaleInjection(Intervention):
    """What is injected is multiplied: ``injected = A [state, factor * e]``; 0 takes it out.

    Args:
        factor: Factor on the prelude's output ``e``, as the adapter sees it.
        recurrences: Where; ``slice(r, None)`` from r on.

    Raises:
        InputError: if the model injects nothing, or nothing at the one recurrence that is named (a
            first recurrence that skips the adapter); for a factor that is not finite.
    """

    factor: float
    recurrences: Recurrences = None

    def __post_init__(self) -> None:
        number(self.factor, "factor")

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Set the run's factors."""
        if not injects(model.cfg):
            raise InputError(f"{self}: {model.cfg.model_name} has no injection to scale")
        where = members(self.recurrences, model.loop.R, "recurrence", self)
        first, given = run.program.first, run.initial_state is not None
        if (
            first is not None
            and where == [first]
            and not model.cell.reads_e(True, given)
            and run.program.passes(first) == 1
        ):
            raise InputError(
                f"{self}: the first recurrence of {model.cfg.model_name} skips the adapter, so "
                "nothing is injected there"
            )
        for r in where:
            run.program = run.program.scaling(r, self.factor)
        return Changes()
