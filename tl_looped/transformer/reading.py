"""What an input is: texts, conversations or tokens, however they are held.

The one place where an input is recognised; every method that takes text or tokens comes here.

- *Texts*: a string, or a list, tuple, numpy array, pandas or datasets column of strings.
- *Conversations*: a list of messages ``{"role": ..., "content": ...}``, or a list of such lists.
- *Tokens*: a tensor, a numpy array of any integer type and memory layout, a list of ids, or rows of
  one length; what a tokenizer returns, or a batch of a DataLoader: a mapping with ``input_ids`` and
  perhaps ``attention_mask``, or a list that holds one tensor of tokens.

Whatever could mean two things is refused: a list of two tensors (tokens and labels? and a mask?), a
mapping with a key that would be ignored, rows of unequal length without a mask, texts among other
things. Shapes and ids are checked by the model (``tl_looped.transformer.prompt``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_looped.errors import InputError

_KEYS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Texts:
    """One or more texts."""

    texts: list[str]
    many: bool  # given as a list, which may be of one


@dataclass(frozen=True)
class Chats:
    """One or more conversations, each a list of messages."""

    chats: list[list[dict[str, Any]]]
    many: bool


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids ``[batch, pos]`` or ``[pos]``, unchecked, and the mask that came with them."""

    tokens: Tensor
    mask: Tensor | None
    many: bool


@dataclass(frozen=True)
class Rows:
    """Token sequences of any lengths, for those who take them one by one."""

    rows: list[Any]


Given = Texts | Chats | Tokens


def read_input(input: Any) -> Given:
    """Recognise an input.

    Raises:
        InputError: if it is none of the above.
    """
    found = _read(input)
    return _stacked(found.rows) if isinstance(found, Rows) else found


def read_rows(input: Any) -> Given | Rows:
    """The same, but a list of token sequences stays one."""
    return _read(input)


def read_tokens(input: Any) -> Tensor:
    """Tokens alone, unchecked.

    Raises:
        InputError: for text.
    """
    given = read_input(input)
    if not isinstance(given, Tokens):
        raise InputError(
            "tokens must be integers of shape [batch, pos], got text: model.to_tokens(text) gives "
            "them"
        )
    if given.mask is not None:
        raise InputError("tokens alone are wanted here: give the mask as attention_mask=")
    return given.tokens


def n_prompts(input: Any) -> int:
    """Number of prompts; a text or an unbatched sequence of tokens is one."""
    given = read_input(input)
    if isinstance(given, Texts):
        return len(given.texts)
    if isinstance(given, Chats):
        return len(given.chats)
    return len(given.tokens) if given.tokens.ndim > 1 else 1


def _read(input: Any) -> Given | Rows:
    if isinstance(input, (Texts, Chats, Tokens, Rows)):
        return input
    if isinstance(input, str):
        return Texts([str(input)], many=False)
    if isinstance(input, Tensor):
        return Tokens(integers(input), None, many=False)
    if isinstance(input, Mapping):
        return _read_encoding(input)
    items = _items(input)
    return Tokens(integers(items), None, many=False) if isinstance(items, Tensor) else _list(items)


def _items(input: Any) -> list[Any] | Tensor:
    """The items of a column or a sequence; a tensor of an array of numbers."""
    if isinstance(input, (bytes, bytearray)):
        raise InputError("the input is bytes: decode it, for instance by .decode('utf-8')")
    if isinstance(input, np.ndarray):
        if input.dtype.kind not in "UOST":
            return _from_numpy(input)
        if input.ndim > 1:
            raise InputError(f"texts must be in one dimension, got an array {input.shape}")
        texts: list[Any] = np.atleast_1d(input).tolist()
        return texts
    for name in ("column_names", "columns"):  # datasets' and pyarrow's tables; pandas' and polars'
        if hasattr(input, name):
            columns = [str(column) for column in getattr(input, name)]
            raise InputError(f"the input is a table: give one of its columns, {columns}")
    for name in ("to_pylist", "to_list"):  # pyarrow's, pandas' and polars' columns
        if not isinstance(input, Sequence) and callable(getattr(input, name, None)):
            return list(getattr(input, name)())
    if isinstance(input, (int, np.integer)) and not isinstance(input, bool):
        raise InputError(f"the input is the number {input}: a single token is [{input}]")
    if not isinstance(input, Sequence):
        raise InputError(
            f"the input is {_kind(input)}: give text, a list of texts, messages or tokens"
        )
    return list(input)


