"""What every command prints with: one console, one kind of progress bar."""

from __future__ import annotations

import errno
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_STOPPED = 130

console = Console()
errors = Console(stderr=True)

# What the user's disk says, not a mistake of the program's.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.ENAMETOOLONG,
)


def command_line() -> str:
    """The command that runs, as it could be typed again."""
    return shlex.join(["tl-looped", *sys.argv[1:]])


def note(text: str) -> None:
    """Say what a user should know and need not act on."""
    console.print("[yellow]Note:[/yellow]", end=" ")
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def progress_bar() -> Progress:
    """A bar with a count and the remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


def parse_batch_size(text: str) -> int | str:
    """``"8"`` as a number; other texts as they are, for the runner to take or to refuse."""
    return int(text) if text.isascii() and text.isdecimal() else text


@contextmanager
def stoppable(
    sentence: str = "What is done stays; the same command goes on from there.",
) -> Iterator[None]:
    """Ctrl-C ends the command with a sentence and the status of a stopped one."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"Stopped. {sentence}")
        raise typer.Exit(_STOPPED) from None


@contextmanager
def watched(description: str, first: bool) -> Iterator[Any]:
    """A watch over a run that shows a bar of its prompts; silent in all but the first process."""
    from tl_looped.experiments.jobs import Watch

    if not first:
        yield Watch()
        return
    with progress_bar() as progress:
        task = progress.add_task(description, total=None)

        def start(total: int, done: int) -> None:
            progress.update(task, total=total, completed=done)
            if done:
                progress.console.print(f"going on: {done} of {total} prompts were done before")

        try:
            yield Watch(
                start=start,
                advance=lambda n: progress.advance(task, n),
                say=note,
            )
        finally:  # of a run that was refused, or had its results, no bar stays
            progress.update(task, visible=progress.tasks[0].total is not None)
