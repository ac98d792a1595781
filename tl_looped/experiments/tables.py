"""Results as tables, each as CSV (six digits) and as parquet (all of them).

- ``layers``: one row per metric and effective layer, over prompts (heads averaged first).
- ``prompts``: one row per prompt: its row in the data set, length, verdict.
- ``neurons``: one row per unique layer, if they were computed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from tl_looped.files import make_folder, write_bytes

TABLES = "tables"
"""Folder of a run for its tables."""

_LAYER_COLUMNS = ("label", "stage", "in_recurrence", "layer_in_stage")


def layer_table(data: xr.Dataset) -> pd.DataFrame:
    """Mean, standard deviation (n - 1) and 10 and 90 % quantiles over the prompts with a value.

    Columns: ``metric``, ``effective_layer``, ``label``, ``stage``, ``in_recurrence`` (-1 outside
    the loop), ``layer_in_stage``, ``mean``, ``sd``, ``p10``, ``p90``, ``prompts``.
    """
    tables = []
    for name in _layer_metrics(data):
        values = data[name]
        values = values.mean("head") if "head" in values.dims else values
        tables.append(_over_prompts(name, values, data))
    columns = ["metric", "effective_layer", *_LAYER_COLUMNS, "mean", "sd", "p10", "p90", "prompts"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _layer_metrics(data: xr.Dataset) -> list[str]:
    """What has a number for every layer and prompt, and none for every token."""
    wanted = {"effective_layer", "prompt"}
    found = {str(name): set(values.dims) for name, values in data.data_vars.items()}
    return [name for name, dims in found.items() if wanted <= dims and "token" not in dims]


def _flat(data: xr.Dataset, dim: str) -> list[str]:
    """What has this dimension and no other."""
    return [str(name) for name, values in data.variables.items() if values.dims == (dim,)]


def _over_prompts(name: str, values: xr.DataArray, data: xr.Dataset) -> pd.DataFrame:
    rows = []
    for row in values.transpose("effective_layer", "prompt").values:
        found = row[~np.isnan(row)]
        n = len(found)
        sd = found.std(ddof=1) if n > 1 else np.nan
        low, high = np.quantile(found, (0.1, 0.9)) if n else (np.nan, np.nan)
        rows.append((found.mean() if n else np.nan, sd, low, high, n))
    table = pd.DataFrame(rows, columns=["mean", "sd", "p10", "p90", "prompts"])
    places = pd.DataFrame({c: data[c].values for c in _LAYER_COLUMNS})
    places.insert(0, "effective_layer", data["effective_layer"].values)
    places.insert(0, "metric", name)
    return pd.concat([places, table], axis=1)


def prompt_table(data: xr.Dataset) -> pd.DataFrame:
    """One row per prompt: whatever has no other dimension."""
    return pd.DataFrame({name: data[name].values for name in sorted(_flat(data, "prompt"))})


def neuron_table(data: xr.Dataset) -> pd.DataFrame:
    """One row per unique layer; empty if neurons were not asked for."""
    return pd.DataFrame({name: data[name].values for name in _flat(data, "unique_layer")})


def write_csv_and_parquet(table: pd.DataFrame, path: Path) -> list[Path]:
    """Write ``PATH.csv`` and ``PATH.parquet``."""
    make_folder(path.parent)
    text = table.to_csv(index=False, float_format="%.6g")
    binary = io.BytesIO()
    table.to_parquet(binary, index=False)
    as_csv, as_parquet = _files_of(path)
    return [write_bytes(text.encode(), as_csv), write_bytes(binary.getvalue(), as_parquet)]


def _files_of(path: Path) -> list[Path]:
    return [path.with_name(path.name + kind) for kind in (".csv", ".parquet")]


def write_run_tables(data: xr.Dataset, folder: Path) -> list[Path]:
    """Write all tables of a result.

    Raises:
        DataError: if they cannot be written.
    """
    makers = {"layers": layer_table, "prompts": prompt_table, "neurons": neuron_table}
    return [
        p for name in _names(data) for p in write_csv_and_parquet(makers[name](data), folder / name)
    ]


def table_files(data: xr.Dataset, folder: Path) -> list[Path]:
    """The files that :func:`write_tables` writes."""
    return [path for name in _names(data) for path in _files_of(folder / name)]


def _names(data: xr.Dataset) -> list[str]:
    """The tables that have rows."""
    rows = {
        "layers": bool(_layer_metrics(data)) and data.sizes["effective_layer"] > 0,
        "prompts": bool(_flat(data, "prompt")) and data.sizes["prompt"] > 0,
        "neurons": bool(_flat(data, "unique_layer")) and data.sizes["unique_layer"] > 0,
    }
    return [name for name, has_rows in rows.items() if has_rows]


def read_table(path: Path, texts: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table that was written as CSV; one without rows and columns is empty.

    Args:
        path: The file.
        texts: Columns whose texts may look like numbers or be empty.
    """
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(texts, str))
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    for name in table.columns.intersection(list(texts)):
        table[name] = table[name].fillna("")
    return table
