"""Carrying writes forward to a place in the stream, and pulling a direction back from it.

Both run over the steps of ``tl_looped.decomposition.steps`` and give the same numbers. Carrying
costs time in components x layers; pulling back costs layers alone and needs no array of components
in d_model, so it serves projections onto a few directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.decomposition.components import ComponentRows
from tl_looped.decomposition.steps import Crossing, NormPlace, Place, Rescale, Step, Write
from tl_looped.decomposition.writes import Writes
from tl_looped.model.program import Do


def _rows(
    steps: Sequence[Step], writes: Writes, rows: ComponentRows
) -> list[tuple[Step, list[int]]]:
    """Every step with the rows of the components that it writes."""
    return [
        (s, [rows.of(c) for c in writes.components(s)] if isinstance(s, Write) else [])
        for s in steps
    ]


def carry(
    steps: Sequence[Step],
    writes: Writes,
    rows: ComponentRows,
    after_each: Callable[[Tensor], None] | None = None,
) -> Float[Tensor, "row *batch_pos d_model"] | None:
    """Every wanted write as it arrives at the end of the steps, summed by row.

    Args:
        steps: From the embedding to the place where the stream is read.
        writes: Reads the writes.
        rows: Groups; filled here.
        after_each: Sees all rows after each step that changes the stream, and may change them.

    Returns:
        None if no write is wanted.
    """
    planned = _rows(steps, writes, rows)
    stack = e = state = None  # e: the prelude's components; state: what the recurrence has read
    used = 0 if after_each is None else len(rows)
    for step, where in planned:
        if isinstance(step, Write) and where:
            values = writes.values(step)
            if stack is None:
                stack = values.new_zeros((len(rows), *values.shape[1:]))
            stack.index_add_(0, torch.tensor(where, device=stack.device), values)
            used = max(used, *(row + 1 for row in where))
        if stack is None:
            continue
        live = stack[:used]
        if isinstance(step, Rescale):
            live *= writes.factor(step)
        elif isinstance(step, Crossing):
            if step.op.do is Do.ENTER:
                e = live.clone()
            elif step.op.do is Do.READ and writes.frozen.cell.writes_from_state:
                state = live.clone()
            if step.op.do is Do.ENTER and step.alone:
                found = writes.frozen.cell.state_like(live)
            else:
                found = writes.frozen.forward(step, live, e, state)
            if found is live:
                continue
            if found.shape[1:] != stack.shape[1:]:
                stack = found.new_zeros((len(rows), *found.shape[1:]))
            stack[:used] = found
        if after_each is not None and not isinstance(step, Place | NormPlace):
            after_each(stack[:used])
    return stack


def project(
    steps: Sequence[Step],
    writes: Writes,
    rows: ComponentRows,
    onto: Float[Tensor, "... d_model out"],
) -> Float[Tensor, "row ... out"] | None:
    """Each row of :func:`carry` times ``onto``, by pulling ``onto`` back through the steps.

    Args:
        steps, writes, rows: As for :func:`carry`.
        onto: Directions, the same everywhere or of each position.

    Returns:
        None if no write is wanted.
    """
    planned = _rows(steps, writes, rows)
    out = for_state = None
    where_read = next(
        (writes.batch_pos(step) for step in steps if isinstance(step, Rescale | NormPlace)), ()
    )
    # Directions first, as the loop's cell takes them: [out, *batch_pos, d_model].
    onto = onto.movedim(-1, 0)
    if onto.ndim == 2:
        onto = onto.unflatten(0, (-1, *(1 for _ in where_read)))
        onto = onto.expand(-1, *where_read, -1)
    like = for_e = torch.zeros_like(onto)
    for step, where in reversed(planned):
        if isinstance(step, Write) and where:
            values = writes.projected(step, onto.movedim(0, -1))
            if out is None:
                out = values.new_zeros((len(rows), *values.shape[1:]))
            out.index_add_(0, torch.tensor(where, device=out.device), values)
        elif isinstance(step, Rescale):
            onto = onto * writes.factor(step)
        elif isinstance(step, Crossing):
            if step.op.do is Do.ENTER and step.alone:
                onto = for_e
                continue
            onto, from_e, from_state = writes.frozen.back(step, onto, like)
            for_e = for_e + from_e
            if step.op.do is Do.WRITE:
                for_state = from_state
            elif step.op.do is Do.READ and for_state is not None:
                onto = onto + for_state
            elif step.op.do is Do.ENTER:
                onto = onto + for_e
    return out
