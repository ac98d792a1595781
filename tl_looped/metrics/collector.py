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
    LOWEST_COSINE,
    METRIC_FAMILIES,
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


class SeenAt(NamedTuple):
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
    def of_layer(cls, loop: LoopGeometry, i: int) -> SeenAt:
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
        skip_first: Tokens at the beginning that metrics of states leave out.
    """

    loop: LoopGeometry
    names: list[str]
    mask: Bool[Tensor, "prompt pos"] | None
    skip_first: int = 0
    values: dict[tuple[str, bool], Float[Tensor, "site prompt *head"]] = field(default_factory=dict)
    _references: dict[tuple[Reads, Slot], Prepared] = field(default_factory=dict)
    _previous: dict[tuple[Reads, Slot], list[Prepared]] = field(default_factory=dict)
    _before: Prepared | None = None

    def __post_init__(self) -> None:
        self._computed = {DERIVED[name].base if name in DERIVED else name for name in self.names}
        self._families = [f for f in METRIC_FAMILIES if self._computed & f.outputs.keys()]

    @property
    def needs_reference(self) -> set[Reads]:
        """What the fixed-point metrics among the wanted ones read."""
        reads: set[Reads] = {f.reads for f in self._families if f.kind == "fixed_point"}
        return reads | ({"resid_post"} if LOWEST_COSINE in self.names else set())

    def _n_previous(self, reads: Reads) -> int:
        """How many earlier recurrences of an activation the metrics look back to."""
        kinds = {f.kind for f in self._families if f.reads == reads}
        return 2 if "turn" in kinds else 1 if "successive" in kinds else 0

    @property
    def reads(self) -> set[Reads]:
        """What any metric reads."""
        return {f.reads for f in self._families} | self.needs_reference

    def refer(self, slot: Slot, reads: Reads, x: Tensor) -> None:
        """Take an activation for the fixed point of a slot."""
        self._references[reads, slot] = prepare(reads, x, self.mask, self.skip_first)

    def forget(self, slot: Slot, reads: Reads) -> None:
        """Let go of a slot's activation and its fixed point: nothing compares with them any more.

        Of a core that runs once, which has a slot for every layer, they would be the whole run.
        """
        self._references.pop((reads, slot), None)
        self._previous.pop((reads, slot), None)

    def see(self, site: SeenAt, reads: Reads, x: Tensor, compare: bool) -> None:
        """Metrics of a layer, and of its step from the previous recurrence.

        Args:
            site: Where it stands.
            reads: What it is.
            x: The activation.
            compare: Compare with the fixed point too; the references must be there.
        """
        prepared = prepare(reads, x, self.mask, self.skip_first)
        self._compute("layer", site, reads, prepared)
        if reads == "resid_post" and site.slot != STATE_OUT:
            self._compute_adjacent(site, prepared)
        if site.slot is None:
            return
        self._look_back(site, site.slot, reads, prepared)
        if compare:
            self._compare(site, site.slot, reads, prepared)

    def _compute_adjacent(self, site: SeenAt, x: Prepared) -> None:
        before, self._before = self._before, x
        if not any(family.kind == "adjacent" for family in self._families):
            self._before = None
        elif before is None:
            self._compute("adjacent", site, "resid_post", x, x, undefined=True)
        else:
            self._compute("adjacent", site, "resid_post", before, x)

    def _look_back(self, site: SeenAt, slot: Slot, reads: Reads, x: Prepared) -> None:
        """Metrics of an activation and of the same at the one or two recurrences before."""
        n = self._n_previous(reads)
        if not n:
            return
        earlier = self._previous.setdefault((reads, slot), [])
        # What a run is too short for is NaN, of the shape that it would have.
        last, oldest = (earlier[-i] if len(earlier) >= i else None for i in (1, 2))
        self._compute(
            "successive", site, reads, x if last is None else last, x, undefined=last is None
        )
        turn = (x if oldest is None else oldest, x if last is None else last, x)
        self._compute("turn", site, reads, *turn, undefined=oldest is None)
        self._previous[reads, slot] = [*earlier, x][-n:]

    def compare(self, site: SeenAt, reads: Reads, x: Tensor) -> None:
        """Compare an activation of the core with its fixed point."""
        assert site.slot is not None
        self._compare(site, site.slot, reads, prepare(reads, x, self.mask, self.skip_first))

    def _compare(self, site: SeenAt, slot: Slot, reads: Reads, x: Prepared) -> None:
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
            of_recurrence = SeenAt(site.recurrence, STATE_OUT, site.recurrence)
            self._keep(LOWEST_COSINE, of_recurrence, lowest(torch.stack(each)))

    def _compute(
        self,
        kind: Kind,
        site: SeenAt,
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

    def _keep(self, name: str, site: SeenAt, value: Float[Tensor, " prompt *head"]) -> None:
        out = site.slot == STATE_OUT
        rows = self.loop.R if out else self.loop.n_layers
        kept = self.values.get((name, out))
        if kept is None:
            kept = self.values[name, out] = value.new_full((rows, *value.shape), math.nan)
        kept[site.row] = value
