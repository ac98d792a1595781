"""The beginning-of-text token: whether a tokenizer adds it by itself; never is it there twice.

Decisions: a model whose configuration does not say otherwise does with text what its tokenizer
does. BOS is prepended as an id, to text that was tokenized without special tokens; a text that
begins with it, as many chat templates write, gets no second one. What else a tokenizer may add, at
the end or before BOS, is not added: hooks and positions count the tokens of the text.
"""

from __future__ import annotations

from typing import Any

_PLAIN = "a"


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its BOS token before a plain text, asked of the tokenizer itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    bare = tokenizer.encode(_PLAIN, add_special_tokens=False)
    return bool(tokenizer.encode(_PLAIN)[:1] == [bos] != bare[:1])


def adds_eos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its EOS token behind a plain text, asked of the tokenizer itself."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return False
    bare = tokenizer.encode(_PLAIN, add_special_tokens=False)
    return bool(tokenizer.encode(_PLAIN)[-1:] == [eos] != bare[-1:])


def with_bos(ids: list[int], bos: int) -> list[int]:
    """The tokens of a text behind one BOS token, which may be there already."""
    return ids if ids[:1] == [bos] else [bos, *ids]


def bos_sentence(tokenizer: Any, prepends: bool, decided_by: str, adds: bool | None = None) -> str:
    """Whether text gets a BOS token, and who says so.

    Args:
        tokenizer: The model's.
        prepends: Whether it gets one.
        decided_by: As in ``LoopedConfig.bos_from``.
        adds: Whether the tokenizer adds one by itself, asked of ``tokenizer`` if None. A
            ``TransformerBridge`` switches it on in its own copy, which then cannot be asked.
    """
    own = "adds one" if (adds_bos(tokenizer) if adds is None else adds) else "adds none"
    who = {
        "tokenizer": f"as its tokenizer does, which {own} by itself",
        "config": f"as the model's configuration says (its tokenizer {own} by itself)",
        "caller": f"as was asked for (its tokenizer {own} by itself)",
    }[decided_by]
    which = f" {tokenizer.bos_token!r}" if prepends else ""
    return f"text is read {'with' if prepends else 'without'} BOS{which}, {who}"
