"""Exact patching: every cell of the grid is a run.

Several cells share a forward pass, each with rows of its own in the batch, so that the grid costs
no more than its forward passes one by one; on small models much less.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import checked, whole
from tl_looped.errors import InputError
from tl_looped.interventions.selection import RUN_ARGUMENTS, Recurrences, check_arguments
from tl_looped.metrics.labels import run_attributes
from tl_looped.model.config import InitialState
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.patching.grid import (
    Baseline,
    Metric,
    PatchGrid,
    Selection,
    as_number,
    clean_value,
    effects_of,
    make_grid,
)
from tl_looped.progress import Progress, advancing
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.intervening import Edit
from tl_looped.transformer.prompt import read_prompt


@checked
def patch_recurrences(
    model: LoopedTransformer,
    corrupted_tokens: Any,
    clean_cache: LoopedActivationCache,
    patching_metric: Metric,
    activation_name: str,
    *,
    source_recurrences: Recurrences = None,
    target_recurrences: Recurrences = None,
    layers: Sequence[int | tuple[int, int]] | None = None,
    positions: Selection = None,
    heads: Selection = None,
    layer_type: str | None = None,
    clean_metric: float | None = None,
    batch_size: int = 16,
    progress: Progress | bool = True,
    **run: Any,
) -> xr.Dataset:
    """Patch an activation of the clean run at (r, l) into the corrupted run at (r', l').

    Args:
        model: A :class:`LoopedTransformer`.
        corrupted_tokens: The prompts that are run, ``[batch, pos]``, or text.
        clean_cache: Where the activations come from: a cache of the clean prompts, of the same
            length, with any number of recurrences; of one prompt for all, or one for each. The
            corrupted run's own cache patches a run with itself.
        patching_metric: Logits ``[batch, pos, d_vocab]`` of the prompts to one number, as in
            TransformerLens.
        activation_name: ``"resid_post"``, ``"z"``, ``"pattern"``, ``"mlp_out"``, ... of core
            layers; ``"state_in"``, ``"injected"`` or ``"state_out"`` of the loop.
        source_recurrences: Recurrences r of the clean run; all if None. Integers, several, a slice.
        target_recurrences: Recurrences r' of the corrupted run; all if None.
        layers: Core layers, or pairs (source layer, target layer); every layer into itself if None.
        positions: ``"each"``, a list, or None: all positions at once. Of the query, in patterns.
        heads: ``"each"``, a list, or None: all heads at once.
        layer_type: As in ``get_act_name``, for instance ``"ln1"`` for ``"normalized"``.
        clean_metric: The metric of the clean run; of the logits in ``clean_cache`` if None.
        batch_size: Most rows of one forward pass; a cell has as many as there are prompts, and is
            alone in it while an intervention is active that tells rows apart.
        progress: Show a bar, or tell a :class:`~tl_looped.progress.Progress`.
        **run: Of the corrupted run: ``n_recurrences``, ``state_seed``, ``initial_state``,
            ``attention_mask``, ``prepend_bos``.

    Returns:
        Dataset of ``difference`` (patched - corrupted, in the metric's unit) and ``effect``
        (normalised, NaN where clean and corrupted differ by less than 1e-6), of dimensions
        ``source_recurrence``, ``target_recurrence``, and ``layer``, ``pos``, ``head`` where there
        is a choice. ``layer`` is the target's; coordinate ``source_layer`` the source's. The
        metric of both runs, shapes and seeds are its attributes.

    Raises:
        InputError: prompts of unequal length or number, a metric of several numbers, ...
        LayerIndexError, HookNameError, GatedHookError: for what does not exist.
        MissingActivationError: if the cache lacks an activation.
    """
    whole(batch_size, "batch_size", 1)
    tokens = as_tokens(model, corrupted_tokens, run)
    n_recurrences = run.pop("n_recurrences", None)
    with model.turn, model.with_recurrences(n_recurrences), torch.no_grad():
        grid = make_grid(
            model, clean_cache, tuple(tokens.shape), activation_name, layer_type,
            source_recurrences, target_recurrences, layers, positions, heads,
        )  # fmt: skip
        clean = clean_value(clean_cache, patching_metric, clean_metric)
        logits = model(tokens, **run)
        corrupted = Baseline.of(logits, patching_metric(logits))
        patched = np.empty(grid.shape)
        cells = list(np.ndindex(*grid.shape))
        alone = any(change.across_rows for change in model.interventions)
        size = 1 if alone else max(1, batch_size // len(tokens))
        with advancing(progress, len(cells), "cell", activation_name) as advance:
            for start in range(0, len(cells), size):
                some = cells[start : start + size]
                logits = _run_cells(model, tokens, clean_cache, grid, some, run)
                for cell, rows in zip(some, logits.split(len(tokens)), strict=True):
                    patched[cell] = as_number(patching_metric(rows))
                advance(len(some))
        record = run_record(model, run) | {"method": "activation patching"}
        return effects_of(grid, clean_cache, patched - corrupted.value, clean, corrupted, record)


def as_tokens(
    model: LoopedTransformer, prompts: Any, run: dict[str, Any]
) -> Int[Tensor, "batch pos"]:
    """The tokens of prompts; puts the mask of their padding into ``run``, and checks the rest.

    Raises:
        InputError: for other arguments than those of a whole run, or without a prompt.
    """
    check_arguments("patching", run, (*RUN_ARGUMENTS, "n_recurrences"))
    if isinstance(prompts, (list, tuple)) and not prompts:
        raise InputError("corrupted_tokens: there is no prompt")
    mask = run.pop("attention_mask", None)
    prepend_bos = run.pop("prepend_bos", None)
    prompt = read_prompt(model, prompts, mask, prepend_bos)
    if prompt.mask is not None:
        run["attention_mask"] = prompt.mask
    return prompt.tokens


def run_record(model: LoopedTransformer, run: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the corrupted run, its seed among them."""
    if run.get("initial_state") is not None:
        return run_attributes(model, model.loop) | {"initial_state": "given"}
    random = model.cfg.initial_state is InitialState.RANDOM
    seed = run.get("state_seed")
    seed = model.state_seed if seed is None else seed
    return run_attributes(model, model.loop, seed if random else None)


def _run_cells(
    model: LoopedTransformer,
    tokens: Int[Tensor, "batch pos"],
    cache: LoopedActivationCache,
    grid: PatchGrid,
    cells: Iterable[tuple[int, ...]],
    run: dict[str, Any],
) -> Tensor:
    """Logits of some cells, ``[cells * batch, pos, d_vocab]``, in one forward pass."""
    n, chosen = len(tokens), list(cells)
    writes: dict[str, list[tuple[slice, Tensor, tuple[Any, ...]]]] = {}
    for slot, (s, t, l, p, h) in enumerate(chosen):  # noqa: E741
        source, target = grid.layers[l]
        donor = grid.donor(cache, grid.sources[s], source)
        part = grid.part(donor.ndim, grid.positions[p], grid.heads[h])
        rows = slice(slot * n, (slot + 1) * n)
        name = grid.target(model, grid.targets[t], target)
        writes.setdefault(name, []).append((rows, donor, part))
    hooks = [(name, _overwrite(some)) for name, some in writes.items()]
    repeated = {
        name: _repeated(value, n, len(chosen)) if name != "state_seed" else value
        for name, value in run.items()
    }
    logits = model.run_with_hooks(tokens.repeat(len(chosen), 1), fwd_hooks=hooks, **repeated)
    assert isinstance(logits, Tensor)
    return logits


def _repeated(value: Any, n: int, times: int) -> Any:
    """An argument with a batch dimension, for so many copies of the batch."""
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == n:
        return value.repeat(times, *itertools.repeat(1, value.ndim - 1))
    return value


def _overwrite(writes: list[tuple[slice, Tensor, tuple[Any, ...]]]) -> Edit:
    def write(x: Tensor, hook: LoopedHookPoint) -> Tensor:
        for rows, donor, part in writes:
            x[rows][part] = donor[part].to(x)
        return x

    return write
