"""Section 4.2: what random weights do when they are looped, one model at a time.

A cell is a looped model without prelude and coda: a norm layout, with or without injection, a
number of layers, an initialisation and a seed. It runs twice the paper's 128 recurrences on one
random input; curves are those of the first 128, whose verdict the other half confirms.

Paired by construction. Weights are drawn in one order from one seed: the token embeddings first,
then the layers, the adapter last. Cells of one seed have the same input and the same core weights
in every norm layout, with and without injection; a core of 4 layers is the first 4 of the one of
16; the two initialisations differ by factors alone.

What the paper (arXiv 2604.11791) leaves open and is chosen here: width 256, 4 heads of 64, a gated
SiLU MLP of 682; the input is 8 tokens of standard normal entries; with injection the loop starts
from another standard normal (cut at three standard deviations), without from the input; the
injection is a linear adapter as in Huginn, initialised like all matrices; gains are one. ``normal``
draws N(0, 0.02^2), ``fan_in`` N(0, 1 / fan_in). The norm layouts are those of the blocks alone: no
final norm ends the recurrences of the Ouro layout, no queries are normed in the OLMo layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
import xarray as xr

from tl_looped.cache import LoopedActivationCache
from tl_looped.errors import InputError
from tl_looped.metrics import convergence_verdict, from_cache
from tl_looped.metrics.convergence import Verdict
from tl_looped.metrics.spectrum import SPECTRUM, loop_spectrum, without_spectrum
from tl_looped.model.config import InitialState, Injection, LoopedConfig, NormLayout
from tl_looped.model.init import init_weights
from tl_looped.transformer import LoopedTransformer

NORMS = ("pre", "residual", "sandwich", "post")
CELL_LAYERS = (4, 12, 16)
INITS = ("normal", "fan_in")
CELL_SEEDS = (0, 1, 2, 3, 4)
METRICS = (
    "fixed_point_abs",
    "fixed_point_rel",
    "fixed_point_cosine",
    "fixed_point_lowest_cosine",
    "successive_abs",
    "successive_rel",
    "successive_cosine",
    "residual_mean",
)
"""What is kept of every layer and recurrence."""

_NORMAL_STD = 0.02


@dataclass(frozen=True)
class CellSize:
    """What all cells of a grid share.

    Args:
        d_model: Width; heads are 64 wide, or one head of the width if that is less.
        n_tokens: Of the input.
        n_recurrences: Of the curves; the verdict is confirmed by a run of twice as many.
        n_iterations: For the spectral radius, where there is a fixed point; see
            :func:`tl_looped.metrics.spectrum.loop_spectrum`. 0 leaves it out.
    """

    d_model: int = 256
    n_tokens: int = 8
    n_recurrences: int = 128
    n_iterations: int = 200

    def __post_init__(self) -> None:
        least = {"d_model": 2, "n_tokens": 1, "n_recurrences": 4, "n_iterations": 0}
        for name, value in asdict(self).items():
            if type(value) is not int or value < least[name]:
                raise InputError(
                    f"{name} must be an integer of at least {least[name]}, got {value!r}"
                )
        if 0 < self.n_iterations < 8:
            raise InputError(f"n_iterations must be 0 or at least 8, got {self.n_iterations}")
        if self.d_model > 64 and self.d_model % 64:
            raise InputError(f"d_model must be a multiple of 64 above 64, got {self.d_model}")


@dataclass(frozen=True, order=True)
class Cell:
    """One model of the grid.

    Args:
        init: ``"normal"`` or ``"fan_in"``.
        n_layers: Layers of the loop.
        norm: A value of :class:`tl_looped.model.config.NormLayout`.
        injected: Whether the input is injected at every recurrence.
        seed: Of weights, input and initial state.
    """

    init: str
    n_layers: int
    norm: str
    injected: bool
    seed: int

    @property
    def name(self) -> str:
        """``"normal-12-pre-injected-seed0"``."""
        how = "injected" if self.injected else "plain"
        return f"{self.init}-{self.n_layers}-{self.norm}-{how}-seed{self.seed}"

    def config(self, size: CellSize) -> LoopedConfig:
        """The configuration of the model; ``normal`` embeddings are scaled up to entries N(0, 1).

        Raises:
            ConfigError: for an unknown norm layout or initialisation.
        """
        std = _NORMAL_STD if self.init == "normal" else 1.0
        d_head = min(size.d_model, 64)
        return LoopedConfig(
            model_name=self.name,
            d_model=size.d_model,
            d_head=d_head,
            n_heads=size.d_model // d_head,
            d_mlp=max(1, 8 * size.d_model // 3),
            n_ctx=size.n_tokens,
            d_vocab=size.n_tokens,
            n_core=self.n_layers,
            n_recurrences=size.n_recurrences,
            norm_layout=NormLayout(self.norm),
            injection=Injection.LINEAR if self.injected else Injection.NONE,
            initial_state=InitialState.RANDOM if self.injected else InitialState.PRELUDE,
            initial_state_std=std if self.injected else 0.0,
            embed_scale=1 / std,
            tie_embeddings=True,
            default_prepend_bos=False,
            init_mode=self.init,
            initializer_range=_NORMAL_STD,
            seed=self.seed,
            device="cpu",
        )


def cells(
    seeds: Iterable[int] = CELL_SEEDS,
    layers: Iterable[int] = CELL_LAYERS,
    norms: Iterable[str] = NORMS,
    inits: Iterable[str] = INITS,
) -> list[Cell]:
    """The grid, in order; every condition of one seed before the next seed.

    Raises:
        InputError: for an unknown norm layout or initialisation.
    """
    for name, value, known in (("norms", tuple(norms), NORMS), ("inits", tuple(inits), INITS)):
        wrong = [one for one in value if one not in known]
        if wrong:
            raise InputError(f"{name}: {', '.join(map(repr, wrong))} is none of {', '.join(known)}")
    return [
        Cell(init, n, norm, injected, seed)
        for seed, init, n, norm, injected in product(seeds, inits, layers, norms, (True, False))
    ]


def model_of(cell: Cell, size: CellSize) -> LoopedTransformer:
    """The cell's model, at twice the recurrences of the curves."""
    config = cell.config(size)
    config.n_recurrences *= 2
    model = LoopedTransformer.from_config(config)
    model.state_seed = cell.seed
    return model


