"""What a checkpoint holds, and what became of it: tensors, options, special tokens, texts.

Which options of a ``config.json`` count is not taken from a list, nor from which keys an adapter
looks up: an adapter may copy the whole file and drop half of it. It is found by experiment. Each
option is given other values, or is left out, and the configuration is read anew. If it comes out
the same every time, the option is ignored. Otherwise it counts, and the fields that changed are
those that it sets; an option of which every other value is refused is checked, and sets none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tl_looped.adapters import Source, find_adapter
from tl_looped.checkpoints import Checkpoint, read_tokenizer
from tl_looped.model.config import LoopedConfig
from tl_looped.transformer import LoopedTransformer
from tl_looped.verification.opening import Opened, VirtualLoop, hashes

_SHOWN_TEXTS = 4
_NOT_COMPARED = ("model_name",)
_EITHER = (("model_type",), ("architectures",))
"""Each of them says which family it is, and an adapter may take either."""


# -- options of the config ------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option of a ``config.json``.

    Args:
        key: Its name; of an option in an object both names, ``rope_parameters.rope_theta``.
        value: As it is written.
        read: Whether any other value of it, or its absence, would change the model or be refused.
        fields: Fields of :class:`LoopedConfig` that it sets; none where it is only checked.
    """

    key: str
    value: Any
    read: bool
    fields: tuple[str, ...] = ()


class _Strange:
    """A value that nobody expects: who looks at it stumbles."""

    def __deepcopy__(self, memo: Any) -> _Strange:
        return self


_ABSENT, _STRANGE = object(), _Strange()


def options_of_config(checkpoint: Checkpoint) -> list[Option]:
    """Every option of a checkpoint's ``config.json``, and whether it counts; see the module."""
    as_it_is = _outcome(checkpoint, checkpoint.raw)
    return list(_options(checkpoint, as_it_is, checkpoint.raw, ()))


