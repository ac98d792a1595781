"""Which recurrences, layers, heads: what the arguments of interventions may be, checked."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_looped.errors import InputError, LayerIndexError

Recurrences: TypeAlias = int | slice | Sequence[int] | None
"""An integer, a slice, several integers, or None for all; negative ones count from the end."""


RUN_ARGUMENTS = ("state_seed", "initial_state", "attention_mask", "prepend_bos")
"""Arguments of a whole run that leave its outputs what they are: logits of every prompt."""


def check_arguments(who: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise InputError for an argument that is not among the known ones."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"{who} takes no {', '.join(unknown)}; of a run it takes {known}")


def members(wanted: Recurrences, n: int, what: str, who: object) -> list[int]:
    """The numbers that a selection means among ``n``, in ascending order, each once.

    Args:
        wanted: The selection.
        n: How many there are.
        what: Their name, for the message: ``"recurrence"``.
        who: The intervention, for the message.

    Raises:
        LayerIndexError: for a number outside ``-n`` to ``n - 1``, or a slice that selects none.
        InputError: for anything else.
    """
    if wanted is None:
        return list(range(n))
    if isinstance(wanted, slice):
        chosen = sorted(range(*wanted.indices(n)))
        if not chosen:
            raise LayerIndexError(f"{who}: {wanted} selects no {what} of the {n} that the run has")
        return chosen
    try:
        numbers = [
            operator.index(i) for i in (wanted if isinstance(wanted, Iterable) else [wanted])
        ]
    except TypeError:
        raise InputError(
            f"{who}: a {what} is an integer, a slice or several integers, got {wanted!r}"
        ) from None
    if not numbers:
        raise InputError(f"{who}: no {what} is given; None means all of them")
    for i in numbers:
        if not -n <= i < n:
            raise LayerIndexError(
                f"{who}: {what} {i} is out of range: the run has 0..{n - 1}"
                if n
                else f"{who}: the run has no {what}"
            )
    return sorted({i % n for i in numbers})


def one_member(wanted: object, n: int, what: str, who: object) -> int:
    """The one number that is meant among ``n``; errors as :func:`members`."""
    return members([wanted], n, what, who)[0]  # type: ignore[list-item]


def frozen_after(wanted: object, R: int, who: object) -> int:
    """The recurrence that later ones are to repeat.

    Raises:
        LayerIndexError: if there is none behind it; errors as :func:`one_member`.
    """
    r = one_member(wanted, R, "recurrence", who)
    if r == R - 1:
        raise LayerIndexError(
            f"{who}: the run has recurrences 0..{r} and nothing behind {r} to freeze"
        )
    return r


def among(chosen: Sequence[int], n: int, device: torch.device) -> Bool[Tensor, " n"]:
    """Which of ``n`` are chosen."""
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(chosen)] = True
    return mask.to(device)
