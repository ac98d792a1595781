"""From activations, one at a time in the order of the forward pass, to a labelled result.

The collector holds at most the newest state and pattern of each core layer, and the reference ones;
what it has computed lies in arrays of one number a prompt or head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_looped.errors import MissingActivationError
from tl_looped.metrics.catalogue import (
    DERIVED,
    FAMILIES,
    LOWEST_COSINE,
    Kind,
    Prepared,
    Reads,
    prepare,
)
from tl_looped.metrics.states import Sized, distances, lowest
from tl_looped.model.geometry import LoopGeometry

# A layer of the core, or what the loop norm makes of the last one.
Slot = int | str
STATE_OUT = "state_out"


class Site(NamedTuple):
    """Where an activation stands.

    Args:
        row: Effective layer; the recurrence of a ``state_out``.
        slot: Core layer, ``"state_out"``, or None outside the loop.
        recurrence: None outside the loop.
    """

    row: int
    slot: Slot | None
    recurrence: int | None

    @classmethod
    def of_layer(cls, loop: LoopGeometry, i: int) -> Site:
        """The site of effective layer ``i``."""
        place = loop.locate(i)
        return cls(i, None if place.recurrence is None else place.layer, place.recurrence)


@dataclass
class Collector:
    """Computes metrics of one batch as its activations come by.

    Args:
        loop: Geometry of the run.
        names: Metrics, as ``catalogue.select`` gives them.
        mask: ``[prompt, pos]``, zero at padding.
    """

    loop: LoopGeometry
    names: list[str]
    mask: Bool[Tensor, "prompt pos"] | None
    values: dict[tuple[str, bool], Float[Tensor, "site prompt *head"]] = field(default_factory=dict)
    _references: dict[tuple[Reads, Slot], Prepared] = field(default_factory=dict)
    _previous: dict[tuple[Reads, Slot], Prepared] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._computed = {DERIVED[name].base if name in DERIVED else name for name in self.names}
        self._families = [f for f in FAMILIES if self._computed & f.outputs.keys()]

    @property
    def needs_reference(self) -> set[Reads]:
        """What the fixed-point metrics among the wanted ones read."""
        reads: set[Reads] = {f.reads for f in self._families if f.kind == "fixed_point"}
        return reads | ({"resid_post"} if LOWEST_COSINE in self.names else set())

    @property
    def needs_previous(self) -> set[Reads]:
        """What the successive metrics read."""
        return {f.reads for f in self._families if f.kind == "successive"}

    @property
    def reads(self) -> set[Reads]:
        """What any metric reads."""
        return {f.reads for f in self._families} | self.needs_reference

    def refer(self, slot: Slot, reads: Reads, x: Tensor) -> None:
        """Take an activation for the fixed point of a slot."""
        self._references[reads, slot] = prepare(reads, x, self.mask)

    def see(self, site: Site, reads: Reads, x: Tensor, compare: bool) -> None:
        """Metrics of a layer, and of its step from the previous recurrence.

        Args:
            site: Where it stands.
            reads: What it is.
            x: The activation.
            compare: Compare with the fixed point too; the references must be there.
        """
        prepared = prepare(reads, x, self.mask)
        self._compute("layer", site, reads, prepared)
        if site.slot is None:
            return
        if reads in self.needs_previous:
            previous = self._previous.get((reads, site.slot))
            self._previous[reads, site.slot] = prepared
            if previous is not None:
                self._compute("successive", site, reads, previous, prepared)
            elif site.recurrence == 0 and site.slot in (0, STATE_OUT):
                # Only to know its shape: with one recurrence there is nothing but NaN.
                self._compute("successive", site, reads, prepared, prepared, undefined=True)
        if compare:
            self._compare(site, site.slot, reads, prepared)

    def compare(self, site: Site, reads: Reads, x: Tensor) -> None:
        """Compare an activation of the core with its fixed point."""
        assert site.slot is not None
        self._compare(site, site.slot, reads, prepare(reads, x, self.mask))

    def _compare(self, site: Site, slot: Slot, reads: Reads, x: Prepared) -> None:
        if reads not in self.needs_reference:
            return
        if (reads, slot) not in self._references:
            raise MissingActivationError(
                f"reference: the run whose last recurrence is taken for the fixed point has no "
                f"{reads!r} of core layer {slot!r}"
            )
        self._compute("fixed_point", site, reads, self._references[reads, slot], x)
        if reads == "resid_post" and slot == 0 and LOWEST_COSINE in self.names:
            each = []
            for layer in range(self.loop.k):
                point = self._references[reads, layer]
                assert isinstance(x, Sized)
                assert isinstance(point, Sized)
                each.append(distances(x, point, ("cosine",))["cosine"])
            assert site.recurrence is not None
            of_recurrence = Site(site.recurrence, STATE_OUT, site.recurrence)
            self._keep(LOWEST_COSINE, of_recurrence, lowest(torch.stack(each)))

    def _compute(
        self,
        kind: Kind,
        site: Site,
        reads: Reads,
        *activations: Prepared,
        undefined: bool = False,
    ) -> None:
        for family in self._families:
            if family.kind == kind and family.reads == reads:
                for name, value in family.compute(*activations).items():
                    if name in self._computed:
                        value = torch.full_like(value, math.nan) if undefined else value
                        self._keep(name, site, value)

    def _keep(self, name: str, site: Site, value: Float[Tensor, "prompt *head"]) -> None:
        out = site.slot == STATE_OUT
        rows = self.loop.R if out else self.loop.n_layers
        kept = self.values.get((name, out))
        if kept is None:
            kept = self.values[name, out] = value.new_full((rows, *value.shape), math.nan)
        kept[site.row] = value
