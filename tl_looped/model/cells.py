"""Loop cells: what a family does with its state between the core's layers.

A loop has a state, and the prelude's output ``e``. A cell says

- ``start``: the first state, from ``e``;
- ``read``: the stream that enters the core, from the state and ``e``;
- ``write``: the next state, from the stream that leaves the core;
- ``gate``: what an exit gate says of a state, in models that have one;
- ``finish``: the stream that enters the coda, from the last state;

and, where a family's core needs more than a stream, ``before_layer`` and ``after_layer``. It owns
parameters, which the model registers under names that the cell gives, and hook points, of which
every recurrence has a set of its own: its :class:`Site`. Everything that has to know how a loop
works asks its cell. The forward pass, the loop map, the lenses and the bridge call it with sites
that are hooked or silent. A decomposition calls it with sites whose norms divide by the scales of a
finished run, which makes a cell of linear maps and norms linear.

:class:`StandardCell` is the cell of all families so far: Huginn, the retrofits, Ouro and virtual
loops are settings of it. ``docs/howto/new-cell.md`` says how another is added.

Limits: a state is one tensor ``[batch, pos, ...]``; what else a loop carries from layer to layer is
in ``run.memory``. A cell that is not linear for fixed scales says why (``why_not_linear``), and is
not decomposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped._compat import Module
from tl_looped.errors import ConfigError, InputError
from tl_looped.model.config import InitialState, Injection, LoopedConfig, NormLayout
from tl_looped.model.context import LoopRun, Sources
from tl_looped.model.devices import beside
from tl_looped.model.geometry import LayerLocation
from tl_looped.model.hook_points import (
    LoopedHookPoint,
    find_hooks,
    has_torch_hooks,
    hook_points_of,
)
from tl_looped.model.initial_state import draw_initial_state
from tl_looped.model.norms import HookedRMSNorm, HookedStreamNorm, NormWeights
from tl_looped.model.program import Do

Stream = Float[Tensor, "... d_model"]
"""``[batch, pos, d_model]``; in a decomposition with a dimension for components in front."""
State = Float[Tensor, "..."]
"""``[batch, pos, ...]``, likewise."""


class Site(Module):
    """The hook points of the loop at one recurrence, or at its two ends.

    Hook points and hooked norms are attributes, under the names that they have in the model.

    Args:
        recurrence: Number of the recurrence; None at the ends of the loop.
        points: Hook points and norms by name, in the order in which they fire, for each step of the
            program that they belong to.

    Attributes:
        names: The names, by step.
    """

    hook_initial_state: LoopedHookPoint
    hook_state_in: LoopedHookPoint
    hook_injected: LoopedHookPoint
    ln_loop: HookedStreamNorm
    hook_state_out: LoopedHookPoint
    hook_exit_gate: LoopedHookPoint
    ln_pre_coda: HookedStreamNorm

    def __init__(
        self, recurrence: int | None, points: Mapping[Do, Mapping[str, nn.Module]]
    ) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.names = {do: list(named) for do, named in points.items()}
        for named in points.values():
            for name, point in named.items():
                self.add_module(name, point)
        if recurrence is not None:
            for module in self.modules():
                if isinstance(module, LoopedHookPoint):
                    # The loop's hooks belong to a recurrence but to no layer; -1 says so.
                    module.location = LayerLocation("core", recurrence, -1)
        self.points = hook_points_of(self)

    def find_hooks(self, place: str) -> None:
        """Take hook points that stand in the place of earlier ones for the site's own.

        Raises:
            InputError: if something else stands there.
        """
        find_hooks(self, self.points, place)

    def replacing(self, name: str, point: nn.Module) -> Site:
        """The same hook points, but for one."""
        own: dict[str, nn.Module] = dict(self.named_children())
        new = Site(None, {do: {n: own[n] for n in names} for do, names in self.names.items()})
        new.recurrence = self.recurrence
        new.add_module(name, point)
        return new


class JoinedNorm(Module):
    """The final norm where it is the last loop norm as well; the hooks of both see it.

    The state has the gain even where the unembedding shows it as its own.
    """

    def __init__(self, ln_final: HookedRMSNorm, ln_loop: HookedRMSNorm) -> None:
        super().__init__()
        self._norms = ln_final, ln_loop  # a tuple: both are registered elsewhere

    def forward(self, x: State) -> State:
        """The normalised state."""
        ln_final, ln_loop = self._norms
        return ln_final.with_folded_gain(ln_final(x, ln_loop))


class LoopCell:
    """A plain loop: the state starts as ``e`` and goes round as it is. Base of all cells.

    Args:
        cfg: The model's configuration.
        modules: The model's modules by name: those that :meth:`make_modules` gave, and
            ``final_norm``. They are looked up at every call, so that replacing one has effect.
    """

    shapes_layers: ClassVar[bool] = False
    """Whether ``before_layer`` and ``after_layer`` do anything."""

    writes_from_state: ClassVar[bool] = False
    """Whether ``write`` uses the state that was read, so that no run can start behind that."""

    def __init__(self, cfg: LoopedConfig, modules: Mapping[str, nn.Module | None]) -> None:
        self.cfg, self.modules = cfg, modules

    # -- what it is made of ------------------------------------------------------------------------

    @staticmethod
    def make_modules(cfg: LoopedConfig) -> dict[str, nn.Module]:
        """Modules with the cell's own parameters, by their names in the model."""
        return {}

    def points_before(self) -> dict[str, nn.Module]:
        """New hook points and norms of a recurrence that fire in :meth:`read`, in order."""
        return {}

    def points_after(self) -> dict[str, nn.Module]:
        """New hook points and norms of a recurrence that fire in :meth:`write`, in order."""
        return {}

    def points_of_gate(self) -> dict[str, nn.Module]:
        """New hook points of a recurrence that fire in :meth:`gate`."""
        return {}

    def points_at_end(self) -> dict[str, nn.Module]:
        """New hook points and norms that fire in :meth:`finish`, under their global names."""
        return {}

    def site(self, r: int) -> Site:
        """New hook points of recurrence ``r``, in the order in which they fire."""
        return Site(
            r,
            {
                Do.READ: {"hook_state_in": LoopedHookPoint(), **self.points_before()},
                Do.WRITE: {**self.points_after(), "hook_state_out": LoopedHookPoint()},
                Do.GATE: self.points_of_gate(),
            },
        )

    def joined(self, site: Site, ln_final: HookedRMSNorm) -> Site:
        """The last recurrence's site, whose norm is ``ln_final`` too; of cells that end in it."""
        raise NotImplementedError

    def ends(self) -> Site:
        """New hook points at the loop's start and end."""
        start = {"hook_initial_state": LoopedHookPoint()}
        return Site(None, {Do.ENTER: start, Do.LEAVE: self.points_at_end()})

    @classmethod
    def why_rescaled(cls, cfg: LoopedConfig) -> str | None:
        """Why the loop does more to the stream than to pass it on, or None if it does not.

        A cell is taken to do more until it says otherwise.
        """
        return None if cls is LoopCell else f"the loop's cell ({cls.__name__}) changes it"

    # -- facts -------------------------------------------------------------------------------------

    @property
    def has_gate(self) -> bool:
        """Whether an exit gate reads each state."""
        return False

    @property
    def ends_in_norm(self) -> bool:
        """Whether every write ends in the final norm, so that without a coda the last one is it."""
        return False

    def starts_anew(self, state_given: bool) -> bool:
        """Whether the initial state is a component of its own, and not made from ``e``."""
        return state_given

    def reads_e(self, first: bool, state_given: bool) -> bool:
        """Whether a recurrence reads the prelude's output; :meth:`read` gets None where not.

        Args:
            first: The recurrence is the first that acts on the state.
            state_given: The caller gave the initial state.
        """
        return False

    def why_not_linear(self) -> str | None:
        """Why the cell is not linear for fixed scales of its norms, or None if it is."""
        return None

    def state_like(self, x: Tensor) -> Tensor:
        """Zeros of a state's shape, for a stream ``[..., batch, pos, d_model]``."""
        return torch.zeros_like(x)

    # -- what it does ------------------------------------------------------------------------------

    def start(self, e: Stream, run: LoopRun) -> State:
        """The initial state, as no hook has seen it yet: given, drawn, or made from ``e``."""
        given = run.initial_state
        if given is None:
            return self.draw(e, run) if self.starts_anew(False) else self.derive(e)
        if given.shape[0] not in (1, e.shape[0]):
            raise InputError(
                f"the initial state has {given.shape[0]} rows, the run {e.shape[0]}: give one for "
                "each row, or one for all"
            )
        return given.to(e).expand(e.shape)

    def draw(self, e: Stream, run: LoopRun) -> State:
        """The initial state that the run's seed and positions give; only where it starts anew."""
        raise NotImplementedError

    def derive(self, e: Stream) -> State:
        """The initial state that is made from ``e``."""
        return e

    def read(self, at: Site, state: State, e: Stream | None) -> Stream:
        """The stream that enters the core.

        Args:
            at: The recurrence's site.
            state: The state, behind ``hook_state_in``.
            e: The prelude's output; None in a recurrence that :meth:`reads_e` does not name.
        """
        return state

    def write(self, at: Site, state: State | None, x: Stream) -> State:
        """The next state, before ``hook_state_out``.

        Args:
            at: The recurrence's site.
            state: The state that :meth:`read` read; None in a run that starts behind it.
            x: The stream that leaves the core.
        """
        return x

    def gate(self, at: Site, state: State) -> Float[Tensor, "... 1"]:
        """Gate logits of a state; only of cells with a gate."""
        raise NotImplementedError

    def finish(self, at: Site, state: State) -> Stream:
        """The stream that enters the coda, or the final norm."""
        return state

    def before_layer(self, at: Site, layer: int, x: Stream, run: LoopRun) -> tuple[Stream, Sources]:
        """What core layer ``layer`` receives, and what its attention reads besides."""
        return x, Sources()

    def after_layer(self, at: Site, layer: int, x: Stream, run: LoopRun) -> Stream:
        """What core layer ``layer`` passes on."""
        return x


