"""Figures and attention views of a folder, for a page.

What is read: ``figNN.json`` with ``figNN.svg`` or ``figNN.png`` (the SVG if both are there);
``viewNN.json`` as :func:`tl_looped.report.views.write_view` writes them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tl_looped.errors import DataError
from tl_looped.report.parts import Exhibit
from tl_looped.viz.page import json_in_html

_KINDS = {"number": int, "title": str, "caption": str, "command": str, "settings": dict}


def figures_of(folder: Path, anchor: str, root: Path) -> tuple[Exhibit, ...]:
    """The figures of a folder, in the order of their names.

    Args:
        folder: With ``figNN.json`` and the images.
        anchor: Beginning of the ids.
        root: Folder that files are named from.

    Raises:
        DataError: if a file is damaged, or an image has no record.
    """
    records = enumerate(records_of(folder, "fig"))
    return tuple(_figure(record, f"{anchor}-fig{i}", root) for i, record in records)


def named_figures(
    folder: Path, names: Sequence[str], anchor: str, root: Path
) -> tuple[Exhibit, ...]:
    """Those of :func:`figures_of` that are there, by the names of their files, in that order."""
    found = {record.stem: record for record in records_of(folder, "fig")}
    return tuple(_figure(found[n], f"{anchor}-{n}", root) for n in names if n in found)


def views_of(folder: Path, anchor: str, root: Path, room: int) -> tuple[tuple[Exhibit, ...], int]:
    """The attention views of a folder, and the bytes that are left for others.

    Args:
        folder, anchor, root: As in :func:`figures_of`.
        room: Bytes that the page has left; a view that does not fit stays a file.

    Raises:
        DataError: if a file is damaged, or a view has no record.
    """
    views = []
    for i, record in enumerate(records_of(folder, "view")):
        view, room = _view(record, f"{anchor}-view{i}", root, room)
        views.append(view)
    return tuple(views), room


def records_of(folder: Path, prefix: str) -> list[Path]:
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
