"""The family of errors, and a check that a refusal is of it and helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tl_looped import (
    TLLoopedError,
)

FAMILY = {
    "ConfigError": ValueError,
    "CheckpointError": ValueError,
    "UnknownArchitectureError": ValueError,
    "RegistryError": ValueError,
    "LayerIndexError": IndexError,
    "RecurrenceCountError": ValueError,
    "HookNameError": KeyError,
    "GatedHookError": ValueError,
    "InputError": ValueError,
    "TokenizerError": ValueError,
    "InvalidDecompositionError": NotImplementedError,
    "MissingActivationError": KeyError,
    "DataError": ValueError,
    "DivergedError": ArithmeticError,
}


@contextmanager
def refused(kind: type[TLLoopedError], *parts: str) -> Iterator[None]:
    with pytest.raises(TLLoopedError) as caught:
        yield
    assert type(caught.value) is kind
    assert isinstance(caught.value, FAMILY[kind.__name__])
    assert [part for part in parts if part not in str(caught.value)] == []
