"""What a call that takes minutes or hours tells of itself: ``progress=``, everywhere the same.

A :class:`Progress` is a handful of functions, and each is called when there is something to tell.
What is not asked for is not told, except notices: these are Python warnings unless ``say`` takes
them. A short loop also takes True, which shows a bar.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm


def warn(text: str) -> None:
    """Say something by a Python warning."""
    warnings.warn(text, stacklevel=3)


@dataclass(frozen=True)
class Tick:
    """A training step.

    Args:
        step: Steps done.
        loss: Training loss of the step, in nats per token.
        tokens_per_second: Training tokens per second since the start or the resumption.
        recurrences: Recurrences of the step.
    """

    step: int
    loss: float
    tokens_per_second: float
    recurrences: int


@dataclass(frozen=True)
class Progress:
    """Functions that a long call calls on its way.

    Args:
        start: Called once with how many items (prompts, models) there are, and how many of them
            were done before.
        advance: Called with the number of items that were just done.
        tick: Called after every training step.
        report: Called with every entry of a training's log.
        say: Called with notices: prompts left out, a smaller batch, a damaged file set aside. They
            are Python warnings if left out.
    """

    start: Callable[[int, int], None] = lambda total, done: None
    advance: Callable[[int], None] = lambda n: None
    tick: Callable[[Tick], None] = lambda tick: None
    report: Callable[[dict[str, Any]], None] = lambda entry: None
    say: Callable[[str], None] = warn


NOTICES = Progress()
"""Tells notices alone."""

SILENT = Progress(say=lambda text: None)
"""Tells nothing, not even notices."""


@contextmanager
def advancing(
    progress: Progress | bool, total: int, unit: str, description: str | None = None
) -> Iterator[Callable[[int], object]]:
    """The ``advance`` of a loop: the caller's, that of a bar for True, or of nobody for False."""
    if isinstance(progress, Progress):
        progress.start(total, 0)
        yield progress.advance
        return
    with tqdm(total=total, disable=not progress, unit=unit, desc=description) as bar:
        yield bar.update
