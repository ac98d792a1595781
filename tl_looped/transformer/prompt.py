"""A prompt, read once at the door: whatever a model takes, as checked tokens and a mask.

What an input *is* (texts, conversations, tokens in any container) is recognised in
``tl_looped.transformer.reading``; what text becomes, in ``tl_looped.transformer.tokenizing``.
Here the two meet, and every shape, id and mask is checked before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.model.masks import real_tokens
from tl_looped.transformer.reading import (
    Chats,
    Rows,
    Texts,
    Tokens,
    integers,
    read_input,
    read_rows,
    read_tokens,
)
from tl_looped.transformer.tokenizing import prepends_bos, row_of, texts_of, tokenize
from tl_looped.transformer.vocabulary import check_ids

if TYPE_CHECKING:
    from tl_looped.transformer.looped_transformer import LoopedTransformer
    from tl_looped.transformer.pool import Pool


@dataclass(frozen=True, eq=False)
class Prompt:
    """A batch of tokens, checked, on the device that the model takes tokens on.

    Args:
        tokens: Ids within the vocabulary.
        mask: True at real tokens; None where nothing says that there is padding.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None


def read_prompt(
    model: Pool,
    input: Any,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    past: LoopedKeyValueCache | None = None,
) -> Prompt:
    """Tokens of any input, and its mask: the given one, its own, or what pad tokens tell.

    Args:
        model: Whose tokenizer, vocabulary and device count.
        input: Anything in ``tl_looped.transformer.reading``.
        attention_mask: ``[batch, pos]``, one at real tokens and zero at padding.
        prepend_bos: Whether text gets a BOS token; ``cfg.default_prepend_bos`` if None.
        padding_side: Side on which text is padded; the tokenizer's own if None.
        past: Keys and values of tokens that come before. After those, no token is taken for padding
            without an ``attention_mask``, text gets no BOS unless asked for, and a row may consist
            of padding.

    Raises:
        InputError: for what is not an input, ids outside the vocabulary, a mask that does not fit,
            or an argument that would have no effect.
    """
    given, whole = read_input(input), cast("LoopedTransformer", model)
    continues = past is not None and past.length > 0
    if continues and prepend_bos is None:
        prepend_bos = False
    mask = attention_mask
    if not isinstance(given, Tokens):
        tokens, own_mask = tokenize(whole, given, prepend_bos, padding_side, False)
        mask = own_mask if mask is None else mask
    else:
        if padding_side is not None:
            raise InputError(
                f"padding_side={padding_side!r} is for text; the padding of tokens is read from "
                "them, on either side: pass attention_mask= to say where it is"
            )
        if given.mask is not None and mask is not None:
            raise InputError(
                "attention_mask is given twice, as an argument and within the input: leave one out"
            )
        mask = given.mask if mask is None else mask
        tokens = check_tokens(model, given.tokens)
        if mask is None and continues:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        elif mask is None:
            mask = padding_of(whole, tokens, prepend_bos)
    batch, length = tokens.shape
    return Prompt(tokens, check_mask(model, mask, batch, length, continues))


class ResidualInput(NamedTuple):
    """A residual stream to start with, and what is known of its tokens."""

    resid: Float[Tensor, "batch pos d_model"]
    tokens: Int[Tensor, "batch pos"] | None
    mask: Bool[Tensor, "batch pos"] | None


def read_resid(
    model: LoopedTransformer,
    resid: Any,
    tokens: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
) -> ResidualInput:
    """The input of a run with ``start_at_layer``.

    Args:
        model: Whose width, dtype and device count.
        resid: The stream that a layer receives, ``[batch, pos, d_model]``.
        tokens: Its tokens, for the loss, and for the mask unless that is given.
        attention_mask: As in :func:`read_prompt`.
        prepend_bos: Whether the tokens begin with a BOS token, if that is also the pad token.
        padding_side: For text alone.

    Raises:
        InputError: as :func:`read_prompt`; for a stream of another width.
    """
    if padding_side is not None:
        raise InputError("padding_side is for text, and start_at_layer takes a stream")
    width = model.cfg.d_model
    if not isinstance(resid, Tensor) or resid.ndim != 3 or resid.shape[-1] != width:
        shape = tuple(resid.shape) if isinstance(resid, Tensor) else type(resid).__name__
        raise InputError(
            f"start_at_layer takes a residual stream [batch, pos, {width}], got {shape}"
        )
    mask = attention_mask
    if tokens is not None:
        tokens = check_tokens(model, tokens)
        mask = padding_of(model, tokens, prepend_bos) if mask is None else mask
    checked = check_mask(model, mask, resid.shape[0], resid.shape[1])
    return ResidualInput(resid.to(model.W_E), tokens, checked)


