"""Section 4.2: the whole grid of random models, on several processes, kept cell by cell.

``OUT/cells/NAME.npz`` is one cell. What is there and undamaged is not run again, so a stopped grid
goes on; what is damaged, or of another cell or size, goes to ``OUT/set-aside``. Every process
computes on one thread: the numbers do not depend on how many there are.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from tl_looped.errors import DataError, InputError
from tl_looped.experiments.locking import lock_folder
from tl_looped.experiments.store import (
    ASIDE,
    PART_SUFFIX,
    has_checksum,
    read_part,
    set_aside,
    write_part,
)
from tl_looped.files import make_folder, write_text
from tl_looped.paper.section42.cells import (
    METRICS,
    Cell,
    CellSize,
    cell_of,
    run_condition,
    size_of,
)
from tl_looped.progress import SILENT, Progress

_CELLS = "cells"
_ABOUT = "grid.json"
_VERSION = 1
"""Of what a cell's numbers mean."""


def run_grid(
    wanted: Sequence[Cell],
    size: CellSize,
    out: Path,
    workers: int,
    progress: Progress = SILENT,
) -> dict[Cell, xr.Dataset]:
    """Run the cells that are not there yet, and read all.

    Args:
        wanted: The cells.
        size: Of all cells.
        out: Folder of the grid.
        workers: Processes; 1 runs in this one.
        progress: Told of cells that became ready, and of what was damaged and is run again.

    Returns:
        The results in the order asked for.

    Raises:
        InputError: no cell, fewer than one process, or a folder with cells of another size.
        DataError: the folder cannot be written to, or another process works in it.
    """
    if not wanted:
        raise InputError("wanted: no cell was given, see tl_looped.paper.section42.cells")
    if type(workers) is not int or workers < 1:
        raise InputError(f"workers must be an integer of at least 1, got {workers!r}")
    folder = make_folder(out / _CELLS)
    lock = lock_folder(folder)
    try:
        _claim(size, out)
        found = _found(wanted, size, folder, progress.say)
        progress.start(len(wanted), len(found))
        todo: dict[Cell, list[Cell]] = {}
        for cell in wanted:
            if cell not in found:
                todo.setdefault(replace(cell, seed=0), []).append(cell)
        for name in _carried_out(list(todo.values()), size, folder, workers):
            progress.advance(1)
            found[name] = read_part(_file(name, folder))
    finally:
        lock.release()
    return {cell: found[cell] for cell in wanted}


def _read_cell(path: Path) -> tuple[Cell, CellSize, xr.Dataset]:
    data = read_part(path)
    try:
        cell = cell_of(data)
        size = size_of({cell: data})
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not say which cell it is of ({error!r})") from error
    if path != _file(cell, path.parent):
        raise DataError(f"{path} holds {cell.name}")
    return cell, size, data


def _file(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.name}{PART_SUFFIX}"


def _claim(size: CellSize, out: Path) -> None:
    """Write what the cells have in common, or compare it with what is there."""
    mine = {"version": _VERSION, "metrics": list(METRICS), **asdict(size)}
    path = out / _ABOUT
    if not path.is_file():
        write_text(json.dumps(mine, indent=2) + "\n", path)
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): restore it or remove {out}") from error
    if theirs != mine:
        differ = [
            key for key in mine if not isinstance(theirs, dict) or theirs.get(key) != mine[key]
        ]
        raise InputError(
            f"{out} holds a grid with another {', '.join(differ) or 'content'}: give another folder"
        )


def _found(
    wanted: Sequence[Cell], size: CellSize, folder: Path, say: Callable[[str], None]
) -> dict[Cell, xr.Dataset]:
    found, unchecked = {}, 0
    for cell in wanted:
        path = _file(cell, folder)
        if not path.exists():
            continue
        try:
            _, of, data = _read_cell(path)
            if of != size:
                raise DataError(f"{path} is of another size, {of}")
        except DataError as error:
            kept = set_aside(path, folder.parent / ASIDE)
            say(f"{error}: the cell is run again; the file is kept as {ASIDE}/{kept.name}")
            continue
        found[cell] = data
        unchecked += not has_checksum(data)
    if unchecked:
        say(
            f"{unchecked} cells in {folder} have no checksum: an earlier version wrote them, and "
            "whether they have changed since cannot be told. Remove them to run them again"
        )
    return found


def _carried_out(
    tasks: Sequence[Sequence[Cell]], size: CellSize, folder: Path, workers: int
) -> Iterator[Cell]:
    """Run conditions, and yield every cell whose file is written."""
    if workers == 1 or len(tasks) < 2:
        with _one_thread():
            for task in tasks:
                yield from _run(task, size, folder)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (stop,))
    try:
        futures = [pool.submit(_run_all, task, size, folder) for task in tasks]
        for future in as_completed(futures):
            yield from future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a process of the grid in {folder.parent} ended before its cells were done: killed, "
            "or out of memory. What is done stays; call again to go on, with fewer workers if "
            "memory is short"
        ) from error
    finally:
        # Whoever stops waits for the cells that are running, so that no process writes afterwards.
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


_stop: Any = None
"""In a worker: the event that ends it before its next cell."""


def _start_worker(stop: Any) -> None:
    global _stop
    _stop = stop
    torch.set_num_threads(1)
    # Ctrl-C reaches every process: a worker ends without a traceback, files are never partial.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run_all(task: Sequence[Cell], size: CellSize, folder: Path) -> list[Cell]:
    done = []
    for cell in _run(task, size, folder):
        done.append(cell)
        if _stop.is_set():
            break
    return done


def _run(task: Sequence[Cell], size: CellSize, folder: Path) -> Iterator[Cell]:
    for cell, data in run_condition(task, size):
        write_part(data, _file(cell, folder))
        yield cell


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
