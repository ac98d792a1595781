"""From a jsonl file of problems to packed token rows.

Each problem is one document, ``question`` newline ``answer``, between BOS and EOS; GSM8K's
calculator notes (``<<48/2=24>>``) are taken out. Documents are joined in a seeded order and cut
into rows of one context length each, so a row may hold the end of one and the start of another.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_looped.errors import DataError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
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
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            problem = json.loads(line)
            text = f"{problem['question']}\n{problem['answer']}"
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: expected an object with question and answer ({error!r})"
            ) from error
        texts.append(_CALCULATOR_NOTE.sub("", text))
    if not texts:
        raise DataError(f"{path} holds no problem")
    return texts


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


def pack(texts: list[str], tokenizer: Any, length: int) -> Int[Tensor, "row length"]:
    """Documents between BOS and EOS, joined and cut into rows; the rest at the end is dropped.

    Raises:
        DataError: if the texts do not fill one row.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        stream += [bos, *tokenizer.encode(text, add_special_tokens=False), eos]
    n = len(stream) // length
    if n == 0:
        raise DataError(f"{len(stream)} tokens do not fill one row of {length}")
    return torch.tensor(stream[: n * length]).reshape(n, length)
