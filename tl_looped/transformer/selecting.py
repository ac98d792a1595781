"""What of the pool a model of some number of recurrences consists of, and the names of its hooks.

Names follow the program, step by step. Only those of a coda layer depend on the number of
recurrences, and a hook point tells its name at that of the present run.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from tl_looped._compat import LISTS_BRIDGE_NAMES
from tl_looped.model.block import GATED_HOOKS, Block, BlockList
from tl_looped.model.cells import Site
from tl_looped.model.geometry import LoopGeometry
from tl_looped.model.hook_points import PER_HEAD_POS_DIM, LoopedHookPoint, settle
from tl_looped.model.names import bridge_spelling, resolve_name
from tl_looped.model.program import Do

if TYPE_CHECKING:
    from tl_looped.transformer.pool import Pool


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without garbage collection, which would look through all hook points again and again.

    For work that makes objects by the ten thousand and no garbage among them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


MOST_SELECTIONS = 8
"""Numbers of recurrences whose names are kept at hand; 27,000 hooks at 128 of Huginn."""


class HookDict(dict[str, LoopedHookPoint]):
    """Hook points by canonical name; look-up also takes aliases and explains what is missing.

    With TransformerLens 4, whose tools look through ``hook_dict`` for the names that a bridge lists
    there, a bridge's spelling of split inputs is listed as well.
    """

    def __init__(self, loop: LoopGeometry) -> None:
        super().__init__()
        self.loop = loop
        self._once: dict[str, LoopedHookPoint] | None = None

    @property
    def canonical(self) -> dict[str, LoopedHookPoint]:
        """Every hook point under its canonical name alone."""
        return self if self._once is None else self._once

    def list_bridge_names(self) -> None:
        """List TransformerBridge's spellings as well, where they are aliases."""
        spelled = {bridge_spelling(name): point for name, point in self.items()}
        spelled.pop(None)
        self._once = dict(self)
        self.update({str(alias): point for alias, point in spelled.items()})

    def __missing__(self, name: str) -> LoopedHookPoint:
        return dict.__getitem__(self, resolve_name(name, self.loop, self.canonical))


class SelectedParts(NamedTuple):
    """What of the pool a model of some number of recurrences consists of."""

    blocks: BlockList
    recurrence: nn.ModuleList
    joined: Site | None
    hooks: HookDict


def select_parts(model: Pool) -> SelectedParts:
    """The blocks, sites and names at a model's number of recurrences, made where they lack."""
    loop, joined = model.loop, None
    with collector_paused():
        for r in range(loop.R):
            if r not in model._recurrence_pool:
                site = model.cell.site(r)
                settle(site, model.training, model._watch)
                model._recurrence_pool.setdefault(r, site)  # as of blocks, the first one stays
        blocks = [model._pooled_block(loop.locate(i)) for i in range(loop.n_layers)]
    if model.cell.ends_in_norm and loop.c == 0 and loop.R:
        joined = model.cell.joined(model._recurrence_pool[loop.R - 1], model.ln_final)
        settle(joined, model.training, model._watch)
    sites = nn.ModuleList(model._recurrence_pool[r] for r in range(loop.R))
    return SelectedParts(BlockList(blocks), sites, joined, _named_hooks(model, blocks))


def _named_hooks(model: Pool, blocks: list[Block]) -> HookDict:
    loop = model.loop
    hooks = HookDict(loop)

    def add(module: nn.Module | None, prefix: str) -> None:
        assert module is not None
        for name, child in module.named_modules(prefix=prefix):
            if isinstance(child, LoopedHookPoint):
                _own(model, child, name)
                hooks[name] = child

    def add_block(i: int) -> None:
        key = (i, blocks[i].location)
        named = model._block_names.get(key)
        if named is None:
            named = model._block_names[key] = _name_block(model, i, blocks[i])
        hooks.update(named)

    whole = {
        Do.EMBED: "hook_embed",
        Do.FINAL_NORM: "ln_final",
        Do.UNEMBED: "unembed",
    }
    for op in model.program.ops:
        if op.do is Do.LAYER:
            add_block(op.layer)
        elif op.do in whole:
            add(model._modules[whole[op.do]], whole[op.do])
        else:
            in_loop = op.recurrence >= 0
            site = model._recurrence_pool[op.recurrence] if in_loop else model._ends
            prefix = f"recurrence.{op.recurrence}." if in_loop else ""
            for name in site.names[op.do]:
                add(site._modules[name], prefix + name)
    if LISTS_BRIDGE_NAMES and model.cfg.use_split_qkv_input:
        hooks.list_bridge_names()
    return hooks


def _own(model: Pool, point: LoopedHookPoint, name: str) -> None:
    point.name, point.watch = name, model._watch
    if point.fwd_hooks or point.bwd_hooks:  # a point that a user put there, with its hooks
        model._watch.hooked.add(point)


def _name_block(model: Pool, i: int, block: Block) -> dict[str, LoopedHookPoint]:
    """Name the hooks of effective layer ``i``; those that the flags leave in use, by name."""
    named = {
        f"blocks.{i}.{suffix}": hook
        for suffix, hook in block.hook_suffixes.items()
        if suffix not in GATED_HOOKS or getattr(model.cfg, GATED_HOOKS[suffix])
    }
    for name, hook in named.items():
        _own(model, hook, name)
    per_head = model.cfg.use_split_qkv_input or model.cfg.use_attn_in
    for suffix in ("ln1.hook_scale", "ln1.hook_normalized"):
        if suffix in block.hook_suffixes:
            # With one input a head, its norm works on [batch, pos, head, d_model].
            block.hook_suffixes[suffix].pos_dim = PER_HEAD_POS_DIM if per_head else -2
    return named
