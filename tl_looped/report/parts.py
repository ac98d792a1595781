"""What pages are made of: parts with paragraphs, tables, figures, attention views and sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tl_looped.errors import InputError


@dataclass(frozen=True)
class Exhibit:
    """A figure or an attention view.

    Args:
        anchor: Its id in the page.
        number, title, caption, command, settings: From its record; number 0 is none of the paper's.
        content: Data URI of an image, or JSON of a view; None for a view that found no room.
        file: Its path as the reader finds it.
    """

    anchor: str
    number: int
    title: str
    caption: str
    command: str
    settings: dict[str, Any]
    content: str | None
    file: str


@dataclass(frozen=True)
class PageTable:
    """A table as text; the first column heads its rows.

    Args:
        caption: What it shows, with units.
        columns: Headings.
        rows: One text per column.
        notes: In small type, below it.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.columns or any(len(row) != len(self.columns) for row in self.rows):
            raise InputError(f"rows must have the {len(self.columns)} columns of the table")


@dataclass(frozen=True)
class RunDetails:
    """How a run was specified and what it wrote.

    Args:
        spec: The specification, as text.
        attributes: Attributes of the results.
        files: Paths of the tables.
    """

    spec: str
    attributes: dict[str, str]
    files: tuple[str, ...]


@dataclass(frozen=True)
class PagePart:
    """A part of a page.

    Args:
        anchor: Its id.
        title: Heading.
        paragraphs: Before the rest.
        tables: In order.
        findings: Sentences, as a list.
        more: Further sentences, behind a fold.
        figures, views: In the order of their numbers.
        details: Of the run that the part is about, behind a fold.
    """

    anchor: str
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[PageTable, ...] = ()
    findings: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    figures: tuple[Exhibit, ...] = ()
    views: tuple[Exhibit, ...] = ()
    details: RunDetails | None = None


@dataclass(frozen=True)
class SummaryCell:
    """A cell of the summary table.

    Args:
        label: Heading of its column.
        main: The number, or "not computed".
        note: Spread, counts or the reason, in small type.
        missing: Whether the number is missing.
        bar: Shares of the verdicts, in percent, with their colour.
        source: Anchor and short name of the run, where its model has several.
    """

    label: str
    main: str
    note: str = ""
    missing: bool = False
    bar: tuple[tuple[float, str], ...] = ()
    source: tuple[str, str] | None = None


@dataclass(frozen=True)
class SummaryRow:
    """A model in the summary table.

    Args:
        model: Its name.
        shape: Of its loop.
        runs: Anchor and short name of each of its runs.
        feedforward: Whether it has no loop.
        notes: What must be known to read the cells.
        cells: One per column.
    """

    model: str
    shape: str
    runs: tuple[tuple[str, str], ...]
    feedforward: bool
    notes: tuple[str, ...]
    cells: tuple[SummaryCell, ...]
