"""Keys and values of past tokens, one slot for each effective layer.

Keys are stored rotated, as they were used; rotary positions are absolute, so a stored key stays
right. A slot belongs to (stage, recurrence, layer), like a block, so that a coda layer keeps its
slot while the number of recurrences changes.

A token that ran fewer recurrences than a later one asks for (because it left the loop early, or
because the number of recurrences changed between calls) is read at its last recurrence. That is
Huginn's public strategy "latest" for a looped layer. It needs no choice where all tokens ran alike.

``recurrence_slots`` keeps fewer slots than recurrences, to save memory: recurrence r uses slot
``r mod recurrence_slots``, and a later recurrence overwrites an earlier one of the same slot. 1
keeps only the last recurrence's keys and values (proposed for Ouro); larger numbers are Huginn's
public strategy "compress". While several tokens are read at once they see each other's own
recurrence, as without a cache; the sharing shows for tokens of earlier calls. It is an
approximation, and changes the logits.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.config import LoopedConfig
from tl_looped.model.geometry import LayerLocation

Keys = Float[Tensor, "batch pos n_kv_heads d_head"]
PastKeys = Float[Tensor, "batch key n_kv_heads d_head"]


class LoopedKeyValueCache:
    """Past keys and values for ``model(tokens, past_kv_cache=cache)``.

    Args:
        recurrence_slots: Slots of each core layer; None keeps one for every recurrence.

    Attributes:
        frozen: While set, runs read the cache and leave it as it is, so that many inputs can
            follow the same prefix.
        mask: ``[batch, pos]``, False at padding.
    """

    def __init__(self, recurrence_slots: int | None = None) -> None:
        if recurrence_slots is not None and (
            type(recurrence_slots) is not int or recurrence_slots < 1
        ):
            raise InputError(
                f"recurrence_slots must be an integer of at least 1, or None for one slot a "
                f"recurrence, got {recurrence_slots!r}"
            )
        self.recurrence_slots = recurrence_slots
        self.frozen = False
        self.mask: Bool[Tensor, "batch pos"] | None = None
        self.n_recurrences = 0
        self.entries: dict[LayerLocation, tuple[PastKeys, PastKeys]] = {}
        self._owner: weakref.ref[Any] | None = None
        self._made_with: dict[str, Any] = {}

    @classmethod
    def init_cache(
        cls, cfg: Any = None, device: Any = None, batch_size: int | None = None
    ) -> LoopedKeyValueCache:
        """An empty cache; TransformerLens's spelling. Shapes follow the first run."""
        return cls()

    def __deepcopy__(self, memo: Any) -> LoopedKeyValueCache:
        """A cache of its own, without the gradients' history, which cannot be copied."""
        new = LoopedKeyValueCache(self.recurrence_slots)
        new.frozen, new.n_recurrences = self.frozen, self.n_recurrences
        new._owner, new._made_with = self._owner, dict(self._made_with)
        new.mask = None if self.mask is None else self.mask.clone()
        new.entries = {
            slot: (keys.detach().clone(), values.detach().clone())
            for slot, (keys, values) in self.entries.items()
        }
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Pickles know the shape of the model, not which one it was."""
        return self.__dict__ | {"_owner": None}

    def own(self, model: Any, cfg: LoopedConfig) -> None:
        """Note whose keys and values these are, after a run has extended them."""
        if not self.frozen:
            self._owner, self._made_with = weakref.ref(model), _made_with(cfg)

    def check_owner(self, model: Any, cfg: LoopedConfig) -> None:
        """Raise if what is held was computed by another model, or in another dtype or place.

        Raises:
            InputError: naming what differs.
        """
        if not self.entries:
            return
        now = _made_with(cfg)
        if self._made_with and self._made_with != now:
            differs = {k: (v, now[k]) for k, v in self._made_with.items() if v != now[k]}
            told = ", ".join(f"{k} {was} and not {is_}" for k, (was, is_) in differs.items())
            raise InputError(
                f"past_kv_cache holds keys and values of a model with {told}: begin with "
                "past_kv_cache=LoopedKeyValueCache()"
            )
        if self._owner is not None and self._owner() is not model:
            raise InputError(
                "past_kv_cache holds keys and values that another model computed: begin with "
                "past_kv_cache=LoopedKeyValueCache(), one for each model"
            )

    @property
    def length(self) -> int:
        """Positions held, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    @property
    def previous_attention_mask(self) -> Int[Tensor, "batch pos"]:
        """TransformerLens's name and type of :attr:`mask`."""
        return torch.zeros(0, 0, dtype=torch.long) if self.mask is None else self.mask.long()

    def freeze(self) -> None:
        """Later runs leave the cache as it is."""
        self.frozen = True

    def unfreeze(self) -> None:
        """Later runs extend the cache again."""
        self.frozen = False

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values, in bytes; storage shared by slots counts once."""
        tensors = [tensor for entry in self.entries.values() for tensor in entry]
        unique = {tensor.data_ptr(): tensor for tensor in tensors}
        return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())

    def __repr__(self) -> str:
        kept = "every recurrence" if self.recurrence_slots is None else self.recurrence_slots
        return (
            f"LoopedKeyValueCache({len(self.entries)} slots, recurrences kept: {kept}, "
            f"{self.length} positions, {self.nbytes / 2**20:.1f} MiB)"
        )

    def slot(self, place: LayerLocation) -> LayerLocation:
        """Where a layer's keys and values are kept."""
        if place.recurrence is None or self.recurrence_slots is None:
            return place
        return place._replace(recurrence=place.recurrence % self.recurrence_slots)


