"""A page of a section of the paper: paragraphs, tables and figures, in the style of the report.

The page is one HTML file that needs no network and no other file, as the report
(:mod:`tl_looped.report.page`): images are data URIs, every text is escaped, there is no
script. The same content gives the same page, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tl_looped._version import __version__
from tl_looped.errors import InputError
from tl_looped.files import write_text
from tl_looped.report.page import Exhibit, exhibits, pages
from tl_looped.report.text import digits
from tl_looped.viz.page import content_policy


@dataclass(frozen=True)
class PageTable:
    """A table as text; the first column heads its rows.

    Args:
        caption: What it shows, with units.
        columns: Headings.
        rows: A text a column.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not self.columns or any(len(row) != len(self.columns) for row in self.rows):
            raise InputError(f"rows must have the {len(self.columns)} columns of the table")


@dataclass(frozen=True)
class PagePart:
    """A part of the page.

    Args:
        anchor: Its id.
        title: Heading.
        paragraphs: Before the rest.
        tables: In order.
        findings: Sentences, as a list.
        more: Further sentences, behind a fold.
        figures: Of :func:`tl_looped.report.page.exhibits`.
    """

    anchor: str
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[PageTable, ...] = ()
    findings: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    figures: tuple[Exhibit, ...] = ()


def write_page(
    path: Path,
    title: str,
    lead: str,
    parts: Sequence[PagePart],
    missing: Sequence[str] = (),
) -> Path:
    """Write a page.

    Args:
        path: Of the HTML file; an older one is replaced.
        title: Heading.
        lead: The first paragraph.
        parts: In order.
        missing: What was planned and is not in the page.

    Raises:
        DataError: if the file cannot be written.
    """
    page = (
        pages()
        .get_template("section.html.j2")
        .render(
            title=title,
            lead=lead,
            parts=parts,
            missing=list(missing),
            version=__version__,
            policy=content_policy([]),
        )
    )
    return write_text(page, path)


def figures_in(folder: Path, names: Sequence[str], root: Path) -> tuple[Exhibit, ...]:
    """Figures of a folder by the beginnings of their names, in that order."""
    if not folder.is_dir():
        return ()
    found = {Path(one.file).stem: one for one in exhibits(folder, "figure", root)}
    return tuple(one for name in names for stem, one in found.items() if stem == name)


def table_of(frame: pd.DataFrame, columns: Mapping[str, str], caption: str) -> PageTable:
    """A table as it is printed: three significant digits, nothing for what is NaN.

    Args:
        frame: The numbers.
        columns: Headings by the column of the frame; the others are left out. ``"t"`` and the like
            stand for an interval, ``t_low`` and ``t_high``.
        caption: Of the table.
    """
    rows = []
    for record in frame.to_dict("records"):
        named = {str(key): value for key, value in record.items()}
        rows.append(tuple(_cell(named, name) for name in columns))
    return PageTable(caption, tuple(columns.values()), tuple(rows))


def _cell(record: Mapping[str, object], name: str) -> str:
    if name in record:
        return _text(record[name])
    low, high = _text(record[f"{name}_low"]), _text(record[f"{name}_high"])
    return f"{low} to {high}" if low != "–" and high != "–" else "–"


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return digits(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