def _list(items: list[Any]) -> Given | Rows:
    if not items:
        raise InputError("there is no prompt: the input has no text, no message and no token")
    first = items[0]
    if isinstance(first, str):
        _all(items, str, "text")
        return Texts([str(item) for item in items], many=True)
    if isinstance(first, Mapping):
        return Chats([_conversation(items)], many=False)
    if _is_conversation(first):
        return Chats([_conversation(chat) for chat in items], many=True)
    if isinstance(first, (int, np.integer)) or _ndim(first) == 0:
        return Tokens(integers(_as_tensor(items)), None, many=False)
    if len(items) == 1 and _ndim(first) == 2:
        return _read(first)  # a DataLoader's batch of a single tensor
    if _ndim(first) == 2 and all(_ndim(item) == 2 for item in items):
        raise InputError(
            f"the input holds {len(items)} arrays of tokens [batch, pos]: give one of them, or "
            '{"input_ids": ..., "attention_mask": ...}'
        )
    if isinstance(first, (list, tuple, Tensor, np.ndarray)):
        return Rows(items)
    raise InputError(
        f"item 0 of the input is {_kind(first)}: give text, a list of texts, messages or tokens"
    )


def _all(items: list[Any], kind: type, what: str) -> None:
    for number, item in enumerate(items):
        if not isinstance(item, kind):
            raise InputError(f"item {number} of the input is {_kind(item)}, item 0 is a {what}")


def _is_conversation(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) > 0 and isinstance(item[0], Mapping)


def _conversation(messages: Any) -> list[dict[str, Any]]:
    """Messages, each with a role; what else they must hold the chat template decides."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"a conversation must be a list of messages, got {_kind(messages)}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            keys = f"a mapping of {sorted(map(str, message))}" if _is_mapping(message) else None
            raise InputError(
                f'message {number} must be {{"role": ..., "content": ...}}, got '
                f"{keys or _kind(message)}"
            )
    return [dict(message) for message in messages]


def _is_mapping(item: Any) -> bool:
    return isinstance(item, Mapping)


def _read_encoding(input: Mapping[str, Any]) -> Tokens:
    """What a tokenizer returns, or a DataLoader's batch."""
    if "role" in input:
        raise InputError("the input is a single message: give a list of messages")
    unknown = [str(key) for key in input if key not in _KEYS]
    if unknown or "input_ids" not in input:
        what = f"the keys {unknown}, which would be ignored" if unknown else "no input_ids"
        raise InputError(
            f"the input is a mapping with {what}: give input_ids, and attention_mask if there is "
            "one, or the column that holds the texts"
        )
    try:
        ids = read_input(input["input_ids"])
    except InputError as error:
        raise InputError(f"input_ids: {error}") from error
    if not isinstance(ids, Tokens):
        raise InputError("input_ids must be token ids, got text")
    mask = input.get("attention_mask")
    if mask is not None:
        mask = mask if isinstance(mask, Tensor) else _as_tensor(mask, "attention_mask")
        mask = mask[None] if mask.ndim == 1 == ids.tokens.ndim else mask
    return Tokens(ids.tokens, mask, many=ids.tokens.ndim > 1)


# -- numbers ----------------------------------------------------------------------------------


def integers(tokens: Tensor) -> Tensor:
    """Any integer type as int64; other types stay what they are, for the model to refuse."""
    plain = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    return tokens.to(torch.int64) if plain else tokens


def _from_numpy(array: np.ndarray) -> Tensor:
    """A tensor of an array, whatever its strides and its byte order."""
    if array.dtype.kind in "iu":
        return torch.from_numpy(np.array(array, dtype=np.int64, order="C"))
    if array.dtype.kind in "bfc":
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    raise InputError(f"tokens must be integers, got an array of {array.dtype}")


def _as_tensor(items: Any, what: str = "tokens") -> Tensor:
    """Numbers in nested lists."""
    try:
        if isinstance(items, np.ndarray):
            return _from_numpy(items)
        if any(isinstance(item, (Tensor, np.ndarray)) for item in items):
            return torch.stack([torch.as_tensor(item) for item in items])
        return torch.as_tensor(items)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} must be numbers in rows of one length: {error}") from error


def _stacked(rows: list[Any]) -> Tokens:
    """Rows of one length as a batch."""
    tensors = []
    for number, row in enumerate(rows):
        if _ndim(row) != 1:
            raise InputError(
                f"row {number} of the tokens must be a sequence of token ids, got {_kind(row)}"
            )
        read = row if isinstance(row, Tensor) else _as_tensor(row)
        tensors.append(integers(read))
    lengths = [len(row) for row in tensors]
    if len(set(lengths)) > 1:
        raise InputError(
            f"the rows of tokens have {lengths[:8]} tokens: pad them to one length and give "
            "attention_mask= with them, or run them one by one (token_rows and stream "
            "take rows of any lengths)"
        )
    return Tokens(torch.stack(tensors), None, many=True)


def _ndim(item: Any) -> int | None:
    """Number of dimensions; None for what is not an array of numbers."""
    if isinstance(item, Tensor):
        return item.ndim
    if isinstance(item, str) or item is None:
        return None
    try:
        found = np.asarray(item)
    except ValueError:  # rows of unequal length
        return None
    return found.ndim if found.dtype.kind in "iufcb" else None


def _kind(item: Any) -> str:
    """What an item is, for an error."""
    if item is None or isinstance(item, (bool, int, float, bytes, np.generic)):
        return f"{item!r}"[:40]
    shape = getattr(item, "shape", None)
    return f"a {type(item).__name__}" + (f" of shape {tuple(shape)}" if shape else "")
