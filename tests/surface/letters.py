"""A tokenizer that needs no download."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def letters(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters; TransformerLens wants one that it can load again."""
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", "<pad>", *" abcdefghijklmnopqrstuvwxyz."])}
    characters = Tokenizer(models.BPE(vocab, merges=[]))
    characters.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=characters, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
