"""Tensors and numpy arrays alike as fp64 numpy arrays, for the metrics that scipy computes."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_looped.errors import InputError


def as_float64(values: Any) -> Float[np.ndarray, "..."]:
    """Numbers as a new fp64 array on the CPU, without gradient; bf16 and fp16 are exact in it."""
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()
    return np.array(values, dtype=np.float64)


def check_finite(argument: str, values: Float[np.ndarray, "..."]) -> None:
    """Raise unless every number is finite; the message names the argument and the first place."""
    if not np.isfinite(values).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise InputError(
            f"{argument} must be finite, got {values[place]} at {list(place)}: leave that entry "
            "out, or look for what made it"
        )
