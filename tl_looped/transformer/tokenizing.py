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

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.checks import described, one_of, shown, whole
from tl_looped.errors import InputError, SingleTokenError, TokenizerError
from tl_looped.model.bos import adds_bos, bos_sentence, with_bos
from tl_looped.transformer.reading import (
    Chats,
    Given,
    Rows,
    Texts,
    Tokens,
    integers,
    read_input,
    read_rows,
)
from tl_looped.transformer.text_length import checked_lengths
from tl_looped.transformer.vocabulary import check_ids

if TYPE_CHECKING:
    from tl_looped.transformer.text_loop import TextLoop


_SHOWN = 8  # tokens in an error
SIDES = ("left", "right")


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


def set_tokenizer(model: TextLoop, tokenizer: Any, default_padding_side: str | None) -> None:
    """Use this tokenizer from now on."""
    if default_padding_side is not None:
        one_of(default_padding_side, "default_padding_side", SIDES)
    is_one = hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")
    if not is_one and not (tokenizer is None and default_padding_side is None):
        raise TokenizerError(f"tokenizer must be Hugging Face's, got {described(tokenizer)}")
    before = model.tokenizer
    model.tokenizer = tokenizer
    if model.cfg.bos_from == "tokenizer" and _bos_decided_by(model, before) == "tokenizer":
        model.cfg.default_prepend_bos = None  # the new one's habit takes the old one's place
    settle_bos(model)
    if default_padding_side is not None:
        tokenizer.padding_side = default_padding_side


def need_tokenizer(model: TextLoop) -> Any:
    """The tokenizer, without which there is no text."""
    if model.tokenizer is None:
        raise TokenizerError(
            f"{model.cfg.model_name} has no tokenizer, so it takes token ids only; "
            "set model.tokenizer to use text"
        )
    return model.tokenizer


def settle_bos(model: TextLoop) -> None:
    """Ask the tokenizer for its habit, if there is one and the configuration does not say."""
    if model.tokenizer is not None and model.cfg.default_prepend_bos is None:
        model.cfg.default_prepend_bos = adds_bos(model.tokenizer)
        model.cfg.bos_from = "tokenizer"


def prepends_bos(model: TextLoop, prepend_bos: bool | None) -> bool:
    """Whether a text of this call gets a BOS token."""
    if prepend_bos is not None:
        return prepend_bos
    settle_bos(model)
    return bool(model.cfg.default_prepend_bos)


def _bos_decided_by(model: TextLoop, tokenizer: Any) -> str:
    """``cfg.bos_from``; ``"caller"`` where the field was changed by hand after loading."""
    if model.cfg.bos_from != "tokenizer" or tokenizer is None:
        return model.cfg.bos_from
    unchanged = model.cfg.default_prepend_bos == adds_bos(tokenizer)
    return "tokenizer" if unchanged else "caller"


def describe_bos(model: TextLoop, prepend_bos: bool | None) -> str:
    """A sentence: whether text gets a BOS token, and who decided it."""
    if model.tokenizer is None:
        return "there is no tokenizer, so no text is read"
    prepends = prepends_bos(model, prepend_bos)
    decided_by = "caller" if prepend_bos is not None else _bos_decided_by(model, model.tokenizer)
    return bos_sentence(model.tokenizer, prepends, decided_by)


def _bos_id(model: TextLoop) -> int:
    bos = need_tokenizer(model).bos_token_id
    if bos is None:
        raise TokenizerError("prepend_bos=True, but the tokenizer has no BOS token")
    return int(bos)


