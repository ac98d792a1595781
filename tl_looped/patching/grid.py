"""The grid of a cross-recurrence patching: its cells, their places, its labelled result.

Effects are TransformerLens's: ``(patched - corrupted) / (clean - corrupted)``, 1 where the patch
restores the clean run and 0 where it does nothing. It is NaN where clean and corrupted differ by
less than 1e-6 (of the largest logit, if that is above 1: two runs of the same prompts differ by so
much in the order of their additions), as when a run is patched with itself. ``difference``,
``patched - corrupted``, is always defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.interventions.selection import Recurrences, members, one_member
from tl_looped.model.hook_points import PER_HEAD_POS_DIM
from tl_looped.transformer import LoopedTransformer

Metric: TypeAlias = Callable[[Float[Tensor, "batch pos d_vocab"]], Any]
"""Logits of the prompts to one number, as in TransformerLens's patching."""

Selection: TypeAlias = Literal["each"] | Sequence[int] | None
"""``"each"`` one, those that are listed, or None: all of them together, in one cell."""

_LEAST = 1e-6
_PATTERNS = ("hook_pattern", "hook_attn_scores")


@dataclass(frozen=True)
class Axes:
    """Where position and head stand in an activation, counted from the right; None if nowhere."""

    pos: int
    head: int | None


@dataclass(frozen=True)
class PatchGrid:
    """Everything that the cells of one grid share.

    Args:
        activation, layer_type: Name as in ``cache[activation, layer, layer_type]``.
        sources, targets: Recurrences of the clean and of the corrupted run.
        layers: ``(source, target)`` core layers; ``(None, None)`` for the loop's own activations.
        positions, heads: One entry a cell along the axis; ``[None]`` for all at once.
        axes: Of the activation.
    """

    activation: str
    layer_type: str | None
    sources: list[int]
    targets: list[int]
    layers: list[tuple[int | None, int | None]]
    positions: list[int | None]
    heads: list[int | None]
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Source recurrence, target recurrence, layer, position, head."""
        sizes = (len(self.sources), len(self.targets), len(self.layers))
        return (*sizes, len(self.positions), len(self.heads))

    def donor(
        self, cache: LoopedActivationCache, r: int, layer: int | None
    ) -> Float[Tensor, "batch ..."]:
        """What the clean run had at a source."""
        found = cache[place_name(self.activation, r, layer, self.layer_type)]
        return found if cache.has_batch_dim else found[None]

    def target(self, model: LoopedTransformer, r: int, layer: int | None) -> str:
        """Canonical name of the hook that is overwritten."""
        return str(model.hook_name(place_name(self.activation, r, layer, self.layer_type)))

    def part(self, ndim: int, pos: int | None, head: int | None) -> tuple[Any, ...]:
        """Index of a cell's part of an activation of so many dimensions."""
        index: list[Any] = [slice(None)] * ndim
        if pos is not None:
            index[self.axes.pos] = pos
        if head is not None:
            assert self.axes.head is not None
            index[self.axes.head] = head
        return tuple(index)


def make_grid(
    model: LoopedTransformer,
    cache: LoopedActivationCache,
    shape: tuple[int, ...],
    activation: str,
    layer_type: str | None,
    source_recurrences: Recurrences,
    target_recurrences: Recurrences,
    layers: Sequence[int | tuple[int, int]] | None,
    positions: Selection,
    heads: Selection,
) -> PatchGrid:
    """The grid of a call's arguments, at the model's present number of recurrences.

    ``shape`` is that of the corrupted prompts' tokens, ``[batch, pos]``.

    Raises:
        LayerIndexError, HookNameError, GatedHookError, InputError: for what does not exist.
    """
    loop = model.loop
    if loop.R == 0 or cache.loop.R == 0:
        raise InputError("a run without recurrences has nothing to patch across them")
    if is_loop_activation(model, activation):
        if layers is not None:
            raise InputError(
                f"{activation!r} belongs to the loop and has no layers: leave them out"
            )
        pairs: list[tuple[int | None, int | None]] = [(None, None)]
    else:
        wanted = range(loop.k) if layers is None else layers
        pairs = [_pair(layer, loop.k) for layer in wanted]
        if not pairs:
            raise InputError("layers is empty; None means all core layers")
    name = model.hook_name(place_name(activation, 0, pairs[0][1], layer_type))
    if ".ln1." in name and (model.cfg.use_attn_in or model.cfg.use_split_qkv_input):
        raise InputError(
            "with use_attn_in or use_split_qkv_input the norm ln1 runs three times, and its hooks "
            "mean no one activation: patch q_input, k_input, v_input or attn_in"
        )
    axes = _axes(model, name)
    if heads is not None and axes.head is None:
        raise InputError(f"activation {activation!r} has no heads: leave heads out")
    what = "the grid"
    n_heads = model.cfg.n_hooked_kv_heads if name.endswith(_KEYS) else model.cfg.n_heads
    grid = PatchGrid(
        activation,
        layer_type,
        members(source_recurrences, cache.loop.R, "source recurrence", what),
        members(target_recurrences, loop.R, "target recurrence", what),
        pairs,
        _along(positions, shape[1], "position"),
        _along(heads, n_heads, "head"),
        axes,
    )
    for r in grid.sources:
        for source, _ in pairs:
            _check_donor(grid, grid.donor(cache, r, source), shape)
    return grid


_KEYS = ("hook_k", "hook_v", "hook_rot_k", "hook_k_input", "hook_v_input")


