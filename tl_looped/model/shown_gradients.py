"""``torch.autograd.grad`` by a weight under TransformerLens's name (``tl_looped.model.shown``).

A run uses what is stored, and not the tensor that shows it: PyTorch would say that this was not
used, or give None. Its gradient is that of the stored parameter in the weight's shape, as ``.grad``
is after ``backward``: over all recurrences, and of heads that are repeated over the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.weight_sources import Rows

Gradient = Tensor | None


def gradients(
    outputs: Any,
    inputs: Sequence[Any],
    sources: Sequence[Rows | None],
    *,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
    **options: Any,
) -> tuple[Gradient, ...]:
    """As ``torch.autograd.grad``, whose other options are passed on.

    Args:
        outputs: What is differentiated.
        inputs: What it is differentiated by, as plain tensors.
        sources: Where each is stored, if it is a shown weight; else None.
        allow_unused: Whether an input that had no part in it has the gradient None.
        is_grads_batched: Whether there is a dimension of gradients of the outputs.
        materialize_grads: Whether there are zeros in place of None.

    Raises:
        InputError: something did not depend on an input.
    """
    leaves = [None if source is None else source.parameter() for source in sources]
    stored = {id(leaf): leaf for leaf in leaves if leaf is not None and leaf.requires_grad}
    found = torch.autograd.grad(
        outputs,
        (*inputs, *stored.values()),
        allow_unused=True,
        is_grads_batched=is_grads_batched,
        **options,
    )
    of_stored = dict(zip(stored, found[len(inputs) :], strict=True))
    out: list[Gradient] = []
    for number, (one, own, source) in enumerate(zip(inputs, found, sources, strict=False)):
        grad: Gradient = own
        below = of_stored.get(id(leaves[number]))
        if source is not None and below is not None:
            grad = _each(own, below, source) if is_grads_batched else _total(own, below, source)
        if grad is None and materialize_grads:
            grad = torch.zeros_like(one)
        if grad is None and not allow_unused:
            name = f"input {number}" if source is None else source.names().shown_as
            if source is not None and leaves[number] is None:
                raise InputError(
                    f"{name} is computed: {source.names().stored_in} is pruned or parametrised. "
                    "Differentiate by what it is computed of (see named_parameters())"
                )
            raise InputError(
                f"what is differentiated does not depend on {name}: allow_unused=True gives None "
                "for it, materialize_grads=True zeros"
            )
        out.append(grad)
    return tuple(out)


def _each(own: Gradient, below: Tensor, source: Rows) -> Tensor:
    """For each of a batch."""
    owns = [None] * len(below) if own is None else own
    return torch.stack([_total(a, b, source) for a, b in zip(owns, below, strict=True)])


def _total(own: Gradient, below: Tensor, source: Rows) -> Tensor:
    """By what is shown, through the runs of the model and through the tensor itself.

    ``below``, the stored parameter's gradient, has both. Of heads that are repeated, what came
    through the tensor is known for each of them, and what came through runs for their group.
    """
    if own is None or source.is_view:
        return source.grad_of(below)
    parameter = source.parameter()
    assert parameter is not None
    with torch.enable_grad():
        (through,) = torch.autograd.grad(source.read(), parameter, own.detach())
    rest = below - through
    return own + source.grad_of(rest) if bool(rest.any()) else own