class StandardCell(LoopCell):
    """Linear injection, loop norm, norm before the coda and exit gate, each where the config says.

    The parameters are ``injection`` (a matrix on ``[state, e]``) and ``exit_gate``; both norms are
    the model's ``final_norm``.
    """

    @staticmethod
    def make_modules(cfg: LoopedConfig) -> dict[str, nn.Module]:
        """``injection`` and ``exit_gate``, as far as the configuration has them."""
        made: dict[str, nn.Module] = {}
        if cfg.injection is not Injection.NONE:
            made["injection"] = nn.Linear(2 * cfg.d_model, cfg.d_model, False, dtype=cfg.dtype)
        if cfg.exit_gate:
            made["exit_gate"] = nn.Linear(cfg.d_model, 1, dtype=cfg.dtype)
        return made

    @classmethod
    def why_rescaled(cls, cfg: LoopedConfig) -> str | None:
        """The injection, or a norm between recurrences or behind the loop."""
        if cfg.injection is not Injection.NONE:
            return "the injection maps the stream through an adapter before every recurrence"
        if cfg.loop_norm:
            return "the loop norm rescales the stream after every recurrence"
        if cfg.pre_coda_norm:
            return "the norm before the coda rescales the stream"
        return None if cls is StandardCell else super().why_rescaled(cfg)

    def _linear(self, name: str) -> Any:
        return self.modules[name]  # an nn.Linear, or what was put in its place, such as an adapter

    def _norm(self) -> HookedStreamNorm:
        weights = self.modules["final_norm"]
        assert isinstance(weights, NormWeights)
        return HookedStreamNorm(weights)

    def points_before(self) -> dict[str, nn.Module]:
        """``hook_injected``, what the injection gives."""
        return {"hook_injected": LoopedHookPoint()} if self._injects else {}

    def points_after(self) -> dict[str, nn.Module]:
        """``ln_loop``, the norm at the end of each recurrence."""
        return {"ln_loop": self._norm()} if self.cfg.loop_norm else {}

    def points_of_gate(self) -> dict[str, nn.Module]:
        """``hook_exit_gate``, the gate's logits."""
        return {"hook_exit_gate": LoopedHookPoint()} if self.cfg.exit_gate else {}

    def joined(self, site: Site, ln_final: HookedRMSNorm) -> Site:
        """The hooks of ``ln_loop`` and ``ln_final`` on one computation."""
        return site.replacing("ln_loop", JoinedNorm(ln_final, site.ln_loop))

    def points_at_end(self) -> dict[str, nn.Module]:
        """``ln_pre_coda``, the norm between loop and coda."""
        return {"ln_pre_coda": self._norm()} if self.cfg.pre_coda_norm else {}

    @property
    def _injects(self) -> bool:
        return self.cfg.injection is not Injection.NONE

    @property
    def has_gate(self) -> bool:
        """As the configuration says."""
        return self.cfg.exit_gate

    @property
    def ends_in_norm(self) -> bool:
        """With a loop norm."""
        return self.cfg.loop_norm

    def starts_anew(self, state_given: bool) -> bool:
        """Whether the state is random or given."""
        return state_given or self.cfg.initial_state is InitialState.RANDOM

    def reads_e(self, first: bool, state_given: bool) -> bool:
        """With an injection, but for a first recurrence that skips it."""
        skips = self.cfg.initial_state is InitialState.PRELUDE_SKIP_ADAPTER
        return self._injects and not (first and skips and not state_given)

    def draw(self, e: Stream, run: LoopRun) -> State:
        """A random state, cut at three standard deviations."""
        cfg, positions = self.cfg, run.context.positions
        if cfg.initial_state_std == 0.0:
            state = e.new_zeros((*positions.shape, cfg.d_model))
        else:
            scale = cfg.initial_state_scale
            state = draw_initial_state(run.state_seed, positions, cfg.d_model, scale, cfg.dtype)
        return state.to(e).expand(e.shape)

    def read(self, at: Site, state: State, e: Stream | None) -> Stream:
        """The injection of ``[state, e]``: one product over the concatenation."""
        if not self._injects:
            return state
        if e is None:
            return at.hook_injected(state)
        injection = self._linear("injection")
        if self.cfg.n_devices > 1:
            state, e = beside(state, injection.weight), beside(e, injection.weight)
        # As the reference rounds it in half precision.
        both = torch.cat((state, e), -1)
        injected: Tensor = injection(both)
        if has_torch_hooks(injection) and (log := at.hook_injected.watch.log) is not None:
            alone = nn.functional.linear(both, injection.weight)
            log.compare(at.hook_injected.name, alone, injected)
        return at.hook_injected(injected)

    def write(self, at: Site, state: State | None, x: Stream) -> State:
        """The loop norm, if there is one."""
        return at.ln_loop(x) if self.cfg.loop_norm else x

    def gate(self, at: Site, state: State) -> Float[Tensor, "... 1"]:
        """A linear map of the state."""
        gate = self._linear("exit_gate")
        return at.hook_exit_gate(gate(beside(state, gate.weight)))

    def finish(self, at: Site, state: State) -> Stream:
        """The norm before the coda, if there is one."""
        return at.ln_pre_coda(state) if self.cfg.pre_coda_norm else state


