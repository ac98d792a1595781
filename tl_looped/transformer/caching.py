"""Running with a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tl_looped._compat import Slice, SliceInput
from tl_looped.cache import LoopedActivationCache, RunRecord
from tl_looped.errors import InputError
from tl_looped.model.hook_points import CacheWriter
from tl_looped.transformer.hooking import LoopedHookManager


def n_rows(batch: Any) -> int:
    """Number of prompts in an input; a text or an unbatched sequence of tokens is one."""
    texts = isinstance(batch, list) and all(isinstance(item, str) for item in batch)
    return len(batch) if texts or np.ndim(batch) > 1 else 1


class CachingMixin(LoopedHookManager):
    """TransformerLens's caching methods, which return a LoopedActivationCache."""

    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        n_recurrences: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and cache, as in TransformerLens.

        Args:
            *model_args: As for the model.
            return_cache_object: Return a :class:`LoopedActivationCache`; a plain dict otherwise.
            remove_batch_dim: Drop the batch dimension; only for a batch of one.
            n_recurrences: Recurrences of this run.
            **kwargs: ``names_filter`` (a name or alias, ``(name, layer)``, a list or set of them,
                or a function on canonical names), ``device``, ``incl_bwd``, ``pos_slice``,
                ``reset_hooks_end``, ``clear_contexts``, and the model's own arguments.
        """
        with self.recurrences(n_recurrences):
            batch = model_args[0] if model_args else kwargs.get("input")
            if remove_batch_dim and n_rows(batch) > 1:
                raise InputError(f"cannot remove the batch dimension of {n_rows(batch)} prompts")
            record = RunRecord()
            self._records.append(record)
            try:
                out, cache_dict = super().run_with_cache(
                    *model_args, remove_batch_dim=remove_batch_dim, **kwargs
                )
            finally:
                self._records.pop()
            if not return_cache_object:
                return out, cache_dict
            cache = LoopedActivationCache(
                cache_dict,
                self,
                not remove_batch_dim,
                self.loop,
                record.state_seed,
                record.state_given,
            )
            return out, cache

    def names_filter_set(self, names_filter: Any) -> set[str]:
        """Canonical names that a ``names_filter`` selects; unknown names are an error."""
        if names_filter is None:
            return set(self.hook_dict)
        if callable(names_filter):
            return set(self._selected(names_filter))
        if isinstance(names_filter, (str, tuple)):
            names_filter = [names_filter]
        return {self.hook_name(name) for name in names_filter}

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput | None = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """As in TransformerLens, with aliases, and slicing on each hook's own position axis."""
        store: dict[str, Tensor] = {} if cache is None else cache
        self.is_caching = True
        common = (store, Slice.unwrap(pos_slice), device, remove_batch_dim)
        names = self.names_filter_set(names_filter)
        ordered = [name for name in self.hook_dict if name in names]
        fwd = [(name, CacheWriter(*common)) for name in ordered]
        bwd = [(name, CacheWriter(*common, "_grad")) for name in ordered] if incl_bwd else []
        return store, fwd, bwd

    def add_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """As in TransformerLens, with aliases; the hooks stay until ``reset_hooks``."""
        store, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache
        )
        for name, hook in fwd:
            self.hook_dict[name].add_hook(hook, "fwd")
        for name, hook in bwd:
            self.hook_dict[name].add_hook(hook, "bwd")
        return store
