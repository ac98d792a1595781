"""Section 4.2 as tables: every cell, every condition, and contrasts over seeds.

A condition is an initialisation, a number of layers, a norm layout and whether the input is
injected; its models differ by their seed. Numbers a seed: whether the loop has a fixed point (0 or
1), and the rate at which its steps shrink, a fit over all steps above the noise floor (near 1 for a
drift or an orbit). Contrasts pair models of one seed, which share the input and as many weights as
they can (see ``cells``), and average over the numbers of layers where those are not what is
compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_looped.experiments.joining import versions
from tl_looped.metrics import by_recurrence
from tl_looped.metrics.bootstrap import Resampling
from tl_looped.paper.data import SHIPPED, read_tables, write_tables
from tl_looped.paper.section42.cells import CELL_LAYERS, INITS, NORMS, Cell, size_of
from tl_looped.paper.statistics import Contrast, condition_table, contrast_table

_FILES = {
    "cells.csv": (),
    "conditions.csv": ("seeds", "n_prompts"),
    "verdicts.csv": (),
    "contrasts.csv": ("seeds", "differences", "layers"),
}
"""Tables, and their columns of texts that may look like numbers, or be empty."""

CONDITION_FACTORS = ("init", "layers", "norm", "injection")
QUANTITIES = {"fixed_point": "has a fixed point", "rate": "rate"}
INJECTIONS = ("injected", "none")
_CELL_NUMBERS = (
    "settled_at",
    "rate",
    "half_life",
    "period",
    "lowest_layer_cosine",
    "spectral_radius",
    "spectral_radius_error",
    "largest_singular_value",
)


@dataclass(frozen=True)
class GridTables:
    """What the grid says.

    Args:
        cells: A row per model: its condition and seed, ``verdict``, ``fixed_point``, ``settled_at``
            (recurrences; -1: never), ``rate``, ``half_life`` (recurrences), ``period``, the largest
            ``relative_step`` of any layer at the last recurrence, the lowest ``cosine_step``,
            ``norm`` growth over the second half (``growth``), ``lowest_layer_cosine``, the spectral
            numbers.
        conditions: A row per condition and quantity, with intervals; see
            :func:`tl_looped.paper.statistics.condition_table`.
        verdicts: A row per condition: how many of its seeds have each verdict.
        contrasts: Paired contrasts; see
            :func:`tl_looped.paper.statistics.contrast_table`. ``layers`` are those that were
            averaged over, ``"4 12 16"``.
        about: Sizes of the models, resampling, and the versions that made the tables.
    """

    cells: pd.DataFrame
    conditions: pd.DataFrame
    verdicts: pd.DataFrame
    contrasts: pd.DataFrame

    about: dict[str, Any]

    def write(self, folder: Path) -> Path:
        """Write ``NAME.csv`` of each table into a folder, and ``manifest.json``, which comes last.

        Raises:
            DataError: if a file cannot be written.
        """
        tables = {name: getattr(self, name.removesuffix(".csv")) for name in _FILES}
        write_tables(folder, tables, self.about)
        return folder


def read_grid_tables(folder: Path) -> GridTables:
    """Read what :meth:`GridTables.write` wrote.

    Raises:
        DataError: if a file is missing or damaged, or of another format.
    """
    tables, about = read_tables(folder, _FILES, "4.2")
    return GridTables(**tables, about=about)


def shipped_grid() -> GridTables:
    """The tables of the whole grid that the package ships."""
    return read_grid_tables(SHIPPED[42])


def grid_tables(
    found: Mapping[Cell, xr.Dataset], resampling: Resampling | None = None
) -> GridTables:
    """The tables of a grid, complete or not.

    Args:
        found: Results by cell.
        resampling: Of the intervals; 1,000 resamples and 95 % if None.
    """
    cells = pd.DataFrame([_of_cell(cell, data) for cell, data in found.items()])
    resampling = resampling or Resampling()
    conditions, contrasts = [], []
    for quantity, label in QUANTITIES.items():
        table = condition_table(cells, CONDITION_FACTORS, quantity, resampling)
        conditions.append(table.assign(quantity=label))
        contrasts.append(_contrasts(cells, quantity, resampling).assign(quantity=label))
    counts = cells.groupby([*CONDITION_FACTORS, "verdict"], sort=False).size().unstack(fill_value=0)
    return GridTables(
        cells,
        pd.concat(conditions, ignore_index=True),
        counts.rename_axis(columns=None).reset_index(),
        pd.concat(contrasts, ignore_index=True),
        {
            "size": asdict(size_of(found)),
            "resampling": asdict(resampling),
            "versions": versions(),
        },
    )


def _of_cell(cell: Cell, data: xr.Dataset) -> dict[str, object]:
    """A cell's row: numbers of its one prompt."""
    last = by_recurrence(data).isel(prompt=0)
    end = last.isel(recurrence=-1)
    norms = last["residual_mean"].isel(layer=-1)
    numbers = {name: data[name].values[0].item() for name in _CELL_NUMBERS}
    return {
        "init": cell.init,
        "layers": cell.n_layers,
        "norm": cell.norm,
        "injection": INJECTIONS[0] if cell.injected else INJECTIONS[1],
        "seed": cell.seed,
        "verdict": str(data["verdict_name"].values[0]),
        "fixed_point": bool(data["has_fixed_point"].values[0]),
        **numbers,
        "relative_step": float(end["successive_rel"].max()),
        "cosine_step": float(end["successive_cosine"].min()),
        "growth": float(norms[-1] / norms[len(norms) // 2]),
    }


def _contrasts(cells: pd.DataFrame, quantity: str, resampling: Resampling) -> pd.DataFrame:
    """Norms, injection and initialisation over all numbers of layers, and layers themselves."""
    here = {name: set(cells[name]) for name in CONDITION_FACTORS}
    norms = [n for n in NORMS if n in here["norm"]]
    layers = [n for n in CELL_LAYERS if n in here["layers"]]
    over_layers = [
        *(Contrast("norm", a, b) for a, b in combinations(norms, 2)),
        *_pair("injection", INJECTIONS, here),
        *_pair("init", INITS, here),
    ]
    between_layers = [Contrast("layers", b, a) for a, b in combinations(layers, 2)]
    tables = [
        contrast_table(cells, CONDITION_FACTORS, over_layers, quantity, ["layers"], resampling),
        contrast_table(cells, CONDITION_FACTORS, between_layers, quantity, (), resampling),
    ]
    return pd.concat([one for one in tables if len(one)] or [pd.DataFrame()], ignore_index=True)


def _pair(factor: str, levels: tuple[str, ...], here: Mapping[str, set[object]]) -> list[Contrast]:
    return [Contrast(factor, *levels)] if set(levels) <= here[factor] else []


def is_zero(contrasts: pd.DataFrame) -> pd.Series:
    """Contrasts whose difference is 0 in every seed."""
    zero = contrasts["differences"].map(lambda text: not np.any(np.fromstring(text, sep=" ")))
    return zero.astype(bool)
