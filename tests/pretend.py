"""Devices that compute on the CPU and refuse to mix, as CUDA devices do.

``lazy:0``, ``lazy:1``, … are names of devices to PyTorch, which have no backend here. Where
:func:`pretended_devices` is on, a tensor on such a device is a wrapper around a tensor on the CPU.
Every operation on it is computed there, but raises as on CUDA if its tensors are on different
devices. Tensors move by ``to`` and ``copy_`` alone, and a scalar on the CPU may join any device. So
a wrong placement is an error, and a right one gives numbers to compare bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten
CPU = torch.device("cpu")
MOVES = (aten._to_copy.default, aten.copy_.default)


class Placed(Tensor):
    """A tensor that says it is on a pretended device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def storage(self) -> Any:
        return self.inner.storage()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self.inner!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Tensors(TorchFunctionMode):
    """``torch.tensor`` makes its tensor without asking a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **(kwargs | {"device": CPU})).to(kwargs["device"])
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """New tensors can be made on pretended devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


@contextmanager
def pretended_devices() -> Iterator[None]:
    """While it is on, there are the devices ``lazy:0``, ``lazy:1``, …"""
    with _Operations(), _Tensors():
        yield


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if torch.is_inference_mode_enabled():
        # Only there do operations arrive that are made of others, `to` for instance.
        with _Operations():
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
    given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    # A scalar on the CPU is a number to any device.
    found = [x.device for x in given if x.ndim or x.device != CPU]
    device = torch.device(kwargs["device"]) if kwargs.get("device") else None
    if func not in MOVES and len(set(found)) > 1:
        raise RuntimeError(
            f"{func}: expected all tensors on one device, found {sorted(map(str, set(found)))}"
        )
    device = device or (found[0] if found else CPU)
    wrappers = {id(x.inner): x for x in given if isinstance(x, Placed)}
    if torch.device(kwargs.get("device") or "cpu").type == "lazy":
        kwargs = kwargs | {"device": CPU}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Placed) else x, (args, kwargs))
    out = func(*args, **kwargs)
    if device.type != "lazy":
        return out

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return wrappers[id(x)] if id(x) in wrappers else Placed(x, device)

    return tree_map(placed, out)
