"""Figures of a run on disk: ``figures/figNN.png``, ``.svg``, their numbers, and ``.json``.

The numbers behind a figure are ``figNN.csv`` (six digits), which any program reads, or, above
``MOST_CSV_ROWS`` rows, ``figNN.parquet`` (all digits). The record, ``figNN.json``, names the file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from tl_looped.checks import checked
from tl_looped.errors import DataError
from tl_looped.files import make_folder, write_bytes

MOST_CSV_ROWS = 20_000
"""Tables of more rows are written as parquet: Figure 63 has one row per weight."""


@runtime_checkable
class Drawn(Protocol):
    """A figure with what belongs to it, as ``tl_looped.paper.draw`` gives it."""

    @property
    def number(self) -> int:
        """In the paper."""

    @property
    def name(self) -> str:
        """Of its files."""

    @property
    def title(self) -> str:
        """What it shows."""

    @property
    def caption(self) -> str:
        """What was run and how."""

    @property
    def figure(self) -> Any:
        """What has ``savefig``."""

    @property
    def numbers(self) -> pd.DataFrame:
        """What was drawn."""

    @property
    def settings(self) -> dict[str, Any]:
        """How it was drawn."""


@checked
def save_figures(drawn: Iterable[Drawn], folder: str | Path, command: str) -> list[Path]:
    """Write what ``draw`` returns: the image twice, its numbers, and a record.

    Args:
        drawn: The figures.
        folder: Where to write.
        command: That made it; kept in the record.

    Returns:
        The images.

    Raises:
        DataError: if a file cannot be written.
    """
    folder = make_folder(Path(folder))
    images = []
    for one in drawn:
        for kind in ("svg", "png"):
            content = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else None  # the same file every time
            one.figure.savefig(content, format=kind, dpi=150, metadata=metadata)
            images.append(write_bytes(content.getvalue(), folder / f"{one.name}.{kind}"))
        numbers = _write_numbers(one.numbers, folder / one.name)
        record = {
            "number": one.number,
            "title": one.title,
            "caption": one.caption,
            "command": command,
            "numbers": numbers.name,
            "rows": len(one.numbers),
            "settings": one.settings,
        }
        text = json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"
        write_bytes(text.encode(), folder / f"{one.name}.json")
    return images


def _write_numbers(table: pd.DataFrame, stem: Path) -> Path:
    """A table as CSV or parquet by its size; one of the other kind, of an earlier call, goes.

    The name is put together by hand: ``with_suffix`` would cut a name at a dot that it holds.
    """
    csv, parquet = (stem.with_name(f"{stem.name}.{kind}") for kind in ("csv", "parquet"))
    if len(table) > MOST_CSV_ROWS:
        content = io.BytesIO()
        table.to_parquet(content, index=False)
        written, other = write_bytes(content.getvalue(), parquet), csv
    else:
        text = table.to_csv(index=False, float_format="%.6g")
        written, other = write_bytes(text.encode(), csv), parquet
    try:
        other.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{other} is of an earlier call and cannot be removed: {error}") from error
    return written
