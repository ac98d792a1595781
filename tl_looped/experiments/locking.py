"""One process works in a folder of results at a time."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from tl_looped.errors import DataError
from tl_looped.files import make_folder


def lock_folder(folder: Path) -> FileLock:
    """Held as long as this process works in the folder; it ends with the process, however it ends.

    Raises:
        DataError: if another process holds it, or the folder cannot be written to.
    """
    lock = FileLock(make_folder(folder) / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise DataError(
            f"another process is running this experiment in {folder}: wait for it and call again, "
            "or give another folder"
        ) from error
    except (OSError, NotImplementedError) as error:  # a disk that is full, read-only, or has none
        raise DataError(f"{folder} cannot be locked for this process: {error}") from error
    return lock
