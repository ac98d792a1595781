"""A cache as the metrics read it: by effective layer, with its mask and its prompts."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from tl_looped._compat import ActivationCache
from tl_looped.cache import LoopedActivationCache
from tl_looped.errors import InputError, MissingActivationError
from tl_looped.metrics.inputs import mask_of_cache
from tl_looped.metrics.labels import run_attributes
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
