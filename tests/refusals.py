"""The family of errors, and a check that a refusal is of it and helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tl_looped import TLLoopedError
from tl_looped.cli import main

FAMILY = {
    "ArgumentTypeError": TypeError,
    "ConfigError": ValueError,
    "CheckpointError": ValueError,
    "UnknownArchitectureError": ValueError,
    "RegistryError": ValueError,
    "LayerIndexError": IndexError,
    "RecurrenceCountError": ValueError,
    "HookNameError": KeyError,
    "GatedHookError": AssertionError,
    "InputError": ValueError,
    "TokenizerError": ValueError,
    "SingleTokenError": AssertionError,
    "InvalidDecompositionError": NotImplementedError,
    "UnsupportedMethodError": NotImplementedError,
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


def command_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    """What the command line says instead of a traceback, as one line."""
    monkeypatch.setattr("sys.argv", ["tl-looped", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return " ".join(printed.split())