def is_loop_activation(model: LoopedTransformer, activation: str) -> bool:
    """Whether a name belongs to the loop (``state_out``), not to blocks."""
    return place_name(activation, 0, None, None) in dict.keys(model.hook_dict)


def place_name(activation: str, r: int, layer: int | None, layer_type: str | None) -> Any:
    """A name for ``model.hook_name`` and ``cache[...]``."""
    if layer is not None:
        return (activation.removeprefix("hook_"), (r, layer), layer_type)
    plain = "." in activation or activation.startswith("hook_")
    return f"recurrence.{r}.{activation if plain else f'hook_{activation}'}"


@checked
def normalised_effect(
    difference: Float[np.ndarray, "..."], clean: float, corrupted: float, largest_logit: float = 1.0
) -> Float[np.ndarray, "..."]:
    """``difference / (clean - corrupted)``; NaN where these two are the same but for rounding."""
    span = clean - corrupted
    if not abs(span) >= _LEAST * max(1.0, largest_logit):
        return np.full_like(difference, np.nan)
    return difference / span


def as_number(value: Any) -> float:
    """A metric's result as a number.

    Raises:
        InputError: if it is more than one.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        got = f"shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
        raise InputError(
            f"the metric must give one number for all prompts, got {got}: take a mean"
        ) from None


@dataclass(frozen=True)
class Baseline:
    """The metric of the corrupted run, and the size of its largest logit."""

    value: float
    largest: float

    @classmethod
    def of(cls, logits: Float[Tensor, "batch pos d_vocab"], value: Any) -> Baseline:
        """From the run's logits and what the metric gave for them."""
        return cls(as_number(value), float(logits.detach().abs().max()))


def clean_value(cache: LoopedActivationCache, metric: Metric, given: float | None) -> float:
    """The metric of the clean run: as given, or of the logits in its cache.

    Raises:
        InputError: if there are neither.
    """
    if given is not None:
        return float(given)
    if "unembed.hook_out" not in cache.cache_dict:
        raise InputError(
            "the clean cache holds no logits ('unembed.hook_out') to compute the metric of: pass "
            "clean_metric=float(metric(clean_logits))"
        )
    logits = cache["unembed.hook_out"]
    with torch.no_grad():
        return as_number(metric(logits if cache.has_batch_dim else logits[None]))


def effects_of(
    grid: PatchGrid,
    cache: LoopedActivationCache,
    difference: Float[np.ndarray, "source target layer pos head"],
    clean: float,
    corrupted: Baseline,
    attributes: dict[str, Any],
) -> xr.Dataset:
    """The grid's result; axes that have no choice are left out.

    Args:
        grid: The grid.
        cache: The clean run's.
        difference: Patched minus corrupted.
        clean: The metric of the clean run.
        corrupted: That of the corrupted run.
        attributes: Of the corrupted run.
    """
    coords: dict[str, Any] = {
        "source_recurrence": grid.sources,
        "target_recurrence": grid.targets,
    }
    named = (("layer", grid.layers), ("pos", grid.positions), ("head", grid.heads))
    dims = ["source_recurrence", "target_recurrence"]
    for dim, entries in named:
        axis = len(dims)
        if entries == [None] or entries == [(None, None)]:
            difference = difference.squeeze(axis)
            continue
        dims.append(dim)
        if dim != "layer":
            coords[dim] = entries
            continue
        coords["layer"] = [target for _, target in grid.layers]
        coords["source_layer"] = ("layer", [source for source, _ in grid.layers])
    data = {
        "difference": (dims, difference),
        "effect": (dims, normalised_effect(difference, clean, corrupted.value, corrupted.largest)),
    }
    attrs = attributes | {"activation": grid.activation, "clean": clean}
    attrs["corrupted"] = corrupted.value
    attrs["source_n_recurrences"] = cache.loop.R
    if cache.state_seed is not None:
        attrs["source_state_seed"] = str(cache.state_seed)
    return xr.Dataset(data, coords, attrs)


def _pair(layer: int | tuple[int, int], k: int) -> tuple[int, int]:
    both = layer if isinstance(layer, tuple) else (layer, layer)
    source, target = (one_member(i, k, "core layer", "layers") for i in both)
    return source, target


def _axes(model: LoopedTransformer, name: str) -> Axes:
    if name.endswith(_PATTERNS):
        return Axes(-2, -3)
    pos = model.hook_dict[name].pos_dim
    # The loop's and the stream's activations have no heads, and neither do norms over all of them.
    has_heads = pos == PER_HEAD_POS_DIM
    return Axes(pos, -2 if has_heads else None)


def _along(wanted: Selection, n: int, what: str) -> list[int | None]:
    if wanted is None:
        return [None]
    if isinstance(wanted, str):
        return list(range(n))
    return list(members(wanted, n, what, "the grid"))


def _check_donor(
    grid: PatchGrid, donor: Float[Tensor, "batch ..."], shape: tuple[int, ...]
) -> None:
    n, length = shape
    if donor.shape[grid.axes.pos] != length:
        raise InputError(
            f"the clean run has {donor.shape[grid.axes.pos]} positions of {grid.activation!r}, the "
            f"corrupted one {length}: patching by position needs prompts of equal length"
        )
    if donor.shape[0] not in (1, n):
        raise InputError(
            f"the clean cache has {donor.shape[0]} prompts, the corrupted run {n}: give one for "
            "each, or one for all"
        )
