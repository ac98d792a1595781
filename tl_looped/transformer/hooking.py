"""Adding, finding and removing hooks, on any spelling of their names.

``reset_hooks`` also reaches the hook points beyond the current number of recurrences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from tl_looped._compat import HookedRootModule, get_act_name
from tl_looped.errors import HookNameError, InvalidDecompositionError
from tl_looped.model.cells import why_no_direct_paths
from tl_looped.model.geometry import LayerLike
from tl_looped.model.hook_points import CacheWriter, LoopedHookPoint, Reader
from tl_looped.model.names import resolve_name
from tl_looped.transformer.pool import BlockPool
from tl_looped.transformer.turns import in_turn

_DIRECT_PATHS = "transformer_lens.tools.analysis.direct_path_patching"

HookName = str | tuple[str, LayerLike] | Callable[[str], bool]


def _joined(first: Reader | None, second: Reader) -> Reader:
    """Both readers; but a run that is cached within another cached one is that one's own."""
    if first is None or (isinstance(first, CacheWriter) and isinstance(second, CacheWriter)):
        return second
    earlier = first

    def read(x: Tensor, hook: LoopedHookPoint) -> None:
        earlier(x, hook)
        second(x, hook)

    return read


class LoopedHookManager(BlockPool):
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
        if isinstance(name, str) and name in self.hook_dict:
            return name  # the common case: reading thousands of canonical names takes a while
        if not isinstance(name, str):
            short, layer, *rest = name
            name = get_act_name(short, self.loop.resolve(layer), *rest)
        return resolve_name(name, self.loop, self.hook_dict)

    def all_hook_points(self) -> Iterator[LoopedHookPoint]:
        """Every hook point there is, those beyond the current number of recurrences included."""
        yield self.hook_embed
        for block in self._block_pool.values():
            yield from block.hook_suffixes.values()
        for owner in (*self._recurrence_pool, self._ends, self.ln_final, self.unembed):
            yield from (m for m in owner.modules() if isinstance(m, LoopedHookPoint))

    @in_turn
    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """As in TransformerLens, also on hook points beyond the current recurrences."""
        for hook in self.all_hook_points():
            if hook.fwd_hooks or hook.bwd_hooks:
                hook.remove_hooks(direction, including_permanent, level)

    @in_turn
    def clear_contexts(self) -> None:
        """As in TransformerLens, also on hook points beyond the current recurrences."""
        for hook in self.all_hook_points():
            if hook.ctx:
                hook.clear_context()

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
            return [self.hook_name(wanted)]
        names = [name for name in self.hook_dict if wanted(name)]
        if not names:
            raise HookNameError(
                f"the filter function selects none of the {len(self.hook_dict)} hooks. It sees "
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
            [(name, hook) for wanted, hook in given for name in self._selected(wanted)]
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
        """A reader that gets the activations of all layers on one device, also if they are on many.

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
        with self._call_with_recurrences(n_recurrences):
            return super().run_with_hooks(*model_args, **kwargs)
