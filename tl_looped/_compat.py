"""Everything that the package takes from TransformerLens, in one place.

All of these have the same address in TransformerLens 3.5.0 to 4.3.0, so there is no choice to make
here yet. A version that moves or renames one is answered here, and no other module imports from
``transformer_lens`` (import-linter checks it). ``HookedTransformer``, which 4.0 removed, and what
came with 4.x (``model_protocol``, most of ``tools``) must not be needed.
"""

from __future__ import annotations

from transformer_lens import ActivationCache, FactoredMatrix, HookedRootModule
from transformer_lens.config import TransformerLensConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import (
    Slice,
    SliceInput,
    get_act_name,
    get_device,
    lm_cross_entropy_loss,
    sample_logits,
)

__all__ = [
    "ActivationCache",
    "FactoredMatrix",
    "HookPoint",
    "HookedRootModule",
    "Slice",
    "SliceInput",
    "TransformerLensConfig",
    "get_act_name",
    "get_device",
    "lm_cross_entropy_loss",
    "sample_logits",
]
