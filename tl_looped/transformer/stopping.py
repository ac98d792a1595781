"""When a generated text has ended: by a token, or by a string in the reply.

Decisions: the tokens that end a text are the tokenizer's EOS, those of the checkpoint's
``generation_config.json`` (an instruction-tuned model often ends its turn with another token), and
the token that the chat template writes after a message of the assistant; ``eos_token_id=`` takes
the place of all of them. A stop string ends a row as in transformers: as soon as the decoded reply
contains it, and the token that completes it stays. Unlike there, it must lie within the reply: what
the prompt ends with does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.checks import described
from tl_looped.errors import ArgumentTypeError, InputError

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


def checked_criteria(given: Any) -> tuple[Any, ...]:
    """One or several of transformers' ``StoppingCriteria``, or their kin, as a tuple.

    Raises:
        ArgumentTypeError: for what cannot be called.
    """
    criteria = given if isinstance(given, (list, tuple)) else (given,) if given is not None else ()
    for criterion in criteria:
        if not callable(criterion):
            raise ArgumentTypeError(
                "stopping_criteria must be one of transformers' StoppingCriteria, or several, got "
                f"{described(criterion)}"
            )
    return tuple(criteria)


class Ends:
    """Where each row's reply ends.

    Args:
        n_rows: Rows.
        tokens: Ids that end a row; a special one is not part of its text.
        strings: Texts that end a row, and are part of it.
        tokenizer: None without one.
        criteria: Called with all tokens and the newest logits; they say which rows end.

    Attributes:
        lengths: Tokens of each row's reply that are text; None of a row that goes on.
    """

    def __init__(
        self,
        n_rows: int,
        tokens: list[int],
        strings: tuple[str, ...],
        tokenizer: Any,
        criteria: tuple[Any, ...] = (),
    ) -> None:
        self.criteria = criteria
        self.tokens, self.strings, self.tokenizer = tokens, strings, tokenizer
        self.special = set() if tokenizer is None else special_ids(tokenizer)
        self.lengths: list[int | None] = [None] * n_rows
        self._replies: list[list[int]] = [[] for _ in range(n_rows)]

    def done(self, device: torch.device) -> Bool[Tensor, " batch"]:
        """Which rows have ended."""
        return torch.tensor([length is not None for length in self.lengths], device=device)

    def note(self, new: Int[Tensor, " batch"], stopped: Sequence[bool] | None = None) -> None:
        """Take in the next token of every row, and which rows end with it for other reasons."""
        if not self.tokens and not self.strings and not stopped:
            return
        for row, token in enumerate(new.tolist()):
            reply = self._replies[row]
            if self.lengths[row] is not None:
                continue
            if token in self.tokens:
                self.lengths[row] = len(reply) + (token not in self.special)
                continue
            reply.append(token)
            if (stopped and stopped[row]) or (self.strings and self._contains_one(reply)):
                self.lengths[row] = len(reply)

    def by_criteria(
        self, tokens: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch d_vocab"]
    ) -> list[bool] | None:
        """Which rows the criteria end, given all tokens and the logits that the last are from."""
        if not self.criteria:
            return None
        n = len(tokens)
        stopped = torch.zeros(n, dtype=torch.bool)
        for criterion in self.criteria:
            said = torch.as_tensor(criterion(tokens, logits)).to("cpu", torch.bool)
            if said.shape not in ((), (n,)):
                raise InputError(
                    f"{type(criterion).__name__} in stopping_criteria returned shape "
                    f"{tuple(said.shape)}: one truth value for each of the {n} rows is wanted"
                )
            stopped |= said
        return cast(list[bool], stopped.tolist())

    def _contains_one(self, reply: list[int]) -> bool:
        text = self.tokenizer.decode(reply, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)
