"""The cache of a bridge: addressable by (recurrence, layer), with TransformerLens's sums.

A bridge has TransformerLens's own hooks and not the loop's, so writes cannot be carried through
loop norms and injections as in the cache of the looped model itself. Sums of plain writes are given
where the stream is such a sum, and refused elsewhere.
"""

from __future__ import annotations

from typing import Any

from transformer_lens import ActivationCache

from tl_looped.cache import LoopedActivationCache
from tl_looped.errors import InvalidDecompositionError
from tl_looped.model.cells import why_no_direct_paths, why_not_additive


class LoopedBridgeCache(LoopedActivationCache):
    """Activations of one run of a bridge."""

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens where the stream is a plain sum; otherwise raises."""
        self._check_sum_of_writes("decompose_resid", why_not_additive(self._looped_cfg))
        return ActivationCache.decompose_resid(self, *args, **kwargs)

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens where heads write plainly to the stream; otherwise raises."""
        self._check_sum_of_writes("stack_head_results", why_no_direct_paths(self._looped_cfg))
        return ActivationCache.stack_head_results(self, *args, **kwargs)

    def stack_neuron_results(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens where neurons write plainly to the stream; otherwise raises."""
        self._check_sum_of_writes("stack_neuron_results", why_no_direct_paths(self._looped_cfg))
        return ActivationCache.stack_neuron_results(self, *args, **kwargs)

    def get_neuron_results(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens where neurons write plainly to the stream; otherwise raises."""
        self._check_sum_of_writes("get_neuron_results", why_no_direct_paths(self._looped_cfg))
        return ActivationCache.get_neuron_results(self, *args, **kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens where the stream is a plain sum; otherwise raises."""
        reason = why_no_direct_paths(self._looped_cfg)
        self._check_sum_of_writes("get_full_resid_decomposition", reason)
        return ActivationCache.get_full_resid_decomposition(self, *args, **kwargs)

    @property
    def _looped_cfg(self) -> Any:
        return self.model.original_model.looped_cfg

    def _check_sum_of_writes(self, method: str, reason: str | None) -> None:
        if reason is not None:
            raise InvalidDecompositionError(
                f"{method} on a bridge adds up plain residual writes, but {reason}. The cache of "
                "the looped model itself, from its own run_with_cache, carries writes exactly."
            )
