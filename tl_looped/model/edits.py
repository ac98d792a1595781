"""What changed a run from outside: where hooks edited an activation, and what interventions did.

An edit is a change of values. A hook that only reads, that returns what it was given, or that
writes the values that are there already, is none. So values are compared, before the hooks of a
hook point and after them, which notices every way to edit: a returned tensor, a write in place, a
raw torch hook. Only points that have hooks compare, and only in a run whose cache is to know.

Limit: a hook that edits, in place, a tensor of another hook point is seen at neither of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tl_looped.model.geometry import LoopGeometry


@dataclass(frozen=True)
class Edits:
    """What changed a run.

    Args:
        names: Canonical names of the hook points whose activation was changed. A torch hook on a
            module counts at the hook point that it works like; ``blocks.{i}.attn.output`` and
            ``blocks.{i}.mlp.output`` for what these modules return, ``blocks.{i}.weights`` for a
            layer that ran with the weights of another.
        interventions: Those that were active.
    """

    names: frozenset[str] = frozenset()
    interventions: tuple[str, ...] = ()


class EditLog:
    """Collects the names of one run.

    Attributes:
        paused: While a hook runs the model: that run is not the one that is recorded.
        within: The hook point whose hooks run at present. A part of the model that they call (a
            block, a norm) leads through hook points whose turn it is not.
    """

    def __init__(self) -> None:
        self.paused = False
        self.within: Any = None
        self._names: set[str] = set()
        self._differs: dict[str, list[Tensor]] = {}

    @contextmanager
    def in_hooks_of(self, point: Any) -> Iterator[None]:
        """While the hooks of a hook point run; the outermost one if they call others."""
        outer = self.within
        self.within = point if outer is None else outer
        try:
            yield
        finally:
            self.within = outer

    def add(self, name: str) -> None:
        """Note an edit."""
        self._names.add(name)

    def compare(self, name: str | None, before: Tensor, after: Any) -> None:
        """Note an edit if two activations differ, NaN included."""
        if after is before or name is None or name in self._names:
            return
        if not isinstance(after, Tensor) or after.shape != before.shape:
            self._names.add(name)
        elif not before.is_meta:
            # Read at the end: to read it now would wait for the accelerator at every hook.
            differs = (before.detach() != after.detach().to(before.device)).any()
            self._differs.setdefault(name, []).append(differs)

    def names(self) -> frozenset[str]:
        """Where the run was edited."""
        found = {name for name, differ in self._differs.items() if any(map(bool, differ))}
        return frozenset(self._names | found)


class Watch:
    """What a model's hook points know of it and of the present run.

    Attributes:
        log: Where edits are noted; None if the run keeps no log.
        loop: Geometry of the present run, if that is not the model's own.
        own_loop: The model's own.
        is_intervened: Whether interventions change the present run.
        hooked: Hook points that have TransformerLens's hooks, or had them a while ago.
    """

    log: EditLog | None = None
    loop: LoopGeometry | None = None
    own_loop: LoopGeometry | None = None
    is_intervened = False

    def __init__(self) -> None:
        self.hooked: set[Any] = set()


UNWATCHED = Watch()
"""Of hook points that belong to no model."""


def watched_call(
    module: Any, call: Callable[..., Tensor], log: EditLog, names: tuple[str, str], inputs: Any
) -> Tensor:
    """A module's call that notes whether torch hooks changed what it is given or what it gives.

    Args:
        module: The module; its first argument and its result are tensors.
        call: Its call, hooks included.
        log: Where to.
        names: What an edit of the input, and of the output, is noted as.
        inputs: Positional arguments and those by keyword.
    """
    args, kwargs = inputs
    if not args:
        return call(**kwargs)
    given, forward = args[0].clone(), module.forward
    results: list[Tensor] = []

    def between(x: Tensor, *rest: Any, **others: Any) -> Any:
        result = forward(x, *rest, **others)
        if not log.paused and log.within is None:
            log.compare(names[0], given, x)
            results.append(result.clone())
        return result

    # Found before the method of the class, by torch's own way to call a module with hooks.
    module.__dict__["forward"] = between
    try:
        found = call(*args, **kwargs)
    finally:
        module.__dict__.pop("forward", None)
    for result in results:
        log.compare(names[1], result, found)
    return found
