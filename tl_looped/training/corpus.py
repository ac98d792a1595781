"""From text files, jsonl files or a hub data set to packed token rows.

Each text is one document between BOS and EOS. Documents are joined in a seeded order and cut into
rows of one context length each, so a row may hold the end of one and the start of another. A jsonl
line holds ``text``, or ``question`` and ``answer``, which are joined by a newline; GSM8K's
calculator notes (``<<48/2=24>>``) are then taken out. A text file's documents are its paragraphs,
which blank lines part. No document may be longer than ``LONGEST``: a tokenizer needs some 190 times
a text's size in memory, and ends the whole process where there is not as much.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_looped.errors import CheckpointError, DataError
from tl_looped.model.bos import with_bos
from tl_looped.training.saved import saving

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
LONGEST = 2**22
"""Characters of the longest document, four million: a long novel."""

_CALCULATOR_NOTE = re.compile(r"<<[^>]*>>")


def read_problems(path: Path) -> list[str]:
    """Texts of a jsonl file with ``question`` and ``answer`` in every line.

    Raises:
        DataError: no file, no line, or a line that is not such an object (its number is given).
    """
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. The demo model was trained on GSM8K's training split "
            '(openai/gsm8k on the hub) as jsonl, one {"question": ..., "answer": ...} a line.'
        )
    texts = _json_lines(path, "question and answer", _problem)
    if not texts:
        raise DataError(f"{path} holds no problem")
    return texts


def read_texts(source: str) -> list[str]:
    """Documents of a file, a folder or a hub data set.

    Args:
        source: A ``.txt`` or ``.jsonl`` file, a folder of them (in the order of their names), or
            ``hub:NAME``, ``hub:NAME:SPLIT``, ``hub:NAME:CONFIG:SPLIT`` for a data set of the hub
            (``train`` if no split is given), which needs the package ``datasets``. Hub rows hold
            the same fields as jsonl lines.

    Raises:
        DataError: nothing there, another kind of file, a line that is not a document (its number
            is given), a document longer than ``LONGEST`` or with half of a surrogate pair, no
            document at all, or a data set that cannot be had.
    """
    if source.startswith("hub:"):
        texts = _hub_texts(source)
    else:
        texts = [text for file in _files(Path(source)) for text in _file_texts(file)]
    if not texts:
        raise DataError(f"{source} holds no text: an empty corpus cannot be trained on")
    return texts


def _files(path: Path) -> list[Path]:
    try:
        if path.is_dir():
            return sorted(p for p in path.iterdir() if p.suffix in (".txt", ".jsonl"))
        if path.is_file():
            return [path]
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise DataError(f"{path} cannot be read: {error}") from error
    raise DataError(f"{path} does not exist: give a file, a folder or hub:NAME")


def _file_texts(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return _json_lines(path, "text, or question and answer", _document)
    if path.suffix != ".txt":
        raise DataError(f"{path} must be a .txt or a .jsonl file")
    paragraphs = re.split(r"\n[ \t]*\n", _utf8(path))
    try:
        return [_checked(text.strip()) for text in paragraphs if text.strip()]
    except ValueError as error:
        raise DataError(f"{path}: {error}; blank lines part the documents of a text") from error


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _json_lines(path: Path, wanted: str, document: Callable[[Any], str]) -> list[str]:
    texts = []
    # Not splitlines(): JSON strings may hold other line separators.
    for number, line in enumerate(_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            texts.append(document(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: expected an object with {wanted} ({error!r})"
            ) from error
    return texts


def _problem(row: Any) -> str:
    for name in ("question", "answer"):
        if not isinstance(row[name], str):
            raise TypeError(f"{name} is {type(row[name]).__name__}")
    return _checked(_CALCULATOR_NOTE.sub("", f"{row['question']}\n{row['answer']}"))


def _document(row: Any) -> str:
    if isinstance(row, dict) and not {"text", "question"} & {*row} and "messages" in row:
        raise ValueError(
            "conversations are not taken: write the text of each with "
            "model.chat_text(messages, add_generation_prompt=False)"
        )
    if not isinstance(row, dict) or "text" not in row:
        return _problem(row)
    if not isinstance(row["text"], str):
        raise TypeError(f"text is {type(row['text']).__name__}")
    return _checked(row["text"])


def _checked(text: str) -> str:
    """A text that a tokenizer takes.

    Raises:
        ValueError: it is too long, or holds half of a surrogate pair.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a document of {len(text):,} characters is longer than {LONGEST:,}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"half of a surrogate pair, {half!r}, is not a character") from None
    return text


def _hub_texts(source: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source} needs the package datasets: pip install datasets, or give a file"
        ) from error
    name, *rest = source.removeprefix("hub:").split(":")
    if not name or len(rest) > 2:
        raise DataError(f"expected hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT, got {source}")
    split = rest[-1] if rest else "train"
    try:
        rows = datasets.load_dataset(name, *rest[:-1], split=split)
    except Exception as error:
        raise DataError(f"{source} cannot be loaded: {type(error).__name__}: {error}") from error
    try:
        return [_document(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source} ({error!r}): expected rows with text, or question and answer; the columns "
            f"are {rows.column_names}"
        ) from error


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; digits are tokens of their own, so numbers are spelled out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def shared_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder; :func:`train_tokenizer`'s, saved there, if there is none.

    Raises:
        CheckpointError: if the folder's cannot be read, or has no BOS and EOS.
    """
    if not (folder / "tokenizer.json").is_file():
        partial = folder.with_name(folder.name + ".partial")
        made = train_tokenizer(texts, vocab_size)
        shutil.rmtree(partial, ignore_errors=True)
        with saving(partial):
            made.save_pretrained(partial)
            partial.replace(folder)
    return read_trained_tokenizer(folder)


def read_trained_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder.

    Raises:
        CheckpointError: if there is none, or it cannot be read, or has no BOS and EOS.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{folder} holds no tokenizer that can be read: {error}") from error
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer in {folder} has no BOS or no EOS token")
    return tokenizer


def split(texts: list[str], held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Shuffle and set the first ``held_out`` texts aside: ``(training, held out)``.

    Raises:
        DataError: if nothing would be left for training.
    """
    if not 0 < held_out < len(texts):
        raise DataError(f"held_out must be 1..{len(texts) - 1} of {len(texts)}, got {held_out}")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [texts[i] for i in order]
    return shuffled[held_out:], shuffled[:held_out]


def pack(
    texts: list[str], tokenizer: Any, length: int, prepend_bos: bool = True
) -> Int[Tensor, "row length"]:
    """Documents between BOS and EOS, joined and cut into rows; the rest at the end is dropped.

    Args:
        texts: The documents.
        tokenizer: With EOS, and BOS if it is prepended.
        length: Tokens per row.
        prepend_bos: Whether BOS begins each document; EOS alone parts them otherwise.

    Raises:
        DataError: if the texts do not fill one row.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        # Not verbose: a document may be longer than the context, since rows are cut afterwards.
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        stream += [*(with_bos(ids, bos) if prepend_bos else ids), eos]
    n = len(stream) // length
    if n == 0:
        raise DataError(f"{len(stream)} tokens do not fill one row of {length}")
    return torch.tensor(stream[: n * length]).reshape(n, length)
