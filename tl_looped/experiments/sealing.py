"""A checksum inside every file of results, so that none that has changed is taken for what it was.

Files of bytes end with a line that holds the SHA-256 of all before it. Where the bytes are netCDF
the line stands behind the end that HDF5 itself records, so that every program reads the file as
before. Every bit counts, values, attributes and padding; hashing takes a tenth of the time of
reading. Small records are JSON objects with the SHA-256 of their other values.

What has no such line was written by an earlier version, or by another program: it can be read, but
whether it has changed cannot be told.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tl_looped.errors import DataError
from tl_looped.files import write_text

_MARK = b"\ntl_looped sha256 "
_SIZE = len(_MARK) + 64 + 1
_KEY = "sha256"


def sealed(content: bytes | memoryview) -> bytes:
    """Content with its checksum behind it."""
    return b"".join((content, _MARK, hashlib.sha256(content).hexdigest().encode(), b"\n"))


def opened(content: bytes) -> tuple[memoryview, bool]:
    """Content without its checksum, and whether there was one.

    Raises:
        ValueError: if it has changed since its checksum was made.
    """
    body, seal = memoryview(content)[:-_SIZE], content[-_SIZE:]
    digest = hashlib.sha256(body).hexdigest().encode()
    if seal == _MARK + digest + b"\n":
        return body, True
    if _MARK in content or digest in seal:  # cut off, continued, or changed, be it the mark alone
        raise ValueError("its bytes are not those that its checksum was made of")
    return memoryview(content), False


def write_record(values: dict[str, Any], path: Path) -> Path:
    """Write a JSON object with its checksum.

    Raises:
        DataError: as :func:`tl_looped.files.write_bytes`.
    """
    return write_text(json.dumps(values | {_KEY: _digest(values)}) + "\n", path)


def read_record(path: Path) -> dict[str, Any]:
    """Read what :func:`write_record` wrote.

    Raises:
        DataError: if it is missing or has changed.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.pop(_KEY, None) != _digest(values):
            raise ValueError("it does not hold what its checksum was made of")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error})") from error
    return values


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