def _options(
    checkpoint: Checkpoint, as_it_is: Any, inside: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[Option]:
    for key, value in inside.items():
        place = (*path, key)
        changed = _differences(checkpoint, as_it_is, place, value)
        if changed is None and place in _EITHER:
            changed = _where_the_other_is_absent(checkpoint, place, value)
        if isinstance(value, dict) and value and changed is not None:
            yield from _options(checkpoint, as_it_is, value, place)
        else:
            yield Option(".".join(place), value, changed is not None, changed or ())


def _differences(
    checkpoint: Checkpoint, as_it_is: Any, place: tuple[str, ...], value: Any
) -> tuple[str, ...] | None:
    """Fields that other values of an option change; None if no other value makes a difference."""
    fields: dict[str, None] = {}
    counts = False
    for other in _others(value, isinstance(checkpoint.adapter, VirtualLoop)):
        outcome = _outcome(checkpoint, _with(checkpoint.raw, place, other))
        if outcome == as_it_is:
            continue
        counts = True
        if isinstance(outcome, dict) and isinstance(as_it_is, dict):
            fields |= dict.fromkeys(k for k in outcome if outcome[k] != as_it_is.get(k))
    return tuple(fields) if counts else None


def _where_the_other_is_absent(
    checkpoint: Checkpoint, place: tuple[str, ...], value: Any
) -> tuple[str, ...] | None:
    """The same in a ``config.json`` without the other option that says which family it is."""
    other = next(one for one in _EITHER if one != place)
    raw = {key: each for key, each in checkpoint.raw.items() if key != other[0]}
    left = replace(checkpoint, raw=raw)
    return _differences(left, _outcome(left, raw), place, value)


def _others(value: Any, of_transformers: bool) -> Iterator[Any]:
    """Other values to try, those of the same kind first.

    Transformers' own classes check the kind of every value, of those that they do not use as well.
    """
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (2 * value, value + 1, value // 2)
    elif isinstance(value, float):
        yield from (2 * value, value / 2) if value else (1.0,)
    elif isinstance(value, str):
        yield value + "?"
    elif isinstance(value, list):
        yield from ([*value, *value[:1]], value[:-1])
    elif isinstance(value, dict):
        yield {key: next(_others(each, of_transformers)) for key, each in value.items()}
    elif value is None:
        yield from (1, 0.5, True, "?", [1])
    yield _ABSENT
    if not of_transformers:
        yield from (None, _STRANGE, {}, 0)


def _with(raw: Any, place: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = dict(raw)
    if len(place) > 1:
        changed[place[0]] = _with(raw[place[0]], place[1:], value)
    elif value is _ABSENT:
        del changed[place[0]]
    else:
        changed[place[0]] = value
    return changed


def _outcome(checkpoint: Checkpoint, raw: dict[str, Any]) -> Any:
    """What a ``config.json`` gives: the fields of the model, or the kind of the refusal."""
    try:
        if isinstance(checkpoint.adapter, VirtualLoop):
            adapter: Any = checkpoint.adapter
        else:
            adapter = find_adapter(raw, set(checkpoint.headers))
        cfg = replace(checkpoint, raw=raw, adapter=adapter).config()
        fields = cfg.to_json() | {"architecture": cfg.architecture, "adapter": adapter.name}
        # By their texts: 1 == 1.0 == True.
        return {name: repr(v) for name, v in fields.items() if name not in _NOT_COMPARED}
    except Exception as error:  # whatever an adapter makes of a value that it does not expect
        return type(error)


# -- tensors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint's files, and what becomes of it.

    Args:
        name, file, shape, dtype: As its header says; dtype as safetensors calls it.
        use: ``whole``, ``joined`` with others, ``indexed`` (several parameters are in it),
            ``duplicate`` (a second copy), ``ignored`` by the family, or ``unexpected``.
        parameters: Of the model, that take their values from it.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    use: str
    parameters: tuple[str, ...] = ()


def tensors_of(checkpoint: Checkpoint, cfg: LoopedConfig) -> list[StoredTensor]:
    """Every tensor of the files, in their order, with the parameters that it becomes."""
    users: dict[str, list[tuple[str, Source]]] = {}
    for parameter, source in checkpoint.adapter.sources(cfg).items():
        for name in source.names:
            users.setdefault(name, []).append((parameter, source))
    duplicates, ignored = checkpoint.adapter.duplicates(cfg), checkpoint.adapter.ignored(cfg)
    found = []
    for name, header in checkpoint.headers.items():
        used = users.get(name, [])
        if used:
            source = used[0][1]
            use = "indexed" if source.index else "joined" if len(source.names) > 1 else "whole"
        elif name in duplicates:
            use = f"duplicate of {duplicates[name]}"
        else:
            use = "ignored" if name in ignored else "unexpected"
        parameters = tuple(parameter for parameter, _ in used)
        found.append(
            StoredTensor(name, header.path.name, header.shape, header.dtype, use, parameters)
        )
    return found


def uses_that_overlap(checkpoint: Checkpoint, cfg: LoopedConfig) -> list[str]:
    """A line for each tensor that is used twice, or of which a part is left over."""
    places: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    for parameter, source in checkpoint.adapter.sources(cfg).items():
        for name in source.names:
            places.setdefault(name, []).append((source.index, parameter))
    out = []
    for name, used in places.items():
        indices, parameters = [index for index, _ in used], [parameter for _, parameter in used]
        if len(set(indices)) < len(indices):
            out.append(f"used twice: {name} becomes {', '.join(parameters)}")
        header, depth = checkpoint.headers.get(name), len(indices[0])
        if header is not None and len(set(indices)) < math.prod(header.shape[:depth]):
            out.append(f"left over: of {name} {list(header.shape)} only {indices} are used")
    return out


# -- tokens ---------------------------------------------------------------------------------------


def special_tokens(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Beginning, end and padding: kind, id, text, and whether tokenizer or adapter says so."""
    tokenizer = read_tokenizer(checkpoint.folder)
    if tokenizer is None:
        return []
    of_adapter = checkpoint.adapter.special_tokens(tokenizer)
    settled = checkpoint.tokenizer()
    return [
        {
            "kind": kind,
            "id": getattr(settled, f"{kind}_token_id"),
            "token": str(getattr(settled, f"{kind}_token")),
            "from": "adapter" if kind in of_adapter else "tokenizer",
        }
        for kind in ("bos", "eos", "pad", "unk")
        if getattr(settled, f"{kind}_token_id") is not None
    ]


def as_tokens(model: LoopedTransformer, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Texts with the ids and the pieces that the model reads."""
    found = []
    for text in texts[:_SHOWN_TEXTS]:
        ids: Tensor = model.to_tokens(text)[0]
        pieces = [str(model.to_string(int(i))) for i in ids]
        found.append({"text": text, "ids": ids.tolist(), "tokens": pieces})
    return found


# -- all of it ------------------------------------------------------------------------------------


def inventory_of_files(opened: Opened) -> dict[str, Any]:
    """What is known before a tensor is read: files, tensors, options, fields."""
    checkpoint = opened.checkpoint
    cfg = checkpoint.config()
    return {
        "files": hashes(checkpoint),
        "tensors": [asdict(one) for one in tensors_of(checkpoint, cfg)],
        "options": [asdict(one) for one in options_of_config(checkpoint)],
        "config": cfg.to_json(),
        "generation_config": checkpoint.generation_config(),
        "special_tokens": special_tokens(checkpoint),
    }


def inventory_of_text(model: LoopedTransformer, texts: Sequence[str] | None) -> dict[str, Any]:
    """What the loaded model does with text; nothing without a tokenizer."""
    if model.tokenizer is None or texts is None:
        return {"bos": model.describe_bos()}
    stop = [{"id": i, "token": str(model.to_string(i))} for i in model.stop_tokens()]
    return {
        "bos": model.describe_bos(),
        "stop_tokens": stop,
        "chat_template": getattr(model.tokenizer, "chat_template", None) is not None,
        "texts": as_tokens(model, texts),
    }


def dtypes_stored(checkpoint: Checkpoint) -> dict[str, int]:
    """Number of tensors of each dtype, as safetensors calls them."""
    found: dict[str, int] = {}
    for header in checkpoint.headers.values():
        found[header.dtype] = found.get(header.dtype, 0) + 1
    return found


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Those that weights have, by safetensors' names."""
