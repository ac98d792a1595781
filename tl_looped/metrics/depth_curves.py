"""A metric over depth: curves of a result, and their parts before, in and after the loop."""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Float

from tl_looped.metrics.labels import geometry_of


def prompt_curves(data: xr.Dataset, metric: str) -> Float[np.ndarray, "layer prompt"]:
    """A metric by effective layer for each prompt, mean over heads, in fp64.

    Args:
        data: A result by depth.
        metric: Name of the variable.
    """
    values = data[metric]
    values = values.mean("head", skipna=False) if "head" in values.dims else values
    return values.transpose("effective_layer", "prompt").to_numpy().astype(np.float64)


def mean_curve(data: xr.Dataset, metric: str) -> Float[np.ndarray, " layer"]:
    """Mean over heads, then over the prompts that have a value, by effective layer.

    Args:
        data: A result by depth.
        metric: Name of the variable.
    """
    values = data[metric]
    values = values.mean("head", skipna=False) if "head" in values.dims else values
    return values.mean("prompt").transpose("effective_layer").to_numpy()


def parts_of(
    data: xr.Dataset, curve: Float[np.ndarray, " layer *feature"]
) -> tuple[
    Float[np.ndarray, " prelude *feature"],
    Float[np.ndarray, "recurrence core *feature"],
    Float[np.ndarray, " coda *feature"],
]:
    """Prelude, core and coda of anything by effective layer.

    Args:
        data: The result, for the geometry of its run.
        curve: One entry per effective layer.
    """
    loop = geometry_of(data)
    end = loop.p + loop.k * loop.R
    core = curve[loop.p : end].reshape(loop.R, loop.k, *curve.shape[1:])
    return curve[: loop.p], core, curve[end:]
