r"""What happens to a write between the place where it is made and the place where it is read.

With the norms' scales as they were in the run, everything between two blocks and inside them is
linear in the residual stream, position by position:

- a plain residual block adds, and changes nothing that is there already;
- a norm *on* the stream (Huginn's ``ln_mid`` and ``ln_out``, a loop norm, the norm before the coda)
  multiplies every earlier write by gain / scale;
- the loop's cell starts, reads, writes and finishes, which for fixed scales is linear in the state,
  the stream and the prelude's output e;
- a state that does not come from the prelude replaces what was written before it: e goes on in the
  cell's reads alone, and the state is a component of its own.

A stream is therefore described by a list of steps, the same for carrying writes forward and for
pulling a direction back. The scales come from the cache, the gains and matrices from the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tl_looped.model.config import LoopedConfig, NormLayout
from tl_looped.model.geometry import LayerLike, LoopGeometry
from tl_looped.model.norms import HookedRMSNorm
from tl_looped.model.program import Do, Op


@dataclass(frozen=True)
class Write:
    """A component joins the stream: ``kind`` as in ``Component``; ``layer`` is effective."""

    kind: str
    layer: int | None = None


@dataclass(frozen=True)
class Rescale:
    """A norm on the stream: its cached scale's name and the path of its gain."""

    scale: str
    gain: str


@dataclass(frozen=True)
class Crossing:
    """The loop's cell acts on the stream.

    Args:
        op: The step of the program.
        alone: Of the loop's start: the state starts anew. Of a read: e is left out.
    """

    op: Op
    alone: bool = False


@dataclass(frozen=True)
class Place:
    """Here the stream, as it is, passes a hook point of this name."""

    name: str


@dataclass(frozen=True)
class NormPlace:
    """Here the stream passes a norm of the loop's cell."""

    path: str


Step = Write | Rescale | Crossing | Place | NormPlace


@dataclass(frozen=True)
class Target:
    """A place in the stream.

    Args:
        layer: Effective layer, whose input is meant; ``n_layers`` is the final norm's input.
        mid: The input of the layer's MLP, ``hook_resid_mid``.
    """

    layer: int
    mid: bool = False

    @classmethod
    def of(cls, layer: LayerLike | None, mid: bool, loop: LoopGeometry) -> Target:
        """Target of TransformerLens's arguments ``layer`` and ``mlp_input``.

        None, -1 and ``n_layers`` all mean the final norm's input, as in TransformerLens.

        Raises:
            LayerIndexError: a layer out of range, or the MLP input of the final norm.
        """
        if layer is None or layer in (-1, loop.n_layers):
            # The final norm has no MLP; resolving n_layers raises with the valid range.
            return cls(loop.resolve(loop.n_layers) if mid else loop.n_layers)
        return cls(loop.resolve(layer), mid)

    def hook(self, loop: LoopGeometry) -> str:
        """Name of the hook that holds the stream here."""
        if self.layer == loop.n_layers:
            return f"blocks.{self.layer - 1}.hook_resid_post" if self.layer else "hook_embed"
        return f"blocks.{self.layer}.hook_resid_{'mid' if self.mid else 'pre'}"


def stream_steps(model: Any, loop: LoopGeometry, state_given: bool, to: Target) -> Iterator[Step]:
    """The steps from the embedding to ``to``.

    Args:
        model: A looped model, for its configuration and its cell.
        loop: Geometry of the run.
        state_given: Whether the run's initial state was given by the caller.
        to: Where to end.
    """
    yield Write("embed")
    for op in model.program_at(loop.R).ops:
        if op.do is Do.FINAL_NORM or op.joined:
            return
        if op.do is Do.LAYER:
            yield Place(f"blocks.{op.layer}.hook_resid_pre")
            if to == Target(op.layer):
                return
            yield Write("attn_out", op.layer)
            yield from _sum_norm(model, loop, op.layer, "mid")
            if to == Target(op.layer, mid=True):
                return
            yield Write("mlp_out", op.layer)
            yield from _sum_norm(model, loop, op.layer, "post")
        elif op.do not in (Do.EMBED, Do.GATE):
            yield from _crossing(model, op, state_given)


def _sum_norm(model: Any, loop: LoopGeometry, i: int, where: str) -> Iterator[Step]:
    """What happens to the stream behind a write of a block."""
    if model.cfg.norm_layout is NormLayout.RESIDUAL:
        yield Place(f"blocks.{i}.hook_resid_{where}_sum")
        yield block_norm(model.cfg, loop, i, "ln_mid" if where == "mid" else "ln_out")
    yield Place(f"blocks.{i}.hook_resid_{where}")


def _crossing(model: Any, op: Op, given: bool) -> Iterator[Step]:
    cell, silent = model.cell, model.silent_parts
    if op.do is Do.ENTER:
        yield Crossing(op, anew := cell.starts_anew(given))
        # A state that does not come from the prelude is a component, edited or not.
        yield Write("initial_state") if anew else Place("hook_initial_state")
        return
    alone = op.do is Do.READ and not cell.reads_e(op.first, given)
    yield Crossing(op, alone)
    site = silent.ends if op.do is Do.LEAVE else silent.sites[0]
    for name in site.names[op.do]:
        path = prefix(op) + name
        yield NormPlace(path) if isinstance(site._modules[name], HookedRMSNorm) else Place(path)


def prefix(op: Op) -> str:
    """What the names of a step's hook points begin with."""
    return "" if op.recurrence < 0 else f"recurrence.{op.recurrence}."


def block_norm(cfg: LoopedConfig, loop: LoopGeometry, i: int, name: str) -> Rescale:
    """A norm of effective layer ``i``."""
    stage, number = cfg.weights_of(loop.locate(i))
    return Rescale(f"blocks.{i}.{name}.hook_scale", f"{stage}.{number}.{name}")
