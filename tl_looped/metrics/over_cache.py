"""All metrics of a run from its ActivationCache.

The cache may be any of TransformerLens's: that of a LoopedTransformer or of its bridge, or of a
plain feedforward model for comparison, which counts as a core that runs once. Metrics need
``resid_post`` or ``pattern`` of every layer: ``names_filter=["residual", "attention"]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, get_args

import torch
import xarray as xr
from torch import Tensor

from tl_looped._compat import ActivationCache
from tl_looped.cache import LoopedActivationCache
from tl_looped.errors import InputError, MissingActivationError
from tl_looped.metrics.catalogue import STAGE, select
from tl_looped.metrics.collector import STATE_OUT, Collector, Site
from tl_looped.metrics.inputs import check_choice, mask_of_cache
from tl_looped.metrics.labels import Over, by_recurrence, labelled, run_attributes
from tl_looped.model.geometry import LoopGeometry
from tl_looped.words import count

_BLOCK = re.compile(r"blocks\.(\d+)\.")


class RunView:
    """A cache as the metrics read it: by effective layer, always with a prompt dimension.

    Args:
        cache: Of one run.
        attention_mask: ``[prompt, pos]``; a LoopedActivationCache knows its own.

    Raises:
        InputError: if a plain cache does not fit its model's present number of recurrences, if a
            mask is given that differs from the one of the run, or if the run went on from a
            key-value cache, so that its prompts are not whole.
    """

    def __init__(self, cache: ActivationCache, attention_mask: Tensor | None = None) -> None:
        if not isinstance(cache, ActivationCache):
            raise InputError(f"cache must be an ActivationCache, got {type(cache).__name__}")
        n_past = getattr(cache, "n_past", 0)
        if n_past:
            raise InputError(
                f"cache is of a run that went on behind {n_past} positions in a key-value cache: "
                "metrics are of whole prompts, so run the whole prompt"
            )
        self.cache = cache
        self.model: Any = cache.model
        self.loop = _geometry(cache)
        self.mask = mask_of_cache(cache, attention_mask)

    def __call__(self, reads: str, i: int) -> Tensor:
        """``[prompt, ...]``: activation ``reads`` of effective layer ``i``."""
        try:
            found = self._with_prompts(self.cache[reads, i])
        except KeyError as error:
            raise MissingActivationError(
                f"the cache holds no {reads!r} of layer {i} of {self.loop.n_layers}: "
                "run_with_cache(..., names_filter=['residual', 'attention']) keeps what is read"
            ) from error
        n_pos = getattr(self.cache, "n_pos", None)
        if n_pos is not None and found.shape[-2] != n_pos:
            raise InputError(
                f"cache holds {found.shape[-2]} of the {n_pos} positions of its run (pos_slice=): "
                "metrics are of whole prompts"
            )
        return found

    def state_out(self, r: int) -> Tensor | None:
        """``[prompt, pos, d_model]``: the end of recurrence ``r`` behind a loop norm, if cached."""
        name = f"recurrence.{r}.hook_state_out"
        if not getattr(self.model.cfg, "loop_norm", False) or name not in self.cache.cache_dict:
            return None
        return self._with_prompts(self.cache.cache_dict[name])

    def attributes(self) -> dict[str, Any]:
        """Attributes of the run."""
        seed = getattr(self.cache, "state_seed", None)
        return run_attributes(self.model, self.loop, seed)

    def _with_prompts(self, activation: Tensor) -> Tensor:
        return activation if self.cache.has_batch_dim else activation[None]


def _geometry(cache: ActivationCache) -> LoopGeometry:
    """The run's geometry; a feedforward model is a core that runs once."""
    model = cache.model
    loop = getattr(cache, "loop", None) or getattr(model, "loop", None)
    if not isinstance(loop, LoopGeometry):
        return LoopGeometry(0, model.cfg.n_layers, 0, 1)
    if not isinstance(cache, LoopedActivationCache):
        found = [int(match[1]) for name in cache.cache_dict if (match := _BLOCK.match(name))]
        if found and max(found) >= loop.n_layers:
            raise InputError(
                f"the cache has activations of layer {max(found)}, but its model has "
                f"{count(loop.n_layers, 'layer')} at its present {count(loop.R, 'recurrence')}: "
                "set the number of the run again, or use the LoopedActivationCache of "
                "run_with_cache, which knows it"
            )
    return loop


def over_cache(
    cache: ActivationCache,
    metrics: str | Iterable[str] = STAGE,
    over: Over | str = "recurrence",
    attention_mask: Tensor | None = None,
    reference: ActivationCache | None = None,
    skip_first: int = 0,
) -> xr.Dataset:
    """Metrics of a run, labelled.

    Args:
        cache: Of one run, with what the metrics read.
        metrics: Names and groups, see ``tl_looped.metrics.catalogue``: ``"stage"``,
            ``"successive"``, ``"fixed_point"``, ``"magnitude"``, ``"all"``.
        over: ``"recurrence"``: dimensions ``recurrence, layer, head, prompt`` of the core;
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
    check_choice("over", over, get_args(Over))
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
        site = Site.of_layer(view.loop, i)
        for name in reads:
            collector.see(site, name, view(name, i), compare=True)
        ends = site.recurrence is not None and site.slot == view.loop.k - 1
        if ends and "resid_post" in reads:
            assert site.recurrence is not None
            after_norm = view.state_out(site.recurrence)
            if after_norm is not None:
                out = Site(site.recurrence, STATE_OUT, site.recurrence)
                collector.see(out, "resid_post", after_norm, compare=True)
    length = some.shape[-2]
    n_tokens = torch.full((len(some),), length) if mask is None else mask.sum(-1)
    attributes = view.attributes()
    if reference is not None:
        attributes["reference_recurrences"] = other.loop.R
    data = labelled(collector, n_tokens, view.model.cfg.d_model, attributes)
    return by_recurrence(data) if over == "recurrence" else data


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
