"""Prompts: from what an experiment names to texts, the same for every model.

Data sets come from a file that the user names, or from the hub through ``datasets``, which is
optional. Nothing is downloaded unless the experiment names a data set of the hub and no file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_looped.errors import DataError
from tl_looped.experiments.spec import TEST_SENTENCE, PromptSet

BUNDLED = Path(__file__).parents[1] / "data" / "word_problems.jsonl"
"""32 word problems of our own, one JSON object a line, `question`."""

COLUMNS = ("question", "ctx", "prompt", "text")


@dataclass(frozen=True)
class HubData:
    """A data set on the hub: its id, configuration and the column of the prompt."""

    hub_id: str
    config: str | None
    column: str


ON_THE_HUB = {
    "gsm8k": HubData("openai/gsm8k", "main", "question"),
    "hellaswag": HubData("Rowan/hellaswag", None, "ctx"),
}


@dataclass(frozen=True)
class Prompts:
    """The chosen texts.

    Args:
        texts: In the order of the data set.
        rows: Number of each in the data set, from 0.
        available: Size of the data set.
        digest: SHA-256 of the texts.
    """

    texts: tuple[str, ...]
    rows: tuple[int, ...]
    available: int
    digest: str


def load_prompts(wanted: PromptSet) -> Prompts:
    """Read a data set and choose the subset.

    Raises:
        DataError: a file that is missing, empty or not what its name says; a data set that cannot
            be had.
    """
    texts = _all_texts(wanted)
    if not texts:
        raise DataError(f"prompts: {wanted.file or wanted.label} holds no prompt")
    rows = choose(len(texts), wanted.subset, wanted.seed)
    chosen = tuple(texts[row] for row in rows)
    digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    return Prompts(chosen, rows, len(texts), digest)


def choose(n: int, subset: int, seed: int) -> tuple[int, ...]:
    """``subset`` of ``n`` row numbers in ascending order; all of them if ``subset`` is 0 or larger.

    Those with the smallest SHA-256 of ``"{seed}:{row}"``: the same with every version of every
    library, and a smaller subset of a seed is part of its larger ones.
    """
    if not 0 < subset < n:
        return tuple(range(n))
    ranked = sorted(range(n), key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest())
    return tuple(sorted(ranked[:subset]))


def _all_texts(wanted: PromptSet) -> list[str]:
    if wanted.source == "text":
        return list(wanted.texts)
    if wanted.source == "sentence":
        return [TEST_SENTENCE]
    if wanted.source == "bundled":
        return read_file(BUNDLED, "question")
    if wanted.file is not None:
        known = ON_THE_HUB.get(wanted.source)
        return read_file(Path(wanted.file), wanted.column or (known.column if known else None))
    return _from_hub(wanted)


def read_file(path: Path, column: str | None = None) -> list[str]:
    """Prompts of a ``.jsonl`` file, or of a text file with one prompt a line; blank lines skipped.

    Raises:
        DataError: with the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts: {path} cannot be read: {error}") from error
    numbered = [(n, line.rstrip("\r")) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"prompts: {path} is empty")
    if path.suffix.lower() not in (".jsonl", ".json"):
        return [line for _, line in numbered]
    texts: list[str] = []
    for number, line in numbered:
        where = f"prompts: line {number} of {path}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error}): one object a line is read") from error
        column = column or _column(row, where)
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where} has no text in {column!r}; set prompts.column")
        texts.append(text)
    return texts


def _column(row: Any, where: str) -> str:
    found = [name for name in COLUMNS if isinstance(row, dict) and name in row]
    if not found:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has none of {', '.join(COLUMNS)} ({keys}); set prompts.column")
    return found[0]


def _from_hub(wanted: PromptSet) -> list[str]:
    data = ON_THE_HUB[wanted.source]
    column = wanted.column or data.column
    instead = (
        f"Give a file instead: --prompts {wanted.source}:PATH, or prompts.file in the experiment, "
        f"a jsonl file of the {wanted.split} split with {column!r} in every line."
    )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{wanted.source} is read from the hub by the package datasets, which is not "
            f"installed: pip install datasets. {instead}"
        ) from error
    try:
        rows = load_dataset(data.hub_id, data.config, split=wanted.split)
        texts = [str(text) for text in rows[column]]
    except Exception as error:  # the library raises whatever its transports do
        raise DataError(
            f"{wanted.source} ({data.hub_id}, split {wanted.split}) cannot be had from the hub: "
            f"{type(error).__name__}: {error}\n{instead}"
        ) from error
    return texts
