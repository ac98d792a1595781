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

from tl_looped.decomposition.components import Rows
from tl_looped.decomposition.steps import EnterLoop, Inject, Place, Rescale, Step, Write
from tl_looped.decomposition.writes import Writes


def _rows(steps: Sequence[Step], writes: Writes, rows: Rows) -> list[tuple[Step, list[int]]]:
    """Every step with the rows of the components that it writes."""
    return [
        (s, [rows.of(c) for c in writes.components(s)] if isinstance(s, Write) else [])
        for s in steps
    ]


def carry(
    steps: Sequence[Step],
    writes: Writes,
    rows: Rows,
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
    stack = None
    used = 0 if after_each is None else len(rows)
    e = injected_e = None  # the prelude's components, and what they inject
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
        elif isinstance(step, EnterLoop):
            e = live.clone()
            if step.anew:
                live.zero_()
        elif isinstance(step, Inject):
            state_map, e_map = _injection(writes)
            live.copy_(live @ state_map.T)
            if e is not None:
                injected_e = e @ e_map.T if injected_e is None else injected_e
                stack[: len(e)] += injected_e
        if after_each is not None and not isinstance(step, Place):
            after_each(live)
    return stack


def project(
    steps: Sequence[Step], writes: Writes, rows: Rows, onto: Float[Tensor, "... d_model out"]
) -> Float[Tensor, "row ... out"] | None:
    """Each row of :func:`carry` times ``onto``, by pulling ``onto`` back through the steps.

    Args:
        steps, writes, rows: As for :func:`carry`.
        onto: Directions, the same everywhere or of each position.

    Returns:
        None if no write is wanted.
    """
    planned = _rows(steps, writes, rows)
    out = None
    for_e = torch.zeros_like(onto)
    for step, where in reversed(planned):
        if isinstance(step, Write) and where:
            values = writes.projected(step, onto)
            if out is None:
                out = values.new_zeros((len(rows), *values.shape[1:]))
            out.index_add_(0, torch.tensor(where, device=out.device), values)
        elif isinstance(step, Rescale):
            onto = writes.factor(step)[..., None] * onto
        elif isinstance(step, EnterLoop):
            onto = for_e if step.anew else onto + for_e
        elif isinstance(step, Inject):
            state_map, e_map = _injection(writes)
            for_e = for_e + e_map.T @ onto
            onto = state_map.T @ onto
    return out


def _injection(
    writes: Writes,
) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, "d_model d_model"]]:
    """A_s and A_e: the injection's matrix acts on [state, e]."""
    weight = writes.weight(writes.model.injection.weight)
    d = weight.shape[0]
    return weight[:, :d], weight[:, d:]
