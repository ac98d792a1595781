"""Running the steps of a program on a model's modules: the one interpreter.

A forward pass, the states of a training step, a loop map, the coda lens and an early exit run
slices of the same list with it. They differ in the modules that it runs on (:class:`Parts`): the
model's own, with hooks, or silent ones on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.block import Block
from tl_looped.model.cells import LoopCell, Site, State, Stream
from tl_looped.model.context import LoopRun
from tl_looped.model.program import Do, Op


@dataclass(frozen=True)
class Parts:
    """The modules that a program runs on.

    Args:
        cell: The loop's cell.
        blocks: Blocks by effective layer.
        sites: Sites by recurrence.
        ends: The site of the loop's ends.
        joined: In place of the last recurrence's site where its norm is the final norm as well.
        final_norm: The norm before the unembedding.
        unembed: Logits of a normed stream; the second argument says that it has the norm's gain.
        home: Brings what a run gives to the embedding's device.
    """

    cell: LoopCell
    blocks: Sequence[Block]
    sites: Sequence[Site]
    ends: Site
    joined: Site | None
    final_norm: Callable[[Tensor], Tensor]
    unembed: Callable[[Tensor, bool], Tensor]
    home: Callable[[Tensor], Tensor]


def execute(ops: Iterable[Op], x: Tensor, run: LoopRun, parts: Parts) -> Tensor:
    """Run steps one after the other.

    Args:
        ops: A slice of a program, past the embedding.
        x: The stream or the state before the first of them.
        run: Of the pass; the steps note in it what later ones need.
        parts: The modules to run on.
    """
    cell, blocks, context = parts.cell, parts.blocks, run.context
    for op in ops:
        if op.do is not Do.LAYER:
            x = _BETWEEN[op.do](op, x, run, parts)
        elif cell.shapes_layers and op.recurrence >= 0:
            x = _shaped_layer(op, x, run, parts)
        else:
            x = blocks[op.layer](x, context)
    return x


def _shaped_layer(op: Op, x: Stream, run: LoopRun, parts: Parts) -> Stream:
    """A core layer of a cell that gives layers more than the stream."""
    block, at = parts.blocks[op.layer], parts.sites[op.recurrence]
    layer = block.location.layer
    x, sources = parts.cell.before_layer(at, layer, x, run)
    return parts.cell.after_layer(at, layer, block(x, run.context, sources), run)


def _enter_loop(op: Op, x: Stream, run: LoopRun, parts: Parts) -> State:
    if run.prelude_output is None:  # what the caller gave stays
        run.prelude_output = x
    return parts.ends.hook_initial_state(parts.cell.start(x, run))


def _read(op: Op, state: State, run: LoopRun, parts: Parts) -> Stream:
    cell, at = parts.cell, parts.sites[op.recurrence]
    state = run.state = at.hook_state_in(state)
    if not cell.reads_e(op.first, run.initial_state is not None):
        return cell.read(at, state, None)
    if run.prelude_output is None:
        raise InputError(
            f"start_at_layer lies in the loop, and recurrence {op.recurrence} injects the "
            "prelude's output: pass it as prelude_output= (hook_resid_post of the last prelude "
            "layer)"
        )
    e = run.prelude_output
    return cell.read(at, state, e if op.factor == 1.0 else e * op.factor)


def _write(op: Op, x: Stream, run: LoopRun, parts: Parts) -> State:
    site = parts.sites[op.recurrence]
    at = parts.joined if op.joined and parts.joined is not None else site
    if run.state is None and parts.cell.writes_from_state:
        raise InputError(
            f"start_at_layer lies in recurrence {op.recurrence}, whose result is made from the "
            "state that it started from: start at its first layer or before"
        )
    return site.hook_state_out(parts.cell.write(at, run.state, x))


def _gate(op: Op, state: State, run: LoopRun, parts: Parts) -> State:
    with torch.set_grad_enabled(torch.is_grad_enabled() or run.trains_gate):
        run.gate = parts.home(parts.cell.gate(parts.sites[op.recurrence], state))
    return state


def _leave_loop(op: Op, state: State, run: LoopRun, parts: Parts) -> Stream:
    return parts.cell.finish(parts.ends, state)


def _final_norm(op: Op, x: Stream, run: LoopRun, parts: Parts) -> Stream:
    return x if op.joined else parts.final_norm(x)


def _unembed(op: Op, x: Stream, run: LoopRun, parts: Parts) -> Float[Tensor, "batch pos d_vocab"]:
    return parts.home(parts.unembed(x, op.joined))


_BETWEEN = {
    Do.ENTER: _enter_loop,
    Do.READ: _read,
    Do.WRITE: _write,
    Do.GATE: _gate,
    Do.LEAVE: _leave_loop,
    Do.FINAL_NORM: _final_norm,
    Do.UNEMBED: _unembed,
}
