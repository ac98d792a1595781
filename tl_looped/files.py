"""Writing results: each file is written beside its place and renamed, so none is ever partial."""

from __future__ import annotations

import os
from pathlib import Path

from tl_looped.errors import DataError


def make_folder(folder: Path) -> Path:
    """Create a folder for results.

    Raises:
        DataError: if the path is a file or cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be used as a folder for results: {error}") from error
    return folder


def write_bytes(content: bytes | memoryview, path: Path) -> Path:
    """Write a file so that it is whole or not there, also after a loss of power.

    Raises:
        DataError: if the disk is full or the folder cannot be written to; nothing is left behind.
    """
    # The process number, so that two processes never write into one partial file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"{path} ({len(content)} bytes) cannot be written: {error}. What was written before "
            "stays; make room and call again to go on from there"
        ) from error
    return path


def write_text(text: str, path: Path) -> Path:
    """Write a text file in UTF-8; see :func:`write_bytes`."""
    return write_bytes(text.encode("utf-8"), path)
