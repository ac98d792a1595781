"""Shown weights are laid out as TransformerLens has them: contiguous.

What is stored is turned around. ``W.reshape(-1)`` would be a copy, and an edit of it lost, where
TransformerLens's is the weight itself; ``W.T.contiguous()`` the weight itself, and an edit of it an
edit of the model, where TransformerLens's is a copy. So each shown weight has a twin without
values, contiguous as TransformerLens's parameter is. It goes through the same operations, and
says whether the result is the weight or a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_looped.model.weight_sources import Names, Source

_KINDS = ("empty", "zeros", "ones", "full", "rand", "randn", "randint")
LAYOUT = frozenset(
    (
        *("reshape", "reshape_as", "view", "view_as", "flatten", "unflatten"),
        *("ravel", "contiguous"),
    )
)
"""Operations whose result is the tensor itself or a copy, as its strides allow."""

NEW = frozenset(("clone", *(f"{kind}_like" for kind in _KINDS)))
"""Operations that make a tensor with the strides of another."""


@dataclass(frozen=True, eq=False)
class Laid(Source):
    """A shown weight, or a part of one, in another shape: a copy that is written back.

    Args:
        of: The ``ShownWeight``.
        shape: The other shape.
    """

    of: Any
    shape: torch.Size

    def names(self) -> Names:
        """As the weight."""
        names: Names = self.of._source.names()
        return names

    def read(self) -> Tensor:
        """The numbers that there are now."""
        of = self.of
        if of._copy is not None:
            of._bring_up()
        with torch._C.DisableTorchFunctionSubclass():
            now: Tensor = of.detach().clone(memory_format=torch.contiguous_format)
            return now.view(self.shape)

    def write(self, new: Tensor) -> None:
        """As an edit of the weight."""
        of = self.of
        of._before_an_edit("copy_", autograd_is_off=True)
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            of.detach().copy_(new.view(of.shape))
            if of._copy is not None:
                of._bring_home(seen=True)

    def refuse_autograd(self) -> None:
        """As an edit of the weight."""
        if self.of._copy is not None:
            self.of._source.refuse_autograd()
        else:
            self.of[:0].zero_()


def twin(value: Tensor) -> Tensor:
    """A contiguous tensor of this shape, without values."""
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def as_contiguous(its_twin: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options of an operation of ``NEW`` that gives the strides of a contiguous weight."""
    if its_twin is None or not its_twin.is_contiguous():
        return kwargs
    return {"memory_format": torch.contiguous_format} | kwargs


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether one is a view of the other, or both of a third."""
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse, or within a function transform
            return False


def replayed(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives of the twins; None if it cannot be told."""
    try:
        return func(*_twins(args), **_twins(kwargs))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def _twins(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _twins(one) for key, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_twins(one) for one in value)
    return getattr(value, "_twin", value) if isinstance(value, Tensor) else value
