"""Tables of a section on disk, and those that the package ships.

A folder of such data holds a file for each table and ``manifest.json``, which says how they were
made, and is written last.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tl_looped.errors import DataError
from tl_looped.experiments.tables import read_table
from tl_looped.files import make_folder, write_bytes, write_text

SHIPPED = {
    section: Path(__file__).parents[1] / "data" / f"section{section}" for section in (42, 51)
}
"""Folders of the data that the package ships, by section without its dot."""

_MANIFEST = "manifest.json"
_FORMAT = 1


def write_tables(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    about: Mapping[str, Any],
    exact: Collection[str] = (),
) -> None:
    """Write tables and how they were made; what stood there is replaced.

    Args:
        folder: Where to.
        tables: By name of the file, ``"cells.csv"`` or ``"steps.parquet"``.
        about: The manifest, plain values.
        exact: Files that keep all digits; others of CSV have eight.

    Raises:
        DataError: if a file cannot be written.
    """
    for name, table in tables.items():
        path = folder / name
        make_folder(path.parent)
        if path.suffix == ".parquet":
            content = io.BytesIO()
            table.to_parquet(content, index=False, compression="zstd")
            write_bytes(content.getvalue(), path)
        else:
            digits = "%.17g" if name in exact else "%.8g"
            write_text(table.to_csv(index=False, float_format=digits), path)
    manifest = {"format": _FORMAT, **about}
    write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", folder / _MANIFEST)


def read_tables(
    folder: Path, files: Mapping[str, Collection[str]], section: str
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Read what :func:`write_tables` wrote.

    Args:
        folder: Where from.
        files: By name, the columns whose texts look like numbers, ``"0 1 2"``, or may be empty.
        section: ``"5.1"``, for messages.

    Returns:
        Tables by file without suffix, and the manifest.

    Raises:
        DataError: if a file is missing or damaged, or of another format.
    """
    try:
        about: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if (found := about.pop("format")) != _FORMAT:
            raise DataError(f"{folder} is of format {found}, this version reads {_FORMAT}")
        return {Path(n).stem: _read(folder / n, texts) for n, texts in files.items()}, about
    except (OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{folder} does not hold the tables of Section {section}, or is damaged "
            f"({type(error).__name__}: {error}): tl-looped reproduce --section {section} writes "
            "them"
        ) from error


def _read(path: Path, texts: Collection[str]) -> pd.DataFrame:
    return pd.read_parquet(path) if path.suffix == ".parquet" else read_table(path, list(texts))
