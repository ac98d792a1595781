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

from tl_looped._compat import TransformerLensKeyValueCache
from tl_looped.checks import one_of
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
from tl_looped.transformer.tokenizing import SIDES, prepends_bos, row_of, texts_of, tokenize
from tl_looped.transformer.vocabulary import check_ids

if TYPE_CHECKING:
    from tl_looped.transformer.pool import Pool
    from tl_looped.transformer.text_loop import TextLoop


@dataclass(frozen=True, eq=False)
class Prompt:
    """A batch of tokens, checked, on the device that the model takes tokens on.

    Args:
        tokens: Ids within the vocabulary.
        mask: True at real tokens; None where nothing says that there is padding.
        embeds: The embedding, in place of tokens, of which there are none then.
    """

    tokens: Int[Tensor, "batch ids"]
    mask: Bool[Tensor, "batch pos"] | None
    embeds: Float[Tensor, "batch pos d_model"] | None = None


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
        padding_side: Side on which text is padded, the tokenizer's own if None; the only one on
            which tokens have padding, either one if None.
        past: Keys and values of tokens that come before. After those, text gets no BOS unless asked
            for, a row may consist of padding, and one more token per row is never taken for it
            without an ``attention_mask`` or a ``padding_side``: the model may have written it.

    Raises:
        InputError: for what is not an input, ids outside the vocabulary, a mask that does not fit,
            or an argument that would have no effect.
    """
    if isinstance(input, Prompt):  # read already
        return input
    given, whole = read_input(input), cast("TextLoop", model)
    continues = past is not None and past.length > 0
    if continues and prepend_bos is None:
        prepend_bos = False
    mask = attention_mask
    if not isinstance(given, Tokens):
        tokens, own_mask = tokenize(whole, given, prepend_bos, padding_side, False)
        mask = own_mask if mask is None else mask
    else:
        if given.mask is not None and mask is not None:
            raise InputError(
                "attention_mask is given twice, as an argument and within the input: leave one out"
            )
        mask = given.mask if mask is None else mask
        tokens = check_tokens(model, given.tokens)
        if mask is None:
            mask = padding_of(whole, tokens, prepend_bos, padding_side, continues)
        if mask is None and continues:
            mask = torch.ones_like(tokens, dtype=torch.bool)
    batch, length = tokens.shape
    return Prompt(tokens, check_mask(model, mask, batch, length, past))


def start_of_run(
    model: TextLoop,
    input: Any,
    prepend_bos: bool | None,
    padding_side: str | None,
    attention_mask: Any,
    past: LoopedKeyValueCache | TransformerLensKeyValueCache | None,
) -> tuple[Tensor, Tensor, None, Tensor | None]:
    """See :meth:`LoopedTransformer.input_to_embed`."""
    if isinstance(past, TransformerLensKeyValueCache):
        past, theirs = LoopedKeyValueCache(), past
        past.mask = theirs.previous_attention_mask.bool()
    prompt = read_prompt(model, input, attention_mask, prepend_bos, padding_side, past)
    mask = prompt.mask
    if past is not None and past.mask is not None:
        new = torch.ones_like(prompt.tokens, dtype=torch.bool) if mask is None else mask
        mask = torch.cat((past.mask.to(new.device), new), 1)
    elif attention_mask is None and getattr(model.tokenizer, "padding_side", None) != "left":
        mask = None if mask is None or bool(mask.all()) else mask
    elif mask is None:
        mask = torch.ones_like(prompt.tokens, dtype=torch.bool)
    resid = model(prompt, stop_at_layer=0)
    return resid, prompt.tokens, None, None if mask is None else mask.to(prompt.tokens.dtype)


class ResidualInput(NamedTuple):
    """A residual stream to start with, and what is known of its tokens."""

    resid: Float[Tensor, "batch pos d_model"]
    tokens: Int[Tensor, "batch pos"] | None
    mask: Bool[Tensor, "batch pos"] | None


def read_resid(
    model: TextLoop,
    resid: Any,
    tokens: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    past: LoopedKeyValueCache | None = None,
) -> ResidualInput:
    """The input of a run with ``start_at_layer``.

    Args:
        model: Whose width, dtype and device count.
        resid: The stream that a layer receives, ``[batch, pos, d_model]``.
        tokens: Its tokens, for the loss, and for the mask unless that is given.
        attention_mask: As in :func:`read_prompt`.
        prepend_bos: Whether the tokens begin with a BOS token, if that is also the pad token.
        padding_side: For text alone.
        past: Keys and values of tokens that come before.

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
        if mask is None:
            continues = past is not None and past.length > 0
            mask = padding_of(model, tokens, prepend_bos, continues=continues)
    checked = check_mask(model, mask, resid.shape[0], resid.shape[1], past)
    return ResidualInput(resid.to(model.W_E), tokens, checked)


