"""How large a model may be made, so that an absurd number is refused before memory ends.

An effective layer has hook points of its own, about 0.1 MB of Python objects, whatever its weights.
"""

from __future__ import annotations

import operator
from typing import Any

from tl_looped.errors import RecurrenceCountError

most_layers = 2**15
"""Most effective layers, ``p + k R + c``: 3 GB of hook points, 8,190 recurrences of Huginn.

``tl_looped.model.limits.most_layers = ...`` raises it, for every model of the process.
"""

MOST_UNITS = 2**24
"""Most of what a weight has a row or a column for: channels, heads, neurons, tokens."""

HOW_TO_RAISE = "tl_looped.model.limits.most_layers = ... raises it"


def checked_recurrences(
    value: Any, fewest: int = 0, core: int = 1, others: int = 0, name: str = "n_recurrences"
) -> int:
    """A number of recurrences as an int; numpy's integers are numbers, True and False are not.

    Args:
        value: What was given.
        fewest: Least number that means something.
        core: Layers of the core; 1 where no model is known yet.
        others: Layers of prelude and coda.
        name: The argument's name, for messages.

    Raises:
        RecurrenceCountError: if it is not an integer, below ``fewest``, or needs more than
            :data:`most_layers` effective layers.
    """
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        n = operator.index(value)
    except TypeError:
        raise RecurrenceCountError(f"{name} must be an integer, got {value!r}") from None
    if n < fewest:
        raise RecurrenceCountError(f"{name} must be at least {fewest}, got {n}")
    if core * n + others > most_layers:
        most = max(0, most_layers - others) // core
        raise RecurrenceCountError(
            f"{name} must be at most {most}, got {n}: every recurrence takes {core} effective "
            f"layer{'s' * (core != 1)}, each with hook points, and {most_layers} layers are the "
            "limit "
            f"({HOW_TO_RAISE})"
        )
    return n
