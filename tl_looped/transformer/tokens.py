"""Text to tokens and back, with TransformerLens's method names.

Decisions: BOS is prepended here, by id, and never by the tokenizer; ``cfg.default_prepend_bos``
says whether, and if it does not, the tokenizer's own habit (``tl_looped.model.bos``). It is never
there twice: a text that begins with it gets none. Text that is longer than the context is an error
unless ``truncate=True`` is asked for (TransformerLens truncates by default). Text batches carry
their own mask. In a batch given as *tokens*, leading and trailing pad tokens are padding; where the
pad token is also BOS or EOS, only leading ones that some rows have and others have not. Pass
``attention_mask`` to say otherwise.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.errors import InputError, TokenizerError
from tl_looped.model.bos import adds_bos, bos_sentence, with_bos
from tl_looped.transformer.reading import Chats, Given, Rows, Tokens, read_input, read_rows
from tl_looped.transformer.text_length import checked_lengths
from tl_looped.transformer.vocabulary import refuse_larger
from tl_looped.transformer.weights import WeightsMixin

_SPECIAL = ("pad", "bos", "eos")


def written(
    messages: list[dict[str, Any]], tokenizer: Any, model: str, add_generation_prompt: bool = True
) -> str:
    """A conversation as a tokenizer's chat template writes it; ``model`` is for errors.

    Raises:
        TokenizerError: if the tokenizer has no chat template, or one that refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise TokenizerError(f"the tokenizer of {model} has no chat template: give text instead")
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # the template's own, and jinja's
        raise TokenizerError(
            f"the chat template refuses the conversation ({type(error).__name__}: {error})"
        ) from error
    return str(text)


