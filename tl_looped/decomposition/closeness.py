"""Whether a sum of writes is what the cache holds."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.errors import InvalidDecompositionError

EXACT = (torch.float32, torch.float64)
"""Precisions in which a sum says something; half precision explains any small error."""

TOLERANCE = 1e-2
"""Largest error, over the largest value at the position, that rounding is held to explain."""


def check_close(
    found: Float[Tensor, "*batch_pos d_model"],
    truth: Float[Tensor, "*batch_pos d_model"],
    name: str,
) -> None:
    """Raise if a sum of writes is not what the cache holds under ``name``."""
    largest = truth.abs().amax(-1)
    error = (found - truth).abs().amax(-1)
    # A position where next to nothing was written is held to the others' size.
    allowed = TOLERANCE * largest.clamp(min=1e-3 * float(largest.max()))
    if bool((error > allowed).any()) or bool(error.isnan().any()):
        raise InvalidDecompositionError(
            f"the writes sum to something else than {name}: at some position the error is "
            f"{float((error / largest).max()):.2g} of the largest value. Either a hook of this run "
            "edited the stream, a norm in it or a sublayer's output, or the model's weights "
            "changed since. raw=True gives the writes as they are."
        )
