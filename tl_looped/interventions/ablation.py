"""Heads, neurons and whole MLP outputs taken out, in chosen recurrences only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import checked, whole
from tl_looped.errors import InputError
from tl_looped.interventions.layers import write_nothing
from tl_looped.interventions.selection import Recurrences, among, members, one_member
from tl_looped.metrics.inputs import at_least_fp32
from tl_looped.model.context import LoopRun
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.intervening import Changes, Edit, Intervention

_LAYER = re.compile(r"(prelude|core|coda)\.(\d+)")
By: TypeAlias = Literal["zero", "mean", "resample"]


class _Ablation(Intervention):
    """Parts, the last axis but what belongs to each, of one activation of core layers."""

    recurrences: Recurrences
    by: By
    reference: LoopedActivationCache | None
    seed: int

    _hook: ClassVar[str]
    _part: ClassVar[str]
    _n_parts: ClassVar[str]  # the configuration's name for how many there are

    @property
    def _wanted(self) -> Mapping[int, Recurrences]:
        """Core layer -> its parts; the field is called after them."""
        found: Mapping[int, Recurrences] = getattr(self, f"{self._part}s")
        return found

    def __post_init__(self) -> None:
        if (self.by == "zero") != (self.reference is None):
            raise InputError(
                f"by={self.by!r} and reference={'None' if self.reference is None else 'a cache'}: "
                "'mean' and 'resample' need the cache of reference prompts "
                f"(run_with_cache(prompts, names_filter=...)) with {self._hook!r}, 'zero' none"
            )
        if not self._wanted:
            raise InputError(f"{self._part}s is empty: name core layers, {{1: None}} for all of 1")
        whole(self.seed, "seed")

    def __repr__(self) -> str:
        shown = f"{type(self).__name__}({dict(self._wanted)}, {self.recurrences}, by={self.by!r}"
        return f"{shown}, seed={self.seed})" if self.by == "resample" else f"{shown})"

    @property
    def across_rows(self) -> bool:
        """Which row of the reference a row gets depends on the row."""
        return self.by == "resample"

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Overwrite the parts."""
        loop, n, changes = model.loop, getattr(model.cfg, self._n_parts), Changes()
        for layer, wanted in self._wanted.items():
            place = one_member(layer, loop.k, "core layer", self)
            chosen = members(wanted, n, self._part, self)
            for r in members(self.recurrences, loop.R, "recurrence", self):
                name = f"recurrence.{r}.blocks.{place}.{self._hook}"
                changes.edits.append((name, self._edit(chosen, r, place)))
        return changes

    def _edit(self, chosen: list[int], r: int, layer: int) -> Edit:
        given = None if self.reference is None else self._given(self.reference, r, layer)

        def ablate(x: Tensor, hook: LoopedHookPoint) -> Tensor:
            if given is not None and given.shape[2:] != x.shape[2:]:
                raise InputError(
                    f"{self}: the reference is of another model: {self._hook} is "
                    f"{list(given.shape[2:])} there and {list(x.shape[2:])} here"
                )
            held = among(chosen, x.shape[2], x.device)
            held = held.reshape(-1, *[1] * (x.ndim - 3))
            if given is None:
                return x.masked_fill(held, 0.0)
            if self.by == "mean":
                return torch.where(held, _mean_over_tokens(given, self._mask()).to(x), x)
            return torch.where(held, self._resampled(given, x).to(x), x)

        return ablate

    def _given(self, reference: LoopedActivationCache, r: int, layer: int) -> Tensor:
        """The reference's activation, ``[batch, pos, unit, ...]``."""
        found = reference[f"recurrence.{r}.blocks.{layer}.{self._hook}"]
        found = found if reference.has_batch_dim else found[None]
        if reference.n_pos is not None and found.shape[1] != reference.n_pos:
            raise InputError(
                f"{self}: the reference holds {found.shape[1]} of the {reference.n_pos} positions "
                "of its run (pos_slice=): cache all of them"
            )
        return found

    def _mask(self) -> Tensor | None:
        assert self.reference is not None
        mask = self.reference.attention_mask
        return None if mask is None else torch.atleast_2d(mask).bool()

    def _resampled(self, given: Tensor, x: Tensor) -> Tensor:
        if given.shape[1] != x.shape[1] or self._mask() is not None:
            raise InputError(
                f"{self}: the reference has {given.shape[1]} positions"
                f"{'' if self._mask() is None else ', some of them padding'}, the run "
                f"{x.shape[1]}: resampling takes prompts of equal length without padding"
            )
        rows = np.random.default_rng(self.seed).integers(given.shape[0], size=x.shape[0])
        return given[torch.from_numpy(rows).to(given.device)]


