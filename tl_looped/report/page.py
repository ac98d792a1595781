"""Pages: the report of runs and those of sections of the paper are one template.

A page is one HTML file that needs no network and no other file: images are data URIs, SVGs too, so
that nothing inside them can run; a content security policy allows the two scripts that draw
attention, where there are views, and nothing else. Every text is escaped. The same content gives
the same page, byte for byte: it holds no date.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tl_looped._version import __version__
from tl_looped.files import write_text
from tl_looped.report.parts import PagePart, PageTable, SummaryRow
from tl_looped.report.text import VERDICTS, digits, value
from tl_looped.viz.attention_views import DRAW
from tl_looped.viz.page import UNPACK, VIEW_STYLE, content_policy, drawing_script, packed_drawing

_DRAW_WHEN_OPENED = """
whenUnpacked(() => {
for (const box of document.querySelectorAll("details.attention")) {
  const draw = () => {
    if (!box.open || box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const target = box.querySelector(".view").id;
    drawView(target, JSON.parse(document.getElementById(target + "-data").textContent));
  };
  box.addEventListener("toggle", draw);
  draw();  // a browser may have opened it again before this script ran
}
});
"""


def write_page(
    path: Path,
    title: str,
    parts: Sequence[PagePart],
    about: str = "Report",
    lead: str = "",
    notice: str = "",
    summary: Sequence[SummaryRow] = (),
) -> Path:
    """Write a page.

    Args:
        path: Of the HTML file; an older one is replaced.
        title: Heading.
        parts: In order.
        about: What the page is, ``"3 runs; report"``.
        lead: The first paragraph.
        notice: What was planned and is not in the page.
        summary: Rows of the summary table, which comes before the parts.

    Raises:
        DataError: if the file cannot be written.
    """
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["value"] = value
    drawn = any(view.content is not None for part in parts for view in part.views)
    draw = UNPACK + DRAW + _DRAW_WHEN_OPENED
    page = pages.get_template("page.html.j2").render(
        title=title,
        parts=parts,
        about=about,
        lead=lead,
        notice=notice,
        summary=summary,
        verdicts=VERDICTS.values(),
        version=__version__,
        policy=content_policy([drawing_script(), draw] if drawn else []),
        # Ours or the package's, and safe in a script element; all else is escaped.
        drawing=Markup(packed_drawing()) if drawn else None,
        draw=Markup(draw),
        view_style=Markup(VIEW_STYLE),
        safe_json=Markup,
    )
    # A text with half of a surrogate pair (JSON can hold one) has no UTF-8.
    return write_text(page.encode("utf-8", "replace").decode("utf-8"), path)


def table_of(frame: pd.DataFrame, columns: Mapping[str, str], caption: str) -> PageTable:
    """A table as it is printed: three significant digits, nothing for NaN.

    Args:
        frame: The numbers.
        columns: Headings by the column of the frame; the others are left out. ``"t"`` and the like
            stand for an interval, ``t_low`` and ``t_high``.
        caption: Of the table.
    """
    rows = [
        tuple(_cell({str(key): value for key, value in record.items()}, name) for name in columns)
        for record in frame.to_dict("records")
    ]
    return PageTable(caption, tuple(columns.values()), tuple(rows))


def _cell(record: Mapping[str, object], name: str) -> str:
    if name in record:
        return _text(record[name])
    low, high = _text(record[f"{name}_low"]), _text(record[f"{name}_high"])
    return f"{low} to {high}" if low != "–" and high != "–" else "–"


def _text(x: object) -> str:
    if isinstance(x, bool) or type(x).__name__ in ("bool_", "bool"):
        return "yes" if x else "no"
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return "–"
    if isinstance(x, float):
        return digits(x)
    return f"{x:,}" if isinstance(x, int) else str(x)
