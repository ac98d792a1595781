"""Writing figures; see ``tl_looped.files``."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from tl_looped.files import write_bytes


def write_figure(figure: Figure, path: Path, dpi: int = 150) -> Path:
    """Write a figure as PNG; see :func:`write_bytes`."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    return write_bytes(content.getvalue(), path)
