"""Prompts: from what an experiment names to texts and conversations, the same for every model.

A row of a jsonl file may hold a conversation, a list of ``{"role": ..., "content": ...}``. Its text
is each model's own: the chat template writes it where it is tokenised.

Data sets come from a file that the user names, or from the hub through ``datasets``, which is
optional. Nothing is downloaded unless the experiment names a data set of the hub and no file.

Files are read line by line, twice: how many prompts there are decides which are chosen, and only
those are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_looped.errors import DataError, InputError
from tl_looped.experiments.spec import TEST_SENTENCE, PromptSet
from tl_looped.transformer.reading import Chats, read_input

PromptContent = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""

WORD_PROBLEMS = Path(__file__).parents[1] / "data" / "word_problems.jsonl"
"""32 word problems of our own, one JSON object a line, `question`."""

_LONGEST_LINE = 2**28  # characters

COLUMNS = ("question", "ctx", "prompt", "text", "messages")


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
class ChosenPrompts:
    """The chosen texts and conversations.

    Args:
        texts: In the order of the data set.
        rows: Number of each in the data set, from 0.
        available: Size of the data set.
        digest: SHA-256 of the texts.
    """

    texts: tuple[PromptContent, ...]
    rows: tuple[int, ...]
    available: int
    digest: str

    @property
    def has_chats(self) -> bool:
        """Whether some are conversations."""
        return any(not isinstance(text, str) for text in self.texts)


def load_prompts(wanted: PromptSet) -> ChosenPrompts:
    """Read a data set and choose the subset.

    Raises:
        DataError: a file that is missing, empty or not what its name says; a data set that cannot
            be had.
    """
    read = _reader(wanted)
    n = sum(1 for _ in read())
    if not n:
        raise DataError(f"prompts: {wanted.file or wanted.label} holds no prompt")
    rows = choose(n, wanted.subset, wanted.seed)
    keep = set(rows)
    chosen = tuple(text for row, text in enumerate(read()) if row in keep)
    if len(chosen) != len(rows):
        raise DataError(f"prompts: {wanted.file} was changed while it was read")
    digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    return ChosenPrompts(chosen, rows, n, digest)


def choose(n: int, subset: int, seed: int) -> tuple[int, ...]:
    """``subset`` of ``n`` row numbers in ascending order; all of them if ``subset`` is 0 or larger.

    Those with the smallest SHA-256 of ``"{seed}:{row}"``: the same with every version of every
    library, and a smaller subset of a seed is part of its larger ones.
    """
    if not 0 < subset < n:
        return tuple(range(n))
    ranked = sorted(range(n), key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest())
    return tuple(sorted(ranked[:subset]))


def _reader(wanted: PromptSet) -> Callable[[], Iterator[PromptContent]]:
    """What gives all prompts from the first on, as often as it is called."""
    if wanted.source == "bundled":
        return lambda: _each_of_file(WORD_PROBLEMS, "question")
    if wanted.file is not None:
        known, path = ON_THE_HUB.get(wanted.source), Path(wanted.file)
        column = wanted.column or (known.column if known else None)
        return lambda: _each_of_file(path, column)
    if wanted.source == "sentence":
        return lambda: iter([TEST_SENTENCE])
    texts = wanted.texts if wanted.source == "text" else _from_hub(wanted)
    return lambda: _checked(texts, wanted.column)


def _checked(texts: Iterable[Any], column: str | None) -> Iterator[PromptContent]:
    for number, text in enumerate(texts):
        where = f"prompts: text {number}"
        if isinstance(text, str):  # blank ones too
            _check_characters(text, where)
        yield text if isinstance(text, str) else _prompt(text, where, column)


def _prompt(value: Any, where: str, column: str | None) -> PromptContent:
    """A text or a conversation of a data set, checked.

    Raises:
        DataError: if it is neither, saying where.
    """
    if isinstance(value, list):
        try:
            given = read_input(value)
        except InputError as error:
            raise DataError(f"{where}: {error}") from error
        if isinstance(given, Chats) and not given.many:
            _check_characters(json.dumps(value, ensure_ascii=False, default=str), where)
            return given.chats[0]
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where} has no text in {column!r}, and no conversation: set prompts.column"
        )
    _check_characters(value, where)
    return value


def _check_characters(text: str, where: str) -> None:
    """Raise if a text holds half of a surrogate pair, which JSON and Python take for a character.

    Raises:
        DataError: saying where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half of a surrogate pair at character {error.start}, "
            f"{text[error.start]!r}, which is not a character: correct it, or leave it out"
        ) from error


def _each_of_file(path: Path, column: str | None) -> Iterator[PromptContent]:
    """Prompts of a ``.jsonl`` file, or of a text file with one prompt per line, one by one.

    Blank lines are skipped.

    Raises:
        DataError: with the line's number.
    """
    as_json = path.suffix.lower() in (".jsonl", ".json")
    is_empty = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        is_empty = False
        where = f"prompts: line {number} of {path}"
        if not as_json:
            yield line
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is not JSON ({error}): one object per line is read"
            ) from error
        column = column or _column(row, where)
        yield _prompt(row.get(column) if isinstance(row, dict) else None, where, column)
    if is_empty:
        raise DataError(f"prompts: {path} is empty")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines, counted from 1; none is longer than the memory of an ordinary machine holds.

    Raises:
        DataError: if the file cannot be read as lines of text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise DataError(
                        f"prompts: line {number} of {path} has {_LONGEST_LINE} characters or more: "
                        "one prompt per line is read"
                    )
                yield number, line.rstrip("\n")
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"prompts: {path} cannot be read: {error}") from error


def _column(row: Any, where: str) -> str:
    found = [name for name in COLUMNS if isinstance(row, dict) and name in row]
    if not found:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has none of {', '.join(COLUMNS)} ({keys}); set prompts.column")
    return found[0]


def _from_hub(wanted: PromptSet) -> list[Any]:
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
        texts = list(rows[column])
    except Exception as error:  # the library raises whatever its transports do
        raise DataError(
            f"{wanted.source} ({data.hub_id}, split {wanted.split}) cannot be had from the hub: "
            f"{type(error).__name__}: {error}\n{instead}"
        ) from error
    return texts
