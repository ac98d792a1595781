"""Numbers in sentences, and what models are called in them: one rule for every page and message."""

from __future__ import annotations


def count(n: int, what: str) -> str:
    """``1 prompt``, ``2 prompts``, ``12,000 recurrences``: whatever takes an s in the plural."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def training(recurrences: int | float | None) -> str:
    """``trained with 4``; ``not trained as a loop`` for None and 0."""
    return f"trained with {recurrences:g}" if recurrences else "not trained as a loop"
