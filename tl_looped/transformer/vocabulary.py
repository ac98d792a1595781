"""A tokenizer against the model's embedding: every id that it can give must have a row."""

from __future__ import annotations

from typing import Any

from tl_looped.errors import TokenizerError


def refuse_larger(tokenizer: Any, d_vocab: int) -> None:
    """Raise if a tokenizer gives ids for which there is no embedding.

    Not its length counts but its ids: there may be holes between them.

    Args:
        tokenizer: A Hugging Face tokenizer; anything without ``get_vocab`` passes.
        d_vocab: Rows of the embedding.

    Raises:
        TokenizerError: it does; some are named.
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
