"""The components of a residual stream: who wrote, where in the loop, and how to sum them up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tl_looped.errors import InputError
from tl_looped.model.geometry import LayerLocation

GROUPINGS = ("recurrence", "layer", "effective_layer", "head")


@dataclass(frozen=True)
class Component:
    """One writer to the residual stream, or a group of them.

    Args:
        kind: ``"embed"``, ``"initial_state"``, ``"attn_out"``, ``"mlp_out"``, ``"head"``,
            ``"neuron"``, ``"bias"``, ``"remainder"``; of a group also ``"layer"`` or
            ``"recurrence"``.
        place: Effective layer; None for what no layer wrote.
        index: Number of the head or neuron.
        over_recurrences: A group: this layer, head or neuron in every recurrence.
    """

    kind: str
    place: LayerLocation | None = None
    index: int | None = None
    over_recurrences: bool = False

    @property
    def label(self) -> str:
        """``r3.l1.attn_out``, ``r3.l1h2``, ``prelude.0n17``, ``l1h2`` (all recurrences), ``r3``."""
        if self.place is None:
            return self.kind
        if self.kind == "recurrence":
            place = self.place
            return place.stage if place.recurrence is None else f"r{place.recurrence}"
        where = self.place.label
        if self.over_recurrences and self.place.stage == "core":
            where = f"l{self.place.layer}"
        if self.kind in ("head", "neuron"):
            return f"{where}{self.kind[0]}{self.index}"
        return where if self.kind == "layer" else f"{where}.{self.kind}"


def grouping(by: str | None) -> Callable[[Component], Component]:
    """The group that each component is summed into.

    Args:
        by: None keeps every component. ``"recurrence"``: one sum for each recurrence, the prelude
            and the coda. ``"layer"``: one for each layer that has weights of its own, over all
            recurrences. ``"effective_layer"``: one for each effective layer. ``"head"``: heads and
            neurons keep their number and are summed over the recurrences; sublayers likewise.

    Raises:
        InputError: any other value.
    """
    if by is None:
        return lambda component: component
    if by not in GROUPINGS:
        raise InputError(f"by must be one of {GROUPINGS} or None, got {by!r}")

    def group(component: Component) -> Component:
        place = component.place
        if place is None:
            return component
        if by == "recurrence":
            return Component("recurrence", place._replace(layer=-1))
        if by == "effective_layer":
            return Component("layer", place)
        anywhere = place if place.stage != "core" else place._replace(recurrence=-1)
        if by == "layer":
            return Component("layer", anywhere, over_recurrences=True)
        return replace(component, place=anywhere, over_recurrences=True)

    return group


class ComponentRows:
    """Which row of a stack each component or group of them has, in order of first appearance."""

    def __init__(self, group: Callable[[Component], Component]) -> None:
        self._group = group
        self._row: dict[Component, int] = {}

    def of(self, component: Component) -> int:
        """The component's row."""
        return self._row.setdefault(self._group(component), len(self._row))

    @property
    def groups(self) -> list[Component]:
        """The component or group of every row."""
        return list(self._row)

    def __len__(self) -> int:
        return len(self._row)
