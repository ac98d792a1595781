"""Pages that open without a network, and the object that shows one in a notebook.

A view is one HTML page, the same in a file and in a notebook. In a notebook it stands in an
``<iframe srcdoc>``: Jupyter, JupyterLab, VS Code, Colab and nbviewer all show one, each page keeps
its styles, scripts and element ids to itself, so that several views do not clash, and nothing needs
a network or a file beside the notebook. The frame is sandboxed: its scripts run, but reach neither
the notebook nor the reader's cookies. The height of a frame has to be given in advance; its lower
edge can be dragged. JupyterLab shows frames of a notebook that somebody else saved only after it
was trusted, and GitHub shows none; save the page for such readers.

Pages are white in a dark notebook too: a frame cannot ask for the theme around it, and the colours
of a legend hold on one background only.

Attention is drawn by the script that circuitsvis's package ships. As text it takes 1.3 MB, which
every view of a notebook would repeat; it is kept compressed (0.48 MB) and unpacked by the browser
(Chromium 80, Firefox 113, Safari 16.4 or later). A content security policy allows that script, the
page's own one, and nothing else: no network at all.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tl_looped.checks import checked
from tl_looped.errors import DataError, InputError
from tl_looped.files import make_folder, write_text

MAX_BYTES = 5_000_000
"""Largest page of a view, scripts and images included."""


@checked
class View(ABC):
    """A picture of a run: shows itself in notebooks, saves itself as a page.

    Attributes:
        title: What is shown.
    """

    title: str

    @abstractmethod
    def page(self, max_bytes: int = MAX_BYTES) -> str:
        """The whole HTML page, which needs no network.

        Raises:
            InputError: if it would be larger than ``max_bytes``.
        """

    @property
    @abstractmethod
    def height(self) -> int:
        """Height of the frame in a notebook, in pixels."""

    def save(self, path: str | Path) -> Path:
        """Write the page to a file that opens by itself, in any browser, without a network.

        Args:
            path: Ends in ``.html``; folders that are missing are made, an older file is replaced.

        Returns:
            The file.

        Raises:
            InputError: another ending, or a page larger than :data:`MAX_BYTES`.
            DataError: if the file cannot be written; then an older one is still whole.
        """
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"path must end in .html, so that a browser opens it; got {path}")
        page = self.page()
        make_folder(path.parent)
        return write_text(page, path)

    def _repr_html_(self) -> str:
        """The page in a frame, see the module."""
        return (
            f'<iframe srcdoc="{html.escape(self.page())}" title="{html.escape(self.title)}" '
            f'sandbox="allow-scripts" style="width:100%;height:{self.height}px;border:0;'
            'background:#fff;resize:vertical;overflow:auto"></iframe>'
        ).encode("utf-8", "replace").decode()  # fmt: skip

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.title}; .save('view.html') writes it>"


def whole_page(
    title: str,
    body: str,
    scripts: Sequence[str] = (),
    allowed: Sequence[str] = (),
    style: str = "",
) -> str:
    """One HTML page.

    Args:
        title: As text; it is also the heading.
        body: HTML, everything foreign in it escaped.
        scripts: JavaScript at the end of the page.
        allowed: JavaScript that those scripts may run besides.
        style: CSS besides :data:`VIEW_STYLE`.
    """
    page = _PAGE.format(
        title=html.escape(title),
        policy=html.escape(content_policy([*allowed, *scripts])),
        style=VIEW_STYLE + style,
        body=body,
        scripts="".join(f"<script>{script}</script>\n" for script in scripts),
    )
    return page.encode("utf-8", "replace").decode()  # half of a surrogate pair has no UTF-8


def check_size(title: str, page: str, max_bytes: int, remedy: str) -> str:
    """The page, if it is not too large.

    Raises:
        InputError: if it is; ``remedy`` says what to do.
    """
    size = len(page.encode())
    if size > max_bytes:
        raise InputError(
            f"the view {title!r} would take {size / 1e6:.2f} MB, above max_bytes = "
            f"{max_bytes / 1e6:.2f} MB: {remedy}"
        )
    return page


def json_in_html(value: Any) -> str:
    """JSON in ASCII without ``<``, ``>`` and ``&``, so that no text can end its script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def content_policy(scripts: Sequence[str]) -> str:
    """A content security policy that lets these scripts run, and no network be used."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


@lru_cache(maxsize=1)
def drawing_script() -> str:
    """The script of circuitsvis as its package ships it.

    Raises:
        DataError: if the package or the script is missing.
    """
    spec = find_spec("circuitsvis")  # not imported: its import looks for a network
    if spec is None or spec.origin is None:
        raise DataError("attention views need the package circuitsvis: pip install circuitsvis")
    path = Path(spec.origin).parent / "dist" / "cdn" / "iife.js"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"circuitsvis is installed without its script {path}: {error}; version 1.43.3 has it"
        ) from error
    return text.split("//# sourceMappingURL=")[0]


@lru_cache(maxsize=1)
def packed_drawing() -> str:
    """:func:`drawing_script`, compressed, in Base64; :data:`UNPACK` unpacks and runs it."""
    # Without a time, so that the same script is the same text.
    return base64.b64encode(gzip.compress(drawing_script().encode(), 9, mtime=0)).decode()


UNPACK = """
async function whenUnpacked(draw) {
  try {
    const packed = atob(document.getElementById("drawing").textContent);
    const bytes = Uint8Array.from(packed, sign => sign.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    draw();
  } catch (error) {
    for (const view of document.querySelectorAll(".view"))
      view.textContent = "The maps cannot be drawn: " + error +
        ". They need Chromium 80, Firefox 113, Safari 16.4 or later.";
  }
}
"""
"""JavaScript that calls a function once the script of the element ``drawing`` is there."""

# circuitsvis draws dark on light, whatever the reader's colours are.
VIEW_STYLE = """
.view { background: #fff; color: #1d2327; color-scheme: light; border-radius: 6px;
  padding: 12px; overflow-x: auto; font: 14px/1.4 system-ui, sans-serif; }
.view h3 { font-size: 14px; font-weight: 600; }
.view h2 { font-size: 13px; }
/* circuitsvis puts up to twelve maps in a row, each under its label on a colour of its own. */
.view > div > h3 + div > div { flex: 0 0 auto !important; max-width: none !important;
  width: max(12.5%, 84px) !important; }
.view > div > h3 + div > div > div > div { border-color: #8c8f94 !important; }
.view h4 { font-size: 11px; font-weight: 500; position: static !important; text-align: center; }
.view h2, .view h4 { background: #1d2327 !important; white-space: nowrap; overflow: hidden; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 8px; font-size: 13px;
  margin: 0 0 10px; }
.legend .scale { display: inline-block; width: 90px; height: 14px; border: 1px solid #8c8f94; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0 auto; max-width: 760px; padding: 12px 16px; background: #fff; color: #1d2327;
  font: 14px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 16px; margin: 0 0 4px; }}
p {{ margin: 0 0 8px; }}
{style}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
{scripts}</body>
</html>
"""