def pad_id(model: TextLoop) -> int:
    """The token that fills up the rows of a batch."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(model.tokenizer, name, None)
        if found is not None:
            return int(found)
    return 0  # never seen by a real token: text batches are masked


def tokenize(
    model: TextLoop,
    text: Any,
    prepend_bos: bool | None,
    padding_side: str | None,
    truncate: bool,
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Tokens of one or more texts, and the mask of the real ones."""
    texts, prepend_bos = texts_of(model, read_input(text), prepend_bos)
    tokenizer = need_tokenizer(model)
    side = padding_side or getattr(tokenizer, "padding_side", None) or "right"
    one_of(side, "padding_side", SIDES)
    rows = _rows(model, texts, prepend_bos, truncate)
    for i, row in enumerate(rows):
        if not row:
            raise TokenizerError(f"text {i} ({texts[i]!r}) gives no token; prepend_bos=True?")
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), pad_id(model))
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, where] = torch.tensor(row)
        mask[i, where] = True
    return tokens.to(model.W_E.device), mask.to(model.W_E.device)


def _rows(
    model: TextLoop, texts: list[str], prepend_bos: bool | None, truncate: bool
) -> list[list[int]]:
    """Tokens of every text; some may have none."""
    tokenizer, n_ctx = need_tokenizer(model), model.cfg.n_ctx
    fitting = checked_lengths(tokenizer, texts, None if truncate else n_ctx)
    rows = [tokenizer.encode(t, add_special_tokens=False) for t in fitting]
    if prepends_bos(model, prepend_bos):
        rows = [with_bos(row, _bos_id(model)) for row in rows]
    for i, row in enumerate(rows):
        if len(row) > n_ctx and not truncate:
            raise InputError(
                f"text {i} has {len(row)} tokens, the context holds {n_ctx}: "
                "shorten it, or cut it with to_tokens(..., truncate=True)"
            )
    return [row[:n_ctx] for row in rows]


def row_of(model: TextLoop, text: str, prepend_bos: bool | None) -> Int[Tensor, " pos"]:
    """Tokens of one text."""
    return tokenize(model, text, prepend_bos, None, False)[0][0]


def texts_of(
    model: TextLoop, given: Given, prepend_bos: bool | None
) -> tuple[list[str], bool | None]:
    """The texts of an input, and whether they get BOS: a chat template writes its own."""
    if isinstance(given, Tokens):
        raise InputError(f"text is needed here, got token ids of shape {tuple(given.tokens.shape)}")
    if isinstance(given, Chats):
        texts = [chat_text(model, messages, True) for messages in given.chats]
        return texts, False if prepend_bos is None else prepend_bos
    for number, text in enumerate(given.texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text {number} holds half of a surrogate pair at character {error.start}, "
                "which is not a character: read it with the right encoding, or drop it by "
                "text.encode(errors='ignore').decode()"
            ) from error
    return given.texts, prepend_bos


def chat_text(model: TextLoop, messages: Any, add_generation_prompt: bool) -> str:
    """A conversation as the tokenizer's chat template writes it, special tokens included."""
    tokenizer, given = need_tokenizer(model), read_input(messages)
    if not isinstance(given, Chats) or given.many:
        raise InputError("chat_text takes one conversation, a list of messages")
    return written(given.chats[0], tokenizer, model.cfg.model_name, add_generation_prompt)


def to_tokens(
    model: TextLoop,
    input: Any,
    prepend_bos: bool | None,
    padding_side: str | None,
    move_to_device: bool,
    truncate: bool,
) -> Int[Tensor, "batch pos"]:
    """Tokens of texts or conversations, padded to the longest."""
    tokens, mask = tokenize(model, input, prepend_bos, padding_side, truncate)
    ids = (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id)
    if ids == (None, None) and not bool(mask.all()):
        raise TokenizerError(
            "texts of unequal length need padding, but the tokenizer has neither a pad nor an "
            "EOS token: give the texts to the model itself, or set tokenizer.pad_token"
        )
    return tokens if move_to_device else tokens.cpu()


