"""Attribution patching: the grid's first-order estimate from one forward and one backward pass.

A patch changes the metric by about ``(donor - activation) . gradient``, the gradient taken in the
corrupted run (Nanda 2023, as TransformerLens's attribution patching). It is exact for small
changes; across recurrences far apart the change is not small, so look at the exact grid where it
matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.interventions.selection import Recurrences
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.patching.exact import as_tokens, run_record
from tl_looped.patching.grid import (
    Baseline,
    Metric,
    PatchGrid,
    Selection,
    clean_value,
    effects_of,
    make_grid,
)
from tl_looped.transformer import LoopedTransformer


@checked
def attribute_recurrences(
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
    **run: Any,
) -> xr.Dataset:
    """Estimate :func:`patch_recurrences`, with the same arguments and the same result.

    Args:
        model, corrupted_tokens, clean_cache, activation_name: As there.
        patching_metric: As there, and differentiable.
        source_recurrences, target_recurrences, layers, positions, heads: As there.
        layer_type, clean_metric, run: As there.

    Returns:
        As there; ``difference`` and ``effect`` are estimates (attribute ``method``).

    Raises:
        InputError: as there, and if the metric has no gradient.
    """
    tokens = as_tokens(model, corrupted_tokens, run)
    # Tensors of inference mode have no gradient, and no parameter needs one.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        model.turn,
        model.with_recurrences(run.pop("n_recurrences", None)),
    ):
        tokens = tokens.clone()
        grid = make_grid(
            model, clean_cache, tuple(tokens.shape), activation_name, layer_type,
            source_recurrences, target_recurrences, layers, positions, heads,
        )  # fmt: skip
        clean = clean_value(clean_cache, patching_metric, clean_metric)
        names = {
            (t, target): grid.target(model, r, target)
            for t, r in enumerate(grid.targets)
            for _, target in grid.layers
        }
        corrupted, fired = _gradients(
            model, tokens, patching_metric, sorted(set(names.values())), run
        )
        difference = np.empty(grid.shape)
        for l, (source, target) in enumerate(grid.layers):  # noqa: E741
            for t in range(len(grid.targets)):
                name = names[t, target]
                for s, r in enumerate(grid.sources):
                    donor = grid.donor(clean_cache, r, source).detach()
                    # A hook that fires several times (a repeated recurrence) is patched each time.
                    difference[s, t, l] = sum(
                        _estimate(grid, donor, activation, gradient)
                        for activation, gradient in fired[name]
                    )
        attributes = run_record(model, run) | {"method": "attribution patching, first order"}
        return effects_of(grid, clean_cache, difference, clean, corrupted, attributes)


def _gradients(
    model: LoopedTransformer,
    tokens: Int[Tensor, "batch pos"],
    metric: Metric,
    names: list[str],
    run: dict[str, Any],
) -> tuple[Baseline, dict[str, list[tuple[Tensor, Tensor]]]]:
    """The metric, and each time a hook fires its activation and the metric's gradient there."""
    leaves: list[tuple[str, Tensor, Tensor]] = []

    def watch(x: Tensor, hook: LoopedHookPoint) -> Tensor:
        assert hook.name is not None
        # A zero that is added: its gradient is the activation's, whatever needs one before it.
        leaf = torch.zeros_like(x, requires_grad=True)
        leaves.append((hook.name, x.detach().clone(), leaf))
        return x + leaf

    logits = model.run_with_hooks(tokens, fwd_hooks=[(n, watch) for n in names], **run)
    value = metric(logits)
    corrupted = Baseline.of(logits, value.detach() if isinstance(value, Tensor) else value)
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise InputError(
            "the metric has no gradient: it must be a tensor that is computed from the logits "
            "without .item(), argmax or no_grad"
        )
    found = torch.autograd.grad(value.sum(), [leaf for *_, leaf in leaves], allow_unused=True)
    fired: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for (name, activation, leaf), gradient in zip(leaves, found, strict=True):
        fired[name].append((activation, torch.zeros_like(leaf) if gradient is None else gradient))
    return corrupted, fired


def _estimate(
    grid: PatchGrid, donor: Tensor, activation: Tensor, gradient: Tensor
) -> Float[np.ndarray, "pos head"]:
    """``(donor - activation) . gradient`` for every position and head of the grid."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    donor = donor.to(activation)
    if not torch.equal(donor.isinf().expand_as(activation), activation.isinf()):
        raise InputError(
            f"{grid.activation} is masked (-inf) at other places in the clean run than in the "
            "corrupted one: a first-order estimate needs the same padding in both"
        )
    # Masked scores are -inf in both.
    change = torch.where(donor == activation, 0.0, donor - activation).to(wide)
    product = change * gradient.to(wide)
    kept = [grid.axes.pos] + ([] if grid.axes.head is None else [grid.axes.head])
    reduced = product.movedim(kept, tuple(range(-len(kept), 0)))
    by_part = reduced.sum(tuple(range(product.ndim - len(kept)))).double().cpu().numpy()
    if grid.axes.head is None:
        by_part = by_part[:, None]
    return _chosen(_chosen(by_part, grid.positions, 0), grid.heads, 1)


def _chosen(
    values: Float[np.ndarray, "pos head"], entries: list[int | None], axis: int
) -> Float[np.ndarray, "pos_ head_"]:
    """Values of the grid's entries along an axis; their sum where they are one cell."""
    wanted = [i for i in entries if i is not None]
    return np.take(values, wanted, axis) if wanted else values.sum(axis, keepdims=True)
