"""Checkpoints of a run that can be trusted: complete, undamaged and of the same run.

``transformers.Trainer`` writes a checkpoint file by file into its final folder, and on resuming it
goes on with a fresh optimiser where ``optimizer.pt`` is absent. So a manifest is written last: its
step, the run it is of (see :mod:`tl_looped.training.record`), every file's SHA-256 and its own. A
checkpoint without one was interrupted and is thrown away. One whose files differ from it is
damaged: it is set aside under another name, and the run goes on from the older one, to the same
weights. Checkpoints are kept by their step; what time the disk gives them is never looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl_looped.errors import CheckpointError, ConfigError, DataError, TLLoopedError
from tl_looped.files import write_text
from tl_looped.progress import warn

MANIFEST = "manifest.json"
KEPT_CHECKPOINTS = 2
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
_FORMAT = 2  # 1 was the files' sums alone

Say = Callable[[str], None]


def write_json(value: Any, path: Path) -> None:
    """Write JSON; see :func:`tl_looped.files.write_bytes`."""
    write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", path)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(checkpoint: Path, run: str) -> None:
    """Write the manifest of a checkpoint that is complete.

    Args:
        checkpoint: Its folder, ``checkpoint-STEP``.
        run: Identity of the run.
    """
    files = {p.name: _sha256(p) for p in sorted(checkpoint.iterdir()) if p.name != MANIFEST}
    body = {"format": _FORMAT, "step": _step(checkpoint), "run": run, "files": files}
    write_json(body | {"sha256": digest(body)}, checkpoint / MANIFEST)


def drop_older_checkpoints(folder: Path) -> None:
    """Remove all but the newest sealed checkpoints; newest is the one of the highest step."""
    for old in sealed_checkpoints(folder)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)


def sealed_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints by their step, the newest last; whether they are sound is not looked at.

    Folders of other names are none, and are left alone.
    """
    return [path for path in _checkpoints(folder) if (path / MANIFEST).is_file()]


def newest_checkpoint(folder: Path, run: str | None = None, say: Say = warn) -> Path | None:
    """The newest sealed checkpoint that is sound; checked file by file.

    Interrupted checkpoints are removed. What stands in the way of one (a file or a link of its
    name) is set aside, and so are damaged ones if an older one is sound.

    Args:
        folder: Folder of the checkpoints.
        run: Identity of the run; not checked if None.
        say: Function that is told what was set aside and what is lost.

    Raises:
        CheckpointError: all that there are are damaged. Nothing is moved then.
        ConfigError: it is another run's.
        DataError: something cannot be set aside.
    """
    _clear(folder, say)
    damaged: dict[Path, list[str]] = {}
    for path in reversed(sealed_checkpoints(folder)):
        manifest, problems = _examined(path)
        if problems:
            damaged[path] = problems
            continue
        _check_run(path, manifest, run, say)
        for other, found in damaged.items():
            _set_aside_damaged(other, found, path, say)
        return path
    if damaged:
        listed = "; ".join(f"{p} is damaged: {', '.join(found)}" for p, found in damaged.items())
        raise CheckpointError(
            f"{listed}. There is no sound one to go on from: restore one, or remove the folder"
            f"{'s' if len(damaged) > 1 else ''} to start again from step 0."
        )
    return None


def move_aside(path: Path) -> Path:
    """Rename what is damaged or in the way, so that it is kept and not read.

    Raises:
        DataError: if the disk does not let it.
    """
    number, target = 1, path.with_name(f"damaged-{path.name}")
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"damaged-{path.name}-{number}")
    try:
        path.rename(target)
    except OSError as error:
        raise DataError(f"{path} must be set aside and cannot be renamed: {error}") from error
    return target


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Other libraries' saving into a folder: their errors as one of ours, and nothing partial left.

    A full disk is an OSError for Python, a SafetensorError, a RuntimeError of PyTorch or a bare
    Exception of tokenizers. A folder that was not there before is removed again.

    Raises:
        DataError: if it cannot be saved.
    """
    is_new = not folder.exists()
    try:
        yield
    except Exception as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, TLLoopedError):
            raise
        raise DataError(
            f"{folder} cannot be saved: {type(error).__name__}: {error}. What was saved before "
            "stays; make room, and the same call or command goes on from the newest checkpoint"
        ) from error


@contextmanager
def loading(checkpoint: Path | str) -> Iterator[None]:
    """Other libraries' loading of a checkpoint that is whole: their errors as one of ours.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    try:
        yield
    except TLLoopedError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} cannot be loaded ({type(error).__name__}: {error}). Its files are as "
            "they were written, so it is of another version of tl_looped or of its libraries: go "
            "on with that one, or train in another folder"
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _clear(folder: Path, say: Say) -> None:
    """Remove what was interrupted, and set aside what is named like a checkpoint but is a file."""
    checkpoints = _checkpoints(folder)
    for path in sorted(folder.glob("checkpoint-*")):
        if path in checkpoints:
            if not (path / MANIFEST).is_file():
                try:
                    shutil.rmtree(path)
                except OSError as error:
                    raise DataError(
                        f"{path} was interrupted and cannot be removed: {error}"
                    ) from error
        elif _NAME.fullmatch(path.name):
            say(f"{path} is not the folder of a checkpoint: it is now {move_aside(path).name}")


def _check_run(path: Path, manifest: dict[str, Any], run: str | None, say: Say) -> None:
    if run is None:
        return
    if "run" not in manifest:
        say(
            f"{path} was written by an earlier version, which did not note the run in it: it is "
            "taken to be this run's"
        )
    elif manifest["run"] != run:
        raise ConfigError(
            f"{path} is a checkpoint of another run (of another spec, model or data): move it "
            "away, or train in another folder"
        )


def _set_aside_damaged(path: Path, problems: list[str], sound: Path, say: Say) -> None:
    aside = move_aside(path)
    say(
        f"{path} is damaged: {', '.join(problems)}. It is now {aside.name}. The run goes on from "
        f"{sound.name}: steps {_step(sound) + 1} to {_step(path)} are done again, and nothing else "
        "is lost"
    )


def _examined(checkpoint: Path) -> tuple[dict[str, Any], list[str]]:
    """The manifest, and what is wrong with the checkpoint."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = manifest
        if "format" in manifest:
            body = {key: value for key, value in manifest.items() if key != "sha256"}
            if digest(body) != manifest["sha256"]:
                return {}, [f"{MANIFEST} has changed since it was written"]
            if manifest["step"] != _step(checkpoint):
                return {}, [f"its folder was renamed: it is of step {manifest['step']}"]
            files = manifest["files"]
        problems = [
            problem for name, sha in files.items() if (problem := _problem(checkpoint, name, sha))
        ]
    except (OSError, ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        return {}, [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    known = {*files, MANIFEST}
    strange = sorted(
        p.name for p in checkpoint.iterdir() if p.name not in known and not p.name.startswith(".")
    )
    # The Trainer would read some of them, a pytorch_model.bin or an adapter.
    return manifest, problems + [f"{name} was added to it" for name in strange]


def _problem(checkpoint: Path, name: str, sha: Any) -> str | None:
    file = checkpoint / name
    if not file.is_file():
        return f"{name} is missing"
    return None if _sha256(file) == sha else f"{name} has changed since it was written"


def _sha256(path: Path) -> str:
    result = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            result.update(chunk)
    return result.hexdigest()