def to_string(model: TextLoop, tokens: Any) -> str | list[str]:
    """Text of one token, of a sequence, or a list of texts of several, of any lengths."""
    tokenizer = need_tokenizer(model)
    if isinstance(tokens, (int, np.integer)):
        tokens = [tokens]
    if isinstance(tokens, (list, tuple)) and not tokens:
        return ""
    given = read_rows(tokens)
    if isinstance(given, Rows):
        return [str(to_string(model, row)) for row in given.rows]
    if not isinstance(given, Tokens):
        raise InputError("to_string takes token ids, got text")
    ids = given.tokens
    if ids.ndim > 2:
        raise InputError(f"tokens must have at most 2 dimensions, got shape {tuple(ids.shape)}")
    if ids.ndim == 2:
        return [str(to_string(model, row)) for row in ids]
    flat = check_ids(ids).reshape(-1).tolist() if ids.numel() else []
    return str(tokenizer.decode(flat, clean_up_tokenization_spaces=False))


def to_str_tokens(
    model: TextLoop, input: Any, prepend_bos: bool | None
) -> list[str] | list[list[str]]:
    """Each token as a string, for each text or sequence."""
    if isinstance(input, (list, tuple)) and not input:
        return []
    given = read_rows(input)
    if isinstance(given, Rows):
        return [cast(list[str], to_str_tokens(model, row, prepend_bos)) for row in given.rows]
    if isinstance(given, Tokens):
        squeezed = Tokens(given.tokens.squeeze(), None, given.many)
        return _strings(model, _one_sequence(model, "to_str_tokens", squeezed))
    texts, prepend_bos = texts_of(model, given, prepend_bos)
    found = [_strings(model, row) for row in _rows(model, texts, prepend_bos, False)]
    return found if given.many else found[0]


def _strings(model: TextLoop, ids: Iterable[Any]) -> list[str]:
    return [str(to_string(model, token)) for token in ids]


def _one_sequence(model: TextLoop, method: str, given: Tokens) -> Int[Tensor, " pos"]:
    """The only row of tokens."""
    ids = given.tokens
    if ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1):
        raise SingleTokenError(f"{method} takes one sequence, got shape {tuple(ids.shape)}")
    return ids.reshape(-1)


def to_single_token(model: TextLoop, string: str) -> int:
    """The id of a text that is exactly one token."""
    (ids,) = _rows(model, texts_of(model, Texts([string], many=False), False)[0], False, True)
    if len(ids) != 1:
        tokens = ", ".join(map(repr, _strings(model, ids[:_SHOWN])))
        more = f", and {len(ids) - _SHOWN} more" * (len(ids) > _SHOWN)
        raise SingleTokenError(f"{shown(string)} is not a single token but [{tokens}{more}]")
    return ids[0]


def to_single_str_token(model: TextLoop, int_token: int) -> str:
    """The text of one token id."""
    return str(to_string(model, torch.tensor([int_token])))


def get_token_position(
    model: TextLoop,
    single_token: str | int | Tensor,
    input: Any,
    mode: str,
    prepend_bos: bool | None,
) -> int:
    """Position of a token in a text, a conversation or one sequence of tokens."""
    one_of(mode, "mode", ("first", "last"))
    given = read_input(input)
    if not isinstance(given, Tokens):
        given = Tokens(tokenize(model, given, prepend_bos, None, False)[0], None, given.many)
    ids = _one_sequence(model, "get_token_position", given)
    if isinstance(single_token, str):
        token = to_single_token(model, single_token)
    else:
        token = whole(single_token, "single_token", least=None)
    found = (ids == token).nonzero().flatten().tolist()
    if not found:
        raise SingleTokenError(f"token {single_token!r} does not occur in the prompt")
    return int(found[0 if mode == "first" else -1])


def tokens_to_residual_directions(
    model: TextLoop, tokens: str | int | Int[Tensor, "..."]
) -> Float[Tensor, "... d_model"]:
    """Columns of W_U of the given tokens, as rows."""
    if isinstance(tokens, str):
        tokens = to_single_token(model, tokens)
    ids = check_ids(integers(torch.as_tensor(tokens)), model.cfg.d_vocab)
    return model._home(model.unembed.directions(int(ids) if ids.numel() == 1 else ids))
