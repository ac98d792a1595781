"""Reading a run's results back, and refusing what is not one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_looped.errors import DataError
from tl_looped.experiments.store import FORMAT
from tl_looped.metrics.labels import geometry_of


@dataclass(frozen=True)
class Missing:
    """A number that cannot be given, and why."""

    reason: str


def read_results(path: Path) -> xr.Dataset:
    """A run's results, in memory.

    Raises:
        DataError: if the file is missing, damaged, of another format, or does not say what it is.
    """
    if not path.is_file():
        raise DataError(f"there is no {path}: run the experiment first")
    try:
        with xr.open_dataset(path, engine="h5netcdf") as opened:
            data = opened.load()
    except Exception as error:  # h5py and h5netcdf raise a dozen kinds for a damaged file
        raise DataError(
            f"{path} cannot be read as netCDF ({type(error).__name__}: {error}). Is it damaged or "
            "cut off? Run the experiment again"
        ) from error
    found = data.attrs.get("format")
    if found is None or not np.issubdtype(np.asarray(found).dtype, np.integer):
        raise DataError(f"{path} has no integer attribute 'format': not written by an experiment")
    if int(found) != FORMAT:
        raise DataError(
            f"{path} is of format {int(found)}, and this version reads format {FORMAT}: use the "
            f"version that wrote it ({data.attrs.get('tl_looped', 'unknown')}), or run again"
        )
    try:
        loop = geometry_of(data)
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} does not say the run's shape: attribute {error}") from error
    if "prompt" not in data.dims or data.sizes.get("effective_layer") != loop.n_layers:
        raise DataError(
            f"{path} must be by depth, with prompt and effective_layer ({loop.n_layers} of a run "
            f"of shape {loop}), got {dict(data.sizes)}"
        )
    return data


def is_feedforward(data: xr.Dataset) -> bool:
    """Whether a result is of a core without prelude and coda that ran once."""
    loop = geometry_of(data)
    return loop.p == loop.c == 0 and loop.R == 1


def specification(data: xr.Dataset) -> dict[str, Any]:
    """The specification that a result carries as JSON; empty if it carries none.

    Raises:
        DataError: if it is no JSON object.
    """
    text = data.attrs.get("spec", "{}")
    try:
        found = json.loads(text)
    except (TypeError, ValueError) as error:
        raise DataError(f"the attribute spec is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"the attribute spec must be a JSON object, got {type(found).__name__}")
    return found
