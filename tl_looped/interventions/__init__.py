"""Interventions on the loop, for ``with model.intervening(...)``.

What they are for: what does a recurrence, a layer, a head, the injection or the initial state do?
Each class below is one change with one definition; a context holds any number of them, contexts
nest, and nothing stays behind. Everything that runs the model inside the context runs changed:
``model(...)``, ``run_with_cache``, ``run_with_hooks``, ``generate``, exit rules, metrics.

    from tl_looped import interventions as iv

    with model.intervening(iv.SkipRecurrences(2), iv.AblateHeads({1: [0, 3]}, slice(4, None))):
        logits = model(prompt, n_recurrences=8)

``recurrences`` is everywhere an integer, a slice (``slice(3, None)``: from recurrence 3 on),
several integers, or None for all; negative numbers count from the end of the run at hand. A
recurrence that a run does not have is a LayerIndexError before the run.

Decisions. Recurrences keep their numbers when one is skipped or repeated. What is skipped is still
computed and can be read, but nothing reads it. A decomposition of a cache whose stream was edited
raises, as it does for hooks. Lenses run nothing of the loop and know no interventions;
``loop_map``, training and ``to_bridge`` refuse while one is active.
"""

from tl_looped.interventions.ablation import (
    AblateHeads,
    AblateMLP,
    AblateNeurons,
)
from tl_looped.interventions.fixed_points import FixedPoint, FreezeLoop, fixed_point
from tl_looped.interventions.frozen_attention import FreezeAttention
from tl_looped.interventions.layers import ReorderLayers, SkipLayers, SwapLayers
from tl_looped.interventions.recurrences import RepeatRecurrence, SkipRecurrences
from tl_looped.interventions.selection import Recurrences
from tl_looped.interventions.splicing import Splice
from tl_looped.interventions.states import (
    AddNoise,
    ReplaceInitialState,
    ScaleInjection,
    SwapStates,
)
from tl_looped.transformer.intervening import Changes, Edit, Intervention

__all__ = [
    "AblateHeads",
    "AblateMLP",
    "AblateNeurons",
    "AddNoise",
    "Changes",
    "Edit",
    "FixedPoint",
    "FreezeAttention",
    "FreezeLoop",
    "Intervention",
    "Recurrences",
    "ReorderLayers",
    "RepeatRecurrence",
    "ReplaceInitialState",
    "ScaleInjection",
    "SkipLayers",
    "SkipRecurrences",
    "Splice",
    "SwapLayers",
    "SwapStates",
    "fixed_point",
]
