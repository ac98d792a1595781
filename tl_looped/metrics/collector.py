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

from tl_looped.metrics.catalogue import DERIVED, LOWEST_COSINE, METRICS, Metric, Reads
from tl_looped.metrics.states import lowest, state_distance
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
        references: Fixed points by what is read and the slot.
    """

    loop: LoopGeometry
    names: list[str]
    mask: Bool[Tensor, "prompt pos"] | None
    references: dict[tuple[Reads, Slot], Tensor] = field(default_factory=dict)
    values: dict[tuple[str, bool], Float[Tensor, "site prompt *head"]] = field(default_factory=dict)
    _previous: dict[tuple[Reads, Slot], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bases = [DERIVED[name].base if name in DERIVED else name for name in self.names]
        self._metrics = [METRICS[name] for name in dict.fromkeys(bases) if name in METRICS]

    @property
    def needs_reference(self) -> set[Reads]:
        """What the fixed-point metrics among the wanted ones read."""
        reads: set[Reads] = {m.reads for m in self._metrics if m.kind == "fixed_point"}
        return reads | ({"resid_post"} if LOWEST_COSINE in self.names else set())

    @property
    def needs_previous(self) -> set[Reads]:
        """What the successive metrics read."""
        return {m.reads for m in self._metrics if m.kind == "successive"}

    @property
    def reads(self) -> set[Reads]:
        """What any metric reads."""
        return {m.reads for m in self._metrics} | self.needs_reference

    def see(self, site: Site, reads: Reads, x: Tensor) -> None:
        """Metrics of a layer, and of its step from the previous recurrence."""
        for metric in self._of("layer", reads):
            self._keep(metric.name, site, metric.compute(x, self.mask))
        if site.slot is None or reads not in self.needs_previous:
            return
        previous = self._previous.get((reads, site.slot))
        self._previous[reads, site.slot] = x
        if previous is not None:
            for metric in self._of("successive", reads):
                self._keep(metric.name, site, metric.compute(previous, x, self.mask))

    def compare(self, site: Site, reads: Reads, x: Tensor) -> None:
        """Metrics of a layer and its fixed point; the references must be there."""
        if site.slot is None:
            return
        for metric in self._of("fixed_point", reads):
            reference = self.references[reads, site.slot]
            self._keep(metric.name, site, metric.compute(reference, x, self.mask))
        if reads == "resid_post" and site.slot == 0 and LOWEST_COSINE in self.names:
            points = [self.references[reads, layer] for layer in range(self.loop.k)]
            each = [state_distance(x, point, "cosine", self.mask) for point in points]
            value = lowest(torch.stack(each))
            assert site.recurrence is not None
            self._keep(LOWEST_COSINE, Site(site.recurrence, STATE_OUT, site.recurrence), value)

    def _of(self, kind: str, reads: Reads) -> list[Metric]:
        return [m for m in self._metrics if m.kind == kind and m.reads == reads]

    def _keep(self, name: str, site: Site, value: Float[Tensor, "prompt *head"]) -> None:
        out = site.slot == STATE_OUT
        rows = self.loop.R if out else self.loop.n_layers
        kept = self.values.get((name, out))
        if kept is None:
            kept = self.values[name, out] = value.new_full((rows, *value.shape), math.nan)
        kept[site.row] = value
