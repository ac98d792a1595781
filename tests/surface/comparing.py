"""Whether two results are the same: values, types and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from closeness import SAME, SAMPLES
from torch import Tensor, nn
from transformer_lens import ActivationCache, FactoredMatrix

# Both are in fp64. What TransformerLens itself computes in fp32 whatever the model is (folding).
ROUNDED = SAMPLES * torch.finfo(torch.float32).eps
# Of the loop alone, in caches and among hook names.
OF_THE_LOOP = ("hook_initial_state", "recurrence.")


def shared(names: Any) -> list[str]:
    """Names of hooks without those of the loop, in their order."""
    return [name for name in names if not name.startswith(OF_THE_LOOP)]


def assert_alike(ours: Any, theirs: Any, where: str = "result", bound: float = SAME) -> None:
    """``ours`` stands for ``theirs``: equal, but for the rounding of sums, ``bound``."""
    if isinstance(theirs, ActivationCache):
        assert isinstance(ours, ActivationCache), where
        assert (ours.has_batch_dim, ours.has_embed) == (theirs.has_batch_dim, theirs.has_embed)
        assert_alike(ours.cache_dict, theirs.cache_dict, where, bound)
    elif isinstance(theirs, FactoredMatrix):
        assert isinstance(ours, FactoredMatrix), where
        assert_alike(ours.AB, theirs.AB, where, bound)
    elif isinstance(theirs, Tensor):
        _assert_tensors(ours, theirs, where, bound)
    elif isinstance(theirs, Mapping):
        assert isinstance(ours, Mapping), where
        if any(str(name).startswith(OF_THE_LOOP) for name in ours):
            ours = {name: ours[name] for name in shared(ours)}
        assert list(ours) == list(theirs), where
        for name in theirs:
            assert_alike(ours[name], theirs[name], f"{where}[{name!r}]", bound)
    elif isinstance(theirs, (list, tuple)):
        assert isinstance(ours, (list, tuple)), where
        assert len(ours) == len(theirs), (where, len(ours), len(theirs))
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_alike(one, other, f"{where}[{i}]", bound)
    elif isinstance(theirs, np.ndarray):
        assert isinstance(ours, np.ndarray), where
        assert ours.shape == theirs.shape, where
        assert ours.dtype == theirs.dtype, where
        assert (ours == theirs).all(), where
    elif isinstance(theirs, nn.Module):
        assert isinstance(ours, nn.Module), where
    else:
        assert type(ours) is type(theirs), (where, ours, theirs)
        assert ours == theirs, (where, ours, theirs)


def _assert_tensors(ours: Any, theirs: Tensor, where: str, bound: float) -> None:
    assert isinstance(ours, Tensor), where
    ours, theirs = ours.detach(), theirs.detach()
    finite = theirs[theirs.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    torch.testing.assert_close(
        ours,
        theirs,
        atol=bound * max(largest, 1.0),
        rtol=0.0,
        equal_nan=True,
        msg=lambda text: f"{where}: {text}",
    )


# The built-in errors of which a caller of TransformerLens catches one, most special first.
CAUGHT = (NotImplementedError, AssertionError, KeyError, IndexError, ValueError, TypeError)
CAUGHT += (AttributeError,)


def assert_same_mistake(ours: Exception, theirs: Exception) -> None:
    """Code that catches TransformerLens's error catches ours."""
    family = next((kind for kind in CAUGHT if isinstance(theirs, kind)), None)
    assert family is not None, f"TransformerLens raises {theirs!r}"
    assert isinstance(ours, family), (ours, theirs)
