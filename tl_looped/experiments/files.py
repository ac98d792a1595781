"""Writing results: each file is written beside its place and renamed, so none is ever partial."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.figure import Figure

from tl_looped.errors import DataError


def make_folder(folder: Path) -> Path:
    """Create a folder for results.

    Raises:
        DataError: if the path is a file or cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be used as a folder for results: {error}") from error
    return folder


def write_text(text: str, path: Path) -> Path:
    """Write a text file in UTF-8."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def write_figure(figure: Figure, path: Path, dpi: int = 150) -> Path:
    """Write a figure as PNG."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=dpi, format="png")
    os.replace(partial, path)
    return path
