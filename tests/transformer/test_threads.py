"""Several threads and one model: every result is the caller's own, or the call is refused."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_looped import InputError, LoopedTransformer
from tl_looped import interventions as iv
from tl_looped.metrics.streaming import stream

COUNTS = (2, 3, 5, 8)
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def model() -> LoopedTransformer:
    cfg = dict(  # noqa: C408
        d_model=16, d_head=4, n_heads=4, n_ctx=32, d_vocab=23, d_mlp=20, n_prelude=1, n_core=2,
        n_coda=1, n_recurrences=3, injection="linear", initial_state="random",
        initial_state_std=0.4, initializer_range=0.3, dtype="float64",
    )  # fmt: skip
    return LoopedTransformer.from_config(cfg)


def in_thread(job: Callable[[], Any]) -> Any:
    """What a job gives in a thread of its own; its error is raised here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(job).result(timeout=60)


def doubled(x: Tensor, hook: Any) -> Tensor:
    return 2 * x


def ways(model: LoopedTransformer) -> dict[str, Callable[[int], Tensor]]:
    """Everything that runs with a number of recurrences of its own."""

    def cached(n: int) -> Tensor:
        out, cache = model.run_with_cache(TOKENS, n_recurrences=n)
        assert cache.loop.with_recurrences(n) == cache.loop
        assert f"recurrence.{n - 1}.hook_state_out" in cache
        return out

    hook = ("recurrence.1.hook_state_out", doubled)
    return {
        "forward": lambda n: model(TOKENS, n_recurrences=n),
        "cached": cached,
        "hooked": lambda n: model.run_with_hooks(TOKENS, n_recurrences=n, fwd_hooks=[hook]),
        "generated": lambda n: model.generate(
            TOKENS, 4, n_recurrences=n, do_sample=False, verbose=False
        ),
        "streamed": lambda n: torch.cat(
            list(
                model.generate_stream(TOKENS, 4, 1, n_recurrences=n, do_sample=False, verbose=False)
            ),
            1,
        ),
        "size": lambda n: torch.tensor(model.estimate_cache_bytes("residual", n_recurrences=n)),
        "metrics": lambda n: torch.tensor(
            stream(model, TOKENS, ["residual_mean"], n_recurrences=n).residual_mean.values
        ),
    }


def test_every_thread_gets_its_own_number_of_recurrences(model: LoopedTransformer) -> None:
    with torch.no_grad():
        jobs = [(name, n) for name in ways(model) for n in COUNTS] * 2
        want = {(name, n): run(n) for name, run in ways(model).items() for n in COUNTS}

        def run(job: tuple[str, int]) -> Tensor:
            with torch.no_grad():
                return ways(model)[job[0]](job[1])

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, jobs))
    for job, result in zip(jobs, found, strict=True):
        torch.testing.assert_close(result, want[job], rtol=1e-12, atol=1e-12)
    assert (model.loop.R, model.cfg.n_recurrences, len(model.blocks)) == (3, 3, 8)


def test_a_run_waits_for_another_threads_run(model: LoopedTransformer) -> None:
    want = model(TOKENS)
    begun, over, waited = threading.Event(), threading.Event(), []

    def other() -> Tensor:
        begun.set()
        logits = model(TOKENS)
        over.set()
        return logits

    with ThreadPoolExecutor(1) as pool:

        def hold(x: Tensor, hook: Any) -> Tensor:
            waited.append(pool.submit(other))
            begun.wait(10)
            assert not over.wait(0.1)
            return 2 * x

        hooks = [("recurrence.4.hook_state_out", hold)]
        edited = model.run_with_hooks(TOKENS, n_recurrences=8, fwd_hooks=hooks)
        assert torch.equal(waited[0].result(timeout=60), want)
    hooks = [("recurrence.4.hook_state_out", doubled)]
    assert torch.equal(edited, model.run_with_hooks(TOKENS, n_recurrences=8, fwd_hooks=hooks))


