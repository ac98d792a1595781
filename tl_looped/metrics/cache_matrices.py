"""What needs a whole run at once, labelled: layer-by-layer matrices, lenses and divergences."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from tl_looped._compat import ActivationCache
from tl_looped.cache import LoopedActivationCache
from tl_looped.errors import InputError
from tl_looped.metrics.attention import distances_of_layers
from tl_looped.metrics.inputs import query_mask, token_mask
from tl_looped.metrics.over_cache import RunView
from tl_looped.metrics.readouts import exit_distribution, kl_between_recurrences, lens_trajectory
from tl_looped.metrics.states import cosines_of_layers, cyclicity_index

_MATRICES = ("attention", "cosine")


def pairwise_over_cache(
    cache: ActivationCache,
    which: str | tuple[str, ...] = _MATRICES,
    attention_mask: Tensor | None = None,
) -> xr.Dataset:
    """Attention distance and residual cosine of every two layers, prompt by prompt.

    Args:
        cache: As for ``over_cache``, with ``pattern`` for ``"attention"`` and ``resid_post`` for
            ``"cosine"`` of every layer.
        which: ``"attention"``, ``"cosine"`` or both.
        attention_mask: As for ``over_cache``.

    Returns:
        ``pairwise_attention_distance`` and ``pairwise_residual_cosine`` over ``effective_layer,
        other_layer, prompt``, and ``cyclicity_index`` (of the cosines, the core alone) over
        ``prompt``.
    """
    which = (which,) if isinstance(which, str) else which
    if not which or set(which) - set(_MATRICES):
        raise InputError(f"which must be some of {', '.join(_MATRICES)}, got {which}")
    view = RunView(cache, attention_mask)
    loop = view.loop
    found: dict[str, Any] = {}
    dims = ("effective_layer", "other_layer", "prompt")
    if "attention" in which:
        matrices = _each_prompt(view, "pattern", distances_of_layers)
        found["pairwise_attention_distance"] = (dims, matrices)
    if "cosine" in which:
        matrices = _each_prompt(view, "resid_post", cosines_of_layers)
        found["pairwise_residual_cosine"] = (dims, matrices)
        core = slice(loop.p, loop.p + loop.k * loop.R)
        block = torch.from_numpy(np.moveaxis(matrices[core, core], -1, 0).copy())
        found["cyclicity_index"] = ("prompt", cyclicity_index(block, loop.k).numpy())
    n = matrices.shape[-1]
    return xr.Dataset(
        found,
        coords={
            "effective_layer": np.arange(loop.n_layers),
            "other_layer": np.arange(loop.n_layers),
            "label": ("effective_layer", loop.labels()),
            "prompt": np.arange(n),
        },
        attrs=view.attributes(),
    )


def _each_prompt(view: RunView, reads: str, metric: Any) -> np.ndarray:
    """``[layer, layer, prompt]``."""
    layers = [view(reads, i) for i in range(view.loop.n_layers)]
    mask_of = query_mask if reads == "pattern" else token_mask
    matrices = []
    for prompt in range(len(layers[0])):
        each = [layer[prompt] for layer in layers]
        mask = None if view.mask is None else view.mask[prompt].to(each[0].device)
        matrices.append(metric(each, [mask_of(each[0], mask)] * len(each)).cpu().numpy())
    return np.stack(matrices, -1)


def lens_over_cache(
    cache: LoopedActivationCache, token: Tensor | None = None, position: int = -1
) -> xr.Dataset:
    """Both lenses at every (recurrence, layer), at one position of every prompt.

    Args:
        cache: With ``resid_post`` of every core layer.
        token, position: See :func:`lens_trajectory`.

    Returns:
        ``rank``, ``probability`` and ``kl_to_final`` (nats) over ``lens, recurrence, layer,
        prompt``; with ``hook_state_out`` in the cache also ``kl_to_previous`` and ``kl_to_last``
        (nats, of the coda lens at the end of each recurrence) over ``recurrence, prompt``; and in
        models with an exit gate ``exit_distribution`` over ``recurrence, prompt``.
    """
    if not isinstance(cache, LoopedActivationCache):
        raise InputError(
            f"cache must be a looped model's LoopedActivationCache, got {type(cache).__name__}"
        )
    mask = cache.attention_mask
    run = lens_trajectory(cache, token, position, mask)
    dims = ("lens", "recurrence", "layer", "prompt")
    found: dict[str, Any] = {
        name: (dims, np.stack([getattr(lens, name).cpu().numpy() for lens in
                               (run.logit_lens, run.coda_lens)]))
        for name in ("rank", "probability", "kl_to_final")
    }  # fmt: skip
    where, rows = run.position, torch.arange(len(run.position))
    if "recurrence.0.hook_state_out" in cache.cache_dict:
        logits = _exit_logits(cache, rows, where)
        divergence = kl_between_recurrences(logits)
        found["kl_to_previous"] = (("recurrence", "prompt"), divergence.to_previous.cpu().numpy())
        found["kl_to_last"] = (("recurrence", "prompt"), divergence.to_last.cpu().numpy())
    if "recurrence.0.hook_exit_gate" in cache.cache_dict:
        gates = cache.stack_recurrences("exit_gate")
        gates = gates if gates.ndim == 4 else gates[:, None]
        distribution = exit_distribution(gates[:, rows, where, 0].float().T)
        found["exit_distribution"] = (("recurrence", "prompt"), distribution.T.cpu().numpy())
    return xr.Dataset(
        found,
        coords={
            "lens": ["logit", "coda"],
            "recurrence": np.arange(cache.loop.R),
            "layer": np.arange(cache.loop.k),
            "prompt": np.arange(len(rows)),
            "token": ("prompt", run.token.cpu().numpy()),
            "position": ("prompt", where.cpu().numpy()),
        },
        attrs=RunView(cache).attributes(),
    )


def _exit_logits(cache: LoopedActivationCache, rows: Tensor, where: Tensor) -> Tensor:
    """``[recurrence, prompt, d_vocab]`` had the loop ended there, at one position of each."""
    logits = []
    with torch.no_grad():
        for r in range(cache.loop.R):
            state = cache[f"recurrence.{r}.hook_state_out"]
            state = state if state.ndim == 3 else state[None]
            mask = cache.attention_mask
            lens = cache.model.coda_lens(state, attention_mask=mask, after_loop_norm=True)
            logits.append(lens[rows, where])
    return torch.stack(logits)
