"""States of a run on disk, so that a reference that is known at the end costs no second run.

One unnamed temporary file: the system removes it when the process ends, however it ends. Reading
and writing go through the file's own buffer, so that memory holds one activation at a time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from tl_looped.errors import DataError


class Spill:
    """Activations in a temporary file, by a key of the caller's.

    Args:
        folder: Where the file is made; the system's temporary folder if None.

    Raises:
        DataError: if the folder does not exist, or its disk is full.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed in __exit__
        except OSError as error:
            raise DataError(f"folder: no file can be made in {folder} ({error})") from error
        self._where: dict[object, tuple[int, tuple[int, ...], torch.dtype, torch.device]] = {}
        self._end = 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def put(self, key: object, x: Tensor) -> None:
        """Append an activation."""
        content = x.detach().cpu().contiguous()
        try:
            self._file.seek(self._end)
            self._file.write(content.view(-1).view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"the states of a batch cannot be kept on disk after {self._end / 2**20:.0f} MiB "
                f"({error}): give a folder= with more room, a smaller batch_size, or "
                "states='recompute'"
            ) from error
        self._where[key] = (self._end, tuple(x.shape), x.dtype, x.device)
        self._end += content.nbytes

    def get(self, key: object) -> Tensor:
        """An activation, as it was."""
        start, shape, dtype, device = self._where[key]
        content = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        room = content.view(-1).view(torch.uint8).numpy().data
        if self._file.readinto(room) != content.nbytes:
            raise DataError("the temporary file of a batch's states is shorter than what was put")
        return content.to(device)
