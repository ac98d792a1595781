"""Loop geometry: effective layers and (recurrence, layer) pairs.

A looped model with p prelude, k core and c coda layers and R recurrences is read as an ordinary
transformer of ``p + k * R + c`` effective layers. This module is the one place that converts
between the two ways of counting. Everything is 0-based; negative numbers count from the end, as in
Python and TransformerLens.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from tl_looped.errors import LayerIndexError

LayerLike: TypeAlias = int | tuple[int, int]
"""An effective layer ``i``, or ``(recurrence, layer)`` in the core."""


class LayerLocation(NamedTuple):
    """Where an effective layer stands: ``recurrence`` is None outside the core."""

    stage: str
    recurrence: int | None
    layer: int

    @property
    def label(self) -> str:
        """Short name for plots and tables: ``prelude.0``, ``r3.l1`` or ``coda.0``."""
        if self.recurrence is None:
            return f"{self.stage}.{self.layer}"
        return f"r{self.recurrence}.l{self.layer}"


@dataclass(frozen=True)
class LoopGeometry:
    """The shape (p, k, c) of a looped model and its number of recurrences R.

    Args:
        p: Prelude layers.
        k: Core layers, those of one recurrence.
        c: Coda layers.
        R: Recurrences.
    """

    p: int
    k: int
    c: int
    R: int

    @property
    def n_layers(self) -> int:
        """Number of effective layers, ``p + k * R + c``."""
        return self.p + self.k * self.R + self.c

    def index(self, r: int, l: int) -> int:  # noqa: E741 - the paper's letters
        """Effective layer of core layer ``l`` in recurrence ``r``.

        Raises:
            LayerIndexError: if ``r`` or ``l`` is out of range; the message gives the range.
        """
        r = self._check("recurrence", r, self.R)
        l = self._check("core layer", l, self.k)  # noqa: E741
        return self.p + r * self.k + l

    def prelude_index(self, l: int) -> int:  # noqa: E741
        """Effective layer of prelude layer ``l``."""
        return self._check("prelude layer", l, self.p)

    def coda_index(self, l: int) -> int:  # noqa: E741
        """Effective layer of coda layer ``l``."""
        return self.p + self.k * self.R + self._check("coda layer", l, self.c)

    def locate(self, i: int) -> LayerLocation:
        """Stage, recurrence and layer in the stage of effective layer ``i``.

        Raises:
            LayerIndexError: if ``i`` is out of range.
        """
        i = self._check("effective layer", i, self.n_layers)
        if i < self.p:
            return LayerLocation("prelude", None, i)
        if i < self.p + self.k * self.R:
            return LayerLocation("core", (i - self.p) // self.k, (i - self.p) % self.k)
        return LayerLocation("coda", None, i - self.p - self.k * self.R)

    def resolve(self, layer: LayerLike) -> int:
        """Effective layer of an effective layer or a ``(recurrence, layer)`` pair."""
        if isinstance(layer, (tuple, list)):
            if len(layer) != 2:
                raise LayerIndexError(f"a layer is an int or (recurrence, layer), got {layer!r}")
            return self.index(layer[0], layer[1])
        return self._check("effective layer", layer, self.n_layers)

    def resolve_or_end(self, layer: LayerLike) -> int:
        """The same, or ``n_layers`` for the end of them all."""
        return (
            self.n_layers
            if (isinstance(layer, int) and layer == self.n_layers)
            else self.resolve(layer)
        )

    def labels(self) -> list[str]:
        """Label of every effective layer, in order."""
        return [self.locate(i).label for i in range(self.n_layers)]

    def with_recurrences(self, R: int) -> LoopGeometry:
        """The same shape with another number of recurrences."""
        return replace(self, R=R)

    def __str__(self) -> str:
        return f"({self.p}, {self.k} x {self.R}, {self.c})"

    def _check(self, what: str, value: int, size: int) -> int:
        try:
            value = operator.index(value)  # numpy's integers too
        except TypeError:
            raise LayerIndexError(f"{what} must be an integer, got {value!r}") from None
        if not -size <= value < size:
            valid = f"0..{size - 1}" if size else "none"
            raise LayerIndexError(
                f"{what} {value} is out of range: valid are {valid} (shape {self}, "
                f"{self.n_layers} effective layers). set_recurrences changes R."
            )
        return value % size