def reseeded(model: LoopedTransformer, cell: Cell) -> LoopedTransformer:
    """The same model with the weights and the initial state of another seed, in place.

    Hook points of thousands of effective layers take longer to make than to run.
    """
    model.cfg.seed = model.state_seed = cell.seed
    model.cfg.model_name = cell.name
    init_weights(model, model.cfg)
    return model


def run_condition(wanted: Sequence[Cell], size: CellSize) -> Iterator[tuple[Cell, xr.Dataset]]:
    """:func:`run_cell` of cells that differ by their seed alone, on one model."""
    model = model_of(wanted[0], size)
    for cell in wanted:
        if replace(cell, seed=wanted[0].seed) != wanted[0]:
            raise InputError(f"{cell.name} and {wanted[0].name} differ by more than their seed")
        yield cell, run_cell(cell, size, reseeded(model, cell))


@torch.no_grad()
def run_cell(cell: Cell, size: CellSize, model: LoopedTransformer | None = None) -> xr.Dataset:
    """Everything that is measured of one cell.

    Args:
        cell: Which.
        size: Of all cells.
        model: :func:`model_of` it, if that is there already.

    Returns:
        ``METRICS`` by depth of the first ``n_recurrences``, and
        over ``prompt``: ``verdict`` and its numbers as
        :func:`tl_looped.metrics.convergence_verdict` gives them, ``lowest_layer_cosine`` (the
        lowest cosine of a layer's last state with the first's), and the variables of
        :data:`tl_looped.metrics.spectrum.SPECTRUM`, which are NaN where there is no fixed point.
    """
    model = model_of(cell, size) if model is None else model
    tokens = torch.arange(size.n_tokens)[None]
    _, cache = model.run_with_cache(
        tokens,
        return_type=None,
        names_filter=lambda name: name.endswith("hook_resid_post"),
    )
    states = cache.stack_recurrences("resid_post")
    result = convergence_verdict(states[: size.n_recurrences], states)
    data = from_cache(_first(cache, model, size.n_recurrences), METRICS, by="depth")
    numbers: dict[str, Any] = {
        name: getattr(result, name).numpy()
        for name in ("verdict", "settled_at", "rate", "half_life", "period", "bound")
    }
    numbers["has_fixed_point"] = result.converged.numpy()
    numbers["lowest_layer_cosine"] = data["fixed_point_lowest_cosine"].isel(recurrence=-1).values
    numbers |= _spectrum(model, tokens, states[size.n_recurrences - 1, -1], result.converged, size)
    data = data.assign({name: ("prompt", value) for name, value in numbers.items()})
    data["verdict_name"] = ("prompt", [Verdict(int(v)).name for v in result.verdict])
    about = asdict(cell) | asdict(size)
    return data.assign_attrs({f"cell_{key}": value for key, value in about.items()})


def _first(cache: Any, model: LoopedTransformer, n: int) -> LoopedActivationCache:
    """The first recurrences of a cached run, as a run of so many."""
    loop = cache.loop.with_recurrences(n)
    kept = {f"blocks.{i}.hook_resid_post" for i in range(loop.n_layers)}
    some = {name: value for name, value in cache.items() if name in kept}
    known = {"state_seed": cache.state_seed, "edits": cache.edits}
    return LoopedActivationCache(some, model, loop=loop, **known)


def _spectrum(
    model: LoopedTransformer,
    tokens: torch.Tensor,
    state: torch.Tensor,
    has_fixed_point: torch.Tensor,
    size: CellSize,
) -> dict[str, Any]:
    if size.n_iterations == 0 or not bool(has_fixed_point.all()):
        found = without_spectrum(len(tokens))
    else:
        found = loop_spectrum(model, tokens, state, n_iterations=size.n_iterations)
    return {name: found[name].values for name in SPECTRUM}


def size_of(found: Mapping[Cell, xr.Dataset]) -> CellSize:
    """The size that the results of a grid share."""
    data = next(iter(found.values()))
    names = CellSize.__dataclass_fields__
    return CellSize(**{name: int(data.attrs[f"cell_{name}"]) for name in names})


def cell_of(data: xr.Dataset) -> Cell:
    """The cell that a result of :func:`run_cell` is of."""
    found = {name: data.attrs[f"cell_{name}"] for name in Cell.__dataclass_fields__}
    return Cell(**(found | {"injected": bool(found["injected"])}))
