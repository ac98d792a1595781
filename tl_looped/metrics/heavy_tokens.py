"""Whether one token of a prompt, where attention sinks, decides what is averaged over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from tl_looped.checks import checked
from tl_looped.metrics.labels import geometry_of

HEAVY_SHARE = 0.5
"""Share of the summed norm above which one token decides what is averaged over tokens."""

FEWEST_TOKENS = 4
"""Of a prompt that :func:`find_heavy_token` looks at: of two, one always holds half."""


@checked
@dataclass(frozen=True)
class HeavyToken:
    """That one token of a prompt holds most of the norm of its states.

    Args:
        prompts: In how many prompts it does.
        of: Prompts with at least ``FEWEST_TOKENS`` tokens.
        most: Largest share of the summed norm that one token holds.
        is_first: Whether it is the first token in all of them.
    """

    prompts: int
    of: int
    most: float
    is_first: bool


@checked
def find_heavy_token(data: xr.Dataset) -> HeavyToken | None:
    """Whether means over tokens are mostly one token's; None if not, or if the data do not say.

    So it is said where one token's norm is more than half (``HEAVY_SHARE``) of the sum of all
    tokens' norms, at some core layer and recurrence. Steps and residual entropy are then mostly its
    own too: ``skip_first`` leaves it out. Read from ``residual_mean`` and ``residual_max``.
    """
    names = ("residual_mean", "residual_max")
    if not {*names, "n_tokens"} <= {*data.variables} or "prompt" not in data.dims:
        return None
    loop = geometry_of(data)
    core = slice(loop.p, loop.p + loop.k * loop.R)
    if "effective_layer" in data.dims:
        data = data.isel(effective_layer=core)
    n = data["n_tokens"] - int(data.attrs.get("skip_first", 0))
    enough = (n >= FEWEST_TOKENS).to_numpy()
    data, n = data.isel(prompt=enough), n.isel(prompt=enough)
    largest = data["residual_max"]
    share = (largest / (data["residual_mean"] * n)).where(np.isfinite(largest))
    places = [dim for dim in share.dims if dim != "prompt"]
    heavy = share > HEAVY_SHARE
    prompts = int(heavy.any(places).sum())
    if not prompts:
        return None
    is_first = False
    if "residual_first" in data:
        is_first = bool((np.isclose(data["residual_first"], largest) | ~heavy).all())
    return HeavyToken(prompts, data.sizes["prompt"], float(share.max()), is_first)
