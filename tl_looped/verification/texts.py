"""Bundled English texts, of our own writing: what plausibility is measured on.

Some 2,000 words in several registers: encyclopaedic prose, stories, dialogues, letters,
instructions, code, and word problems with worked answers in the manner of GSM8K, which are all that
the small bundled models know. None is a quotation, so that no model has seen them in training.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TEXTS = Path(__file__).parents[1] / "data" / "verification_texts.jsonl"
"""One JSON object a line, ``register`` and ``text``."""


@dataclass(frozen=True)
class BundledText:
    """One text.

    Args:
        register: Its kind, such as ``"story"``.
        text: Of some 50 to 130 words.
    """

    register: str
    text: str


@cache
def bundled_texts() -> tuple[BundledText, ...]:
    """All texts, in the order of the file."""
    lines = TEXTS.read_text(encoding="utf-8").splitlines()
    return tuple(BundledText(**json.loads(line)) for line in lines)


@cache
def texts_digest() -> str:
    """SHA-256 of the file; losses of two certificates compare where it is the same."""
    return hashlib.sha256(TEXTS.read_bytes()).hexdigest()