CONTEXTS: dict[str, Callable[[LoopedTransformer], Any]] = {
    "hooks": lambda model: model.hooks([("blocks.0.hook_resid_post", doubled)]),
    "readers": lambda model: model.readers([("blocks.0.hook_resid_post", lambda x, hook: None)]),
    "recurrences": lambda model: model.with_recurrences(7),
    "intervening": lambda model: model.intervening(iv.SkipRecurrences(1)),
}
USES: dict[str, Callable[[LoopedTransformer], Any]] = {
    "forward": lambda model: model(TOKENS),
    "run_with_cache": lambda model: model.run_with_cache(TOKENS),
    "run_with_hooks": lambda model: model.run_with_hooks(TOKENS),
    "generate": lambda model: model.generate(TOKENS, 1, verbose=False),
    "generate_stream": lambda model: next(model.generate_stream(TOKENS, 1, verbose=False)),
    "estimate": lambda model: model.estimate_cache_bytes(),
    "set_recurrences": lambda model: model.set_recurrences(5),
    "flag": lambda model: model.set_use_attn_result(True),
    "add_hook": lambda model: model.add_hook("blocks.0.hook_resid_post", doubled),
    "reset_hooks": lambda model: model.reset_hooks(),
    "step by step": lambda model: model.start_run(TOKENS, 0),
    "deepcopy": copy.deepcopy,
    **{name: lambda model, c=context: c(model).__enter__() for name, context in CONTEXTS.items()},
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_an_open_context_keeps_other_threads_out(model: LoopedTransformer, context: str) -> None:
    want = model(TOKENS)
    with CONTEXTS[context](model):
        inside = model(TOKENS)
        for use in USES.values():
            with pytest.raises(InputError):
                in_thread(lambda use=use: use(model))
        assert torch.equal(model(TOKENS), inside)
    assert torch.equal(in_thread(lambda: model(TOKENS)), want)
    assert not any(point.fwd_hooks for point in model.all_hook_points())


def test_within_a_turn_contexts_are_waited_for(model: LoopedTransformer) -> None:
    want, opened = model(TOKENS), threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def other() -> Tensor:
            opened.wait(10)
            return model(TOKENS)

        waiting = pool.submit(other)
        with model.turn, model.hooks([("blocks.0.hook_resid_post", doubled)]):
            opened.set()
            assert not torch.equal(model(TOKENS), want)
            assert not waiting.done()
        assert torch.equal(waiting.result(timeout=60), want)


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_generator_that_another_thread_ends_leaves_nothing(
    model: LoopedTransformer, context: str
) -> None:
    want = model(TOKENS)

    def runs() -> Iterator[Tensor]:
        with CONTEXTS[context](model):
            while True:
                yield model(TOKENS)

    left_open, resumed = runs(), runs()
    next(resumed)
    next(left_open)  # the same thread may nest them
    in_thread(left_open.close)  # ... and the other still has the model
    with pytest.raises(InputError):
        in_thread(lambda: model(TOKENS))
    with pytest.raises(InputError):
        in_thread(lambda: next(resumed))
    model.reset_hooks()
    model.set_recurrences(3)
    for run in (lambda: model(TOKENS), lambda: in_thread(lambda: model(TOKENS))):
        assert torch.equal(run(), want)
    assert model.interventions == ()
    assert all(point.reader is None for point in model.hook_dict.values())


def test_streams_of_one_model_go_on_side_by_side(model: LoopedTransformer) -> None:
    options: dict[str, Any] = {"do_sample": False, "verbose": False}
    want = [model.generate(TOKENS, 6, n_recurrences=n, **options)[:, 5:] for n in (2, 8)]
    streams = [model.generate_stream(TOKENS, 6, 1, n_recurrences=n, **options) for n in (2, 8)]
    pieces = [[in_thread(lambda s=s: next(s)) for s in streams] for _ in range(6)]
    for parts, tokens in zip(zip(*pieces, strict=True), want, strict=True):
        assert torch.equal(torch.cat(parts, 1)[:, 5:], tokens)


def test_recurrences_one_by_one_refuse_another_number(model: LoopedTransformer) -> None:
    x, run = model.start_run(TOKENS, 0)
    states = model.unroll(x, run)
    next(states)
    in_thread(lambda: model(TOKENS, n_recurrences=1))
    _, cache = model.run_with_cache(TOKENS, state_seed=0)
    want = cache["recurrence.1.hook_state_out"]
    torch.testing.assert_close(next(states), want, rtol=1e-12, atol=1e-12)
    model.set_recurrences(2)
    with pytest.raises(InputError):
        next(states)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copy_has_turns_of_its_own(
    model: LoopedTransformer, copied: Callable[[LoopedTransformer], LoopedTransformer]
) -> None:
    with model.with_recurrences(5):
        other, want = copied(model), model(TOKENS)
        assert torch.equal(in_thread(lambda: other(TOKENS)), want)
    assert (model.loop.R, other.loop.R) == (3, 5)


def in_fork(job: Callable[[], bool]) -> bool:
    """Whether a job is true in a forked process."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            torch.set_num_threads(1)
            code = 0 if job() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads, on purpose
def test_a_fork_runs_unless_it_stands_in_another_threads_run(model: LoopedTransformer) -> None:
    want, begun, go = model(TOKENS), threading.Event(), threading.Event()
    assert in_fork(lambda: torch.equal(model(TOKENS), want))
    with model.with_recurrences(5):
        inside = model(TOKENS)
        assert in_fork(lambda: torch.equal(model(TOKENS), inside))

    def hold(x: Tensor, hook: Any) -> None:
        begun.set()
        go.wait(60)

    def refused() -> bool:
        with pytest.raises(InputError):
            model(TOKENS)
        return True

    hooks = [("hook_embed", hold)]
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(lambda: model.run_with_hooks(TOKENS, fwd_hooks=hooks))
        begun.wait(60)
        found = in_fork(refused)
        go.set()
        assert torch.equal(run.result(timeout=60), want)
    assert found
