"""Slices of positions, rows and neurons: what they select, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tl_looped import InputError
from tl_looped._compat import Slice
from tl_looped.model.axis_slice import AxisSlice

X = torch.arange(24.0).reshape(2, 4, 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, X),
        (1, X[:, 1]),
        (-1, X[:, -1]),
        (np.int64(2), X[:, 2]),
        (torch.tensor(2), X[:, 2]),
        ((2,), X[:, :2]),
        ((1, 3), X[:, 1:3]),
        ((0, 4, 2), X[:, ::2]),
        ([3, 0, -4], X[:, [3, 0, 0]]),
        ([], X[:, :0]),
        (torch.tensor([True, False, False, True]), X[:, [0, 3]]),
        (Slice([1]), X[:, [1]]),
        (Slice(1), X[:, 1]),
    ],
)
def test_what_is_selected(given: Any, expected: torch.Tensor) -> None:
    assert torch.equal(AxisSlice(given, "positions").apply(X, dim=1), expected)
    kept = AxisSlice(given, "positions", keep=True).apply(X, dim=1)
    assert torch.equal(kept, expected if expected.ndim == 3 else expected[:, None])
    without_values = AxisSlice(given, "positions").apply(X.to("meta"), dim=1)
    assert without_values.shape == expected.shape


@pytest.mark.parametrize(
    "given", [4, -5, [0, 4], [[0, 1]], torch.ones(3, dtype=torch.bool), True, [0.5], "a", (0, 1, 0)]
)
def test_what_is_not_there_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="positions"):
        AxisSlice(given, "positions").apply(X, dim=1)
