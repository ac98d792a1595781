"""From results to what a line shows: means over heads, prompts and seeds, and their bands.

Heads are averaged first, then prompts, then seeds. A prompt with an undefined head is undefined
(there is no mean over the others), and an undefined prompt is left out of the mean over prompts;
infinities count as undefined. ``left_out`` counts those, for captions.

Bands are about what was averaged last: prompts of one run, or seeds of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from tl_looped.errors import InputError
from tl_looped.metrics.inputs import check_choice
from tl_looped.metrics.labels import geometry_of
from tl_looped.model.geometry import LoopGeometry
from tl_looped.words import called

Band = Literal["sd", "quantiles", "range", "none"]
"""Mean +- one standard deviation (divisor n - 1), 10 to 90 %, least to largest, or nothing."""

Runs: TypeAlias = xr.Dataset | Sequence[xr.Dataset]
"""One result by depth, or several of the same shape: one per seed."""

QUANTILES = (0.1, 0.9)
_SITES = ("effective_layer", "recurrence", "unique_layer")


@dataclass(frozen=True)
class Summary:
    """What a line and its band show.

    Attributes:
        mean: Mean over prompts, or over the seeds' means; NaN where nothing is defined.
        low, high: Edges of the band; NaN where there is none (fewer than two values, for an SD).
        n: How many values the mean is of.
        left_out: Undefined values among places that have any defined one.
    """

    mean: Float[np.ndarray, " site"]
    low: Float[np.ndarray, " site"]
    high: Float[np.ndarray, " site"]
    n: Int[np.ndarray, " site"]
    left_out: int

    def part(self, where: slice) -> Summary:
        """The same for some of the places."""
        return Summary(
            self.mean[where], self.low[where], self.high[where], self.n[where], self.left_out
        )


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


def summary(runs: Runs, name: str, band: Band | str = "sd") -> Summary:
    """Mean and band of one variable at every layer or recurrence.

    Args:
        runs: One result: the band is over prompts. Several: over the seeds' means over prompts.
        name: The variable.
        band: See :data:`Band`.
    """
    check_choice("band", band, get_args(Band))
    values = [per_prompt(run, name) for run in as_runs(runs)]
    missing = sum(_left_out(x) for x in values)
    table = values[0] if isinstance(runs, xr.Dataset) else np.stack([_mean(x) for x in values], 1)
    low, high = _band(table, band)
    n = np.isfinite(table).sum(1)
    return Summary(_mean(table), low, high, n, missing)


def _left_out(values: Float[np.ndarray, "site prompt"]) -> int:
    """Prompts that are undefined somewhere where another is not."""
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
