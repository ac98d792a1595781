"""Figures of a run on disk: ``figures/figNN.png``, ``.svg``, their numbers, and ``.json``.

The numbers behind a figure are ``figNN.csv`` (six digits), which any program reads, or, above
``MOST_CSV_ROWS`` rows, ``figNN.parquet`` (all digits). The record, ``figNN.json``, names the file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from tl_looped.errors import DataError
from tl_looped.files import make_folder, write_bytes

MOST_CSV_ROWS = 20_000
"""Tables of more rows are written as parquet: Figure 63 has one row per weight."""


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
