"""Labelled results: xarray datasets over recurrences, layers, heads and prompts.

Two arrangements of the same numbers:

- *by recurrence*: ``recurrence, layer, head, prompt`` of the core (``token`` in place of ``head``
  where a metric has a number for each; NaN at padding). A feedforward model is a core of
  all its layers that runs once.
- *by depth*: ``effective_layer, head, prompt`` with prelude and coda, and the coordinates ``label``
  (``r3.l1``), ``stage``, ``in_recurrence`` (-1 outside the loop) and ``layer_in_stage``.

Everything is 0-based. What a model with a loop norm (Ouro) has behind it, at the end of a
recurrence, stands in variables of its own, ``…_state_out``, over ``recurrence``. Attributes hold
the run's shape, seed and versions; each variable has ``long_name`` and ``units``.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from tl_looped._version import __version__
from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.metrics.catalogue import DERIVED, LOWEST_COSINE, OUTPUTS, PER_TOKEN
from tl_looped.metrics.collector import Collector
from tl_looped.model.config import TRAINED
from tl_looped.model.geometry import LoopGeometry

IGNORES_STATE = "adapter_ignores_state"
"""The attribute, 1, of a model whose adapter gives the state no weight at all."""

NOT_TRAINED = 0
"""The attribute ``trained_recurrences`` of a model that was not trained as a loop."""

Arrangement = Literal["recurrence", "depth"]


def labelled(
    collector: Collector, n_tokens: Int[Tensor, " prompt"], d_model: int, attributes: dict[str, Any]
) -> xr.Dataset:
    """What a collector has gathered, by depth.

    Args:
        collector: After the run.
        n_tokens: Real tokens of each prompt.
        d_model: Width of the states.
        attributes: Attributes of the run.
    """
    found: dict[str, xr.DataArray] = {}
    for name in collector.names:
        base = DERIVED[name].base if name in DERIVED else name
        for out in (False, True):
            values = collector.values.get((base, out))
            if values is None:
                continue
            if name in DERIVED:
                n = n_tokens.to(values.device)
                # What is derived of patterns has heads; of states the tokens that count are fewer.
                n = n if values.ndim == 3 else n - collector.skip_first
                n = n[:, None] if values.ndim == 3 else n  # [site, prompt, head]
                values = DERIVED[name].convert(values, n, d_model)
            suffix = "_state_out" if out and name != LOWEST_COSINE else ""
            found[name + suffix] = _variable(name, values, out)
    loop = collector.loop
    if collector.skip_first:
        attributes = attributes | {"skip_first": collector.skip_first}
    places = [loop.locate(i) for i in range(loop.n_layers)]
    data = xr.Dataset(found, attrs=attributes)
    if "effective_layer" in data.dims:
        recurrence = [-1 if place.recurrence is None else place.recurrence for place in places]
        data = data.assign_coords(
            effective_layer=np.arange(loop.n_layers),
            label=("effective_layer", loop.labels()),
            stage=("effective_layer", [place.stage for place in places]),
            in_recurrence=("effective_layer", recurrence),
            layer_in_stage=("effective_layer", [place.layer for place in places]),
        )
    for dim in ("recurrence", "head", "token"):
        if dim in data.dims:
            data = data.assign_coords({dim: np.arange(data.sizes[dim])})
    return data.assign_coords(
        prompt=np.arange(len(n_tokens)), n_tokens=("prompt", n_tokens.cpu().numpy())
    )


def _variable(name: str, values: Tensor, out: bool) -> xr.DataArray:
    first = "recurrence" if out else "effective_layer"
    numbers = values.detach().cpu().numpy()
    dims: tuple[str, ...] = (first, "prompt")
    if numbers.ndim == 3:
        inner = "token" if name in PER_TOKEN else "head"
        numbers, dims = numbers.swapaxes(1, 2), (first, inner, "prompt")
    output = OUTPUTS[name]
    attributes = {"long_name": output.label, "units": output.unit}
    return xr.DataArray(numbers, dims=dims, attrs=attributes)


@checked
def by_recurrence(data: xr.Dataset) -> xr.Dataset:
    """A result by depth as ``recurrence, layer, head, prompt`` of the core.

    Raises:
        InputError: if the result is not by depth, or its run had no recurrence.
    """
    if "effective_layer" not in data.dims:
        if "recurrence" in data.dims:
            return data
        raise InputError(f"the result has no dimension effective_layer, only {list(data.dims)}")
    loop = geometry_of(data)
    if data.sizes["effective_layer"] != loop.n_layers:
        raise InputError(
            f"the result has {data.sizes['effective_layer']} of its run's {loop.n_layers} layers: "
            "arrange it by recurrence before you select some"
        )
    if loop.R == 0:
        raise InputError("the run had no recurrence: there is nothing to arrange by recurrence")
    core = data.isel(effective_layer=slice(loop.p, loop.p + loop.k * loop.R))
    core = core.drop_vars([name for name in core.coords if "effective_layer" in core[name].dims])
    folded = core.coarsen(effective_layer=loop.k).construct(effective_layer=("recurrence", "layer"))
    folded = folded.assign_coords(recurrence=np.arange(loop.R), layer=np.arange(loop.k))
    order = ("recurrence", "layer", "head", "token", "prompt")
    return folded.transpose(*order, ..., missing_dims="ignore")


def geometry_of(data: xr.Dataset) -> LoopGeometry:
    """Geometry of the run behind a result, from its attributes."""
    return LoopGeometry(*(int(data.attrs[name]) for name in _GEOMETRY))


_GEOMETRY = ("n_prelude", "n_core", "n_coda", "n_recurrences")


def trained_recurrences(data: xr.Dataset) -> int | float | None:
    """How many recurrences the model behind a result was trained with, from its attributes.

    ``NOT_TRAINED``, which is 0, if it was not trained as a loop; None if the result does not say.
    A float is the mean of numbers that were drawn anew for each step.
    """
    said = data.attrs.get(TRAINED)
    if said is None:
        return None
    return int(said) if isinstance(said, (int, np.integer)) else float(said)


def ignores_state(model: Any) -> bool:
    """Whether the adapter's columns for the state are exactly zero, as in a new retrofit.

    Every recurrence then repeats the first, bit for bit.
    """
    weight = getattr(getattr(model, "injection", None), "weight", None)
    if weight is None or weight.device.type == "meta":
        return False
    # A view made in inference mode is not one that every kind of tensor can make.
    with torch.inference_mode(False), torch.no_grad():
        return not bool(weight[:, : weight.shape[0]].any())


def run_attributes(model: Any, loop: LoopGeometry, state_seed: int | None = None) -> dict[str, Any]:
    """Attributes that describe a model, the shape of its run and its random initial state."""
    cfg = model.cfg
    trained = {TRAINED: getattr(cfg, TRAINED) or NOT_TRAINED} if hasattr(cfg, TRAINED) else {}
    shape = zip(_GEOMETRY, (loop.p, loop.k, loop.c, loop.R), strict=True)
    switches = {name: getattr(cfg, name, None) for name in ("norm_layout", "injection")}
    return {
        "model": str(getattr(cfg, "model_name", "")),
        **{k: str(getattr(v, "value", v)) for k, v in switches.items() if v is not None},
        **dict(shape),
        **trained,
        **({IGNORES_STATE: 1} if ignores_state(model) else {}),
        "dtype": str(getattr(cfg, "dtype", "")),
        "tl_looped": __version__,
        "torch": str(torch.__version__),  # a class of its own, which files do not hold
    } | ({} if state_seed is None else {"state_seed": _storable(state_seed)})


def _storable(seed: int) -> int | str:
    """Files hold integers of 64 bits; a longer seed is spelled out."""
    return seed if -(2**63) <= seed < 2**63 else str(seed)
