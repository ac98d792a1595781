"""Attention that stays as it was at one recurrence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.interventions.selection import Recurrences, among, frozen_after, members
from tl_looped.model.context import LoopRun
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.intervening import Changes, Intervention


@checked
@dataclass(frozen=True)
class FreezeAttention(Intervention):
    """After recurrence r, heads attend as they did there.

    ``pattern[r', l] = pattern[r, l]`` for every r' > r. Values are still those of the moment: what
    a model loses by this is what it gains from moving its attention after r. In generation each new
    token keeps its own row.

    Args:
        recurrence: r, the last one whose patterns are computed.
        layers: Core layers; all if None.
        heads: Query heads; all if None.

    Raises:
        LayerIndexError: where there is no such recurrence, layer or head, or none behind r.
        InputError: in a run that starts behind r (``start_at_layer``).
    """

    recurrence: int
    layers: Recurrences = None
    heads: Recurrences = None

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Read the patterns of r, write them into all later recurrences."""
        loop, cfg = model.loop, model.cfg
        last = frozen_after(self.recurrence, loop.R, self)
        heads = members(self.heads, cfg.n_heads, "head", self)
        kept: dict[int | None, Tensor] = {}

        def keep(x: Tensor, hook: LoopedHookPoint) -> None:
            kept[hook.layer_in_stage] = x

        def hold(x: Tensor, hook: LoopedHookPoint) -> Tensor:
            if hook.layer_in_stage not in kept:
                raise InputError(f"{self}: the run starts behind recurrence {last}")
            held = among(heads, cfg.n_heads, x.device)[:, None, None]
            return torch.where(held, kept[hook.layer_in_stage].to(x), x)

        changes = Changes()
        for layer in members(self.layers, loop.k, "core layer", self):
            changes.readers.append((f"recurrence.{last}.blocks.{layer}.attn.hook_pattern", keep))
            for r in range(last + 1, loop.R):
                name = f"recurrence.{r}.blocks.{layer}.attn.hook_pattern"
                changes.edits.append((name, hold))
        return changes
