"""When a generated text has ended: by a token, or by a string in the reply.

Decisions: the tokens that end a text are the tokenizer's EOS, those of the checkpoint's
``generation_config.json`` (an instruction-tuned model often ends its turn with another token), and
the token that the chat template writes after a message of the assistant; ``eos_token_id=`` takes
the place of all of them. A stop string ends a row as in transformers: as soon as the decoded reply
contains it, and the token that completes it stays. Unlike there, it must lie within the reply: what
the prompt ends with does not count.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_looped.errors import InputError

_REPLY = "Xylophone"


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that a chat template writes after the assistant's reply, or None.

    Found by writing a conversation. None without a template, if the template refuses the
    conversation, and if something other than a special token comes after the reply.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _REPLY}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # the template's own: it takes other roles, or more
        return None
    _, found, after = text.rpartition(_REPLY)
    ids = tokenizer.encode(after.strip(), add_special_tokens=False) if found else []
    if not ids or ids[0] == tokenizer.bos_token_id or ids[0] not in special_ids(tokenizer):
        return None
    return int(ids[0])


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that a tokenizer leaves out of text when it is asked to."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def checked_strings(given: Any) -> tuple[str, ...]:
    """Stop strings as a tuple.

    Raises:
        InputError: for what is not text, or an empty one, which every reply contains.
    """
    strings = (given,) if isinstance(given, str) else given
    strings = () if strings is None else strings
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) and s for s in strings):
        raise InputError(
            f"stop_strings must be a text or a list of texts, none of them empty, got {given!r}"
        )
    return tuple(strings)


class Ends:
    """Where each row's reply ends.

    Args:
        n_rows: Rows.
        tokens: Ids that end a row; a special one is not part of its text.
        strings: Texts that end a row, and are part of it.
        tokenizer: None without one.

    Attributes:
        lengths: Tokens of each row's reply that are text; None of a row that goes on.
    """

    def __init__(
        self, n_rows: int, tokens: list[int], strings: tuple[str, ...], tokenizer: Any
    ) -> None:
        self.tokens, self.strings, self.tokenizer = tokens, strings, tokenizer
        self.special = set() if tokenizer is None else special_ids(tokenizer)
        self.lengths: list[int | None] = [None] * n_rows
        self._replies: list[list[int]] = [[] for _ in range(n_rows)]

    def done(self, device: torch.device) -> Bool[Tensor, " batch"]:
        """Which rows have ended."""
        return torch.tensor([length is not None for length in self.lengths], device=device)

    def note(self, new: Int[Tensor, " batch"]) -> None:
        """Take in the next token of every row."""
        if not self.tokens and not self.strings:
            return
        for row, token in enumerate(new.tolist()):
            reply = self._replies[row]
            if self.lengths[row] is not None:
                continue
            if token in self.tokens:
                self.lengths[row] = len(reply) + (token not in self.special)
                continue
            reply.append(token)
            if self.strings and self._contains_one(reply):
                self.lengths[row] = len(reply)

    def _contains_one(self, reply: list[int]) -> bool:
        text = self.tokenizer.decode(reply, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)
