"""Pictures of one looped run to look through, in a notebook or as an HTML file.

- :func:`head_across_recurrences`: one head at every recurrence
- :func:`heads_at`: all heads at one (recurrence, layer)
- :func:`difference`: one head, every recurrence minus the one before it
- :func:`floor_plan`: every map of the run on one sheet (Figure 63 of arXiv 2604.11791)
- :func:`settled_tokens`: the prompt, coloured by when each token's prediction settles

Each takes the cache of a run and gives a :class:`View`. As the last line of a notebook cell it
shows itself, ``view.save("head.html")`` writes the page, and its fields are the numbers::

    logits, cache = model.run_with_cache(prompt)
    viz.head_across_recurrences(cache, model.to_str_tokens(prompt), layer=1, head=2)

Labels are ``r3 l1 h2``: recurrence, core layer, head, all 0-based.
"""

from tl_looped.viz.attention_views import (
    AttentionView,
    attention_view,
    difference,
    head_across_recurrences,
    heads_at,
)
from tl_looped.viz.floor_plan import FloorPlan, floor_plan
from tl_looped.viz.page import MAX_BYTES, View
from tl_looped.viz.settling import SettledTokens, settled_tokens, settling_recurrence

__all__ = [
    "MAX_BYTES",
    "AttentionView",
    "FloorPlan",
    "SettledTokens",
    "View",
    "attention_view",
    "difference",
    "floor_plan",
    "head_across_recurrences",
    "heads_at",
    "settled_tokens",
    "settling_recurrence",
]
