"""Interventions: changes to every run of a model while a context lasts.

An :class:`Intervention` says what it changes once a run is known: its number of recurrences, its
positions, its seed. So the same intervention fits runs of any number of recurrences, reaches the
recurrences that a run grows by, and is refused *before* the run where it names one that does not
exist. Nothing stays on the model between runs: hooks are attached when a run begins and are gone
when it ends, also by an error, whatever ``reset_hooks`` does in between.

At one hook point the outermost intervention acts first, then the inner ones, then the hooks of
``run_with_hooks`` and ``add_hook``; a cache holds what they left.

Not under interventions: lenses, ``loop_map`` and training. The first never run the loop, the others
refuse while any is active.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.block import Block, BlockWeights
from tl_looped.model.context import LoopRun
from tl_looped.model.hook_points import LoopedHookPoint, Reader
from tl_looped.transformer.hooked_loop import HookName

if TYPE_CHECKING:
    from tl_looped.transformer.looped_transformer import LoopedTransformer

Edit: TypeAlias = Callable[[Tensor, LoopedHookPoint], Tensor | None]


@dataclass
class Changes:
    """What an intervention does to one run.

    Args:
        edits: ``(hook name, function)``; a function gets the activation and the hook point, and
            returns the new activation, or None if it edited in place or leaves it.
        readers: The same for functions that only look; they see what all hooks left.
        weights: Blocks that run with another layer's weights.
    """

    edits: list[tuple[HookName, Edit]] = field(default_factory=list)
    readers: list[tuple[HookName, Reader]] = field(default_factory=list)
    weights: list[tuple[Block, BlockWeights]] = field(default_factory=list)


class Intervention(ABC):
    """A change to every run of a model, for :meth:`LoopedTransformer.intervening`."""

    @property
    def across_rows(self) -> bool:
        """Whether what it does to a row of the batch depends on which row that is.

        Then prompts cannot be batched in another way: patching runs its cells one by one, and
        streaming metrics refuse.
        """
        return False

    @abstractmethod
    def changes(self, model: Any, run: LoopRun) -> Changes:
        """What to do to this run; called when it begins, its number of recurrences set.

        The run itself (its initial state, repeats, factors) is changed in place.

        Raises:
            LayerIndexError: if it names a recurrence or a layer that the run does not have.
            InputError: if it cannot be done to this run.
        """


@contextmanager
def intervening(
    model: LoopedTransformer, interventions: tuple[Intervention, ...]
) -> Iterator[LoopedTransformer]:
    """Change every run while the context lasts."""
    with model.turn.kept():
        yield from _with_interventions(model, interventions)


def _with_interventions(
    model: LoopedTransformer, interventions: tuple[Intervention, ...]
) -> Iterator[LoopedTransformer]:
    model.interventions += interventions
    try:
        yield model
    finally:
        model.turn.take_over()
        active = list(model.interventions)
        for given in reversed(interventions):
            # By identity, from the end: the same object may be active twice.
            del active[max(i for i, other in enumerate(active) if other is given)]
        model.interventions = tuple(active)


@contextmanager
def intervened(model: LoopedTransformer, run: LoopRun) -> Iterator[None]:
    """Apply the active interventions to one run."""
    if model._watch.is_intervened:
        raise InputError(
            f"a hook runs the model within a run that interventions change: "
            f"{list(model.interventions)} would act on both. Run the inner one beforehand"
        )
    with ExitStack() as stack:
        stack.callback(setattr, model._watch, "is_intervened", False)
        model._watch.is_intervened = True
        edits: list[tuple[LoopedHookPoint, Edit]] = []
        readers: list[tuple[HookName, Reader]] = []
        for intervention in model.interventions:
            changes = intervention.changes(model, run)
            # At once: a later intervention finds the layers in the order that this one left.
            for block, weights in changes.weights:
                if weights is not block.weights:
                    layer = block.hook_resid_pre.layer()  # type: ignore[no-untyped-call]
                    run.changed.add(f"blocks.{layer}.weights")
                stack.callback(block.borrow, block.weights)
                block.borrow(weights)
            edits += [
                (model.hook_dict[name], edit)
                for wanted, edit in changes.edits
                for name in model._selected(wanted)
            ]
            readers += changes.readers
        stack.enter_context(model._reading(readers))
        # Each is put before all that are there, so the first one last.
        for point, edit in reversed(edits):
            handle = point.register_forward_hook(_as_torch_hook(edit), prepend=True)
            stack.callback(handle.remove)
        yield


def refuse_interventions(model: LoopedTransformer, what: str) -> None:
    """Raise if any is active, for what they do not reach."""
    if model.interventions:
        raise InputError(
            f"{what} takes no interventions, and active are {list(model.interventions)}: leave "
            "their contexts first"
        )


def _as_torch_hook(edit: Edit) -> Callable[[Any, Any, Tensor], Tensor | None]:
    def hook(point: Any, _: Any, activation: Tensor) -> Tensor | None:
        changed = edit(activation, point)
        # What it returns may be kept elsewhere, and a later hook may edit in place.
        return changed if changed is None or changed is activation else changed.clone()

    return hook
