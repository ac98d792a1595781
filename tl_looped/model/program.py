"""What a looped model does, said once: a run is a list of steps.

    embed, layer 0 .. p-1, enter the loop,
    [read, layer 0 .. k-1, write, gate] for each of R recurrences,
    leave the loop, layer 0 .. c-1, final norm, unembed

The list is a function of the shape and the number of recurrences. It holds no weight, no hook point
and no activation. Whatever has to know the order reads it here: a forward pass runs it
(:mod:`tl_looped.model.running`), a part of one (``start_at_layer``, ``stop_at_layer``, one
recurrence, what follows the loop) is a slice of it, hook names are enumerated from it, a
decomposition carries writes along it, a bridge makes modules of it. An intervention that changes
the loop itself edits a copy.

What ``read``, ``write`` and the others *do* is for the family's loop cell to say
(:mod:`tl_looped.model.cells`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cached_property, lru_cache
from typing import NamedTuple

from tl_looped.model.geometry import LoopGeometry


class Do(Enum):
    """Kinds of steps."""

    EMBED = auto()
    LAYER = auto()
    ENTER = auto()
    READ = auto()
    WRITE = auto()
    GATE = auto()
    LEAVE = auto()
    FINAL_NORM = auto()
    UNEMBED = auto()


class Op(NamedTuple):
    """One step.

    Args:
        do: What.
        layer: Effective index of a layer.
        recurrence: Number of the recurrence, of every step within one.
        first: Of a read: the first that acts on the state.
        factor: Of a read: what the prelude's output is multiplied by.
        joined: The last write ends in the final norm, one computation that is both (Ouro). Set on
            that write, on the final norm, which has nothing left to do, and on the unembedding,
            which then reads a state that has the norm's gain.
    """

    do: Do
    layer: int = -1
    recurrence: int = -1
    first: bool = False
    factor: float = 1.0
    joined: bool = False


@dataclass(frozen=True)
class Program:
    """The steps of a run.

    Args:
        loop: The shape, with the number of recurrences.
        ops: The steps in order.
        passed_by: Recurrences that leave the state as it was.
    """

    loop: LoopGeometry
    ops: tuple[Op, ...]
    passed_by: frozenset[int] = frozenset()

    @staticmethod
    @lru_cache(maxsize=64)
    def of(loop: LoopGeometry, has_gate: bool = False, ends_in_norm: bool = False) -> Program:
        """The steps of a model of this shape.

        Args:
            loop: The shape, with the number of recurrences.
            has_gate: An exit gate reads the state at the end of each recurrence.
            ends_in_norm: Every write ends in the final norm; without a coda, the last one is it.
        """
        return Program(loop, tuple(_steps(loop, has_gate, ends_in_norm)))

    # -- parts -----------------------------------------------------------------------------------

    def part(self, start: int | None, stop: int | None) -> tuple[Op, ...]:
        """The steps of a run that starts with what layer ``start`` receives, up to ``stop``.

        Everything between two layers belongs to what the second one receives, so that two parts
        compose to the whole.

        Args:
            start: An effective layer or ``n_layers``; the embedding, as it is, if None.
            stop: An effective layer, whose input is the result, or ``n_layers``, for the last
                layer's output; the logits if None.
        """
        first = 1 if start is None else self._place(start)
        return self.ops[first : None if stop is None else self._place(stop)]

    def before(self, layer: int) -> tuple[Op, ...]:
        """What happens between effective layer ``layer`` and what comes before it.

        For ``n_layers``: between the last layer and the final norm.
        """
        place = self._first(Do.FINAL_NORM) if layer == self.loop.n_layers else self._place(layer)
        first = place
        while self.ops[first - 1].do not in (Do.LAYER, Do.EMBED):
            first -= 1
        return self.ops[first:place]

    def recurrence(self, r: int) -> tuple[Op, ...]:
        """One recurrence, from a state to the next; with its repetitions, if there are any."""
        return self.ops[self._spans[r]]

    @property
    def up_to_loop(self) -> tuple[Op, ...]:
        """From the embedding, as it is, to the initial state."""
        return self.ops[1 : self._first(Do.ENTER) + 1]

    @property
    def after_loop(self) -> tuple[Op, ...]:
        """From the last state to the logits."""
        return self.ops[self._first(Do.LEAVE) :]

    def passes(self, r: int) -> int:
        """How often recurrence ``r`` runs."""
        return sum(op.do is Do.READ for op in self.recurrence(r))

    @property
    def first(self) -> int | None:
        """The first recurrence that acts on the state; None if there is none."""
        return next((op.recurrence for op in self.ops if op.first), None)

    def _first(self, do: Do) -> int:
        return next(place for place, op in enumerate(self.ops) if op.do is do)

    def _place(self, layer: int) -> int:
        """Where a layer stands; for ``n_layers``, right behind the last one."""
        for place, op in enumerate(self.ops):
            if op.layer == layer:
                return place
        last = [place for place, op in enumerate(self.ops) if op.do is Do.LAYER][-1:]
        return last[0] + 1 if last else self._first(Do.FINAL_NORM)

    @cached_property
    def _spans(self) -> dict[int, slice]:
        """Where each recurrence stands."""
        spans: dict[int, slice] = {}
        for place, op in enumerate(self.ops):
            if op.recurrence >= 0:
                start = spans[op.recurrence].start if op.recurrence in spans else place
                spans[op.recurrence] = slice(start, place + 1)
        return spans

    # -- edits -----------------------------------------------------------------------------------

    def repeating(self, r: int, times: int) -> Program:
        """Recurrence ``r`` runs ``times`` times more, in place; the last pass ends the loop."""
        span = self._spans[r]
        own = self.ops[span]
        reads = [place for place, op in enumerate(own) if op.do is Do.READ]
        last = tuple(op._replace(first=False) for op in own[reads[-1] :])
        passes = (*own, *last * (times - 1))
        inner = tuple(op._replace(joined=False) for op in passes)
        return self._with((*self.ops[: span.start], *inner, *last, *self.ops[span.stop :]))

    def passing_by(self, r: int) -> Program:
        """The state passes by recurrence ``r``, and another one is the first that acts on it."""
        passed = self.passed_by | {r}
        first = next((i for i in range(self.loop.R) if i not in passed), None)
        ops = list(self.ops)
        for place, op in enumerate(ops):
            if op.do is Do.READ:
                ops[place] = op._replace(first=op.recurrence == first)
                first = None if op.recurrence == first else first
        return replace(self, ops=tuple(ops), passed_by=passed)

    def scaling(self, r: int, factor: float) -> Program:
        """What recurrence ``r`` injects is multiplied by ``factor``."""
        return self._with(
            op._replace(factor=op.factor * factor)
            if op.do is Do.READ and op.recurrence == r
            else op
            for op in self.ops
        )

    def _with(self, ops: Iterable[Op]) -> Program:
        return replace(self, ops=tuple(ops))


def _steps(loop: LoopGeometry, has_gate: bool, ends_in_norm: bool) -> Iterator[Op]:
    joined = ends_in_norm and loop.c == 0 and loop.R > 0
    yield Op(Do.EMBED)
    yield from (Op(Do.LAYER, i) for i in range(loop.p))
    yield Op(Do.ENTER)
    for r in range(loop.R):
        yield Op(Do.READ, recurrence=r, first=r == 0)
        yield from (Op(Do.LAYER, loop.index(r, i), r) for i in range(loop.k))
        yield Op(Do.WRITE, recurrence=r, joined=joined and r == loop.R - 1)
        if has_gate:
            yield Op(Do.GATE, recurrence=r)
    yield Op(Do.LEAVE)
    yield from (Op(Do.LAYER, loop.coda_index(i)) for i in range(loop.c))
    yield Op(Do.FINAL_NORM, joined=joined)
    yield Op(Do.UNEMBED, joined=joined)
