"""Writing results: each file is written beside its place and renamed, so none is ever partial."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from tl_looped.errors import DataError

_LONGEST_NAME = 255  # bytes: what the usual file systems take


def make_folder(folder: Path) -> Path:
    """Create a folder for results.

    Raises:
        DataError: if the path is a file or cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DataError(f"{folder} cannot be used as a folder for results: {error}") from error
    return folder


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; no error for a name that none can have, of 5,000 characters."""
    with suppress(OSError, ValueError):
        return Path(path).is_file()
    return False


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; see :func:`is_file`."""
    with suppress(OSError, ValueError):
        return Path(path).is_dir()
    return False


def write_bytes(content: bytes | memoryview, path: Path) -> Path:
    """Write a file so that it is whole or not there, even after a loss of power.

    Raises:
        DataError: if the disk is full, the folder cannot be written to, or no file can have such a
            name; nothing is left behind.
    """
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        # On a disk that cannot be written to there is nothing to remove, and that fails too.
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, (OSError, ValueError)):
            raise
        raise DataError(
            f"{path} ({len(content)} bytes) cannot be written: {error}. What was written before "
            "stays; make room and call again to go on from there"
        ) from error
    return path


def _partial(path: Path) -> Path:
    """Where a file is written first: with the process number, so that two processes never share it.

    A name that would become too long with it is replaced by its hash.
    """
    ending = f".{os.getpid()}.partial"
    name, content = path.name, path.name.encode("utf-8", "surrogatepass")
    if len(content) + len(ending) > _LONGEST_NAME:
        name = hashlib.sha256(content).hexdigest()[:16]
    return path.parent / (name + ending)  # with_name refuses a path without a name


def write_text(text: str, path: Path) -> Path:
    """Write a text file in UTF-8; see :func:`write_bytes`.

    Raises:
        DataError: as :func:`write_bytes`, and for a text that UTF-8 cannot hold.
    """
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path} cannot be written: its text holds half of a surrogate pair, "
            f"{error.object[error.start]!r}, which is not a character"
        ) from error
    return write_bytes(content, path)
