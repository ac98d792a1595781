"""The folder of a run that is not finished: what is done, and how it was divided.

``parts/plan.json`` holds the batch size, ``limit-RANK-of-WORLD.json`` every reduction for want of
memory, the ``.npz`` files are the parts, a batch each. All of them carry the run's hash and their
own checksum, and every part the batch size that was planned. What is damaged, of another run or
written by another version of this package goes to the run's folder ``set-aside`` and is said:

- a part's prompts are run again;
- a plan is read off the parts; where these do not agree, another one is made, and the last bits of
  a number may then differ from those of a run that was not stopped;
- a limit is found again, by running out of memory once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xarray as xr

from tl_looped._version import __version__
from tl_looped.checks import whole
from tl_looped.errors import DataError
from tl_looped.experiments import store
from tl_looped.experiments.sealing import read_record, write_record

_PLAN = "plan.json"
_OF_A_BATCH = ("prompt", "token")  # dimensions whose length is each batch's own


class BatchParts:
    """The parts of one run.

    Args:
        folder: Of the run.
        digest: The run's hash.
        n_prompts: How many it runs.
    """

    def __init__(self, folder: Path, digest: str, n_prompts: int) -> None:
        self.folder, self.aside = folder / store.PARTS, folder / store.ASIDE
        self.n_prompts = n_prompts
        self._mark = {"run": digest, "tl_looped": __version__}
        self.planned: int | None = None

    # -- looking through what is there ----------------------------------------------------------

    def check(self, say: Callable[[str], None]) -> None:
        """Set aside what cannot be used; for one process, before any other reads the folder."""
        sizes = self._check_parts(say)
        for path in sorted(self.folder.glob("limit-*.json")):
            self._usable(path, "limit", say, "The limit is found again")
        lost = f"The batch size is read off the parts: {', '.join(map(str, sizes))}"
        if len(sizes) != 1:
            lost = (
                "The batch size is lost and chosen anew: prompts may share other batches, which "
                "changes the last bits of a number at most"
            )
        plan = self.folder / _PLAN
        if plan.exists() and self._usable(plan, "batch_size", say, lost):
            self.plan()
        elif len(sizes) == 1:
            self.write_plan(*sizes)

    def _check_parts(self, say: Callable[[str], None]) -> set[int]:
        """The batch sizes of the parts that can be used."""
        found: dict[Path, tuple[xr.Dataset, int]] = {}
        seen: set[int] = set()
        for path in self._files():
            try:
                data, size = self._read(path)
                if twice := sorted(seen & set(_prompts(data))):
                    raise DataError(f"{path} holds prompts that another part holds: {twice}")
            except DataError as error:
                self._put_aside(path, error, say, "Its prompts are run again")
                continue
            seen |= set(_prompts(data))
            found[path] = data, size
        try:
            _check_same_variables([data for data, _ in found.values()], self.folder)
        except DataError as error:  # nothing tells which of them is right
            for path in found:
                self._put_aside(path, error, say, "Its prompts are run again")
            return set()
        return {size for _, size in found.values()}

    def _usable(self, path: Path, key: str, say: Callable[[str], None], lost: str) -> bool:
        """Whether a record can be used; it is set aside if not."""
        try:
            self._number(path, key)
        except DataError as error:
            self._put_aside(path, error, say, lost)
            return False
        return True

    def _put_aside(
        self, path: Path, error: DataError, say: Callable[[str], None], lost: str
    ) -> None:
        kept = store.set_aside(path, self.aside)
        say(f"{error}. {lost}; the file is kept as {kept.parent.name}/{kept.name}")

    # -- the plan -------------------------------------------------------------------------------

    def plan(self) -> int:
        """The batch size.

        Raises:
            DataError: if it cannot be read.
        """
        self.planned = self._number(self.folder / _PLAN, "batch_size")
        return self.planned

    def write_plan(self, batch_size: int) -> None:
        """Write the batch size down."""
        write_record(self._mark | {"batch_size": batch_size}, self.folder / _PLAN)
        self.planned = batch_size

    def limit(self, worker: str) -> int | None:
        """The largest batch that the memory of a process held, ``"0-of-1"``; None if all did."""
        path = self._limit_file(worker)
        return self._number(path, "limit") if path.exists() else None

    def write_limit(self, worker: str, limit: int) -> None:
        """Write down that the memory held no larger batch."""
        write_record(self._mark | {"limit": limit}, self._limit_file(worker))

    def _limit_file(self, worker: str) -> Path:
        return self.folder / f"limit-{worker}.json"

    def _number(self, path: Path, key: str) -> int:
        values = read_record(path)
        self._check_mark(values, path)
        return whole(values.get(key), f"{key} of {path}", 1, error=DataError)

    # -- the parts ------------------------------------------------------------------------------

    def save(self, data: xr.Dataset, batch: list[int]) -> None:
        """Write a batch's results."""
        name = hashlib.sha256(str(batch).encode()).hexdigest()[:12]
        path = self.folder / f"{batch[0]:06d}-{name}{store.PART_SUFFIX}"
        store.write_part(data, path, self._mark | {"batch_size": self.planned or self.plan()})

    def prompts(self) -> set[int]:
        """The prompts that the parts hold."""
        return {n for data in self.read() for n in _prompts(data)}

    def read(self) -> list[xr.Dataset]:
        """All parts, by the first prompt of each, so that sums over parts have one order.

        Raises:
            DataError: if one is damaged, of another run, or of other variables than the first: the
                next call sets the damaged one aside.
        """
        found = [self._read(path)[0] for path in self._files()]
        _check_same_variables(found, self.folder)
        return found

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*" + store.PART_SUFFIX))

    def _read(self, path: Path) -> tuple[xr.Dataset, int]:
        """A part and the batch size that was planned."""
        data, record = store.read_part_and_record(path)
        if not store.has_checksum(data):
            raise DataError(f"{path} has no checksum: an earlier version wrote it")
        self._check_mark(record, path)
        n = record.get("batch_size")
        found = _prompts(data)
        if type(n) is not int or not found or not set(found) <= set(range(self.n_prompts)):
            raise DataError(f"{path} does not hold prompts of this run, 0 to {self.n_prompts - 1}")
        return data, n

    def _check_mark(self, values: dict[str, Any], path: Path) -> None:
        for key, mine in self._mark.items():
            if (found := values.get(key)) != mine:
                what = "of another run" if key == "run" else f"by another version, {found}"
                raise DataError(f"{path} is {what}")


def _check_same_variables(parts: list[xr.Dataset], folder: Path) -> None:
    """Raise unless parts can be joined: what one of them lacks would be NaN, and not be said."""
    shapes = [
        {
            str(name): [(dim, n) for dim, n in values.sizes.items() if dim not in _OF_A_BATCH]
            for name, values in part.variables.items()
            if name not in _OF_A_BATCH
        }
        for part in parts
    ]
    for shape in shapes[1:]:
        differ = [k for k in {**shape, **shapes[0]} if shape.get(k) != shapes[0].get(k)]
        if differ:
            raise DataError(
                f"parts of {folder} differ in {', '.join(differ)}, and cannot be joined"
            )


def _prompts(data: xr.Dataset) -> list[int]:
    """Numbers of a part's prompts; none if it does not say."""
    return [int(n) for n in data["prompt"].values] if "prompt" in data.coords else []