def token_rows(
    model: TextLoop, prompts: Any, attention_mask: Any, prepend_bos: bool | None
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


def _token_row(model: TextLoop, number: int, row: Any) -> Int[Tensor, " pos"]:
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
    model: TextLoop,
    tokens: Int[Tensor, "batch pos"],
    prepend_bos: bool | None,
    side: str | None = None,
    continues: bool = False,
) -> Bool[Tensor, "batch pos"] | None:
    """Mask of a token batch, read off its pad tokens; None if it has no padding.

    A pad token that is neither BOS nor EOS is padding wherever it leads or ends a row. One that
    is also BOS or EOS may be meant, so only leading runs that some rows have and others have
    not are padding, less the BOS token itself. Where the caller says on which side there is
    padding, all pad tokens that lead, or end, a row are padding, as in TransformerLens. In a batch
    that continues others only the tokenizer's own side has padding, and one token per row is none:
    the model may have written it.
    """
    if side is not None:
        return _padding_on(model, tokens, prepend_bos, one_of(side, "padding_side", SIDES))
    if continues and tokens.shape[1] == 1:
        return None
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
    if continues:  # as in TransformerLens; at the other side the text goes on
        other = trailing if model.tokenizer.padding_side == "left" else leading
        other.zero_()
    if not bool(leading.any() or trailing.any()):
        return None
    at = torch.arange(tokens.shape[1], device=tokens.device)
    real: Tensor = (at >= leading[:, None]) & (at < tokens.shape[1] - trailing[:, None])
    return real


def _padding_on(
    model: TextLoop, tokens: Int[Tensor, "batch pos"], prepend_bos: bool | None, side: str
) -> Bool[Tensor, "batch pos"] | None:
    pad = getattr(model.tokenizer, "pad_token_id", None)
    if pad is None:
        raise InputError(
            f"padding_side={side!r} of tokens needs a tokenizer with a pad token, off which the "
            "padding is read: pass attention_mask= to say where it is"
        )
    is_pad = tokens == pad
    ends = is_pad if side == "left" else is_pad.flip(-1)
    n = ends.long().cumprod(-1).sum(-1, keepdim=True)
    at = torch.arange(tokens.shape[1], device=tokens.device)
    if side == "right":
        real = at < tokens.shape[1] - n
    else:
        if pad == model.tokenizer.bos_token_id and prepends_bos(model, prepend_bos):
            n = (n - 1).clamp(min=0)  # the last of them is BOS itself
        real = at >= n
    return None if bool(real.all()) else real


def check_mask(
    model: Pool,
    mask: Any,
    batch: int,
    length: int,
    past: LoopedKeyValueCache | None = None,
) -> Bool[Tensor, "batch pos"] | None:
    """A boolean mask on the embedding's device, with a real token in every row; None stays None.

    Args:
        model: Whose device counts.
        mask: One at real tokens and zero at padding, a tensor or rows of numbers.
        batch, length: Its shape.
        past: Keys and values of tokens that come before, so that a row may consist of padding. The
            mask may begin with theirs.
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
    n_past = 0 if past is None else past.length
    if tuple(mask.shape) not in ((batch, length), (batch, n_past + length)):
        raise InputError(
            f"attention_mask must have shape {(batch, length)} like the tokens, "
            f"got {tuple(mask.shape)}"
        )
    real = real_tokens(mask).to(model.embed.W_E.device)
    if mask.shape[1] > length:
        assert past is not None
        if not torch.equal(real[:, :n_past], cast(Tensor, past.mask).to(real.device)):
            raise InputError(
                f"the first {n_past} columns of attention_mask are of cached tokens, and differ "
                "from past_kv_cache.mask: give the mask of the new tokens alone"
            )
        real = real[:, n_past:]
    if n_past == 0:
        check_rows(real)
    return real


def check_rows(mask: Bool[Tensor, "batch key"]) -> None:
    """Raise if a row has no real token."""
    if not bool(mask.any(-1).all()):
        empty = (~mask.any(-1)).nonzero().flatten().tolist()
        raise InputError(f"attention_mask leaves rows {empty} without any token")