class TokensMixin(WeightsMixin):
    """The tokenizer's side of a model."""

    state_seed: int

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer, or None for a model of token ids only.

        Raises:
            TokenizerError: when one is set that gives ids without an embedding.
        """
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        refuse_larger(tokenizer, self.cfg.d_vocab)
        self._tokenizer = tokenizer

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Use this tokenizer from now on.

        Args:
            tokenizer: A Hugging Face tokenizer.
            default_padding_side: ``"left"`` or ``"right"``; the tokenizer's own if None.

        Raises:
            TokenizerError: if it gives ids for which the model has no embedding.
        """
        if default_padding_side not in (None, "left", "right"):
            raise InputError(
                f"default_padding_side must be 'left' or 'right', got {default_padding_side!r}"
            )
        before = self.tokenizer
        self.tokenizer = tokenizer
        if self.cfg.bos_from == "tokenizer" and self._bos_decided_by(before) == "tokenizer":
            self.cfg.default_prepend_bos = None  # the new one's habit takes the old one's place
        self._settle_bos()
        if default_padding_side is not None:
            tokenizer.padding_side = default_padding_side

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.cfg.model_name} has no tokenizer, so it takes token ids only; "
                "set model.tokenizer to use text"
            )
        return self.tokenizer

    def _settle_bos(self) -> None:
        """Ask the tokenizer for its habit, if there is one and the configuration does not say."""
        if self.tokenizer is not None and self.cfg.default_prepend_bos is None:
            self.cfg.default_prepend_bos = adds_bos(self.tokenizer)
            self.cfg.bos_from = "tokenizer"

    def _prepends(self, prepend_bos: bool | None) -> bool:
        """Whether a text of this call gets a BOS token."""
        if prepend_bos is not None:
            return prepend_bos
        self._settle_bos()
        return bool(self.cfg.default_prepend_bos)

    def _bos_decided_by(self, tokenizer: Any) -> str:
        """``cfg.bos_from``; ``"caller"`` where the field was changed by hand after loading."""
        if self.cfg.bos_from != "tokenizer" or tokenizer is None:
            return self.cfg.bos_from
        unchanged = self.cfg.default_prepend_bos == adds_bos(tokenizer)
        return "tokenizer" if unchanged else "caller"

    def describe_bos(self, prepend_bos: bool | None = None) -> str:
        """A sentence: whether text gets a BOS token, and who decided it.

        Args:
            prepend_bos: Of the call that is described, if it says otherwise.
        """
        if self.tokenizer is None:
            return "there is no tokenizer, so no text is read"
        prepends = self._prepends(prepend_bos)
        decided_by = "caller" if prepend_bos is not None else self._bos_decided_by(self.tokenizer)
        return bos_sentence(self.tokenizer, prepends, decided_by)

    def _bos_id(self) -> int:
        bos = self._need_tokenizer().bos_token_id
        if bos is None:
            raise TokenizerError("prepend_bos=True, but the tokenizer has no BOS token")
        return int(bos)

    def _pad_id(self) -> int:
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(self.tokenizer, name, None)
            if found is not None:
                return int(found)
        return 0  # never seen by a real token: text batches are masked

    def tokenize(
        self,
        text: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        truncate: bool = False,
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Tokens of one or more texts, and the mask of the real ones.

        Args:
            text: One text or several, padded to the longest, or conversations: see
                ``tl_looped.transformer.reading``. A conversation is written by :meth:`chat_text`,
                with the opening of the model's reply, and gets no BOS but the template's own.
            prepend_bos: Overrides ``cfg.default_prepend_bos``. A text that begins with BOS gets
                no second one either way.
            padding_side: ``"left"`` or ``"right"``; the tokenizer's own side if None.
            truncate: Cut rows to the context length instead of raising.

        Raises:
            TokenizerError: without a tokenizer, or if a text gives no token at all.
            InputError: if a text is longer than the context or no text, or padding_side is unknown.
        """
        texts, prepend_bos = self._texts(read_input(text), prepend_bos)
        tokenizer = self._need_tokenizer()
        prepend_bos = self._prepends(prepend_bos)
        side = padding_side or getattr(tokenizer, "padding_side", None) or "right"
        if side not in ("left", "right"):
            raise InputError(f"padding_side must be 'left' or 'right', got {side!r}")
        fitting = checked_lengths(tokenizer, texts, None if truncate else self.cfg.n_ctx)
        rows = [tokenizer.encode(t, add_special_tokens=False) for t in fitting]
        if prepend_bos:
            rows = [with_bos(row, self._bos_id()) for row in rows]
        for i, row in enumerate(rows):
            if not row:
                raise TokenizerError(f"text {i} ({texts[i]!r}) gives no token; prepend_bos=True?")
            if len(row) > self.cfg.n_ctx and not truncate:
                raise InputError(
                    f"text {i} has {len(row)} tokens, the context holds {self.cfg.n_ctx}: "
                    "shorten it, or cut it with to_tokens(..., truncate=True)"
                )
        rows = [row[: self.cfg.n_ctx] for row in rows]
        length = max(map(len, rows))
        tokens = torch.full((len(rows), length), self._pad_id())
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            tokens[i, where] = torch.tensor(row)
            mask[i, where] = True
        return tokens.to(self.W_E.device), mask.to(self.W_E.device)

    def _texts(self, given: Given, prepend_bos: bool | None) -> tuple[list[str], bool | None]:
        """The texts of an input, and whether they get BOS: a chat template writes its own."""
        if isinstance(given, Tokens):
            raise InputError(
                f"text is needed here, got token ids of shape {tuple(given.tokens.shape)}"
            )
        if isinstance(given, Chats):
            texts = [self.chat_text(messages) for messages in given.chats]
            return texts, False if prepend_bos is None else prepend_bos
        for number, text in enumerate(given.texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"text {number} holds half of a surrogate pair at character {error.start}, "
                    "which is no character: read it with the right encoding, or drop it by "
                    "text.encode(errors='ignore').decode()"
                ) from error
        return given.texts, prepend_bos

    def chat_text(self, messages: Any, add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it, special tokens included.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            add_generation_prompt: End with the opening of the model's reply.

        Raises:
            TokenizerError: without a tokenizer, or if it has no chat template, or one that refuses
                the messages.
            InputError: if they are no messages.
        """
        tokenizer, given = self._need_tokenizer(), read_input(messages)
        if not isinstance(given, Chats) or given.many:
            raise InputError("chat_text takes one conversation, a list of messages")
        return written(given.chats[0], tokenizer, self.cfg.model_name, add_generation_prompt)

    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of texts or conversations, padded to the longest; see :meth:`tokenize`."""
        tokens, mask = self.tokenize(input, prepend_bos, padding_side, truncate)
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        if ids == (None, None) and not bool(mask.all()):
            raise TokenizerError(
                "texts of unequal length need padding, but the tokenizer has neither a pad nor an "
                "EOS token: give the texts to the model itself, or set tokenizer.pad_token"
            )
        return tokens if move_to_device else tokens.cpu()

    def _padding(
        self, tokens: Int[Tensor, "batch pos"], prepend_bos: bool | None = None
    ) -> Bool[Tensor, "batch pos"] | None:
        """Mask of a token batch, read off its pad tokens; None if it has no padding.

        A pad token that is neither BOS nor EOS is padding wherever it leads or ends a row. One that
        is also BOS or EOS may be meant, so only leading runs that some rows have and others have
        not are padding, less the BOS token itself.
        """
        ids = {name: getattr(self.tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
        pad = ids["eos"] if ids["pad"] is None else ids["pad"]
        if pad is None:
            return None
        is_pad = tokens == pad
        leading = is_pad.long().cumprod(-1).sum(-1)
        trailing = torch.zeros_like(leading)
        if pad in (ids["bos"], ids["eos"]):
            if pad == ids["bos"] and self._prepends(prepend_bos):
                leading = (leading - 1).clamp(min=0)
            if int(leading.min()) > 0:
                return None
        else:
            trailing = is_pad.flip(-1).long().cumprod(-1).sum(-1)
        if not bool(leading.any() or trailing.any()):
            return None
        at = torch.arange(tokens.shape[1], device=tokens.device)
        return (at >= leading[:, None]) & (at < tokens.shape[1] - trailing[:, None])

    def to_string(self, tokens: Any) -> str | list[str]:
        """Text of one token, of a sequence, or a list of texts of several, of any lengths."""
        tokenizer = self._need_tokenizer()
        if isinstance(tokens, (int, np.integer)):
            tokens = [tokens]
        if isinstance(tokens, (list, tuple)) and not tokens:
            return ""
        given = read_rows(tokens)
        if isinstance(given, Rows):
            return [str(self.to_string(row)) for row in given.rows]
        if not isinstance(given, Tokens):
            raise InputError("to_string takes token ids, got text")
        ids = given.tokens
        if ids.ndim > 2:
            raise InputError(f"tokens must have at most 2 dimensions, got shape {tuple(ids.shape)}")
        if ids.ndim == 2:
            return [str(self.to_string(row)) for row in ids]
        flat = ids.reshape(-1).tolist()
        return str(tokenizer.decode(flat, clean_up_tokenization_spaces=False))

    def to_str_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> list[str] | list[list[str]]:
        """Each token as a string; a list of texts, conversations or token sequences gives a list of
        such lists, unpadded.
        """
        given = read_rows(input)
        if isinstance(given, Rows):
            return [cast(list[str], self.to_str_tokens(row, prepend_bos)) for row in given.rows]
        if isinstance(given, Tokens):
            squeezed = Tokens(given.tokens.squeeze(), None, given.many)
            return self._strings(self._one_sequence("to_str_tokens", squeezed))
        texts, prepend_bos = self._texts(given, prepend_bos)
        found = [self._strings(self.tokenize(text, prepend_bos)[0][0]) for text in texts]
        return found if given.many else found[0]

    def _strings(self, ids: Int[Tensor, " pos"]) -> list[str]:
        return [str(self.to_string(token)) for token in ids]

    def _one_sequence(self, method: str, given: Tokens) -> Int[Tensor, " pos"]:
        """The only row of tokens."""
        ids = given.tokens
        if ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1):
            raise InputError(f"{method} takes one sequence, got shape {tuple(ids.shape)}")
        return ids.reshape(-1)

    def to_single_token(self, string: str) -> int:
        """The id of a text that is exactly one token.

        Raises:
            TokenizerError: if it is none or several; the message lists them.
        """
        ids = self.tokenize(string, prepend_bos=False)[0][0]
        if len(ids) != 1:
            raise TokenizerError(
                f"{string!r} is not a single token but {self.to_str_tokens(string, False)}"
            )
        return int(ids[0])

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        return str(self.to_string(torch.tensor([int_token])))

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Position of a token in a text, a conversation or tokens ``[pos]`` or ``[1, pos]``.

        Raises:
            InputError: if it does not occur, if there is more than one sequence, or if ``mode``
                is neither ``"first"`` nor ``"last"``.
        """
        if mode not in ("first", "last"):
            raise InputError(f"mode must be 'first' or 'last', got {mode!r}")
        given = read_input(input)
        if not isinstance(given, Tokens):
            given = Tokens(self.tokenize(given, prepend_bos)[0], None, given.many)
        ids = self._one_sequence("get_token_position", given)
        is_text = isinstance(single_token, str)
        token = self.to_single_token(str(single_token)) if is_text else int(single_token)
        found = (ids == token).nonzero().flatten().tolist()
        if not found:
            raise InputError(f"token {single_token!r} does not occur in the prompt")
        return int(found[0 if mode == "first" else -1])

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "..."]
    ) -> Float[Tensor, "... d_model"]:
        """Columns of W_U of the given tokens, as rows.

        As in TransformerLens, a single token gives ``[d_model]``. The final norm's gain is folded
        in only in compatibility mode; the exact direction of a logit is always
        ``ln_final.w * W_U[:, token]``.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, int) or tokens.numel() == 1:
            return self._home(self.unembed.directions(int(tokens)))
        return self._home(self.unembed.directions(tokens))
