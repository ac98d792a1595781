"""The third storey: TransformerLens's hooks and caches, on any spelling of a hook's name.

``reset_hooks`` also reaches the hook points beyond the current number of recurrences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from tl_looped._compat import HookedRootModule, Slice, SliceInput, get_act_name
from tl_looped.cache import LoopedActivationCache, RunRecord
from tl_looped.checks import checked, described, whole
from tl_looped.errors import (
    GatedHookError,
    HookNameError,
    InputError,
    InvalidDecompositionError,
    LayerIndexError,
)
from tl_looped.model.axis_slice import AxisSlice
from tl_looped.model.cells import why_no_direct_paths
from tl_looped.model.geometry import LayerLike
from tl_looped.model.hook_points import CacheWriter, LoopedHookPoint, Reader
from tl_looped.model.names import resolve_name
from tl_looped.transformer.cache_size import (
    PRESETS,
    n_rows,
    refuse_too_large_cache,
    twin_sizes,
)
from tl_looped.transformer.named_weights import NamedWeights
from tl_looped.transformer.selecting import collector_paused
from tl_looped.transformer.turns import in_turn

_DIRECT_PATHS = "transformer_lens.tools.analysis.direct_path_patching"

HookName = str | tuple[str, LayerLike] | Callable[[str], bool]


def _pairs(hooks: Any) -> list[tuple[Any, Any]]:
    try:
        return [(wanted, hook) for wanted, hook in hooks]
    except (TypeError, ValueError):
        raise InputError(
            f"hooks must be pairs of a hook name and a function, got {described(hooks)}"
        ) from None


def _joined(first: Reader | None, second: Reader) -> Reader:
    """Both readers; but a run that is cached within another cached one is that one's own."""
    if first is None or (isinstance(first, CacheWriter) and isinstance(second, CacheWriter)):
        return second
    earlier = first

    def read(x: Tensor, hook: LoopedHookPoint) -> None:
        earlier(x, hook)
        second(x, hook)

    return read


