"""Weights as TransformerLens has them: tensors that know where their numbers are stored.

``blocks[3].attn.W_Q`` is no parameter. It is rows of a matrix that every recurrence shares, turned
around; in compatibility mode it is multiplied by a norm's gain, under grouped-query attention keys
and values are repeated for each query head, and a bias that the model lacks is zeros. A plain
tensor would take an edit that never reaches the model. A :class:`ShownWeight` is a tensor whose
edits take effect on what is stored, or raise an error that says what to do:

* A view (``W_Q``, ``W_O``, ``W_in``, ...) is edited where it is stored.
* A copy is written back: where a gain is folded in, what changed is divided by it, in fp32 or
  better, and refused where it is zero; repeated heads must agree.
* Zeros of a bias, ones of a folded norm and stacks over layers refuse what would change them.

That holds for operations in place (``W[0] = 0``, ``W *= 2``, ``copy_``, ``out=``,
``torch.nn.init``), for ``.data = ...``, for assignment (``attn.W_Q = nn.Parameter(x)`` copies the
numbers), and for views of such a tensor, ``W.reshape(-1)`` too (``shown_layout``). As with a
parameter, PyTorch refuses edits in place that autograd would see: edit within
``torch.no_grad()``. ``grad`` is what ``backward`` left in the stored parameter, in
TransformerLens's shape, and ``torch.autograd.grad`` gives the same. What is computed of a shown
weight is a plain tensor, and so are its copies by ``clone``, ``deepcopy``, ``pickle`` and
``torch.save``.

Weights are shared: by all recurrences of a layer, by the query heads of a group, by embedding and
unembedding where they are tied. ``shared_by`` names all that change with a weight, and so does its
``repr``; ``grad`` is the sum over all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from tl_looped._compat import Module
from tl_looped.checks import described
from tl_looped.errors import InputError
from tl_looped.model.shown_gradients import gradients
from tl_looped.model.shown_layout import (
    LAYOUT,
    NEW,
    Laid,
    as_contiguous,
    replayed,
    shares_memory,
    twin,
)
from tl_looped.model.weight_sources import Rows, Source, same_values

# What their type hints do not know.
_Tensor: Any = Tensor
_plain = torch._C.DisableTorchFunctionSubclass

_BASE = _Tensor._base.__get__

_SHAPE_CHANGES = frozenset(
    (
        *("resize_", "resize_as_", "sparse_resize_", "as_strided_", "detach_"),
        *("transpose_", "t_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "share_memory_"),
    )
)
"""Operations in place that change what a tensor is, and none of its numbers."""


class ShowsWeights(Module):
    """A module whose weights are properties: assigning one of them copies values."""

    def register_parameter(self, name: str, param: Tensor | None) -> None:
        """As in PyTorch; of a weight that is shown, its values are stored."""
        if isinstance(param, ShownWeight) and name.endswith("_orig"):  # torch.nn.utils.prune
            param._refuse("it cannot be pruned under this name, it is stored in", "prune that one")
        shown = getattr(type(self), name, None)
        if not isinstance(shown, property):
            super().register_parameter(name, cast("nn.Parameter | None", param))
        elif shown.fset is None:
            raise InputError(
                f"{name} cannot be assigned: edit what it is made of, such as blocks[i].attn.W_Q, "
                "embed.W_E, unembed.W_U"
            )
        else:
            shown.fset(self, param)


class ShownWeight(Tensor):
    """A weight under TransformerLens's name; edits reach the stored parameter, or are refused.

    It is a tensor as any other: results of operations are plain tensors, views are shown weights.
    ``weight.as_subclass(torch.Tensor)`` is the tensor without its knowledge.
    """

    _source: Source
    # Of a copy, all of it, as a plain tensor; None where the numbers are the stored ones.
    _copy: Tensor | None
    _is_whole: bool
    # Contiguous, without values, through all that this went through; None if that is not known.
    _twin: Tensor | None

    @property
    def shown_as(self) -> str:
        """TransformerLens's name, ``blocks.3.attn.W_Q``; a part of the weight has the same."""
        return self._source.names().shown_as

    @property
    def stored_in(self) -> str | None:
        """Name of the parameter, ``core.1.attn.qkv``; None where there is none."""
        return self._source.names().stored_in

    @property
    def shared_by(self) -> tuple[str, ...]:
        """TransformerLens's names of all weights that are these numbers, this one included.

        ``("blocks.3.attn.W_Q", "blocks.6.attn.W_Q", ...)``: an edit of one is an edit of all.
        """
        return self._source.names().shared_by

    @property
    def grad(self) -> Tensor | None:
        """The stored parameter's gradient in this shape, summed over all that share it."""
        if self._is_whole:
            source = self._source
            computed = isinstance(source, Rows) and source.parameter() is None
            if not computed:
                grad = source.grad()
                return show(grad) if isinstance(grad, Source) else grad
        with _plain():
            return cast("Tensor | None", _Tensor.grad.__get__(self))

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        if not self._is_whole:
            with _plain():
                _Tensor.grad.__set__(self, grad)
        elif grad is not None or self.grad is not None:
            self._refuse("its gradient is that of", "set the grad of that")

    @property
    def data(self) -> Tensor:
        """The same numbers without autograd."""
        return self.detach()

    @data.setter
    def data(self, data: Tensor) -> None:
        if getattr(self, "_is_param", False):
            # nn.Parameter(weight) of another module, which moves (``to``): it is that module's now.
            self.__dict__.clear()
            self.__class__ = nn.Parameter  # type: ignore[assignment]
            self.data = data
            return
        if not self._is_whole:
            self._refuse("a part of it cannot get other data: it is stored in", "assign with [:] =")
        assign(self._source, data.detach() if isinstance(data, Tensor) else data)
        if self._copy is not None:
            self._bring_up()

    @property
    def requires_grad(self) -> bool:
        """As the stored parameter."""
        with _plain():
            return bool(_Tensor.requires_grad.__get__(self))

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.requires_grad_(requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> ShownWeight:
        """As in PyTorch for what is no weight any more (``detach()``); else set the parameter's."""
        if requires_grad != self.requires_grad:
            if self._is_whole:
                self._refuse("it requires a gradient as it is stored in", "set requires_grad there")
            with _plain():
                Tensor.requires_grad_(self, requires_grad)
        return self

    def register_hook(self, hook: Any) -> NoReturn:
        """Refused: the model's runs do not pass through this tensor."""
        self._refuse("the model runs with", "register the hook there")

    def register_post_accumulate_grad_hook(self, hook: Any) -> NoReturn:
        """Refused: the model's runs do not pass through this tensor."""
        self._refuse("the model runs with", "register the hook there")

    def set_(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the weight stays where it is stored."""
        self._refuse("set_ would change this tensor alone, and not", "edit its values")

    def _refuse(self, reason: str, instead: str) -> NoReturn:
        names = self._source.names()
        where = names.stored_in or "what it is made of"
        raise InputError(f"{names.shown_as}: {reason} {where}: {instead}")

    def numpy(self, *, force: bool = False) -> Any:
        """As in PyTorch; of a copy, an array that cannot be written to."""
        with _plain():
            array = Tensor.numpy(self, force=force)
        if self._copy is not None:
            array.flags.writeable = False
        return array

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with _plain():
            copy = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy = nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _plain():
            copy = self.detach().clone().requires_grad_(self.requires_grad)
        return copy.__reduce_ex__(protocol)

    def __format__(self, format_spec: str) -> str:
        with _plain():
            return format(self.as_subclass(Tensor), format_spec) if format_spec else repr(self)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        with _plain():
            text = repr(self.as_subclass(Tensor))
        part = "" if self._is_whole else "part of "
        return f"{text}\n# {part}{self._source.names().note()}"

    def _part(self, view: Tensor, its_twin: Any) -> ShownWeight:
        mine, part = self._twin, _as_shown(view, self._source, self._copy, is_whole=False)
        known = type(its_twin) is Tensor and mine is not None and its_twin.shape == view.shape
        part._twin = its_twin if known and shares_memory(its_twin, cast(Tensor, mine)) else None
        return part

    def _laid_out(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What an operation on the layout gives, as of a contiguous weight; None if unknown."""
        mine = self._twin
        if mine is None:
            return None
        its = func(mine, *args, **kwargs)
        if its.dtype != mine.dtype:
            return None
        out: Tensor = func(self.contiguous(), *args, **kwargs)
        if not shares_memory(its, mine):
            return out.clone() if shares_memory(out, self) else out
        if shares_memory(out, self):
            return self._part(out, its)
        laid = _as_shown(out, Laid(self, out.shape), out, is_whole=False)
        laid._twin = its
        return laid

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run with plain tensors, bring edits to where they belong, keep views shown."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        edits = _is_edit(name, kwargs)
        if name == "as_subclass" or (torch.compiler.is_compiling() and not edits) or func == _BASE:
            with _plain():
                return func(*args, **kwargs)
        if func is torch.autograd.grad:
            return _differentiated(*args, **kwargs)
        shown = list(_shown_among((*args, *kwargs.values())))
        written = list(_shown_among(_written(args, kwargs))) if edits else []
        for one in written:
            one._before_an_edit(name, getattr(func, "__module__", "") == "torch.nn.init")
        copies = {id(one._copy): one for one in shown if one._copy is not None}
        versions = {i: _version(one._copy) for i, one in copies.items()}
        with _plain():
            if name in NEW and args and isinstance(args[0], ShownWeight):
                kwargs = as_contiguous(args[0]._twin, kwargs)
            if name in LAYOUT and args and isinstance(args[0], ShownWeight):
                laid = args[0]._laid_out(func, args[1:], kwargs)
                if laid is not None:
                    return laid
            out = func(*args, **kwargs)
            edited = {id(one._copy) for one in written}
            for i, one in copies.items():
                if i in edited or _version(one._copy) != versions[i]:
                    one._bring_home(seen=i in edited)
            return _still_shown(out, shown, lambda: replayed(func, args, kwargs))

    def _before_an_edit(self, name: str, autograd_is_off: bool) -> None:
        """Refuse what is no edit of values, or cannot reach the stored ones; bring copies up."""
        if name in _SHAPE_CHANGES:
            self._refuse(f"{name} would change this tensor alone, and not", "edit its values")
        if self._copy is None:
            parameter = self._source.parameter()
            if parameter is None or not shares_memory(self, parameter):
                self._refuse(
                    "it was read before the model was moved or its parameter replaced, now",
                    "read it again",
                )
            return
        if torch.is_grad_enabled() and not autograd_is_off and self.requires_grad:
            self._source.refuse_autograd()
        self._bring_up()

    def _bring_up(self) -> None:
        copy = cast(Tensor, self._copy).detach()
        now = self._source.read()
        if (now.dtype, now.device) != (copy.dtype, copy.device):
            self._refuse("it was read before the model was moved, it is stored in", "read it again")
        with torch.no_grad(), _plain():
            copy.copy_(now)

    def _bring_home(self, seen: bool) -> None:
        """Write an edited copy to where it is stored; after that it shows what is stored."""
        try:
            if not seen and self.requires_grad and torch.is_grad_enabled():
                self._source.refuse_autograd()
            self._source.write(cast(Tensor, self._copy).detach())
        finally:
            self._bring_up()


def show(source: Source) -> Tensor:
    """A weight as TransformerLens has it; a plain tensor while ``torch.compile`` traces.

    Of a parameter of another class of tensors (``DTensor``), one of that class.
    """
    value = source.read()
    if torch.compiler.is_compiling() or type(value) is not Tensor:
        return value
    return _as_shown(value, source, None if source.is_view else value, is_whole=True)


def _as_shown(value: Tensor, source: Source, copy: Tensor | None, is_whole: bool) -> ShownWeight:
    shown = value.as_subclass(ShownWeight)
    shown._source, shown._copy, shown._is_whole = source, copy, is_whole
    shown._twin = twin(value)
    return shown


def assign(source: Source, value: Any) -> None:
    """Store values for a weight: what assignment to it does.

    Raises:
        InputError: it is no tensor, of another shape, or the weight's dtype cannot hold it; a
            gradient is wanted, or the weight is only lent to a call.
    """
    _refuse_a_loan(source, value)
    with torch.no_grad(), _plain():
        now, name = source.read(), source.names().shown_as
        if not isinstance(value, Tensor) or value.shape != now.shape or value.is_complex():
            raise InputError(
                f"{name} is real, of shape {list(now.shape)}: it cannot become {described(value)}"
            )
        held = value.detach().to(now.device, now.dtype)
        if not (held.is_meta or bool(same_values(held.to(value), value.detach()).all())):
            raise InputError(
                f"{name} is {now.dtype}, which cannot hold all of these values of {value.dtype}: "
                f"round them first (.to({now.dtype})), or move the model to another dtype"
            )
        source.write(held)


def _refuse_a_loan(source: Source, value: Any) -> None:
    """Refuse what would take the number and nothing else: a gradient, or the end of the loan.

    ``torch.func.functional_call`` exchanges what is no parameter by assignment, and assigns after
    the call what it has read before: a view, which has the new numbers by then.
    """
    names = source.names()
    instead = "there is no such parameter"
    if names.stored_in is not None:
        instead = f"use {names.stored_in}, where it is stored (model.parameter_of has its rows)"
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.nn.utils._named_member_accessor":
            raise InputError(f"{names.shown_as} cannot be lent to functional_call: {instead}")
        frame = frame.f_back
    traced = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    if traced and value.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{names.shown_as}: assignment copies numbers, and no gradient would reach what they "
            f"were computed of: assign value.detach(). For gradients {instead}, with "
            "torch.func.functional_call or torch.nn.utils.parametrize"
        )


def _differentiated(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.autograd.grad``, by shown weights too."""
    with _plain():
        sources = [
            one._source
            if isinstance(one, ShownWeight) and one._is_whole and isinstance(one._source, Rows)
            else None
            for one in inputs
        ]
        if not any(sources):
            return torch.autograd.grad(outputs, inputs, *args, **kwargs)
        return gradients(outputs, inputs, sources, **kwargs)


def _is_edit(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether an operation says that it works in place."""
    in_place = name[-1:] == "_" and name[-2:] != "__"
    has_out = kwargs.get("out") is not None
    return in_place or has_out or name == "__setitem__" or kwargs.get("inplace") is True


def _written(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What it edits."""
    if kwargs.get("out") is not None:
        return (kwargs["out"],)
    return args[:1] or tuple(kwargs.values())[:1]


def _shown_among(values: Any) -> Iterator[ShownWeight]:
    for value in values:
        if isinstance(value, ShownWeight):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _shown_among(value)


def _version(x: Tensor | None) -> int | None:
    """How often a tensor was edited, if anyone counts."""
    return None if x is None or x.is_inference() else x._version


def _still_shown(out: Any, shown: list[ShownWeight], of_twins: Callable[[], Any]) -> Any:
    """What an operation gives, its views of shown weights as such."""
    if type(out) is Tensor:
        for one in shown:
            if shares_memory(out, one):
                return one._part(out, of_twins())
    elif type(out) in (tuple, list):
        return type(out)(
            _still_shown(part, shown, partial(_item, of_twins, i)) for i, part in enumerate(out)
        )
    return out


def _item(of_twins: Callable[[], Any], i: int) -> Any:
    twins = of_twins()
    return twins[i] if type(twins) in (tuple, list) and i < len(twins) else None
