"""A tokenizer against the model's embedding: every id that it can give must have a row."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_looped.checks import described
from tl_looped.errors import InputError, TokenizerError


def refuse_larger(tokenizer: Any, d_vocab: int) -> None:
    """Raise if a tokenizer gives ids for which there is no embedding.

    Not its length counts but its ids: there may be holes between them.

    Args:
        tokenizer: A Hugging Face tokenizer, or None; one without ``get_vocab`` passes.
        d_vocab: Rows of the embedding.

    Raises:
        TokenizerError: if it does; some are named.
    """
    if not hasattr(tokenizer, "get_vocab"):
        return
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= d_vocab)
    if beyond:
        named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:3])
        more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        raise TokenizerError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {d_vocab}: {named}"
            f"{more} would have no embedding. Use the tokenizer that the model was trained with, "
            "take these tokens out of its files, or give the model an embedding that has them"
        )


def check_ids(tokens: Tensor, d_vocab: int = 2**31) -> Int[Tensor, "*any"]:
    """Token ids of any shape, below ``d_vocab``.

    Raises:
        InputError: for other numbers, or ids outside the vocabulary.
    """
    if tokens.dtype != torch.int64:
        raise InputError(f"tokens must be integers, got {described(tokens)}")
    if tokens.numel() and tokens.device.type != "meta":
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= d_vocab:
            raise InputError(f"token ids must be 0..{d_vocab - 1}, got {low if low < 0 else high}")
    return tokens
