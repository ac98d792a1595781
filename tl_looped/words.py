"""Numbers in sentences, and what models are called in them: one rule for every page and message."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath


def count(n: int, what: str) -> str:
    """``1 prompt``, ``2 prompts``, ``12,000 recurrences``: whatever takes an s in the plural."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


IGNORED_STATE = (
    "the adapter ignores the state ([0 | I], as in a new retrofit), so that every recurrence "
    "repeats the first: its fixed point is there from the start and says nothing of a loop"
)


def called(model: str) -> str:
    """What a model is called: its hub id or short name; of an absolute path the last part."""
    path = PurePath(model)
    return path.name if path.is_absolute() else model


def told_apart(names: Sequence[str], ends: Sequence[str]) -> list[str]:
    """The names, with something behind each of those that would be equal.

    Args:
        names: What things are called.
        ends: What to add where that is not enough; things of one name and one end are the same.
    """
    of_name: dict[str, set[str]] = {}
    for name, end in zip(names, ends, strict=True):
        of_name.setdefault(name, set()).add(end)
    return [
        f"{name} ({end})" if len(of_name[name]) > 1 and end else name
        for name, end in zip(names, ends, strict=True)
    ]


def differing(names: Sequence[str], separator: str = "_") -> list[str]:
    """The parts in which names differ, for tables that have no room for whole ones.

    Parts that all names share are left out, and the last part too (a hash) where the others tell
    the names apart without it. A single name, and names of different numbers of parts, stay whole.
    """
    parts = [name.split(separator) for name in names]
    if len(names) < 2 or len({len(p) for p in parts}) > 1:
        return list(names)
    columns = [set(column) for column in zip(*parts, strict=True)]
    kept = [i for i, column in enumerate(columns) if len(column) > 1]
    for chosen in (kept[:-1], kept):
        short = [separator.join(p[i] for i in chosen) for p in parts]
        if chosen and len(set(short)) == len(set(names)):
            return short
    return list(names)


def heavy_token(prompts: int, of: int, most: float, is_first: bool) -> str:
    """That one token's norm outweighs all others, and what follows; without a full stop."""
    which = "the first token" if is_first else "one token"
    return (
        f"in {prompts:,} of {count(of, 'prompt')} {which} holds more than half of the summed norm "
        f"of all tokens at some core layer (up to {100 * most:.0f} %), so that means over tokens, "
        "rates of steps and the residual entropy are mostly its own"
    )


def training(recurrences: int | float | None) -> str:
    """``trained with 4``; ``not trained as a loop`` for None and 0."""
    return f"trained with {recurrences:g}" if recurrences else "not trained as a loop"
