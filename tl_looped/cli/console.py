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
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from tl_looped.progress import SILENT, Progress, Tick

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


@contextmanager
def progress_bars(first: bool = True) -> Iterator[Bars]:
    """Bars of calls that take long; none stays of a call that did nothing, refused or finished.

    Args:
        first: Whether this process is the first of those that share the work; the others are
            silent.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    numbers = TextColumn("{task.fields[numbers]}")
    bars = Bars(*columns, numbers, TimeRemainingColumn(), console=console, disable=not first)
    with bars:
        try:
            yield bars
        finally:
            for task in bars.tasks:
                bars.update(task.id, visible=bool(task.completed))


def bar(bars: Bars, what: str, total: int | None = None, numbers: str = "") -> Progress:
    """A new bar, as the ``progress=`` of a call.

    Args:
        bars: Those that it stands among.
        what: Its description.
        total: Items or steps, if they are known yet.
        numbers: Text beside the bar until the first training step.
    """
    if bars.disable:
        return SILENT
    task = bars.add_task(what, total=total, numbers=numbers)

    def start(total: int, done: int) -> None:
        bars.update(task, total=total, completed=done)
        if done:
            bars.console.print(f"going on: {done} of {total} were done before")

    def tick(value: Tick) -> None:
        speed = f"loss {value.loss:.3f}, {value.tokens_per_second:.0f} tokens/s"
        bars.update(task, completed=value.step, numbers=speed)

    def report(entry: dict[str, Any]) -> None:
        losses = f"train {entry['train_loss']:.3f}, held out {entry['held_out_loss']:.3f}"
        bars.console.print(f"{what}, step {entry['step']}: {losses}", highlight=False)

    return Progress(start, lambda n: bars.advance(task, n), tick, report, note)


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
