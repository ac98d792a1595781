"""Runs of a looped model from one state to the next.

The steps themselves are :mod:`tl_looped.model.program`'s, and running them is
:mod:`tl_looped.model.running`'s; here a training step runs them recurrence by recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.errors import InputError
from tl_looped.model.cells import State, Stream
from tl_looped.model.context import LoopRun, RunContext
from tl_looped.model.running import execute
from tl_looped.transformer.intervening import InterveningMixin
from tl_looped.transformer.prompt import check_tokens
from tl_looped.transformer.turns import in_turn


class LoopMixin(InterveningMixin):
    """Runs step by step."""

    @in_turn
    def start_run(
        self, tokens: Int[Tensor, "batch pos"], state_seed: int
    ) -> tuple[Stream, LoopRun]:
        """The embedding of tokens without padding and a run for it, for :meth:`unroll`."""
        self._refuse_interventions("a run step by step (training)")
        tokens = check_tokens(self, tokens)
        if tokens.shape[1] > self.cfg.n_ctx:
            raise InputError(
                f"a sequence of {tokens.shape[1]} tokens is longer than the context of "
                f"{self.cfg.n_ctx}"
            )
        x = self.hook_embed(self.embed(tokens))
        context = RunContext.build(self.cfg, x.shape[1], None, x.device, x.dtype)
        return x, LoopRun(context, self.program, None, state_seed)

    def unroll(self, x: Stream, run: LoopRun, backprop_last: int | None = None) -> Iterator[State]:
        """The state after each recurrence, from the embedding; the same numbers as a whole run.

        ``run.gate`` holds the gate logits of the state that was just given, in models with a gate.

        Args:
            x: The embedding, from :meth:`start_run`.
            run: Its run.
            backprop_last: Recurrences at the end that keep a graph. The earlier ones run without
                one, so their states are constants to autograd and their memory is free at once;
                the exit gate still has a graph there, on the state as a constant. The prelude
                always keeps its graph: each injection reads its output. All recurrences if None.
        """
        states, R = self._unroll(x, run, backprop_last), None
        while True:
            with self.turn:  # between the states another thread may have one
                R = self.loop.R if R is None else R
                if self.loop.R != R:
                    raise InputError(
                        f"the model went from {R} to {self.loop.R} recurrences while they were run "
                        "one by one: take the next state first, and set_recurrences afterwards"
                    )
                state = next(states, None)
            if state is None:
                return
            yield state
            del state  # not held while the next one is computed

    def _unroll(self, x: Stream, run: LoopRun, backprop_last: int | None) -> Iterator[State]:
        """As :meth:`unroll`, within one turn."""
        program, parts, wanted = run.program, self.parts, torch.is_grad_enabled()
        n_recurrences = program.loop.R
        n = n_recurrences if backprop_last is None else backprop_last
        run.trains_gate = wanted
        x = execute(program.up_to_loop, x, run, parts)
        for r in range(n_recurrences):
            # Left before each yield: a generator must not hold the caller's gradient mode.
            with _with_graph(wanted and r >= n_recurrences - n):
                x = execute(program.recurrence(r), x, run, parts)
            yield self._home(x)

    @in_turn
    def read_out(self, state: State, run: LoopRun) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a state that has left its recurrence, as :meth:`unroll` gives it."""
        return execute(run.program.after_loop, state, run, self.parts)


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