@checked
@dataclass(frozen=True, eq=False, repr=False)
class AblateHeads(_Ablation):
    """Overwrite the output ``z`` of attention heads, ``[batch, pos, head, d_head]``.

    Args:
        heads: Core layer -> its query heads (an integer, several, or None for all).
        recurrences: Recurrences in which they are overwritten.
        by: ``"zero"`` writes zeros; ``"mean"`` the mean of the reference's prompts and real tokens
            at the same recurrence and layer; ``"resample"`` what another prompt has at the same
            recurrence, layer and position, for each row of the run a row of the reference.
        reference: Cache of reference prompts with ``attn.hook_z``, for the last two; with at least
            the recurrences that are named.
        seed: Seed for the rows that ``"resample"`` draws, with replacement.

    Raises:
        InputError, LayerIndexError, MissingActivationError: where something named does not exist.
    """

    heads: Mapping[int, Recurrences]
    recurrences: Recurrences = None
    by: By = "zero"
    reference: LoopedActivationCache | None = None
    seed: int = 0

    _hook = "attn.hook_z"
    _part = "head"
    _n_parts = "n_heads"


@checked
@dataclass(frozen=True, eq=False, repr=False)
class AblateNeurons(_Ablation):
    """Overwrite neurons of MLPs, ``mlp.hook_post`` ``[batch, pos, d_mlp]``.

    Args:
        neurons: Core layer -> its neurons.
        recurrences, by, reference, seed: As :class:`AblateHeads`; the reference has
            ``mlp.hook_post``.
    """

    neurons: Mapping[int, Recurrences]
    recurrences: Recurrences = None
    by: By = "zero"
    reference: LoopedActivationCache | None = None
    seed: int = 0

    _hook = "mlp.hook_post"
    _part = "neuron"
    _n_parts = "d_mlp"


@checked
@dataclass(frozen=True)
class AblateMLP(Intervention):
    """The MLP of one layer writes nothing: ``hook_mlp_out`` is zero at every position.

    The layer that writes the massive activations of the first token in a retrofitted Llama is the
    second, ``AblateMLP("prelude.1")`` of a (4, 6, 4) model (Figure 41 of arXiv 2604.11791). No
    weight changes.

    Args:
        layer: Core layer, 0-based; or a name such as ``"prelude.1"``, ``"core.2"``, ``"coda.0"``.
        recurrences: Recurrences in which a core layer is ablated; all if None.

    Raises:
        LayerIndexError: if the model has no such layer, or the run no such recurrence.
        InputError: for another name, or recurrences of a layer outside the loop.
    """

    layer: int | str
    recurrences: Recurrences = None

    def place(self, model: LoopedTransformer) -> tuple[str, int]:
        """Stage and 0-based number of the layer within it."""
        loop = model.loop
        sizes = {"prelude": loop.p, "core": loop.k, "coda": loop.c}
        named = _LAYER.fullmatch(self.layer) if isinstance(self.layer, str) else None
        if isinstance(self.layer, str) and named is None:
            raise InputError(
                f"layer must be a core layer or a name such as 'prelude.1', got {self.layer!r}"
            )
        stage, number = ("core", self.layer) if named is None else (named[1], int(named[2]))
        if stage != "core" and self.recurrences is not None:
            raise InputError(f"{self}: {stage} layers run once: leave recurrences out")
        return stage, one_member(number, sizes[stage], f"{stage} layer", self)

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Zero ``hook_mlp_out``."""
        stage, i = self.place(model)
        names = [f"{stage}.{i}"]
        if stage == "core":
            wanted = members(self.recurrences, model.loop.R, "recurrence", self)
            names = [f"recurrence.{r}.blocks.{i}" for r in wanted]
        return Changes(edits=[(f"{name}.hook_mlp_out", write_nothing) for name in names])


def _mean_over_tokens(given: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over prompts and real positions, in fp32 or better."""
    wide = at_least_fp32(given)
    if mask is None:
        return wide.mean((0, 1))
    return wide[mask.to(wide.device)].mean(0)
