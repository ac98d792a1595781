"""The forward pass between embedding and logits: the loop and its boundaries.

Everything that happens between two blocks (the start of the loop, the injection, the loop norm, the
norm before the coda) is the *boundary before* an effective layer. ``stop_at_layer=i`` returns what
layer i would have received, boundary included, and ``start_at_layer=i`` takes exactly that, so that
the two compose to the whole run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_looped.errors import InputError
from tl_looped.model.block import Block, BlockWeights
from tl_looped.model.config import InitialState, Injection
from tl_looped.model.context import RunContext
from tl_looped.model.devices import beside
from tl_looped.model.geometry import LayerLocation
from tl_looped.model.hook_points import has_torch_hooks
from tl_looped.model.initial_state import draw_initial_state
from tl_looped.model.norms import NormWeights
from tl_looped.transformer.intervening import InterveningMixin
from tl_looped.transformer.loop_run import LoopRun, Stream
from tl_looped.transformer.pool import RecurrenceHooks
from tl_looped.transformer.prompt import check_tokens
from tl_looped.transformer.turns import in_turn


class LoopMixin(InterveningMixin):
    """Blocks, loop boundaries and the head."""

    injection: nn.Linear
    final_norm: NormWeights
    exit_gate: nn.Linear
    _stages_without_hooks: dict[str, list[Block]]

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
        return x, LoopRun(context, None, state_seed)

    def unroll(self, x: Stream, run: LoopRun, backprop_last: int | None = None) -> Iterator[Stream]:
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

    def _unroll(self, x: Stream, run: LoopRun, backprop_last: int | None) -> Iterator[Stream]:
        """As :meth:`unroll`, within one turn."""
        loop, wanted = self.loop, torch.is_grad_enabled()
        n = loop.R if backprop_last is None else backprop_last
        run.trains_gate = wanted
        x = self._enter_loop(self._run_layers(x, run, 0, loop.p, enter_first=True), run)
        for r in range(loop.R):
            first = loop.index(r, 0)
            # Left before each yield: a generator must not hold the caller's gradient mode.
            with _with_graph(wanted and r >= loop.R - n):
                x = self._enter_recurrence(r, x, run)
                x = self._run_layers(x, run, first, first + loop.k, enter_first=False)
                x = self._leave_recurrence(r, x, run)
            yield self._home(x)

    @in_turn
    def read_out(self, state: Stream, run: LoopRun) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a state that has left its recurrence, as :meth:`unroll` gives it."""
        if self.cfg.pre_coda_norm:
            state = self.ln_pre_coda(state)
        n = self.loop.n_layers
        return self._unembed_final(
            self._run_layers(state, run, n - self.loop.c, n, enter_first=False)
        )

    def _run_layers(
        self, x: Stream, run: LoopRun, start: int, stop: int, enter_first: bool
    ) -> Stream:
        """Blocks ``start`` to ``stop - 1`` with their boundaries; the first one's if asked."""
        loop, context = self.loop, run.context
        # One walk over the list: indexing it costs as much as a norm.
        for i, block in enumerate(islice(self.blocks, start, stop), start):
            if loop.has_boundary(i) and (i > start or enter_first):
                x = self._enter_layer(i, x, run)
            x = block(x, context)
        return x

    def _enter_layer(self, i: int, x: Stream, run: LoopRun) -> Stream:
        """The boundary before effective layer ``i``."""
        for event, r in self.loop.boundary(i):
            if event == "enter_loop":
                x = self._enter_loop(x, run)
            elif event == "leave":
                x = self._leave_recurrence(cast(int, r), x, run)
            elif event == "enter":
                x = self._enter_recurrence(cast(int, r), x, run)
            elif self.cfg.pre_coda_norm:
                x = self.ln_pre_coda(x)
        return x

    def _enter_loop(self, e: Stream, run: LoopRun) -> Stream:
        """The prelude is done: keep its output, start the state."""
        run.prelude_output = e
        return self.hook_initial_state(self._start(e, run))

    def _start(self, e: Stream, run: LoopRun) -> Stream:
        """The initial state of a run, as no hook has seen it yet."""
        if run.initial_state is not None:
            if run.initial_state.shape[0] not in (1, e.shape[0]):
                raise InputError(
                    f"the initial state has {run.initial_state.shape[0]} rows, the run "
                    f"{e.shape[0]}: give one a row, or one for all"
                )
            return run.initial_state.to(e).expand(e.shape)
        if self.cfg.initial_state is InitialState.RANDOM:
            return self.random_initial_state(run)
        return e

    def random_initial_state(self, run: LoopRun) -> Stream:
        """The state drawn for a run's seed and positions, one row a sequence."""
        cfg, positions = self.cfg, run.context.positions
        if cfg.initial_state_std == 0.0:
            shape = (*positions.shape, cfg.d_model)
            state = self.W_E.new_zeros(shape)
        else:
            state = draw_initial_state(
                run.state_seed, positions, cfg.d_model, cfg.initial_state_scale, cfg.dtype
            )
        assert run.prelude_output is not None
        return state.to(run.prelude_output).expand(run.prelude_output.shape)

    def _enter_recurrence(
        self, r: int, state: Stream, run: LoopRun, once_more: bool = False
    ) -> Stream:
        """The start of recurrence ``r``; ``once_more`` if it is repeated."""
        hooks = self._recurrence_hooks(r)
        state = hooks.hook_state_in(state)
        if self.cfg.injection is Injection.NONE:
            return state
        if r == run.first and not once_more and self._skips_first_adapter(run):
            return hooks.hook_injected(state)
        if run.prelude_output is None:
            raise InputError(
                f"start_at_layer lies in the loop, and recurrence {r} injects the prelude's output:"
                " pass it as prelude_output= (hook_resid_post of the last prelude layer)"
            )
        if self.cfg.n_devices > 1:
            weight = self.injection.weight
            state, run.prelude_output = beside(state, weight), beside(run.prelude_output, weight)
        e = run.prelude_output
        if r in run.injection_factors:
            e = e * run.injection_factors[r]
        # One product over the concatenation, as the reference rounds it in half precision.
        both = torch.cat((state, e), -1)
        alone = self._injection_alone(both)
        injected = self.injection(both)
        if alone is not None and self._record is not None:
            self._record.log.compare(hooks.hook_injected.name, alone, injected)
        return hooks.hook_injected(injected)

    def _injection_alone(self, both: Tensor) -> Tensor | None:
        """What the injection gives without torch hooks; None if it has none, or nobody asks."""
        if self._record is None or not has_torch_hooks(self.injection):
            return None
        return nn.functional.linear(both, self.injection.weight)

    def _skips_first_adapter(self, run: LoopRun) -> bool:
        """Whether the first recurrence that acts takes the state as it is."""
        skip = self.cfg.initial_state is InitialState.PRELUDE_SKIP_ADAPTER
        return skip and run.initial_state is None

    def _leave_recurrence(self, r: int, x: Stream, run: LoopRun) -> Stream:
        """The end of recurrence ``r``, and of its repetitions."""
        x = self._close_recurrence(r, x, run)
        first = self.loop.p + r * self.loop.k
        for _ in range(run.repeats.get(r, 0)):
            x = self._enter_recurrence(r, x, run, once_more=True)
            x = self._run_layers(x, run, first, first + self.loop.k, enter_first=False)
            x = self._close_recurrence(r, x, run)
        return x

    def _close_recurrence(self, r: int, x: Stream, run: LoopRun) -> Stream:
        """Loop norm, state and gate at the end of recurrence ``r``."""
        hooks = self._recurrence_hooks(r)
        if self._ends_in_loop_norm and r == self.loop.R - 1:
            # The state has the gain, also where the unembedding shows it as its own.
            x = self.ln_final.with_folded_gain(self.ln_final(x, hooks.ln_loop))
        elif self.cfg.loop_norm:
            x = hooks.ln_loop(x)
        x = hooks.hook_state_out(x)
        if self.cfg.exit_gate:
            read = x if self.cfg.n_devices == 1 else beside(x, self.exit_gate.weight)
            with torch.set_grad_enabled(torch.is_grad_enabled() or run.trains_gate):
                run.gate = self._home(hooks.hook_exit_gate(self.exit_gate(read)))
        return x

    @property
    def _ends_in_loop_norm(self) -> bool:
        """Whether the last loop norm is also the final norm (Ouro)."""
        return self.loop.c == 0 and self.cfg.loop_norm

    def _head(self, x: Stream, run: LoopRun) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits from the last block's output, closing the loop first if there is no coda."""
        if self.loop.c == 0:
            x = self._leave_recurrence(self.loop.R - 1, x, run)
        return self._unembed_final(x)

    def _unembed_final(self, x: Stream) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the final stream, behind the loop norm where that is the final norm."""
        if self._ends_in_loop_norm:
            return self._home(self.unembed(x, has_gain=True))
        return self._home(self.unembed(self.ln_final(x)))

    def _recurrence_hooks(self, r: int) -> RecurrenceHooks:
        return self._recurrence_pool[r]

    def _silent_blocks(self, stage: str) -> list[Block]:
        """A stage's layers without hooks: blocks of their own on the same weights."""
        # Past nn.Module.__setattr__: they hold no parameters and are no part of the model.
        if getattr(self, "_stages_without_hooks", None) is None:
            object.__setattr__(self, "_stages_without_hooks", {})
        stages = self._stages_without_hooks
        if stage not in stages:
            recurrence = 0 if stage == "core" else None
            layers = cast(Iterable[BlockWeights], self._modules[stage])
            stages[stage] = [
                Block(self.cfg, weights, LayerLocation(stage, recurrence, i))
                for i, weights in enumerate(layers)
            ]
        return stages[stage]


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
