"""What a padding mask is: one and zero, or True and False. Nothing else is guessed at."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_looped.errors import InputError


def real_tokens(mask: Any, name: str = "attention_mask") -> Bool[Tensor, "..."]:
    """A padding mask as booleans, True at real tokens.

    Args:
        mask: Of any shape and dtype; every value zero (padding) or one (a real token).
        name: The argument's name, for messages.

    Raises:
        InputError: for any other value. An additive mask has zero where this one has one, so that
            it would turn real tokens and padding around; weights and numbers of packed documents
            would all count as real; NaN says nothing.
    """
    given: Tensor = torch.as_tensor(mask)
    if given.dtype == torch.bool:
        return given
    if given.device.type != "meta":
        strange = given[(given != 0) & (given != 1)]
        if strange.numel():
            value = strange[0].item()
            advice = " (of an additive mask, pass mask == 0)" if value < 0 else ""
            raise InputError(
                f"{name} must be 1 at real tokens and 0 at padding, got {value!r}{advice}"
            )
    return given != 0
