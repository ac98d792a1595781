"""A feedforward checkpoint that is run and read while its tensors stay in their files.

The looped model and the one that it is made of would be two models in memory. So transformers
builds its model without values, and each part of it (the embedding, a layer, the last norm, the
unembedding) gets its tensors when it is called and loses them when it returns. What computes is
transformers' own code, as always.

What transformers does to the names of a checkpoint is not repeated here: one whose tensors do not
have the names of its model's parameters is loaded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tl_looped.adapters.stored import Header, TensorReader

EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


def stored_parameters(model: Any, headers: Mapping[str, Header]) -> dict[str, Header] | None:
    """Where each parameter of a model is stored, tied ones once.

    Args:
        model: Of transformers, on the meta device.
        headers: Every tensor of its checkpoint.

    Returns:
        By name of the parameter; None if the checkpoint has other names for some of them.
    """
    names = [name for name, _ in model.named_parameters()]
    if not set(names) <= set(headers):
        return None
    if UNEMBEDDING in names and model.config.tie_word_embeddings:
        with TensorReader(headers) as read:
            if _same(read(EMBEDDING), read(UNEMBEDDING), model.dtype):
                names.remove(UNEMBEDDING)
    return {name: headers[name] for name in names}


def _same(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether transformers ties two stored tensors: they are equal in the dtype of the model.

    It cannot see that of a model without values.
    """
    if one.dtype == other.dtype and torch.equal(one, other):
        return True
    return torch.equal(one.to(dtype), other.to(dtype))


def give_rotary_frequencies(model: Any) -> bool:
    """Compute what a model without values lacks beside its parameters.

    Returns:
        Whether it has all its buffers now.
    """
    rotary = getattr(model.model, "rotary_emb", None)
    if rotary is not None:
        model.model.rotary_emb = type(rotary)(model.config)
    return not any(buffer.is_meta for buffer in model.buffers())


@contextmanager
def from_files(model: Any, parameters: Mapping[str, Header]) -> Iterator[None]:
    """While it lasts, a model without values can be run on the CPU.

    Args:
        model: Of transformers; its parts are without values again when they have run.
        parameters: See :func:`stored_parameters`.
    """
    body = model.model
    # A tied unembedding is the embedding, and goes by its name.
    names = {
        id(parameter): name if name in parameters else EMBEDDING
        for name, parameter in model.named_parameters()
    }
    handles = []
    casts: dict[tuple[str, torch.Size], Tensor] = {}
    with TensorReader(parameters) as read:
        for part in (body.embed_tokens, *body.layers, body.norm, model.lm_head):
            its = {own: names[id(parameter)] for own, parameter in part.named_parameters()}
            fill = partial(_fill, its=its, read=read, casts=casts)
            handles.append(part.register_forward_pre_hook(fill))
            handles.append(part.register_forward_hook(_empty))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _fill(
    part: nn.Module,
    inputs: object,
    *,
    its: Mapping[str, str],
    read: Callable[[str], Tensor],
    casts: dict[tuple[str, torch.Size], Tensor],
) -> None:
    """Give a part its values: as they are mapped, or cast into what the last such part had.

    To allocate them anew for each layer leaves the process with holes as large as some layers.
    """
    values = {}
    for own, wanted in part.named_parameters():
        stored = read(its[own])
        if stored.dtype != wanted.dtype:
            key = (own, wanted.shape)
            if key not in casts:
                casts[key] = torch.empty(wanted.shape, dtype=wanted.dtype)
            stored = casts[key].copy_(stored)
        values[own] = stored
    part.load_state_dict(values, assign=True)


def _empty(part: nn.Module, inputs: object, output: object) -> None:
    part.to("meta")
