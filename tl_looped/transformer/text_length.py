"""Whether a text can be tokenized: it fits the context, as far as its length tells, and the memory.

A tokenizer takes some 200 bytes of memory per byte of text, and where they cannot be had it ends
the whole process. So a text is looked at before. Of tokenizers that lose nothing of a text (BPE
over all bytes, without a step that drops or shortens anything) the longest token says how much text
the context can hold at most; what is longer is certainly too long. Of other tokenizers nothing is
known: one token may stand for a word of any length, or none for white space. There, and where a
text is to be cut to the context, only the memory is a limit: the beginning of a text need not have
the first tokens of the whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tl_looped.errors import InputError
from tl_looped.transformer.cache_size import free_bytes, readable

_SHORT = 2**18  # characters that are tokenized without a look
_BYTES_PER_BYTE = 256  # of memory for text; 190 were measured
_KEEPS_ALL = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"}
# A canonical composition is of at most four characters of at most four bytes each.
_NFC_SHORTENS = 16


def checked_lengths(tokenizer: Any, texts: Sequence[str], n_tokens: int | None) -> Iterator[str]:
    """The texts, each looked at before it is given out.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        n_tokens: The most that a text may have; None if it is cut.

    Raises:
        InputError: for a text that certainly has more tokens, or for which there is no memory.
    """
    for number, text in enumerate(texts):
        if n_tokens is not None and is_surely_longer(tokenizer, text, n_tokens):
            raise InputError(
                f"text {number} has {len(text)} characters, more than the context of {n_tokens} "
                "tokens holds: shorten it, or cut it with to_tokens(..., truncate=True)"
            )
        if len(text) > _SHORT:
            needed, free = _BYTES_PER_BYTE * len(text.encode()), free_bytes(torch.device("cpu"))
            if free is not None and needed > free:
                raise InputError(
                    f"text {number} has {len(text)} characters: tokens of it may take "
                    f"{readable(needed)} of memory, and {readable(free)} are free: shorten it"
                )
        yield text


def is_surely_longer(tokenizer: Any, text: str, n_tokens: int) -> bool:
    """Whether a text has more tokens than so many, as far as its length alone tells."""
    if len(text) <= max(_SHORT, n_tokens):
        return False
    longest = longest_token(tokenizer)
    return longest is not None and len(text.encode()) > n_tokens * longest


def longest_token(tokenizer: Any) -> int | None:
    """The most bytes of text that one token can stand for; None if that is not bounded."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    about = json.loads(backend.to_str())
    model, added = about["model"], about.get("added_tokens") or []
    shortens = _shortening(about.get("normalizer"))
    splitters = _parts(about.get("pre_tokenizer"), "pretokenizers")
    if (
        model.get("type") != "BPE"
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or shortens is None
        or not all(
            part["type"] in _KEEPS_ALL and part.get("behavior") != "Removed" for part in splitters
        )
        or any(token.get("lstrip") or token.get("rstrip") for token in added)
    ):
        return None
    vocab = model["vocab"]
    if any(part["type"] == "ByteLevel" for part in splitters):
        # Each byte is written as a character of its own.
        has_all_bytes = len({token for token in vocab if len(token) == 1} & _byte_letters()) == 256
        longest = max(map(len, vocab))
    else:
        has_all_bytes = bool(model.get("byte_fallback")) and all(
            f"<0x{byte:02X}>" in vocab for byte in range(256)
        )
        longest = max(len(token.encode()) for token in vocab)
    if not has_all_bytes:
        return None  # what is not in the vocabulary may go, or become one token in any length
    most = max([longest, *(len(token["content"].encode()) * 4 for token in added)])
    return most * shortens


def _shortening(normalizer: Any) -> int | None:
    """The factor by which normalization may shorten a text; None if that is not bounded."""
    factor = 1
    for part in _parts(normalizer, "normalizers"):
        if part["type"] == "NFC":
            factor *= _NFC_SHORTENS
        elif part["type"] == "Replace":
            old, new = part["pattern"].get("String"), part["content"]
            if old is None or len(new.encode()) < len(old.encode()):
                return None
        elif part["type"] != "Prepend":
            return None
    return factor


def _parts(step: Any, key: str) -> list[Any]:
    """The steps of which a step of a tokenizer consists."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [part for one in step[key] for part in _parts(one, key)]


def _byte_letters() -> set[str]:
    """The characters that a byte-level tokenizer writes bytes as: printable Latin-1 as it is."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return {chr(n) for n in printable} | {chr(0x100 + n) for n in range(256 - len(printable))}
