"""The fixed point that a prompt's loop reaches, and a loop held there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.checks import checked, whole
from tl_looped.errors import InputError
from tl_looped.interventions.selection import (
    RUN_ARGUMENTS,
    check_arguments,
    frozen_after,
    one_member,
)
from tl_looped.metrics.convergence import default_eps
from tl_looped.metrics.states import state_distance
from tl_looped.model.context import LoopRun
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.intervening import Changes, Intervention
from tl_looped.words import count


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """The cycle of states that a prompt's loop has reached.

    Args:
        state: What a recurrence starts from and returns to, ``hook_state_out``.
        layers: Stream behind each core layer, ``hook_resid_post``.
        n_recurrences: Of the run that reached it.
        step: The last relative step, ``||S(x) - x|| / ||S(x)||``, mean over real tokens, of the
            prompt where it is largest.
        state_seed: Of the run; None if its initial state was not drawn.
    """

    state: Float[Tensor, "batch pos d_model"]
    layers: Float[Tensor, "layer batch pos d_model"]
    n_recurrences: int
    step: float
    state_seed: int | None

    def __repr__(self) -> str:
        return (
            f"FixedPoint({tuple(self.state.shape)} after "
            f"{count(self.n_recurrences, 'recurrence')}, last relative step {self.step:.2g})"
        )


@checked
def fixed_point(
    model: LoopedTransformer,
    input: Any,
    n_recurrences: int = 128,
    tolerance: float | None = None,
    **kwargs: Any,
) -> FixedPoint:
    """Run a prompt until its loop stands still.

    Args:
        model: The model; interventions that are active act here too.
        input: Text or tokens, as for the model.
        n_recurrences: How long; at least 2.
        tolerance: Largest relative step that counts as standing still: 1e-4, and 1e-2 in half
            precision (the convergence verdict's) if None. ``math.inf`` takes whatever was reached.
        **kwargs: As for the model: ``state_seed``, ``initial_state``, ``attention_mask``,
            ``prepend_bos``, ``padding_side``.

    Raises:
        InputError: for other arguments; if the state still moves by more than ``tolerance``.
    """
    whole(n_recurrences, "n_recurrences", 2)
    check_arguments("fixed_point", kwargs, (*RUN_ARGUMENTS, "padding_side"))
    last, k = n_recurrences - 1, model.loop.k
    wanted = [*_places(last, k), f"recurrence.{last - 1}.hook_state_out"]
    with model.turn, model.with_recurrences(n_recurrences):
        _, cache = model.run_with_cache(input, names_filter=wanted, return_type=None, **kwargs)
    before, state = (cache[f"recurrence.{r}.hook_state_out"] for r in (last - 1, last))
    step = float(state_distance(before, state, "rel", cache.attention_mask).max())
    if tolerance is None:
        tolerance = default_eps(state.dtype)
    if not step <= tolerance:
        raise InputError(
            f"after {count(n_recurrences, 'recurrence')} the state still moves by {step:.2g} of "
            f"its norm in each, above the tolerance of {tolerance:.2g}: it is no fixed point. Run "
            "longer, or pass tolerance=math.inf to take it as it is"
        )
    layers = torch.stack([cache["resid_post", (last, layer)] for layer in range(k)])
    return FixedPoint(state, layers, n_recurrences, step, cache.state_seed)


@checked
@dataclass(frozen=True, eq=False)
class FreezeLoop(Intervention):
    """From one recurrence on, the loop stands still.

    Without ``at``, the recurrences behind ``recurrence`` return the state that it returned, and
    their layers what its layers returned: the logits are those of a run that ends there. With
    ``at``, ``recurrence`` and all behind it are held at a fixed point that was found before. At the
    model's own fixed point it changes nothing.

    Args:
        recurrence: The last one that is computed; with ``at``, the first that is held.
        at: The states to hold.

    Raises:
        LayerIndexError: if the run has no such recurrence, or nothing behind it to freeze.
        InputError: if ``at`` has another shape than the run; in a run that starts behind it.
    """

    recurrence: int
    at: FixedPoint | None = None

    @property
    def across_rows(self) -> bool:
        """With ``at``: its rows are those of the batch."""
        return self.at is not None

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Write the kept states into every later recurrence."""
        loop = model.loop
        changes, held = Changes(), self._held()
        if self.at is None:
            last = frozen_after(self.recurrence, loop.R, self)
            first = last + 1

            def keep(x: Tensor, hook: LoopedHookPoint) -> None:
                held[hook.layer_in_stage] = x

            changes.readers += [(name, keep) for name in _places(last, loop.k)]
        else:
            first = one_member(self.recurrence, loop.R, "recurrence", self)

        def hold(x: Tensor, hook: LoopedHookPoint) -> Tensor:
            if hook.layer_in_stage not in held:
                raise InputError(f"{self}: the run starts behind recurrence {self.recurrence}")
            kept = held[hook.layer_in_stage]
            if kept.shape != x.shape:
                raise InputError(
                    f"{self}: the fixed point is {tuple(kept.shape)}, the run {tuple(x.shape)}; "
                    "both are [batch, pos, d_model] of the same tokens"
                )
            return kept.to(x)

        for r in range(first, loop.R):
            changes.edits += [(name, hold) for name in _places(r, loop.k)]
        return changes

    def _held(self) -> dict[int | None, Tensor]:
        """States by core layer; None stands for the loop's own, ``hook_state_out``."""
        if self.at is None:
            return {}
        return dict(enumerate(self.at.layers)) | {None: self.at.state}


def _places(r: int, k: int) -> list[str]:
    layers = [f"recurrence.{r}.blocks.{layer}.hook_resid_post" for layer in range(k)]
    return [*layers, f"recurrence.{r}.hook_state_out"]
