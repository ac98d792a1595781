"""Running with a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_looped._compat import Slice, SliceInput
from tl_looped.cache import LoopedActivationCache, RunRecord
from tl_looped.errors import InputError
from tl_looped.model.config import InitialState
from tl_looped.model.hook_points import CacheWriter
from tl_looped.transformer.cache_size import (
    ALWAYS_FREE,
    PRESETS,
    free_bytes,
    most_bytes,
    readable,
    twin_config,
    twin_name,
)
from tl_looped.transformer.hooking import LoopedHookManager
from tl_looped.transformer.pool import collector_paused
from tl_looped.transformer.reading import Tokens, n_prompts, read_input
from tl_looped.transformer.turns import in_turn


class CachingMixin(LoopedHookManager):
    """TransformerLens's caching methods, which return a LoopedActivationCache."""

    if TYPE_CHECKING:  # of the classes that inherit this one

        def tokenize(  # noqa: D102
            self, text: Any, prepend_bos: bool | None = None, padding_side: str | None = None
        ) -> tuple[Tensor, Tensor]: ...

    @in_turn
    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        n_recurrences: int | None = None,
        force: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and cache, as in TransformerLens.

        Args:
            *model_args: As for the model.
            return_cache_object: Return a :class:`LoopedActivationCache`; a plain dict otherwise.
            remove_batch_dim: Drop the batch dimension; only for a batch of one.
            n_recurrences: Recurrences of this run.
            force: Run even if the cache exceeds the free memory.
            **kwargs: ``names_filter`` (a name or alias, ``(name, layer)``, a preset such as
                ``"residual"``, a list or set of them, or a function on canonical names),
                ``device`` (where the cache goes; if None, the activations stay where they are, or
                go to ``cfg.device`` if the model is spread over several devices), ``incl_bwd``,
                ``pos_slice``, ``reset_hooks_end``, ``clear_contexts``, and the model's own
                arguments. The presets are explained in ``tl_looped.transformer.cache_size``.

        Raises:
            InputError: if the cache would take more memory than its device has free; see
                :meth:`estimate_cache_bytes`.
        """
        with self._call_with_recurrences(n_recurrences):
            batch = model_args[0] if model_args else kwargs.get("input")
            if remove_batch_dim and (n := self._n_rows(batch, kwargs)) > 1:
                raise InputError(f"cannot remove the batch dimension of {n} prompts")
            if not force:
                self._refuse_too_large_cache(batch, kwargs)
            record = RunRecord()
            self._records.append(record)
            try:
                with collector_paused():
                    self._caches_this_run = True
                    out, cache_dict = super().run_with_cache(
                        *model_args, remove_batch_dim=remove_batch_dim, **kwargs
                    )
            finally:
                self._caches_this_run = False
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
                record.early_exit,
                record.attention_mask,
                record.n_pos,
                record.n_past,
                # Hooks that stay write later runs into the same dict.
                record.edits(cache_dict) if kwargs.get("reset_hooks_end", True) else None,
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
        names: set[str] = set()
        for name in names_filter:
            if isinstance(name, str) and name in PRESETS:
                names |= {known for known in self.hook_dict if PRESETS[name](known)}
            else:
                names.add(self.hook_name(name))
        return names

    @in_turn
    def estimate_cache_bytes(
        self,
        names_filter: Any = None,
        batch: int = 1,
        pos: int = 1,
        n_recurrences: int | None = None,
        *,
        pos_slice: Slice | SliceInput | None = None,
        incl_bwd: bool = False,
    ) -> int:
        """Bytes of all tensors that ``run_with_cache`` would put into its cache.

        Exact for the model as it stands, with its dtype and its flags, for runs of the whole model
        whose hooks change no shape and no dtype. No value is computed and no hook fires.

        Args:
            names_filter: As for :meth:`run_with_cache`.
            batch: Rows.
            pos: Tokens per row, padding included.
            n_recurrences: Recurrences of the run; the present number if None.
            pos_slice: As for :meth:`run_with_cache`.
            incl_bwd: Count the gradients too, as if every parameter had one.
        """
        if batch < 1 or pos < 1:
            raise InputError(f"batch and pos must be at least 1, got {batch} and {pos}")
        with self._call_with_recurrences(n_recurrences):
            sizes = self._twin_sizes(batch, pos, pos_slice, incl_bwd)
            return sum(sizes[name] for name in self.names_filter_set(names_filter))

    def _twin_sizes(self, batch: int, pos: int, pos_slice: Any, incl_bwd: bool) -> dict[str, int]:
        """Bytes of every activation and its gradient, by canonical name."""
        twin = type(self)(twin_config(self.cfg))
        # A random state is drawn from values, of which there are none here.
        state = "zeros" if twin.cfg.initial_state is InitialState.RANDOM else None
        tokens = torch.zeros(batch, pos, dtype=torch.long, device="meta")
        with torch.inference_mode(False), torch.set_grad_enabled(incl_bwd):
            _, cache = twin.run_with_cache(
                tokens,
                initial_state=state,
                return_type="loss" if incl_bwd else None,
                return_cache_object=False,
                pos_slice=pos_slice,
                incl_bwd=incl_bwd,
                force=True,
            )
        in_twin = dict.fromkeys(twin.hook_dict, 0)
        for key, activation in cache.items():
            in_twin[key.removesuffix("_grad")] += activation.nbytes
        return {
            name: in_twin[twin_name(name, hook, self.loop, twin.loop)]
            for name, hook in self.hook_dict.items()
        }

    def _refuse_too_large_cache(self, input: Any, kwargs: dict[str, Any]) -> None:
        """Raise if the cache of a run with these arguments exceeds the free memory."""
        shape = self._shape_of(input, kwargs)
        if shape is None:
            return
        incl_bwd = kwargs.get("incl_bwd", False)
        most = most_bytes(self.cfg, len(self.hook_dict) * (1 + incl_bwd), *shape)
        if most < ALWAYS_FREE:
            return
        device = torch.device(kwargs.get("device") or self.W_E.device)
        free = free_bytes(device)
        if free is None or most < free:
            return
        pos_slice = Slice.unwrap(kwargs.get("pos_slice"))
        sizes = self._twin_sizes(*shape, pos_slice, incl_bwd)
        start, stop = (
            default if kwargs.get(end) is None else self.loop.resolve_or_end(kwargs[end])
            for end, default in (("start_at_layer", 0), ("stop_at_layer", self.loop.n_layers))
        )
        unused = [f"blocks.{i}." for i in (*range(start), *range(stop, self.loop.n_layers))]
        names = self.names_filter_set(kwargs.get("names_filter"))
        if unused:
            names = {name for name in names if not name.startswith(tuple(unused))}
        needed = sum(sizes[name] for name in names)
        if needed > free:
            elsewhere = "" if device.type == "cpu" else ", put it elsewhere (device='cpu')"
            raise InputError(
                f"the cache of {len(names)} activations would take {readable(needed)}, but "
                f"{device} has {readable(free)} free. Cache less (names_filter='residual', "
                "'attention', 'loop' or a list of names, pos_slice=, fewer n_recurrences or "
                f"prompts){elsewhere}, or pass force=True to try nevertheless."
            )

    def _shape_of(self, input: Any, kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """Batch and positions of a model's input; None if it is none, which the run will tell."""
        if kwargs.get("start_at_layer") is not None:
            is_stream = isinstance(input, Tensor) and input.ndim == 3
            return (input.shape[0], input.shape[1]) if is_stream else None
        given = read_input(input)
        if not isinstance(given, Tokens):
            text_arguments = (kwargs.get("prepend_bos"), kwargs.get("padding_side"))
            tokens, _ = self.tokenize(given, *text_arguments)
        else:
            tokens = given.tokens[None] if given.tokens.ndim == 1 else given.tokens
        return (tokens.shape[0], tokens.shape[1]) if tokens.ndim == 2 else None

    def _n_rows(self, input: Any, kwargs: dict[str, Any]) -> int:
        """Number of prompts in a model's input."""
        if kwargs.get("start_at_layer") is not None:
            return len(input) if isinstance(input, Tensor) and input.ndim else 1
        return n_prompts(input)

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
        if device is None and self.cfg.n_devices > 1:
            device = self.cfg.device  # what reads a cache brings its layers together
        common = (store, Slice.unwrap(pos_slice), device, remove_batch_dim)
        names = self.names_filter_set(names_filter)
        ordered = [name for name in self.hook_dict if name in names]
        log = self._records[-1].log if self._caches_this_run else None
        writer, grad_writer = CacheWriter(*common, log=log), CacheWriter(*common, "_grad", log)
        fwd = [(name, writer) for name in ordered]
        bwd = [(name, grad_writer) for name in ordered] if incl_bwd else []
        return store, fwd, bwd

    @in_turn
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
