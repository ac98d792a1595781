"""Writing a file: whole or not there, and every refusal of the system is one of the package's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tl_looped import DataError
from tl_looped.files import make_folder, write_bytes, write_text


def test_a_file_is_written_under_any_name_that_a_file_can_have(tmp_path: Path) -> None:
    for name in ("a", "x" * 255, "é" * 127, "$x$ {y} %s"):
        assert write_bytes(b"content", tmp_path / name).read_bytes() == b"content"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "name", ["x" * 256, "file/below", "absent/below", "nul\0", "half\ud800"], ids=ascii
)
def test_a_path_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    """Below a file, removing what was not written fails too, as on a read-only disk."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError) as caught:
        write_bytes(b"content", tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["x" * 256, "file", "file/below", "nul\0", "half\ud800"], ids=ascii
)
def test_a_folder_that_cannot_be_made_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError) as caught:
        make_folder(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_text_that_utf_8_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt .*half of a surrogate pair"):
        write_text("one \ud800 two", tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def _fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("stop", "error"), [(_fail, DataError), (_stop, KeyboardInterrupt)])
@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_the_old_file_stays_whole_and_nothing_is_left(
    when: str, stop: Callable[..., None], error: type[BaseException], tmp_path: Path, monkeypatch
) -> None:
    path = write_bytes(b"old", tmp_path / "a")
    with monkeypatch.context() as patched:
        patched.setattr(os, when, stop)
        with pytest.raises(error):
            write_bytes(b"new", path)
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a", b"old")]
