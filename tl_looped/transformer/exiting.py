"""Leaving the loop early, token by token, as an exit rule says.

The loop goes on for the whole batch until every token has left, so compute is saved when the last
one leaves. A token that has left keeps its state; the others still see its keys and values at every
recurrence that is run. Then one pass through the coda reads all states, each at its own recurrence.

With a key-value cache a row leaves as a whole, by its last position, and its keys and values stay
at that recurrence, so that a row gives what it gives alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.context import LoopRun
from tl_looped.model.exit_rules import ExitRule, ExitTracker
from tl_looped.transformer.lenses import exit_logits
from tl_looped.transformer.unrolling import read_out, unroll_in_turn

if TYPE_CHECKING:
    from tl_looped.transformer.looped_transformer import LoopedTransformer


def run_with_exits(
    model: LoopedTransformer,
    x: Float[Tensor, "batch pos d_model"],
    run: LoopRun,
    rule: ExitRule,
    mask: Bool[Tensor, "batch pos"] | None,
) -> tuple[Float[Tensor, "batch pos d_vocab"], Int[Tensor, "batch pos"]]:
    """Logits, and the recurrence after which each token left (-1 at padding)."""
    loop, kv = model.loop, run.context.kv
    if kv is not None and mask is not None and not bool(mask[:, -1].all()):
        raise InputError(
            "with past_kv_cache a row leaves the loop by its last position, and some rows end "
            "in padding: pad on the left"
        )
    if model._record is not None:
        model._record.early_exit = True
    tracker = ExitTracker(rule, kv is not None, mask)
    for r, state in enumerate(unroll_in_turn(model, x, run, None)):
        logits = partial(exit_logits, model, state, run, kv is not None)
        tracker.update(r, r == loop.R - 1, state, logits, run.gate)
        if kv is not None:
            kv.left = tracker.has_left[:, -1]
        if tracker.all_left:
            break
    assert tracker.state is not None
    assert tracker.steps is not None
    logits_out = read_out(model, tracker.state, run)
    steps = tracker.steps if mask is None else tracker.steps.masked_fill(~mask, -1)
    return logits_out, steps
