"""Skipping core layers, and running them in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.interventions.selection import Recurrences, members, one_member
from tl_looped.model.config import NormLayout
from tl_looped.model.context import LoopRun
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.intervening import Changes, Intervention


@checked
@dataclass(frozen=True)
class SkipLayers(Intervention):
    """The stream passes by these core layers unchanged: ``resid_post = resid_pre``.

    Their ``attn_out`` and ``mlp_out`` are zero, so that a decomposition stays exact. In Huginn's
    layout, where the sum is normalised, the stream is put back as well, and a decomposition raises.

    Args:
        layers: Core layers, 0-based.
        recurrences: In which recurrences.
    """

    layers: Recurrences
    recurrences: Recurrences = None

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Zero writes; behind norms on the stream, the stream itself."""
        changes, entered = Changes(), dict[tuple[int | None, int | None], Tensor]()

        def keep(x: Tensor, hook: LoopedHookPoint) -> None:
            entered[hook.recurrence, hook.layer_in_stage] = x

        def bring(x: Tensor, hook: LoopedHookPoint) -> Tensor:
            return entered[hook.recurrence, hook.layer_in_stage].to(x)

        on_the_stream = model.cfg.norm_layout is NormLayout.RESIDUAL
        for r in members(self.recurrences, model.loop.R, "recurrence", self):
            for layer in members(self.layers, model.loop.k, "core layer", self):
                block = f"recurrence.{r}.blocks.{layer}"
                for write in ("hook_attn_out", "hook_mlp_out"):
                    changes.edits.append((f"{block}.{write}", write_nothing))
                if on_the_stream:
                    changes.readers.append((f"{block}.hook_resid_pre", keep))
                    for place in ("hook_resid_mid", "hook_resid_post"):
                        changes.edits.append((f"{block}.{place}", bring))
        return changes


def write_nothing(x: Tensor, hook: LoopedHookPoint) -> Tensor:
    """Zeros in place of an activation."""
    return torch.zeros_like(x)


@checked
@dataclass(frozen=True)
class ReorderLayers(Intervention):
    """The core's layers run in another order.

    Hook names stand for places: ``(r, l)`` is the l-th layer that runs in recurrence r, with the
    weights of core layer ``order[l]``. ``model.blocks[i].W_Q`` and its kin follow while a run lasts
    and are the old ones afterwards, so a decomposition by heads of such a cache raises.

    Args:
        order: For each place, the core layer whose weights run there. A layer may be named several
            times or not at all.
        recurrences: In which recurrences.

    Raises:
        InputError: if ``order`` does not have one entry a core layer.
    """

    order: Sequence[int]
    recurrences: Recurrences = None

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Every block borrows another layer's weights."""
        loop = model.loop
        if len(self.order) != loop.k:
            raise InputError(
                f"{self}: order must name one layer for each of the core's {loop.k} places, got "
                f"{self.order!r}"
            )
        sources = [one_member(i, loop.k, "core layer", self) for i in self.order]
        changes = Changes()
        for r in members(self.recurrences, loop.R, "recurrence", self):
            blocks = [model.blocks[loop.index(r, layer)] for layer in range(loop.k)]
            for block, source in zip(blocks, sources, strict=True):
                changes.weights.append((block, blocks[source].weights))
        return changes


@checked
@dataclass(frozen=True)
class SwapLayers(Intervention):
    """Two core layers change places; :class:`ReorderLayers` says what the hook names mean then.

    Args:
        first, second: Core layers, 0-based.
        recurrences: In which recurrences.
    """

    first: int
    second: int
    recurrences: Recurrences = None

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """As :class:`ReorderLayers` with the two exchanged."""
        k = model.loop.k
        a, b = (one_member(i, k, "core layer", self) for i in (self.first, self.second))
        order = list(range(k))
        order[a], order[b] = b, a
        return ReorderLayers(tuple(order), self.recurrences).changes(model, run)
