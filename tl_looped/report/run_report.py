"""The report: one HTML file that says what one run, or several, found.

The summary table comes first (:mod:`tl_looped.report.summary`), then mirroring scores, then every
run with its figures (caption, command and settings) and attention views. What is read, for each
run: ``results.nc``, ``figures``, ``views`` (:mod:`tl_looped.report.exhibits`), names in ``tables``.
A folder of several runs may have ``figures`` and ``views`` of its own, shown as comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import xarray as xr

from tl_looped.experiments.reading import specification
from tl_looped.report import text
from tl_looped.report.exhibits import figures_of, records_of, views_of
from tl_looped.report.findings import Findings, read_findings
from tl_looped.report.page import write_page
from tl_looped.report.parts import PagePart, RunDetails
from tl_looped.report.summary import RunSummary, mirrored_runs
from tl_looped.viz.page import MAX_BYTES, packed_drawing
from tl_looped.words import count


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
    has_views = any(records_of(path / "views", "view") for path in (folder, *folders.values()))
    room = MAX_BYTES - len(packed_drawing()) if has_views else 0
    parts: list[PagePart] = []
    if mirrored := mirrored_runs(summaries):
        tables = tuple(text.mirroring(run) for run in mirrored)
        parts.append(PagePart("mirroring", "Mirroring scores and stages", tables=tables))
    if folder not in folders.values() and any((folder / n).is_dir() for n in ("figures", "views")):
        part, room = _part("all", "Comparisons", folder, folder, None, room)
        parts.append(part)
    for i, summary in enumerate(summaries):
        heading, path = text.heading(summary), folders[summary.run]
        part, room = _part(f"run{i}", heading, path, folder, found.data[summary.run], room)
        parts.append(part)
    waiting = ", ".join(found.waiting)
    return write_page(
        folder / "report.html",
        title or _title(summaries),
        parts,
        about=f"{count(len(summaries), 'run')}; report",
        notice=waiting and f"Specified but not yet run, so not in this report: {waiting}.",
        summary=found.rows(),
    )


def _title(summaries: Sequence[RunSummary]) -> str:
    if len(summaries) == 1:
        return f"{summaries[0].model} {summaries[0].loop}"
    return ", ".join(dict.fromkeys(summary.model for summary in summaries))


def _part(
    anchor: str, title: str, path: Path, root: Path, data: xr.Dataset | None, room: int
) -> tuple[PagePart, int]:
    """One run, or what compares several (``data`` is None), and the bytes left for views."""
    figures = figures_of(path / "figures", anchor, root)
    views, room = views_of(path / "views", anchor, root, room)
    bare = () if figures or views else ("This run has no figures.",)
    details = None if data is None else _details(data, path / "tables", root)
    return PagePart(anchor, title, bare, figures=figures, views=views, details=details), room


def _details(data: xr.Dataset, tables: Path, root: Path) -> RunDetails:
    files = (file for file in sorted(tables.rglob("*")) if file.suffix in (".csv", ".parquet"))
    return RunDetails(
        spec=json.dumps(specification(data), indent=2, sort_keys=True),
        attributes={str(k): text.value(v) for k, v in sorted(data.attrs.items()) if k != "spec"},
        files=tuple(file.relative_to(root).as_posix() for file in files),
    )