@checked
class HookedLoop(NamedWeights):
    """TransformerLens's hook methods, with aliases and names checked before the run."""

    # Set by run_with_cache for its own hooks alone: they come last, behind those that edit. Caching
    # hooks that a user attaches keep their place among the others.
    _caches_this_run = False

    def hook_name(self, name: Any) -> str:
        """The canonical name of a hook that exists at the current number of recurrences.

        Args:
            name: Canonical name, alias, or ``(name, layer)`` as in a cache.

        Raises:
            HookNameError, GatedHookError, LayerIndexError: see ``tl_looped.model.names``.
        """
        return self._canonical(name)

    def _canonical(self, name: Any) -> str:
        # Without the check of types, which would be most of the time of thousands of names.
        known = self.hook_dict.canonical
        if isinstance(name, str) and name in known:
            return name
        if not isinstance(name, str):
            if not (isinstance(name, tuple) and len(name) > 1 and isinstance(name[0], str)):
                raise InputError(
                    f"a hook is a name, or (name, layer) as in a cache, got {described(name)}"
                )
            short, layer, *rest = name
            name = get_act_name(short, self.loop.resolve(layer), *rest)
        return resolve_name(name, self.loop, known)

    def all_hook_points(self) -> Iterator[LoopedHookPoint]:
        """Every hook point there is, those beyond the current number of recurrences included."""
        yield self.hook_embed
        for block in self._block_pool.values():
            yield from block.hook_suffixes.values()
        for owner in (*self._recurrence_pool.values(), self._ends, self.ln_final, self.unembed):
            yield from (m for m in owner.modules() if isinstance(m, LoopedHookPoint))

    def hook_points(self) -> Collection[LoopedHookPoint]:
        """Those that exist at the current number of recurrences, each once."""
        return self.hook_dict.canonical.values()

    def block_hooks(self, layer_idx: LayerLike) -> list[str]:
        """Sorted names of a layer's hooks, without ``blocks.{i}.``.

        Args:
            layer_idx: An effective layer, or (recurrence, layer).

        Raises:
            LayerIndexError: if there is no such layer.
        """
        prefix = f"blocks.{self.loop.resolve(layer_idx)}."
        names = self.hook_dict.canonical
        return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    def block_submodules(self, layer_idx: LayerLike) -> list[str]:
        """Names of a layer's parts that are no hook points: ``attn``, ``mlp`` and its norms.

        Args:
            layer_idx: An effective layer, or (recurrence, layer).

        Raises:
            LayerIndexError: if there is no such layer.
        """
        block = self.blocks[self.loop.resolve(layer_idx)]
        children = block.named_children()
        return [name for name, part in children if not isinstance(part, LoopedHookPoint)]

    def layer_types(self) -> list[str]:
        """What each effective layer is: ``"attn+mlp"``, the norms left out."""
        return ["attn+mlp"] * self.loop.n_layers

    def get_hook_point(self, hook_name: str) -> LoopedHookPoint | None:
        """The hook point of a name or an alias, or None if there is none now."""
        try:
            return self.hook_dict[hook_name]
        except (HookNameError, GatedHookError, LayerIndexError):
            return None

    @in_turn
    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """As in TransformerLens, also on hook points beyond the current recurrences."""
        # Of those that have any: a run with one hook must not look at all 27,000 at its end.
        hooked = self._watch.hooked
        for hook in tuple(hooked):
            hook.remove_hooks(direction, including_permanent, level)
            if not (hook.fwd_hooks or hook.bwd_hooks):
                hooked.discard(hook)

    @in_turn
    def clear_contexts(self) -> None:
        """As in TransformerLens, also on hook points beyond the current recurrences."""
        for hook in self.all_hook_points():
            if hook.ctx:
                hook.clear_context()  # type: ignore[no-untyped-call]

    @in_turn
    def add_hook(
        self,
        name: HookName,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook until ``reset_hooks``; names as in :meth:`hook_name`, or a filter function."""
        add: dict[str, Any] = {
            "dir": dir,
            "is_permanent": is_permanent,
            "level": level,
            "prepend": prepend,
        }
        for canonical in self._selected(name):
            self.check_and_add_hook(self.hook_dict[canonical], canonical, hook, **add)

    def _selected(self, wanted: Any) -> list[str]:
        """Canonical names that a name or a filter function means; none at all is a mistake."""
        if not callable(wanted):
            return [self._canonical(wanted)]
        known = self.hook_dict.canonical
        names = [name for name in known if wanted(name)]
        if not names:
            raise HookNameError(
                f"the filter function selects none of the {len(known)} hooks. It sees "
                "canonical names only, such as 'blocks.0.attn.hook_z' or "
                "'recurrence.0.hook_state_out', no aliases."
            )
        return names

    def _enable_hook(self, name: HookName, hook: Callable[..., Any], dir: Any) -> None:
        for canonical in self._selected(name):
            self.hook_dict[canonical].add_hook(hook, dir=dir, level=self.context_level)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedRootModule]:
        """As in TransformerLens; every name is resolved before the first hook is attached."""
        with self.turn.kept():
            yield from self._hooked(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)

    def _hooked(
        self, fwd_hooks: Any, bwd_hooks: Any, reset_hooks_end: bool, clear_contexts: bool
    ) -> Iterator[HookedRootModule]:
        fwd, bwd = (
            [(name, hook) for wanted, hook in _pairs(given) for name in self._selected(wanted)]
            for given in (fwd_hooks, bwd_hooks)
        )
        self._check_direct_paths(hook for _, hook in fwd)
        readers: list[tuple[HookName, Reader]] = []
        quick, self._caches_this_run = self._caches_this_run, False
        if quick and reset_hooks_end:
            # What only reads needs none of torch's way to call a hook, see LoopedHookPoint.reader.
            readers = [(name, hook) for name, hook in fwd if isinstance(hook, CacheWriter)]
            fwd = [(name, hook) for name, hook in fwd if not isinstance(hook, CacheWriter)]
        with (
            self._reading(readers),
            super().hooks(fwd, bwd, reset_hooks_end, clear_contexts) as model,
        ):
            try:
                yield model
            finally:
                self.turn.take_over()

    @contextmanager
    def readers(self, readers: Iterable[tuple[HookName, Reader]]) -> Iterator[None]:
        """Let functions look at activations, as the hooks left them, while the context lasts.

        A reader costs less than a hook, and can change nothing: it gets the tensor that the model
        goes on with, and must neither return nor edit it. Of a model that is spread over several
        devices it gets a copy on the embedding's device.

        Args:
            readers: ``(name, function)``; names as in :meth:`hook_name`, or filter functions. A
                function is called with the activation and the hook point.
        """
        with self.turn.kept(), self._reading(readers):
            try:
                yield
            finally:
                self.turn.take_over()

    @contextmanager
    def _reading(self, readers: Iterable[tuple[HookName, Reader]]) -> Iterator[None]:
        """As :meth:`readers`, within a turn that is taken already."""
        points = [
            (self.hook_dict[name], self._reading_home(reader))
            for wanted, reader in readers
            for name in self._selected(wanted)
        ]
        before: list[tuple[LoopedHookPoint, Reader | None]] = []
        try:
            for point, reader in points:
                before.append((point, point.reader))
                point.reader = _joined(point.reader, reader)
            yield
        finally:
            for point, earlier in reversed(before):
                point.reader = earlier

    def _reading_home(self, reader: Reader) -> Reader:
        """A reader that gets the activations of all layers on one device, even if they are on many.

        It compares activations of different layers, and brings tensors of its own. What writes a
        cache moves them by itself, to where the caller wants them.
        """
        if self.cfg.n_devices == 1 or isinstance(reader, CacheWriter):
            return reader
        home = torch.device(str(self.cfg.device))

        def read(x: Tensor, hook: LoopedHookPoint) -> None:
            reader(x.to(home), hook)

        return read

    def _check_direct_paths(self, hooks: Iterable[Any]) -> None:
        """Refuse TransformerLens's direct-path hooks where they would be silently wrong.

        They add a head's output to a later head's input as if nothing happened to it in between.
        TransformerLens 4 asks the blocks whether that holds (``Block.hook_aliases``), 3 does not.
        """
        reason = why_no_direct_paths(self.cfg)
        if reason is not None and any(
            getattr(hook, "__module__", None) == _DIRECT_PATHS for hook in hooks
        ):
            raise InvalidDecompositionError(
                f"direct-path patching takes a head's output for what later heads receive, but "
                f"{reason}. Valid here: patching of activations at any (recurrence, layer), and "
                "cache.stack_head_results, which carries each head's output to where it is read."
            )

    @in_turn
    def run_with_hooks(
        self, *model_args: Any, n_recurrences: int | None = None, **kwargs: Any
    ) -> Any:
        """As in TransformerLens; hook names are read at ``n_recurrences``, before the run."""
        with self._at(n_recurrences) as model:
            return HookedRootModule.run_with_hooks(model, *model_args, **kwargs)

    # -- caches -------------------------------------------------------------------------------

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
        with self._at(n_recurrences) as model:
            batch = model_args[0] if model_args else kwargs.get("input")
            if remove_batch_dim and (n := n_rows(batch, kwargs)) > 1:
                raise InputError(f"cannot remove the batch dimension of {n} prompts")
            if not force:
                refuse_too_large_cache(model, batch, kwargs)
            record = RunRecord()
            model._records.append(record)
            try:
                with collector_paused():
                    model._caches_this_run = True
                    out, cache_dict = HookedRootModule.run_with_cache(
                        model, *model_args, remove_batch_dim=remove_batch_dim, **kwargs
                    )
            finally:
                model._caches_this_run = False
                model._records.pop()
            if not return_cache_object:
                return out, cache_dict
            cache = LoopedActivationCache(
                cache_dict,
                self,
                not remove_batch_dim,
                model.loop,
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
            return set(self.hook_dict.canonical)
        if callable(names_filter):
            return set(self._selected(names_filter))
        if isinstance(names_filter, (str, tuple)):
            names_filter = [names_filter]
        if isinstance(names_filter, Tensor) or not isinstance(names_filter, Iterable):
            raise InputError(
                "names_filter must be a name, several, a preset or a function, got "
                f"{described(names_filter)}"
            )
        names: set[str] = set()
        for name in names_filter:
            if isinstance(name, str) and name in PRESETS:
                names |= {known for known in self.hook_dict.canonical if PRESETS[name](known)}
            else:
                names.add(self._canonical(name))
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
        whole(batch, "batch", 1)
        whole(pos, "pos", 1)
        model = self.view_at(n_recurrences)
        sizes = twin_sizes(model, batch, pos, pos_slice, incl_bwd)
        return sum(sizes[name] for name in model.names_filter_set(names_filter))

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
        positions = AxisSlice(pos_slice, "positions", keep=not isinstance(pos_slice, Slice))
        common = (store, positions, device, remove_batch_dim)
        names = self.names_filter_set(names_filter)
        ordered = [name for name in self.hook_dict.canonical if name in names]
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
