"""The cells of the notebooks, run without Jupyter.

Cells with the tag ``real`` need the pretrained model: ``make real`` runs them, the other lanes do
not. They are a notebook's second half.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot  # closed below, whether a notebook imports it or not
import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells_of(path: Path) -> list[dict[str, Any]]:
    """All cells of a notebook, text and code."""
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


def is_real(cell: dict[str, Any]) -> bool:
    """Whether a cell needs the pretrained model."""
    return "real" in cell["metadata"].get("tags", ())


def printed(cell: dict[str, Any]) -> str:
    """What a cell printed, as it is kept in the notebook."""
    return "".join(
        "".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"
    )


@contextmanager
def started(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names of a notebook that begins in its own folder; nothing of it stays behind."""
    matplotlib.use("agg")
    monkeypatch.chdir(path.parent)
    grad, resolution = torch.is_grad_enabled(), matplotlib.rcParams["figure.dpi"]
    names: dict[str, Any] = {}
    try:
        yield names
    finally:
        names.clear()
        torch.set_grad_enabled(grad)
        matplotlib.pyplot.close("all")
        matplotlib.rcParams["figure.dpi"] = resolution


def run(cell: dict[str, Any], path: Path, names: dict[str, Any]) -> str:
    """Run a cell of code; what it prints is shown, and returned."""
    output = io.StringIO()
    with redirect_stdout(output):
        exec(compile("".join(cell["source"]), path.name, "exec"), names)
    sys.stdout.write(output.getvalue())
    return output.getvalue()
