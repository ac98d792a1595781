"""What stands beside the metrics in a result: the variables of extras, named and labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor


def merged(data: xr.Dataset, more: xr.Dataset) -> xr.Dataset:
    """The variables and attributes of both; an attribute of the first stays as it is."""
    new = {key: value for key, value in more.attrs.items() if key not in data.attrs}
    return data.merge(
        more, join="exact", compat="identical", combine_attrs="override"
    ).assign_attrs(new)


def pattern_variables(
    patterns: Float[Tensor, "layer head query key"], tokens: Sequence[str]
) -> dict[str, Any]:
    """``pattern`` (fp32) and ``pattern_token``, the prompt's tokens as text."""
    return {
        "pattern": (
            ("effective_layer", "head", "query", "key"),
            patterns.float().cpu().numpy(),
            {"long_name": "attention of the first prompt", "units": "1"},
        ),
        "pattern_token": ("query", np.array(list(tokens), dtype=str)),
    }


def neuron_variables(by_layer: xr.Dataset) -> xr.Dataset:
    """Fractions over ``unique_layer``, with the coordinates of their layers renamed."""
    found = by_layer[["prediction", "suppression"]].rename(layer="unique_layer")
    names = {"stage": "unique_stage", "layer_in_stage": "unique_layer_in_stage"}
    found = found.rename({old: new for old, new in names.items() if old in found.coords})
    return found.assign_coords(unique_layer=np.arange(found.sizes["unique_layer"]))
