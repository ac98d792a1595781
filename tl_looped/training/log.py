"""``log.csv``: one line for every evaluation of a run. Every checkpoint holds it as it then was."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from tl_looped.errors import DataError
from tl_looped.files import write_text
from tl_looped.training.saved import Say, move_aside

LOG = "log.csv"
Entry = dict[str, Any]
LOG_FIELDS = (
    "step",
    "tokens",
    "epoch",
    "train_loss",
    "held_out_loss",
    "learning_rate",
    "tokens_per_second",
    "seconds",
)


def read_log(path: Path) -> list[Entry]:
    """The entries of a ``log.csv``; none if there is no file.

    Raises:
        DataError: if a line is not an entry.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {k: int(row[k]) if k in ("step", "tokens") else float(row[k]) for k in LOG_FIELDS}
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read as a log ({error!r}): restore or remove it"
        ) from error


def resumed_log(out: Path, checkpoint: Path, step: int, writes: bool, say: Say) -> list[Entry]:
    """The log where a checkpoint stands; the run's own file becomes it again.

    Args:
        out: Folder of the run.
        checkpoint: Checkpoint that it goes on from; one of an earlier version holds no log.
        step: Step of the checkpoint.
        writes: Whether this process writes files.
        say: Function that is told if the run's file is damaged; it is set aside then.

    Raises:
        DataError: if the file is damaged and the checkpoint holds no log.
    """
    path, kept = out / LOG, checkpoint / LOG
    if not kept.is_file():
        return [entry for entry in read_log(path) if entry["step"] <= step]
    log = read_log(kept)
    if writes:
        try:
            same = read_log(path) == log
        except DataError as error:
            same = False
            aside = move_aside(path)
            say(f"{error}. It is now {aside.name}, and is written anew: {checkpoint.name} holds it")
        if not same:
            write_log(path, log)
    return log


def write_log(path: Path, log: list[Entry]) -> None:
    """Write the log; see :func:`tl_looped.files.write_bytes`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, LOG_FIELDS)
    writer.writeheader()
    writer.writerows(log)
    write_text(text.getvalue(), path)
