"""What a folder of runs holds: results and their summaries, read once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from tl_looped.errors import DataError, InputError
from tl_looped.experiments.reading import is_feedforward, read_results
from tl_looped.experiments.store import RESULTS, SPEC_FILE, find_runs
from tl_looped.files import is_folder
from tl_looped.report import text
from tl_looped.report.parts import SummaryRow
from tl_looped.report.summary import RunSummary, by_model, summarise
from tl_looped.words import called


@dataclass(frozen=True)
class Findings:
    """Results of a folder.

    Args:
        folder: A run, or a folder of runs.
        folders: Of each run, by name.
        data: Results, by name.
        summaries: Of each run: loops first, feedforward models are what they are compared with.
        waiting: Subfolders with a specification and no results.
    """

    folder: Path
    folders: dict[str, Path]
    data: dict[str, xr.Dataset]
    summaries: list[RunSummary]
    waiting: list[str]

    def rows(self) -> list[SummaryRow]:
        """The rows of the summary table, a model each."""
        anchors = {summary.run: f"run{i}" for i, summary in enumerate(self.summaries)}
        return [text.row(runs, anchors) for runs in by_model(self.summaries)]


def read_findings(folder: Path, feedforward: str | None = None) -> Findings:
    """Read and summarise a run, or a folder of runs.

    A subfolder that holds ``spec.toml`` but no results has not been run.

    Args:
        folder: A folder with ``results.nc``, or one whose subfolders have it.
        feedforward: Compare with this feedforward run, named by itself or its model, in place of
            the one that specifications name.

    Raises:
        DataError: if there are no results, or a file is missing, damaged or of another format.
        InputError: if no feedforward run has that name.
    """
    folders, waiting = _run_folders(folder)
    data = {name: read_results(path / RESULTS) for name, path in folders.items()}
    if feedforward is not None:
        others = {
            run: called(str(d.attrs.get("model"))) for run, d in data.items() if is_feedforward(d)
        }
        if not {feedforward, Path(feedforward).name} & {*others, *others.values()}:
            raise InputError(
                f"feedforward: no feedforward run in {folder} is called {feedforward!r} or of a "
                f"model of that name; there are {', '.join(others) or 'none'}"
            )
        for name in data.keys() - others.keys():
            data[name] = data[name].assign_attrs(feedforward=feedforward)
    summaries = sorted(summarise(data), key=lambda summary: summary.feedforward)
    return Findings(folder, folders, data, summaries, waiting)


def _run_folders(folder: Path) -> tuple[dict[str, Path], list[str]]:
    if not is_folder(folder):
        raise DataError(f"{folder} is not a folder: give a run's folder, or a folder of runs")
    specified = {path.parent for path in folder.glob(f"*/{SPEC_FILE}")}
    try:
        found = find_runs(folder)
    except DataError as error:
        names = ", ".join(sorted(path.name for path in specified))
        raise DataError(f"{error}; not yet run: {names}" if names else str(error)) from error
    if found == [folder]:
        return {folder.resolve().name: folder}, []
    waiting = [path.name for path in sorted(specified - set(found), key=_by_numbers)]
    return {path.name: path for path in sorted(found, key=_by_numbers)}, waiting


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """Orders ``r8`` before ``r32``."""
    return [(int(n), text) for text, n in re.findall(r"([^0-9]*)([0-9]*)", path.name + "0") if n]
