"""How close two computations of the same mathematics must be: the one place that says it.

Two ways of computing one thing (fused or explicit attention, a batch or its rows, a bridge or its
model) round differently, and how differently depends on the processor and its kernels. So no test
compares them in fp32 by a number that held somewhere once. Three rules:

* They are compared in fp64, by :func:`assert_same`. Rounding there is far below the bound on every
  processor, and a mistake far above it.
* Where fp32 or half precision is itself what a test is about, the bound comes from the run:
  :func:`rounding_bound` of the run in fp64 and in the precision at hand.
* What the reference implementations computed in fp32 (``tests/golden``) is compared by the
  documented bound, ``conftest.TOLERANCE``.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from tl_looped import LoopedTransformer

SAME = 1e-10
"""Relative to the largest value compared. In between two things that are far apart:

One rounding in fp64 is 1e-16 of its value. The models here sum some hundred terms in some dozen
layers, and their loops may amplify an error by some thousand (a spectral radius above 1 over a
handful of recurrences): 1e-12 of the largest value at worst, and 1e-14 as a rule. Any intermediate
that is kept in fp32 by mistake is off by 6e-8 of its value, and a term that is lost, doubled or
taken from the wrong place by more than that.
"""

SAMPLES = 16
"""By how much the largest of one run's rounding errors may exceed that of another one.

Both are maxima over many errors of the same kind, which differ by a factor of 2 or 3; what a
processor adds is the order of its sums. Summing n terms one after another is at worst sqrt(n) times
as bad as in blocks, and n is at most some hundred here.
"""


def assert_same(actual: Tensor, expected: Tensor, scale: float = 0.0) -> None:
    """Two fp64 tensors that the same mathematics gives.

    Args:
        actual: One of them.
        expected: The other.
        scale: Size of the values that were summed, where the result is small because they cancel.
    """
    assert actual.dtype == expected.dtype == torch.float64, (actual.dtype, expected.dtype)
    finite = expected.detach()[expected.isfinite()]
    largest = max(scale, float(finite.abs().max()) if finite.numel() else 0.0)
    torch.testing.assert_close(
        actual, expected, atol=SAME * largest, rtol=0.0, equal_nan=True, check_stride=False
    )


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """An fp32 tensor that is the fp64 one rounded, or the sum of a few such roundings."""
    assert (actual.dtype, exact.dtype) == (torch.float32, torch.float64)
    largest = float(exact.detach().abs().max())
    bound = SAMPLES * torch.finfo(torch.float32).eps * largest
    torch.testing.assert_close(actual.double(), exact, atol=bound, rtol=0.0, check_stride=False)


def assert_same_data(actual: xr.Dataset, expected: xr.Dataset) -> None:
    """Two sets of metrics of fp64 states: the same variables, coordinates and values."""
    assert set(actual.data_vars) == set(expected.data_vars)
    for name in actual.data_vars:
        assert actual[name].dims == expected[name].dims, name
        assert actual[name].dtype == expected[name].dtype, name
        np.testing.assert_allclose(
            actual[name].values, expected[name].values, atol=SAME, rtol=SAME, err_msg=str(name)
        )
    xr.testing.assert_equal(actual.coords.to_dataset(), expected.coords.to_dataset())


def assert_logits(model: LoopedTransformer, tokens: Tensor, expected: Tensor, **run: Any) -> None:
    """An fp32 model gives the logits that another implementation computed in fp32.

    transformers normalises in fp32 whatever its model is, so that fp64 shows nothing there.
    """
    with torch.no_grad():
        found = model(tokens, **run)
        bound = rounding_bound(deepcopy(model).double()(tokens, **run), found)
    torch.testing.assert_close(found, expected.detach(), atol=bound, rtol=0.0)


def rounding_bound(exact: Tensor, rounded: Tensor) -> float:
    """Largest difference that rounding explains between two runs in a precision below fp64.

    Each of the two is off the exact result by its own roundings. How far, the conditioning of the
    model and its loop decides; it is seen in one of the runs beside the same run in fp64.

    Args:
        exact: Result of the run in fp64.
        rounded: Result of the same run in the precision that is tested (or a metric of it).
    """
    assert exact.dtype == torch.float64
    bound = SAMPLES * float((rounded.double() - exact).abs().max())
    assert bound > 0.0, "nothing was rounded: these are not runs in two precisions"
    return bound


def rounding_of_vectors(matrix: Tensor, n: int) -> float:
    """How far rounding to fp32 may turn one of the first ``n`` singular vectors of a matrix.

    Wedin: by the error of the matrix over the gap to the next singular value.
    """
    values = torch.linalg.svdvals(matrix.detach().double())
    gap = float((values[:n] - values[1 : n + 1]).min())
    return SAMPLES * torch.finfo(torch.float32).eps * float(values[0]) / gap
