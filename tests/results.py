"""Small results by depth, as files would hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from tl_looped.experiments.store import FORMAT
from tl_looped.metrics.bootstrap import Resampling
from tl_looped.report.summary import RunSummary, summarise

P, K, C, R, N = 1, 3, 2, 4, 5
FEW = Resampling(n_resamples=200)


def result(shape: tuple[int, int, int, int] = (P, K, C, R), n: int = N, **extra: Any) -> xr.Dataset:
    """A result by depth with one metric of random numbers; ``extra`` are attributes."""
    p, k, c, r = shape
    rng = np.random.default_rng(sum(shape))
    dims = ("effective_layer", "head", "prompt")
    values = rng.random((p + k * r + c, 2, n))
    attributes: dict[str, Any] = {"model": "toy", "format": FORMAT, "prompts_digest": "words"}
    attributes |= dict(zip(("n_prelude", "n_core", "n_coda", "n_recurrences"), shape, strict=True))
    data = xr.Dataset({"colsum_concentration": (dims, values)}, attrs=attributes | extra)
    return data.assign_coords(source_row=("prompt", range(n)))


def feedforward(layers: int = 6, n: int = N, **extra: Any) -> xr.Dataset:
    return result((0, layers, 0, 1), n, **({"model": "base"} | extra))


def with_numbers(data: xr.Dataset, **numbers: list[float]) -> xr.Dataset:
    return data.assign({name: ("prompt", values) for name, values in numbers.items()})


def only(data: xr.Dataset, *others: xr.Dataset) -> RunSummary:
    names = [f"other{i}" for i in range(len(others))]
    return summarise({"run": data, **dict(zip(names, others, strict=True))}, FEW)[0]


def curves(data: xr.Dataset) -> np.ndarray:
    return data["colsum_concentration"].mean("head").to_numpy()