def _made_with(cfg: LoopedConfig) -> dict[str, Any]:
    names = ("n_prelude", "n_core", "n_coda", "n_hooked_kv_heads", "d_head", "dtype", "device")
    return {name: getattr(cfg, name) for name in names}


@dataclass
class KVRun:
    """One forward pass over new tokens that follow those of a cache.

    Args:
        cache: Extended by :meth:`commit`, when the pass has succeeded.
        mask: Of past and new tokens together, False at padding.
        n_new: New positions.
        left: Rows that have left the loop; their keys and values stay at their last recurrence.
    """

    cache: LoopedKeyValueCache
    mask: Bool[Tensor, "batch pos"]
    n_new: int
    left: Bool[Tensor, " batch"] | None = None
    _extended: dict[LayerLocation, tuple[PastKeys, PastKeys]] = field(default_factory=dict)
    _latest: dict[int, tuple[Keys, Keys]] = field(default_factory=dict)
    _ran: int = 0  # recurrences that this pass has run

    @property
    def n_past(self) -> int:
        """Positions of earlier passes."""
        return self.cache.length

    def extend(self, place: LayerLocation, keys: Keys, values: Keys) -> tuple[PastKeys, PastKeys]:
        """Keys and values of past and new positions at one layer; the new ones are noted."""
        new = keys, values
        if place.recurrence is not None:
            before = self._latest.get(place.layer)
            if self.left is not None and before is not None:
                left = self.left.to(keys.device)[:, None, None, None]
                new = torch.where(left, before[0], keys), torch.where(left, before[1], values)
            self._latest[place.layer] = new
            self._ran = place.recurrence + 1
        together = self._with_past(place, new)
        self._extended[self.cache.slot(place)] = together
        return together

    def peek(self, place: LayerLocation, keys: Keys, values: Keys) -> tuple[PastKeys, PastKeys]:
        """As :meth:`extend`, and nothing is noted: for lenses."""
        return self._with_past(place, (keys, values))

    def _with_past(self, place: LayerLocation, new: tuple[Keys, Keys]) -> tuple[PastKeys, PastKeys]:
        if self.n_past == 0:
            return new
        past = self._past(place)
        return torch.cat((past[0], new[0]), 1), torch.cat((past[1], new[1]), 1)

    def _past(self, place: LayerLocation) -> tuple[PastKeys, PastKeys]:
        """What the cache holds for a layer, at the last recurrence that its tokens ran."""
        entries, held = self.cache.entries, self.cache.n_recurrences
        slot = self.cache.slot(place)
        if place.recurrence is not None and place.recurrence >= held:
            if held == 0:
                raise InputError("the cached tokens ran no recurrence, so the loop has no past")
            slot = self.cache.slot(place._replace(recurrence=held - 1))
        return entries[slot]

    def commit(self, n_recurrences: int) -> None:
        """Extend the cache by the new positions.

        Args:
            n_recurrences: Recurrences that this pass stands for. Where it stopped before, later
                ones get the last that was run.
        """
        cache = self.cache
        if cache.frozen:
            return
        # A slot holds what the last recurrence of its kind reads, run or not.
        for r in range(self._ran, max(n_recurrences, cache.n_recurrences)):
            for layer, latest in self._latest.items():
                place = LayerLocation("core", r, layer)
                self._extended[cache.slot(place)] = self._with_past(place, latest)
        if self.n_past == 0:
            # Not joined to anything yet, they may be parts of larger tensors.
            self._extended = {
                slot: (keys.clone(), values.clone())
                for slot, (keys, values) in self._extended.items()
            }
        cache.entries = self._extended
        cache.mask = self.mask
        cache.n_recurrences = max(n_recurrences, cache.n_recurrences)
