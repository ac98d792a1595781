"""Activation patching across recurrences.

TransformerLens's ``patching`` works on a looped model as it is: it patches each effective layer
with the same layer of the clean run. What a loop adds is the question *when*: does the state of an
early recurrence already do what a later one does, is what recurrence 5 computes still of use at
recurrence 2? Here an activation at (r, l) of one run replaces the one at (r', l') of another, or of
the same run, for every r and r' on a grid.

    from tl_looped import patching

    _, clean_cache = model.run_with_cache(clean_tokens)
    grid = patching.patch_recurrences(
        model, corrupted_tokens, clean_cache, logit_difference, "resid_post"
    )
    grid["effect"].sel(source_recurrence=1, target_recurrence=3)

``attribute_recurrences`` estimates the same grid from one forward and one backward pass.
"""

from tl_looped.patching.attribution import attribute_recurrences
from tl_looped.patching.exact import patch_recurrences
from tl_looped.patching.grid import Metric, Selection, normalised_effect

__all__ = [
    "Metric",
    "Selection",
    "attribute_recurrences",
    "normalised_effect",
    "patch_recurrences",
]