def token_rows(
    model: LoopedTransformer, prompts: Any, attention_mask: Any, prepend_bos: bool | None
) -> list[Int[Tensor, " pos"]]:
    """The real tokens of every prompt; see :meth:`LoopedTransformer.token_rows`."""
    given = read_rows(prompts)
    if isinstance(given, (Texts, Chats)):
        texts, prepend_bos = texts_of(model, given, prepend_bos)
        rows = [row_of(model, text, prepend_bos) for text in texts]
    elif isinstance(given, Rows):
        if attention_mask is not None:
            raise InputError("attention_mask is for tokens [batch, pos], not for a list")
        rows = [_token_row(model, number, row) for number, row in enumerate(given.rows)]
    else:
        prompt = read_prompt(model, given, attention_mask, prepend_bos)
        rows = list(prompt.tokens)
        if prompt.mask is not None:
            rows = [row[real] for row, real in zip(rows, prompt.mask, strict=True)]
    for number, row in enumerate(rows):
        if len(row) > model.cfg.n_ctx:
            raise InputError(
                f"prompt {number} has {len(row)} tokens, more than the context of "
                f"{model.cfg.n_ctx}: leave it out or cut it"
            )
    return rows


def _token_row(model: LoopedTransformer, number: int, row: Any) -> Int[Tensor, " pos"]:
    """One sequence of a list of them."""
    try:
        given = read_input(row)
    except InputError as error:
        raise InputError(f"prompt {number} must be a sequence of token ids: {error}") from error
    if not isinstance(given, Tokens) or given.tokens.ndim != 1:
        shape = tuple(given.tokens.shape) if isinstance(given, Tokens) else "text"
        raise InputError(f"prompt {number} must be one sequence of token ids, got {shape}")
    return check_tokens(model, given.tokens)[0]


def check_tokens(model: Pool, tokens: Any) -> Int[Tensor, "batch pos"]:
    """Token ids within the vocabulary, as a batch on the embedding's device."""
    tokens = integers(tokens) if isinstance(tokens, Tensor) else read_tokens(tokens)
    if tokens.dtype != torch.int64 or tokens.ndim not in (1, 2):
        raise InputError(
            f"tokens must be integers of shape [batch, pos], got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)} (a residual stream needs start_at_layer=)"
        )
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.numel() == 0:
        raise InputError(f"there is no token in an input of shape {tuple(tokens.shape)}")
    return check_ids(tokens, model.cfg.d_vocab).to(model.embed.W_E.device)


def padding_of(
    model: LoopedTransformer, tokens: Int[Tensor, "batch pos"], prepend_bos: bool | None
) -> Bool[Tensor, "batch pos"] | None:
    """Mask of a token batch, read off its pad tokens; None if it has no padding.

    A pad token that is neither BOS nor EOS is padding wherever it leads or ends a row. One that
    is also BOS or EOS may be meant, so only leading runs that some rows have and others have
    not are padding, less the BOS token itself.
    """
    ids = {
        name: getattr(model.tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos")
    }
    pad = ids["eos"] if ids["pad"] is None else ids["pad"]
    if pad is None:
        return None
    is_pad = tokens == pad
    leading = is_pad.long().cumprod(-1).sum(-1)
    trailing = torch.zeros_like(leading)
    if pad in (ids["bos"], ids["eos"]):
        if pad == ids["bos"] and prepends_bos(model, prepend_bos):
            leading = (leading - 1).clamp(min=0)
        if int(leading.min()) > 0:
            return None
    else:
        trailing = is_pad.flip(-1).long().cumprod(-1).sum(-1)
    if not bool(leading.any() or trailing.any()):
        return None
    at = torch.arange(tokens.shape[1], device=tokens.device)
    real: Tensor = (at >= leading[:, None]) & (at < tokens.shape[1] - trailing[:, None])
    return real


def check_mask(
    model: Pool, mask: Any, batch: int, length: int, rows_continue: bool = False
) -> Bool[Tensor, "batch pos"] | None:
    """A boolean mask on the embedding's device, with a real token in every row; None stays None.

    Args:
        model: Whose device counts.
        mask: One at real tokens and zero at padding, a tensor or rows of numbers.
        batch, length: Its shape.
        rows_continue: Tokens come before these, so that a row may consist of padding.
    """
    if mask is None:
        return None
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"attention_mask must be 1 at real tokens and 0 at padding, a tensor or rows of "
            f"numbers of shape {(batch, length)}, got {mask!r}"
        ) from error
    if tuple(mask.shape) != (batch, length):
        raise InputError(
            f"attention_mask must have shape {(batch, length)} like the tokens, "
            f"got {tuple(mask.shape)}"
        )
    real = real_tokens(mask).to(model.embed.W_E.device)
    if not rows_continue:
        check_rows(real)
    return real


def check_rows(mask: Bool[Tensor, "batch key"]) -> None:
    """Raise if a row has no real token."""
    if not bool(mask.any(-1).all()):
        empty = (~mask.any(-1)).nonzero().flatten().tolist()
        raise InputError(f"attention_mask leaves rows {empty} without any token")
