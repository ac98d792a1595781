"""The first storey: the pool of blocks, the number of recurrences, hook names and flags.

Blocks are pooled by (stage, recurrence, layer) and made once, when they are first needed. Changing
the number of recurrences only selects among them, so hooks survive it: a hook on recurrence 7
sleeps while R is 4 and is there again at R = 8, and a coda layer keeps its hooks while its
effective index moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

from tl_looped._compat import HookedRootModule
from tl_looped.cache import RunRecord
from tl_looped.checks import checked
from tl_looped.errors import ConfigError, GatedHookError, InputError, RecurrenceCountError
from tl_looped.model.block import GATED_HOOKS, Block, BlockList, BlockWeights
from tl_looped.model.cells import LoopCell, Site
from tl_looped.model.config import LoopedConfig
from tl_looped.model.devices import beside
from tl_looped.model.edits import UNWATCHED, Watch
from tl_looped.model.geometry import LayerLocation, LoopGeometry
from tl_looped.model.hook_points import LoopedHookPoint, find_hooks, hook_points_of, settle
from tl_looped.model.limits import checked_recurrences
from tl_looped.model.norms import HookedRMSNorm, HookedStreamNorm, NormWeights
from tl_looped.model.program import Program
from tl_looped.model.running import Parts
from tl_looped.transformer.embeddings import Embed, Unembed
from tl_looped.transformer.selecting import MOST_SELECTIONS, SelectedParts, select_parts
from tl_looped.transformer.turns import Turns, in_turn
from tl_looped.transformer.weights import make_weights, note_places, weight_modules
from tl_looped.words import count


@dataclass
class Common:
    """What may be set of a model and holds for its views too.

    Attributes:
        context_level: How many contexts of hooks are open, one within the other; each one's end
            removes the hooks of its own level.
        state_seed: Seed of the random initial state where a call gives none.
        setups: How often hook points were read anew.
        interventions: Those that are active now, outermost first.
    """

    context_level: int = 0
    state_seed: int = 0
    setups: int = 0
    interventions: tuple[Any, ...] = ()


@checked
class Pool(HookedRootModule):
    """Blocks, recurrences and names; :class:`~tl_looped.LoopedTransformer` adds the rest."""

    cfg: LoopedConfig
    loop: LoopGeometry
    cell: LoopCell
    final_norm: NormWeights
    turn: Turns
    _ends: Site
    # Of the runs whose caches are being made, the innermost last; and of the present run, if it is
    # one of these and not a run within its hooks.
    _records: list[RunRecord]
    _record: RunRecord | None
    _base: Pool | None = None  # of a view
    _common: Common
    embed: Embed
    unembed: Unembed

    def __init__(self) -> None:
        self.__dict__["_common"] = Common()
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        """As in PyTorch, but for another configuration, which no run would honour."""
        if name == "cfg" and value is not self.__dict__.get("cfg", value):
            raise ConfigError(
                "a model was made of its configuration and keeps it: set fields of model.cfg that "
                "may be set, or make a model of the other one, LoopedTransformer.from_config(cfg)"
            )
        super().__setattr__(name, value)

    @property
    def context_level(self) -> int:
        """As in TransformerLens: how many contexts of hooks are open."""
        return self._common.context_level

    @context_level.setter
    def context_level(self, context_level: int) -> None:
        self._common.context_level = context_level

    @property
    def state_seed(self) -> int:
        """Seed of the random initial state where a call gives none."""
        return self._common.state_seed

    @state_seed.setter
    def state_seed(self, state_seed: int) -> None:
        self._common.state_seed = state_seed

    def _setup_hooks(self, cfg: LoopedConfig) -> None:
        """Make the global hook points and the pool; the weights must exist already."""
        self.turn = Turns()
        self.hook_embed = LoopedHookPoint()
        # Past __setattr__: its hook points are the model's own, under their global names.
        object.__setattr__(self, "_ends", self.cell.ends())
        for name, point in self._ends.named_children():
            self.add_module(name, point)
        # Past __setattr__: `ln_final` and `blocks` are class-level properties, since that is all
        # that TransformerLens's runtime-checked protocols see from Python 3.12 on.
        self._modules["ln_final"] = HookedStreamNorm(self.final_norm)
        self._block_pool: dict[LayerLocation, Block] = {}
        self._recurrence_pool: dict[int, Site] = {}
        self._joined: Site | None = None
        self._silent: list[Parts] = []  # made once, and shared with views
        self._selections: dict[int, SelectedParts] = {}
        self._block_names: dict[tuple[int, LayerLocation], dict[str, LoopedHookPoint]] = {}
        ends = [name for name, _ in self._ends.named_children()]
        self._single_hooks = {
            name: point
            for name, point in hook_points_of(self).items()
            if name.partition(".")[0] in ("hook_embed", "ln_final", "unembed", *ends)
        }
        self._records, self._record = [], None
        self._watch = Watch()
        for owner in (self.hook_embed, self._ends, self.ln_final, self.unembed):
            for module in owner.modules():
                if isinstance(module, LoopedHookPoint):
                    module.watch = self._watch
        self._borrowed = list(weight_modules(self))
        note_places(self)
        self.loop = LoopGeometry(cfg.n_prelude, cfg.n_core, cfg.n_coda, cfg.n_recurrences)
        self._select()
        self._claim_config()

    @property
    def program(self) -> Program:
        """The steps of a run at the present number of recurrences."""
        return self.program_at(self.loop.R)

    def program_at(self, n_recurrences: int) -> Program:
        """The steps of a run at another number of recurrences."""
        loop = self.loop.with_recurrences(n_recurrences)
        return Program.of(loop, self.cell.has_gate, self.cell.ends_in_norm)

    @property
    def parts(self) -> Parts:
        """What a run at the present number of recurrences runs on."""
        return Parts(
            cell=self.cell,
            blocks=list(self.blocks),
            sites=[self._recurrence_pool[r] for r in range(self.loop.R)],
            ends=self._ends,
            joined=self._joined,
            final_norm=self.ln_final,
            unembed=self.unembed,
            home=self._home,
        )

    @property
    def silent_parts(self) -> Parts:
        """The same weights for one recurrence, on hook points of their own, which nobody hooks."""
        if not self._silent:
            self._silent.append(self._make_silent_parts())
        return self._silent[0]

    def _make_silent_parts(self) -> Parts:
        loop = self.loop.with_recurrences(1)
        norm = HookedStreamNorm(self.final_norm)
        site, ends = self.cell.site(0), self.cell.ends()
        blocks = [self._new_block(loop.locate(i)) for i in range(loop.n_layers)]
        for module in (*blocks, norm, site, ends):
            settle(module, self.training, UNWATCHED)
        return Parts(
            cell=self.cell,
            blocks=blocks,
            sites=[site],
            ends=ends,
            joined=None,
            final_norm=norm,
            unembed=self._silent_unembed,
            home=self._home,
        )

    def _silent_unembed(self, x: Tensor, joined: bool) -> Tensor:
        return self.unembed.silent(x)

    def _check_borrowed(self) -> None:
        """Raise if a module of weights was replaced: blocks borrow the one they were made with.

        What prunes weights does so before a module is called, and these are not: it is done here.
        """
        blocks = self._modules["blocks"]  # whatever stands there
        if not isinstance(blocks, nn.ModuleList) or len(blocks) != self.loop.n_layers:
            n = len(blocks) if isinstance(blocks, nn.ModuleList) else "no"
            raise InputError(
                f"model.blocks has {n} blocks, and {self.loop.n_layers} effective "
                f"layers run at {count(self.loop.R, 'recurrence')}: none can be taken out or "
                "added. interventions.SkipLayers leaves layers out, set_recurrences shortens the "
                "loop, and stop_at_layer= ends a run"
            )
        for owner, name, module in self._borrowed:
            if module._forward_pre_hooks:
                make_weights(module)
            if owner._modules.get(name) is not module:
                where = next((n for n, m in self.named_modules() if m is owner), "")
                path = ".".join(part for part in (where, name) if part)
                raise InputError(
                    f"{path} was replaced by another module, but the effective layers go on with "
                    f"the weights of the first one: copy values into it "
                    f"(model.{path}.load_state_dict(...)), or assign a new nn.Parameter"
                )

    # -- recurrences --------------------------------------------------------------------------

    @in_turn
    def set_recurrences(self, n_recurrences: int) -> None:
        """Set the number of recurrences of every later run. Hooks and older caches stay right.

        Raises:
            RecurrenceCountError: if it is negative, or zero where the model has no meaning at zero;
                beyond :data:`tl_looped.model.limits.most_layers` effective layers.
            InputError: if another thread has the model in an open context.
        """
        self._go_to_recurrences(n_recurrences)

    def _loop_at(self, n_recurrences: int | None) -> LoopGeometry:
        """The geometry of a run, checked; None is the present number of recurrences."""
        if n_recurrences is None or (type(n_recurrences) is int and n_recurrences == self.loop.R):
            return self.loop
        loop, fewest = self.loop, self.cfg.min_recurrences
        n_recurrences = checked_recurrences(n_recurrences, core=loop.k, others=loop.p + loop.c)
        if n_recurrences < fewest:
            raise RecurrenceCountError(
                f"n_recurrences must be at least {fewest} for this model, got {n_recurrences}"
                + ("" if n_recurrences else ": without injection and coda, zero has no output")
            )
        return loop.with_recurrences(n_recurrences)

    def _go_to_recurrences(self, n_recurrences: int) -> None:
        loop = self._loop_at(n_recurrences)
        if loop.R == self.loop.R:
            return
        if self._base is not None:
            raise InputError(
                f"this is a view of a model at {count(self.loop.R, 'recurrence')}, such as a cache "
                "holds: set the number of recurrences of the model itself"
            )
        self.loop = loop
        self.cfg.note(n_recurrences=loop.R, n_layers=loop.n_layers)
        self._select()

    @contextmanager
    def with_recurrences(self, n_recurrences: int | None) -> Iterator[Pool]:
        """Run with another number of recurrences for a while; None changes nothing.

        Other threads cannot use the model meanwhile: ``n_recurrences=`` of a call is for those.
        """
        with self.turn.kept():
            before = self.loop.R
            try:
                if n_recurrences is not None:
                    self._go_to_recurrences(n_recurrences)
                yield self
            finally:
                self.turn.take_over()
                self._go_to_recurrences(before)

    def view_at(self, n_recurrences: int | None) -> Self:
        """The model at another number of recurrences, while this one stays as it is.

        Weights, hook points, hooks, interventions, seed and turns are the same; ``loop``,
        ``blocks``, ``hook_dict`` and ``cfg`` are its own, with the model's flags of this moment.
        The model itself for its present number.

        Raises:
            RecurrenceCountError: as :meth:`set_recurrences`.
        """
        loop = self._loop_at(n_recurrences)
        if loop.R == self.loop.R:
            return self
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.__dict__["_modules"] = dict(self._modules)
        view.__dict__["cfg"] = copy(self.cfg)
        view.cfg.note(n_recurrences=loop.R, n_layers=loop.n_layers)
        view.loop = loop
        # Past __setattr__, which would make the model a part of its view.
        base = view.__dict__["_base"] = self if self._base is None else self._base
        view.cfg.belong_to(view, base)
        view._select()
        return view

    @property
    def is_current(self) -> bool:
        """Whether a view has the flags, dtype and device that its model has now."""
        if self._base is None:
            return True
        its = {"n_recurrences": self.loop.R, "n_layers": self.loop.n_layers}
        its_hooks = self._setups == self._common.setups
        return its_hooks and vars(self.cfg) == vars(self._base.cfg) | its

    @contextmanager
    def _at(self, n_recurrences: int | None) -> Iterator[Self]:
        """A view for one call, which has its turn already; hooks see the names that it has."""
        view = self.view_at(n_recurrences)
        before, self._watch.loop = self._watch.loop, view.loop
        try:
            yield view
        finally:
            self._watch.loop = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        """As copied by default, but not in the middle of another thread's run."""
        with self.turn:
            new = type(self).__new__(type(self))
            memo[id(self)] = new
            new.__dict__.update(deepcopy(self.__dict__, memo))
            new._claim_config()
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in PyTorch, behind pickling; copies of a configuration belong to no model."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._claim_config()

    def _claim_config(self) -> None:
        """Setting a flag of ``cfg`` is setting it of this model."""
        self.cfg.belong_to(*(one for one in (self, self._base) if one is not None))

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Within ``run_with_cache``: a record is of its own run, not of those that its hooks start.

        While a hook runs the model, nothing is stored for the outer cache, and no edit is noted.
        """
        newest, outer, log_before = self._records[-1], self._record, self._watch.log
        self._record = None if newest.filled else newest
        newest.filled = True
        others = [record.log for record in self._records if record is not self._record]
        paused = [log.paused for log in others]
        for log in others:
            log.paused = True
        self._watch.log = None if self._record is None else self._record.log
        try:
            yield
        finally:
            self._record = outer
            self._watch.log = log_before
            for log, was in zip(others, paused, strict=True):
                log.paused = was

    def train(self, mode: bool = True) -> Pool:
        """As in PyTorch, also for blocks beyond the current recurrences."""
        super().train(mode)
        for module in (*self._block_pool.values(), *self._recurrence_pool.values()):
            module.train(mode)
        return self

    def _pooled_block(self, location: LayerLocation) -> Block:
        block = self._block_pool.get(location)
        if block is None:
            block = self._new_block(location)
            settle(block, self.training, self._watch)
            # The first one stays: a cache may be read in one thread and a model run in another.
            block = self._block_pool.setdefault(location, block)
        return block

    def _new_block(self, location: LayerLocation) -> Block:
        name, number = self.cfg.weights_of(location)
        stage = self._modules[name]
        assert isinstance(stage, nn.ModuleList)
        weights = stage[number]
        assert isinstance(weights, BlockWeights)
        # The model's own configuration, even if a view makes the block: its flags reach all blocks.
        return Block(self.cell.cfg, weights, location)

    def _select(self) -> None:
        """Bring blocks, recurrences and hook names in line with ``self.loop``."""
        selection = self._selections.get(self.loop.R)
        if selection is None:
            while len(self._selections) >= MOST_SELECTIONS:
                self._selections.pop(next(iter(self._selections)))
            selection = self._selections[self.loop.R] = select_parts(self)
        self._modules["blocks"], self._modules["recurrence"] = selection[:2]
        # Past __setattr__: its hook points are in the model already.
        self.__dict__["_joined"] = selection.joined
        self.hook_dict, self._setups = selection.hooks, self._common.setups
        for name in ("blocks", "recurrence"):  # their members have the right mode already
            self._modules[name].training = self.training  # type: ignore[union-attr]
        if self._base is None:
            self._watch.own_loop = self.loop

    @in_turn
    def setup(self) -> None:
        """Read the hook points anew, as in TransformerLens, after some were replaced.

        A HookPoint that stands where one was (``model.blocks[0].hook_resid_pre = HookPoint()``)
        becomes that one, with its own hooks; runs use it from the moment it stands there. Hook
        points in other places are no part of a run, and are not listed.

        Raises:
            InputError: something else stands in the place of a hook point, or a block in another's.
        """
        if self._base is not None:
            self._base.setup()
            return self._select()
        for i, block in enumerate(self.blocks):
            if self._block_pool.get(self.loop.locate(i)) is not block:
                raise InputError(
                    f"blocks.{i} was replaced by another module, but the blocks of other numbers of"
                    " recurrences stay: hook it, or use model.intervening(...)"
                )
        names = {block.location: f"blocks.{i}" for i, block in enumerate(self.blocks)}
        for location, block in self._block_pool.items():
            block.find_hooks(names.get(location, location.label))
        for r, site in self._recurrence_pool.items():
            site.find_hooks(f"recurrence.{r}")
        find_hooks(self, self._single_hooks, "")
        for name, _ in list(self._ends.named_children()):
            self._ends.add_module(name, self._modules[name])
        self._block_names.clear()
        self._selections.clear()
        self._common.setups += 1
        self._select()

    @property
    def mod_dict(self) -> dict[str, nn.Module]:
        """Every module by name."""
        return {name: module for name, module in self.named_modules() if name}

    # -- flags --------------------------------------------------------------------------------

    @in_turn
    def _set_flag(self, flag: str, on: bool) -> None:
        if self._base is not None:
            self._base._set_flag(flag, on)
            self.cfg.note(**{flag: on})
            return self._select()
        for block in self._block_pool.values():
            for suffix, gate in GATED_HOOKS.items():
                point = block.hook_suffixes[suffix]
                if gate == flag and not on and (point.fwd_hooks or point.bwd_hooks):
                    raise GatedHookError(
                        f"{point.name} has hooks that would never fire with {flag} off: "
                        "call reset_hooks() first"
                    )
        self.cfg.note(**{flag: on})
        self._block_names.clear()
        self._selections.clear()
        self._select()

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Compute and hook each head's output, ``attn.hook_result``."""
        self._set_flag("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Give queries, keys and values of each head hooked inputs of their own."""
        if use_split_qkv_input and self.cfg.use_attn_in:
            raise InputError("use_split_qkv_input and use_attn_in exclude each other: turn one off")
        self._set_flag("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Give each head a hooked input of its own, ``hook_attn_in``."""
        if use_attn_in and self.cfg.use_split_qkv_input:
            raise InputError("use_split_qkv_input and use_attn_in exclude each other: turn one off")
        self._set_flag("use_attn_in", use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Hook the residual stream that enters each MLP, before its norm, ``hook_mlp_in``."""
        self._set_flag("use_hook_mlp_in", use_hook_mlp_in)

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Give each query head keys and values of its own, copies of its group's, to hook.

        Hooks of keys and values, and of their split inputs, then have ``n_heads`` heads. Without
        grouped-query attention nothing changes.

        Raises:
            InputError: one norm is over the keys of all heads (``cfg.qk_norm``).
        """
        if ungroup_grouped_query_attention and (why := self.cfg.why_not_ungrouped) is not None:
            raise InputError(why)
        self._set_flag("ungroup_grouped_query_attention", ungroup_grouped_query_attention)

    @property
    def blocks(self) -> BlockList:
        """The effective layers, in order."""
        return cast(BlockList, self._modules["blocks"])

    @property
    def ln_final(self) -> HookedRMSNorm:
        """The norm before the unembedding."""
        return cast(HookedRMSNorm, self._modules["ln_final"])

    def _home(self, x: Tensor) -> Tensor:
        """``x`` on the embedding's device, where a spread model takes and gives everything."""
        return x if self.cfg.n_devices == 1 else beside(x, self.embed.W_E)
