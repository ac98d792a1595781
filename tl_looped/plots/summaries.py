"""From results to what a line shows: means over heads, prompts and seeds, and their bands.

Heads are averaged first, then prompts, then seeds. A prompt with an undefined head is undefined
(there is no mean over the others), and an undefined prompt is left out of the mean over prompts;
infinities count as undefined. :func:`left_out` counts those, for captions.

What a line shows is a table, one row per place; the numbers of a figure are these tables.

Bands are about what was averaged last: prompts of one run, or seeds of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from tl_looped.checks import one_of
from tl_looped.errors import InputError
from tl_looped.metrics.labels import geometry_of
from tl_looped.model.geometry import LoopGeometry
from tl_looped.words import called

Band = Literal["sd", "quantiles", "range", "none"]
"""Mean +- one standard deviation (divisor n - 1), 10 to 90 %, least to largest, or nothing."""

Runs: TypeAlias = xr.Dataset | Sequence[xr.Dataset]
"""One result by depth, or several of the same shape: one per seed."""

QUANTILES = (0.1, 0.9)
_SITES = ("effective_layer", "recurrence", "unique_layer")


def as_runs(runs: Runs) -> list[xr.Dataset]:
    """Several results of one shape as a list.

    Raises:
        InputError: if there is none, one is no Dataset, or their shapes differ.
    """
    found = [runs] if isinstance(runs, xr.Dataset) else list(runs)
    if not found or not all(isinstance(run, xr.Dataset) for run in found):
        kinds = ", ".join(type(run).__name__ for run in found) or "nothing"
        raise InputError(f"data must be an xarray Dataset, or one per seed, got {kinds}")
    shapes = sorted({str(shape_of(run)) for run in found})
    if len(shapes) > 1:
        raise InputError(f"data: runs of one figure must have one shape, got {', '.join(shapes)}")
    return found


def shape_of(runs: Runs) -> LoopGeometry:
    """Geometry of the run, or of the first of several.

    Raises:
        InputError: if the attributes that hold it are missing.
    """
    run = runs if isinstance(runs, xr.Dataset) else as_runs(runs)[0]
    try:
        return geometry_of(run)
    except KeyError as error:
        raise InputError(
            f"data has no attribute {error}: results of stream and from_cache have it"
        ) from error


def name_of(run: xr.Dataset) -> str:
    """The model's name; of a folder its last part."""
    return called(str(run.attrs.get("model") or "model without a name"))


def per_prompt(data: xr.Dataset, name: str) -> Float[np.ndarray, "site prompt"]:
    """One variable with heads averaged, in fp64; infinities are NaN.

    Raises:
        InputError: if the variable is missing or is not over layers or recurrences.
    """
    if name not in data:
        raise InputError(f"data has no variable {name!r}; it has {', '.join(map(str, data))}")
    values = data[name].astype(np.float64)
    site = [str(dim) for dim in values.dims if dim in _SITES]
    extra = set(values.dims) - {*_SITES, "head", "prompt"}
    if len(site) != 1 or extra:
        raise InputError(f"data: {name} must be by depth, over one of {_SITES}, got {values.dims}")
    if "head" in values.dims:
        values = values.mean("head", skipna=False)
    if "prompt" not in values.dims:
        values = values.expand_dims("prompt")
    array = values.transpose(site[0], "prompt").to_numpy()
    return np.where(np.isfinite(array), array, np.nan)


def summary(runs: Runs, name: str, band: Band | str = "sd") -> pd.DataFrame:
    """Mean and band of one variable at every layer or recurrence: what a line shows.

    Args:
        runs: One result: the band is over prompts. Several: over the seeds' means over prompts.
        name: The variable.
        band: See :data:`Band`.

    Returns:
        As :func:`summary_of`.
    """
    one_of(band, "band", get_args(Band))
    values = [per_prompt(run, name) for run in as_runs(runs)]
    one = isinstance(runs, xr.Dataset)
    return summary_of(values[0] if one else np.stack([_mean(x) for x in values], 1), band)


def summary_of(values: Float[np.ndarray, "site n"], band: Band | str = "sd") -> pd.DataFrame:
    """Mean and band over the second axis; NaN are left out.

    Returns:
        One row per place: ``mean``, NaN where nothing is defined; ``low`` and ``high``, the edges
        of the band, NaN for fewer than two values; ``n``, how many values the mean is of.
    """
    low, high = _band(values, band)
    n = np.isfinite(values).sum(1)
    return pd.DataFrame({"mean": _mean(values), "low": low, "high": high, "n": n})


def without_band(values: Float[np.ndarray, " site"]) -> pd.DataFrame:
    """A line of single values, as :func:`summary_of`."""
    return summary_of(values[:, None], "none")


def left_out(runs: Runs, name: str) -> int:
    """Prompts whose value of a variable is undefined somewhere where another's is not."""
    return sum(_left_out(per_prompt(run, name)) for run in as_runs(runs))


def _left_out(values: Float[np.ndarray, "site prompt"]) -> int:
    undefined = np.isnan(values)
    here = ~undefined.all(1)
    return int(undefined[here].any(0).sum()) if here.any() else 0


def _mean(values: Float[np.ndarray, "site n"]) -> Float[np.ndarray, " site"]:
    n = np.isfinite(values).sum(1)
    total = np.nansum(values, 1)
    return np.divide(total, n, out=np.full(len(values), np.nan), where=n > 0)


def _band(
    values: Float[np.ndarray, "site n"], band: Band | str
) -> tuple[Float[np.ndarray, " site"], Float[np.ndarray, " site"]]:
    low, high = np.full(len(values), np.nan), np.full(len(values), np.nan)
    some = np.isfinite(values).sum(1) >= 2
    if band == "none" or not some.any():
        return low, high
    rows = values[some]
    if band == "sd":
        mean, sd = _mean(rows), np.nanstd(rows, axis=1, ddof=1)
        low[some], high[some] = mean - sd, mean + sd
    else:
        edges = QUANTILES if band == "quantiles" else (0.0, 1.0)
        low[some], high[some] = np.nanquantile(rows, edges, axis=1)
    return low, high
