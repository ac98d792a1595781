"""The report: one HTML file that says what one run, or several, found.

The summary table comes first (:mod:`tl_looped.report.summary`), then every figure with its
caption, command and settings, then attention views. The file needs no network and no other file:
images are data URIs, SVGs too, so that nothing inside them can run; a content security policy
allows the two scripts that draw attention, and nothing else. Every text from a file is escaped.

What is read, for each run: ``results.nc``; ``figures/figNN.json`` with ``figNN.svg`` or
``figNN.png`` (the SVG if both are there); ``views/viewNN.json`` as
:func:`tl_looped.report.views.write_view` writes them; names in ``tables``. A folder of
several runs may have ``figures`` and ``views`` of its own, shown as comparisons.

The same files give the same report, byte for byte: it holds no date.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import xarray as xr
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tl_looped._version import __version__
from tl_looped.errors import DataError
from tl_looped.experiments.reading import specification
from tl_looped.files import write_text
from tl_looped.report import text as report_text
from tl_looped.report.findings import Findings, read_findings
from tl_looped.report.summary import RunSummary, mirrored_runs
from tl_looped.viz.attention import DRAW
from tl_looped.viz.page import (
    MAX_BYTES,
    UNPACK,
    VIEW_STYLE,
    content_policy,
    drawing_script,
    json_in_html,
    packed_drawing,
)

_TEMPLATES = Path(__file__).parent / "templates"

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


@dataclass(frozen=True)
class Exhibit:
    """A figure or an attention view.

    Args:
        anchor: Its id in the page.
        number, title, caption, command, settings: From its record.
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
class Section:
    """One run, or what compares several.

    Args:
        anchor: Its id in the page.
        name: Heading.
        figures, views: In the order of their numbers.
        spec: The specification, as text; None for comparisons.
        attributes: Attributes of the results.
        tables: Paths of the numbers.
    """

    anchor: str
    name: str
    figures: tuple[Exhibit, ...]
    views: tuple[Exhibit, ...]
    spec: str | None
    attributes: dict[str, str]
    tables: tuple[str, ...]


def write_report(folder: Path | Findings, title: str | None = None) -> Path:
    """Write ``report.html`` of a run's folder, or of a folder of runs.

    Args:
        folder: A folder with ``results.nc``, or one whose subfolders have it; or what was read of
            it.
        title: Heading; the names of the models if None.

    Returns:
        Path of the report; an older one is replaced.

    Raises:
        DataError: if there are no results, or a file is missing, damaged or of another format; then
            nothing is written.
    """
    found = folder if isinstance(folder, Findings) else read_findings(Path(folder))
    folder, folders, summaries = found.folder, found.folders, found.summaries
    room = MAX_BYTES - len(packed_drawing()) if _has_views(folder, folders) else 0
    sections: list[Section] = []
    if folder not in folders.values() and any((folder / n).is_dir() for n in ("figures", "views")):
        section, room = _section("all", "Comparisons", folder, folder, None, room)
        sections.append(section)
    for i, summary in enumerate(summaries):
        heading, path = report_text.heading(summary), folders[summary.run]
        section, room = _section(f"run{i}", heading, path, folder, found.data[summary.run], room)
        sections.append(section)
    page = _render(title or _title(summaries), found, sections)
    # A text with half of a surrogate pair (JSON can hold one) has no UTF-8.
    return write_text(page.encode("utf-8", "replace").decode("utf-8"), folder / "report.html")


def _title(summaries: Sequence[RunSummary]) -> str:
    if len(summaries) == 1:
        return f"{summaries[0].model} {summaries[0].loop}"
    return ", ".join(dict.fromkeys(summary.model for summary in summaries))


def _section(
    anchor: str, name: str, path: Path, root: Path, data: xr.Dataset | None, room: int
) -> tuple[Section, int]:
    figures = exhibits(path / "figures", anchor, root)
    views = []
    for i, record in enumerate(_records(path / "views", "view")):
        view, room = _view(record, f"{anchor}-view{i}", root, room)
        views.append(view)
    section = Section(
        anchor=anchor,
        name=name,
        figures=figures,
        views=tuple(views),
        spec=None if data is None else json.dumps(specification(data), indent=2, sort_keys=True),
        attributes={} if data is None else _attributes(data),
        tables=tuple(
            file.relative_to(root).as_posix()
            for file in sorted((path / "tables").rglob("*"))
            if file.suffix in (".csv", ".parquet")
        ),
    )
    return section, room


def _attributes(data: xr.Dataset) -> dict[str, str]:
    return {str(k): report_text.value(v) for k, v in sorted(data.attrs.items()) if k != "spec"}


# -- figures and views --------------------------------------------------------------------------


