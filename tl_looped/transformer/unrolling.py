"""Runs of a looped model from one state to the next.

The steps themselves are :mod:`tl_looped.model.program`'s, and running them is
:mod:`tl_looped.model.running`'s; here a training step runs them recurrence by recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.checks import Seed
from tl_looped.errors import InputError
from tl_looped.model.cells import State, Stream
from tl_looped.model.context import LoopRun, RunContext
from tl_looped.model.running import execute
from tl_looped.transformer.intervening import refuse_interventions
from tl_looped.transformer.prompt import check_tokens
from tl_looped.words import count

if TYPE_CHECKING:
    from tl_looped.transformer.looped_transformer import LoopedTransformer


def start_run(
    model: LoopedTransformer, tokens: Int[Tensor, "batch pos"], state_seed: Seed
) -> tuple[Stream, LoopRun]:
    """The embedding of tokens and a run for it."""
    refuse_interventions(model, "a run step by step (training)")
    tokens = check_tokens(model, tokens)
    if tokens.shape[1] > model.cfg.n_ctx:
        raise InputError(
            f"a sequence of {tokens.shape[1]} tokens is longer than the context of "
            f"{model.cfg.n_ctx}"
        )
    x = model.hook_embed(model.embed(tokens))
    context = RunContext.build(model.cfg, x.shape[1], None, x.device, x.dtype)
    return x, LoopRun(context, model.program, None, state_seed)


def unroll(
    model: LoopedTransformer, x: Stream, run: LoopRun, backprop_last: int | None
) -> Iterator[State]:
    """The state after each recurrence; other threads may have a turn in between."""
    states, R = unroll_in_turn(model, x, run, backprop_last), None
    while True:
        with model.turn:  # between the states another thread may have one
            R = model.loop.R if R is None else R
            if model.loop.R != R:
                raise InputError(
                    f"the model went from {R} to {count(model.loop.R, 'recurrence')} while they "
                    "were run one by one: take the next state first, and set_recurrences afterwards"
                )
            state = next(states, None)
        if state is None:
            return
        yield state
        del state  # not held while the next one is computed


def unroll_in_turn(
    model: LoopedTransformer, x: Stream, run: LoopRun, backprop_last: int | None
) -> Iterator[State]:
    """The state after each recurrence, within one turn."""
    program, parts, wanted = run.program, model.parts, torch.is_grad_enabled()
    n_recurrences = program.loop.R
    n = n_recurrences if backprop_last is None else backprop_last
    run.trains_gate = wanted
    x = execute(program.up_to_loop, x, run, parts)
    for r in range(n_recurrences):
        # Left before each yield: a generator must not hold the caller's gradient mode.
        with _with_graph(wanted and r >= n_recurrences - n):
            x = execute(program.recurrence(r), x, run, parts)
        yield model._home(x)


def read_out(
    model: LoopedTransformer, state: State, run: LoopRun
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a state that has left its recurrence."""
    return execute(run.program.after_loop, state, run, model.parts)


@contextmanager
def _with_graph(keep: bool) -> Iterator[None]:
    """Whether what runs keeps a graph; without one, autocast keeps no copy of a weight either.

    PyTorch before 2.11 would give the copy that was cast without a graph to the recurrences that
    keep theirs, and the weight would get no gradient at all.
    """
    cached = torch.is_autocast_cache_enabled()
    with torch.set_grad_enabled(keep):
        torch.set_autocast_cache_enabled(cached and keep)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