CELLS: dict[str, type[LoopCell]] = {"standard": StandardCell}
"""Cells by ``cfg.cell``."""


def cell_class(cfg: LoopedConfig) -> type[LoopCell]:
    """The cell that a configuration names.

    Raises:
        ConfigError: if there is none of this name.
    """
    if cfg.cell not in CELLS:
        raise ConfigError(f"there is no loop cell {cfg.cell!r}; there are {sorted(CELLS)}")
    return CELLS[cfg.cell]


def injects(cfg: LoopedConfig) -> bool:
    """Whether recurrences read the prelude's output, the first perhaps excepted."""
    return cell_class(cfg)(cfg, {}).reads_e(first=False, state_given=False)


def refuse_zeros_for_the_prompt(cfg: LoopedConfig, what: str) -> None:
    """Raise where a state of zeros would leave nothing of the prompt, and say nothing about it."""
    if not injects(cfg):
        raise InputError(
            f"{what}: {cfg.model_name} injects nothing, so that the initial state alone carries the"
            " prompt, and zeros would give every prompt the same logits. For that very run, pass a "
            "tensor of zeros"
        )


def why_not_additive(cfg: LoopedConfig) -> str | None:
    """Why the residual stream is not the plain sum of all writes, or None if it is."""
    if cfg.norm_layout is NormLayout.RESIDUAL:
        return "each block normalises its residual sum (ln_mid, ln_out)"
    return cell_class(cfg).why_rescaled(cfg)


def why_no_direct_paths(cfg: LoopedConfig) -> str | None:
    """Why a head's output is not what later layers receive of it, or None if it is."""
    if cfg.norm_layout in (NormLayout.POST, NormLayout.SANDWICH):
        return "each sublayer's output is normalised before it is added (ln1_post, ln2_post)"
    return why_not_additive(cfg)
