"""Skipping and repeating whole recurrences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tl_looped.checks import checked, whole
from tl_looped.errors import InputError
from tl_looped.interventions.selection import Recurrences, members, one_member
from tl_looped.model import limits
from tl_looped.model.context import LoopRun
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.intervening import Changes, Intervention


@checked
@dataclass(frozen=True)
class SkipRecurrences(Intervention):
    """The state passes by these recurrences unchanged: ``state_out[r] = state_in[r]``.

    Neither their injection nor their loop norm acts on it. With tied weights, a run of R
    recurrences without one of them is a run of R - 1 (but for edits at other recurrences). Where a
    run's first recurrence skips the adapter, it is the first that is left which does.

    Args:
        recurrences: Which.

    Raises:
        InputError: in a run that starts within one of them (``start_at_layer``).
    """

    recurrences: Recurrences

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """The state that enters is the one that leaves."""
        changes, entered = Changes(), dict[int, Tensor]()

        def keep(x: Tensor, hook: LoopedHookPoint) -> None:
            entered[_recurrence(hook)] = x

        def bring(x: Tensor, hook: LoopedHookPoint) -> Tensor:
            if _recurrence(hook) not in entered:
                raise InputError(
                    f"{self}: the run starts within recurrence {hook.recurrence}, or behind it"
                )
            return entered.pop(_recurrence(hook)).to(x)

        for r in members(self.recurrences, model.loop.R, "recurrence", self):
            run.program = run.program.passing_by(r)
            changes.readers.append((f"recurrence.{r}.hook_state_in", keep))
            changes.edits.append((f"recurrence.{r}.hook_state_out", bring))
        return changes


@checked
@dataclass(frozen=True)
class RepeatRecurrence(Intervention):
    """A recurrence is run several times in place: the same hooks, edits and weights again.

    With tied weights, a run of R recurrences that repeats one of them n times is one of R + n (but
    for edits). Hooks of the recurrence fire in every pass, and a cache holds the last one. A
    repetition of recurrence 0 goes through the adapter, also where the first pass does not.

    Args:
        recurrence: Which.
        times: How many more passes.

    Raises:
        InputError: if ``times`` is below one; or in a run with a key-value cache, which has one
            slot a recurrence (``use_past_kv_cache=False`` in ``generate``).
    """

    recurrence: int
    times: int = 1

    def __post_init__(self) -> None:
        whole(self.times, "times", 1, limits.most_layers)

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """More passes at the end of the recurrence."""
        if run.context.kv is not None:
            raise InputError(
                f"{self} cannot run with a key-value cache, which has one slot a recurrence: pass "
                "use_past_kv_cache=False to generate, or leave past_kv_cache out"
            )
        r = one_member(self.recurrence, model.loop.R, "recurrence", self)
        run.program = run.program.repeating(r, self.times)
        return Changes()


def _recurrence(hook: LoopedHookPoint) -> int:
    assert hook.recurrence is not None
    return hook.recurrence
