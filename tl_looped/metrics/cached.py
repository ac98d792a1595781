"""Metrics of a run from its ActivationCache.

The cache may be any of TransformerLens's: that of a LoopedTransformer or of its bridge, or of a
plain feedforward model for comparison, which counts as a core that runs once. Metrics need
``resid_post`` or ``pattern`` of every layer: ``names_filter=["residual", "attention"]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from tl_looped._compat import ActivationCache
from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import checked, one_of
from tl_looped.errors import InputError
from tl_looped.metrics.attention_patterns import distances_of_layers
from tl_looped.metrics.catalogue import DEFAULT_METRICS, select
from tl_looped.metrics.collector import STATE_OUT, Collector, SeenAt
from tl_looped.metrics.inputs import query_mask, token_mask
from tl_looped.metrics.labels import Arrangement, by_recurrence, labelled
from tl_looped.metrics.readouts import exit_distribution, kl_between_recurrences, lens_trajectory
from tl_looped.metrics.run_view import RunView
from tl_looped.metrics.states import cosines_of_layers, cyclicity_index

_MATRICES = ("attention", "cosine")


@checked
def from_cache(
    cache: ActivationCache,
    metrics: str | Iterable[str] = DEFAULT_METRICS,
    by: Arrangement | str = "recurrence",
    attention_mask: Tensor | None = None,
    reference: ActivationCache | None = None,
    skip_first: int = 0,
) -> xr.Dataset:
    """Metrics of a run, labelled.

    Args:
        cache: Of one run, with what the metrics read.
        metrics: Names and groups, see ``tl_looped.metrics.catalogue``: ``"signature"``,
            ``"successive"``, ``"fixed_point"``, ``"magnitude"``, ``"all"``.
        by: ``"recurrence"``: dimensions ``recurrence, layer, head, prompt`` of the core;
            ``"depth"``: ``effective_layer, head, prompt``, prelude and coda included.
        attention_mask: ``[prompt, pos]`` of a padded run; a LoopedActivationCache knows its own.
        reference: A cache of more recurrences on the same prompts, whose last states are taken for
            the fixed points; the run's own last states if None.
        skip_first: Tokens at the beginning of every prompt that metrics of states leave out of
            their means; see ``tl_looped.metrics.inputs``.

    Returns:
        One variable a metric, see ``tl_looped.metrics.labels``. NaN where a metric is undefined:
        steps at the first recurrence, comparisons outside the loop.

    Raises:
        MissingActivationError: if the cache lacks what a metric reads.
        InputError: see the metrics.
    """
    one_of(by, "by", get_args(Arrangement))
    view = RunView(cache, attention_mask)
    collector = Collector(view.loop, select(metrics), None, skip_first)
    reads = sorted(collector.reads)
    some = view(reads[0], 0)
    mask = None if view.mask is None else view.mask.to(some.device)
    collector.mask = mask
    other = view if reference is None else RunView(reference, attention_mask)
    if reference is not None:
        _check_same_start(view, other, reads[0])
    _refer(collector, other)
    if "pattern" in reads:
        _check_causal(view)
    for i in range(view.loop.n_layers):
        site = SeenAt.of_layer(view.loop, i)
        for name in reads:
            collector.see(site, name, view(name, i), compare=True)
        ends = site.recurrence is not None and site.slot == view.loop.k - 1
        if ends and "resid_post" in reads:
            assert site.recurrence is not None
            after_norm = view.state_out(site.recurrence)
            if after_norm is not None:
                out = SeenAt(site.recurrence, STATE_OUT, site.recurrence)
                collector.see(out, "resid_post", after_norm, compare=True)
    length = some.shape[-2]
    n_tokens = torch.full((len(some),), length) if mask is None else mask.sum(-1)
    attributes = view.attributes()
    if reference is not None:
        attributes["reference_recurrences"] = other.loop.R
    data = labelled(collector, n_tokens, view.model.cfg.d_model, attributes)
    return by_recurrence(data) if by == "recurrence" else data


def _check_same_start(view: RunView, other: RunView, reads: str) -> None:
    """Raise unless two runs are of one model, prompts, padding and initial state."""
    here, there = view(reads, 0), other(reads, 0)
    masks = (view.mask is None) == (other.mask is None)
    if masks and view.mask is not None and other.mask is not None:
        masks = torch.equal(view.mask, other.mask.to(view.mask.device))
    seeds = [getattr(v.cache, "state_seed", None) for v in (view, other)]
    same = (
        view.loop.with_recurrences(0) == other.loop.with_recurrences(0)
        and here.shape == there.shape
        and masks
        and (None in seeds or seeds[0] == seeds[1])
    )
    if same:
        # What the first layer gives is the same but for rounding; padding may hold anything.
        a, b = here.float(), there.to(here.device).float()
        if view.mask is not None:
            a, b = a.movedim(-2, 1)[view.mask], b.movedim(-2, 1)[view.mask]
        off = (a - b).norm() / b.norm()
        same = not bool(off > 1e-2)
    if not same:
        raise InputError(
            "reference must be a run of the same model and prompts, with the same padding and "
            "state_seed (or initial_state), but for its number of recurrences"
        )


def _check_causal(view: RunView) -> None:
    """Raise if a causal model's queries look ahead, as those of unknown padding do."""
    causal = getattr(view.model.cfg, "attention_dir", "causal") == "causal"
    if causal and view.mask is None and bool((view("pattern", 0).triu(1) > 1e-3).any()):
        raise InputError(
            "cache: a query attends to later tokens, which padding does: pass attention_mask="
        )


def _refer(collector: Collector, view: RunView) -> None:
    """Take the last recurrence of a run for the fixed points."""
    loop = view.loop
    if loop.R == 0:
        return
    for reads in collector.needs_reference:
        for layer in range(loop.k):
            collector.refer(layer, reads, view(reads, loop.index(loop.R - 1, layer)))
    after_norm = view.state_out(loop.R - 1)
    if after_norm is not None and "resid_post" in collector.needs_reference:
        collector.refer(STATE_OUT, "resid_post", after_norm)


@checked
def pairwise_from_cache(
    cache: ActivationCache,
    which: str | tuple[str, ...] = _MATRICES,
    attention_mask: Tensor | None = None,
) -> xr.Dataset:
    """Attention distance and residual cosine of every two layers, prompt by prompt.

    Args:
        cache: As for ``from_cache``, with ``pattern`` for ``"attention"`` and ``resid_post`` for
            ``"cosine"`` of every layer.
        which: ``"attention"``, ``"cosine"`` or both.
        attention_mask: As for ``from_cache``.

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


@checked
def lenses_from_cache(
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
