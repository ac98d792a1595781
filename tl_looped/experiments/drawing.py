"""Figures of a run on disk: ``figures/figNN.png``, ``.svg``, ``.csv`` and ``.json``."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tl_looped.errors import InputError
from tl_looped.experiments.files import make_folder
from tl_looped.experiments.store import write_bytes


def save_figures(drawn: Iterable[Any], folder: Path, command: str) -> list[Path]:
    """Write what ``draw`` returns: the image twice, its numbers, and a record.

    Args:
        drawn: Each with ``number``, ``name``, ``title``, ``caption``, ``figure``, ``numbers`` and
            ``settings``.
        folder: Where to write.
        command: That made it; kept in the record.

    Returns:
        The images.

    Raises:
        DataError: if a file cannot be written.
    """
    make_folder(folder)
    images = []
    for one in drawn:
        for kind in ("svg", "png"):
            content = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else None  # the same file every time
            one.figure.savefig(content, format=kind, dpi=150, metadata=metadata)
            images.append(write_bytes(content.getvalue(), folder / f"{one.name}.{kind}"))
        table = one.numbers.to_csv(index=False, float_format="%.6g")
        write_bytes(table.encode(), folder / f"{one.name}.csv")
        record = {
            "number": one.number,
            "title": one.title,
            "caption": one.caption,
            "command": command,
            "settings": one.settings,
        }
        text = json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"
        write_bytes(text.encode(), folder / f"{one.name}.json")
    return images


def draw_figures(
    data: Any,
    numbers: Iterable[int],
    folder: Path,
    command: str,
    say: Callable[[str], None],
) -> list[Path]:
    """Draw and save figures of one result; what cannot be drawn of it is said, and passed over."""
    from tl_looped.experiments.figures import draw

    images = []
    for number in numbers:
        try:
            images += save_figures(draw(number, data), folder, command)
        except InputError as error:
            say(f"figure {number}: {error}")
    return images