def exhibits(folder: Path, anchor: str, root: Path) -> tuple[Exhibit, ...]:
    """The figures of a folder, in the order of their names.

    Args:
        folder: With ``figNN.json`` and the images.
        anchor: Begins the ids.
        root: Files are named from here.

    Raises:
        DataError: if a file is damaged, or an image has no record.
    """
    return tuple(
        _figure(record, f"{anchor}-fig{i}", root)
        for i, record in enumerate(_records(folder, "fig"))
    )


def _has_views(folder: Path, folders: dict[str, Path]) -> bool:
    return any(_records(path / "views", "view") for path in (folder, *folders.values()))


def _records(folder: Path, prefix: str) -> list[Path]:
    """Records in the order of their names.

    Raises:
        DataError: if an image has no record.
    """
    records = sorted(folder.glob(f"{prefix}*.json"))
    known = {record.stem for record in records}
    for file in sorted(folder.glob(f"{prefix}*")):
        if file.suffix in (".png", ".svg", ".html") and file.stem not in known:
            raise DataError(
                f"{file} has no record {file.stem}.json with its caption, command and settings"
            )
    return records


_KINDS = {"number": int, "title": str, "caption": str, "command": str, "settings": dict}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    for name, kind in _KINDS.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise DataError(f"{path} must hold {name}, {kind.__name__}: the record of a figure")
    return {name: record[name] for name in _KINDS} | {"view": record.get("view")}


def _figure(path: Path, anchor: str, root: Path) -> Exhibit:
    record = _read_record(path)
    for suffix, check in ((".svg", _is_svg), (".png", _is_png)):
        image = path.with_suffix(suffix)
        if image.is_file():
            content = image.read_bytes()
            if not check(content):
                raise DataError(f"{image} is damaged: no whole {suffix[1:].upper()}; make it again")
            break
    else:
        raise DataError(f"{path} has no figure {path.stem}.svg or {path.stem}.png beside it")
    kind = "png" if image.suffix == ".png" else "svg+xml"
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return _exhibit(record, anchor, uri, image.relative_to(root))


def _exhibit(record: dict[str, Any], anchor: str, content: str | None, file: Path) -> Exhibit:
    fields = {name: record[name] for name in _KINDS}
    return Exhibit(anchor=anchor, content=content, file=file.as_posix(), **fields)


def _is_png(content: bytes) -> bool:
    return content.startswith(b"\x89PNG\r\n\x1a\n") and content[-8:-4] == b"IEND"


def _is_svg(content: bytes) -> bool:
    try:
        return ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    except ElementTree.ParseError:
        return False


def _view(path: Path, anchor: str, root: Path, room: int) -> tuple[Exhibit, int]:
    """A view, and the bytes that are left for others: one that does not fit stays a file."""
    record = _read_record(path)
    view = record["view"]
    keys = ("tokens", "labels", "cells")
    if not isinstance(view, dict) or not all(isinstance(view.get(k), list) for k in keys):
        raise DataError(f"{path} must hold a view with {', '.join(keys)}: write it with write_view")
    try:
        shown = {k: view[k] for k in (*keys, "limit", "digits") if k in view}
        content: str | None = json_in_html(shown)
    except ValueError as error:
        raise DataError(f"{path}: the view holds a number that is not finite") from error
    if len(content or "") > room:
        content = None
    page = path.with_suffix(".html")
    if content is None and not page.is_file():
        raise DataError(f"{path}: too large for the report, and {page.name} is missing")
    exhibit = _exhibit(record, anchor, content, page.relative_to(root))
    return exhibit, room - len(content or "")


# -- the page -----------------------------------------------------------------------------------


def pages() -> Environment:
    """The templates of pages: everything is escaped, and a name that is not given is an error."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["value"] = report_text.value
    return environment


def _render(title: str, found: Findings, sections: Sequence[Section]) -> str:
    drawn = any(view.content is not None for section in sections for view in section.views)
    draw = UNPACK + DRAW + _DRAW_WHEN_OPENED
    return (
        pages()
        .get_template("report.html.j2")
        .render(
            title=title,
            version=__version__,
            policy=content_policy([drawing_script(), draw] if drawn else []),
            rows=found.rows(),
            n_runs=len(found.summaries),
            mirroring=[report_text.mirroring(run) for run in mirrored_runs(found.summaries)],
            verdicts=report_text.VERDICTS.values(),
            sections=sections,
            waiting=found.waiting,
            # Ours or the package's, and safe in a script element; all else is escaped.
            drawing=Markup(packed_drawing()) if drawn else None,
            draw=Markup(draw),
            view_style=Markup(VIEW_STYLE),
            safe_json=Markup,
        )
    )
