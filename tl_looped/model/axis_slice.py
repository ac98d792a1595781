"""Which entries of an axis are wanted: a slice of TransformerLens that says what is not there."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tl_looped._compat import Slice
from tl_looped.checks import described
from tl_looped.errors import InputError


class AxisSlice(Slice):
    """A TransformerLens slice of a named axis.

    Args:
        given: An integer, which drops the axis; a tuple as of ``slice``; a list, array or tensor of
            indices or of bools; None for all; or a slice.
        name: What the axis holds, for messages: ``"positions"``.
        keep: An integer keeps the axis, of one entry.

    Raises:
        InputError: if it is none of these, and when it is applied to an axis that is too short.
    """

    def __init__(self, given: Any, name: str, keep: bool = False) -> None:
        self.name = name
        if isinstance(given, Slice):
            self.slice, self.mode = given.slice, given.mode
        else:
            try:
                super().__init__(given)
            except (ValueError, TypeError) as error:
                raise self._refused(given) from error
        if self.mode == "int" and (keep or isinstance(self.slice, bool)):
            self.slice, self.mode = np.array([self.slice]), "array"
        if isinstance(self.slice, np.ndarray):
            if self.slice.ndim != 1 or not (self.slice.dtype.kind in "iub" or not self.slice.size):
                raise self._refused(given)
            if not self.slice.size:
                self.slice = self.slice.astype(np.int64)

    def _refused(self, given: Any) -> InputError:
        return InputError(
            f"{self.name} are selected by an integer, a tuple (stop,), (start, stop) or (start, "
            f"stop, step), or a list of integers or bools, not by {described(given)}"
        )

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The selected entries of an axis.

        Raises:
            InputError: if the axis has fewer entries than are selected.
        """
        try:
            if self.mode != "array":
                return super().apply(tensor, dim)
            # numpy finds what is out of range, and what is True, for tensors without values too.
            return Slice(self.indices(tensor.shape[dim])).apply(tensor, dim)
        except (IndexError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.name}: {self.slice} does not select of {tensor.shape[dim]}: {error}"
            ) from error
