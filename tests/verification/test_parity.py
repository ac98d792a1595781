"""Bounds that come from the run: what is rounding, what is not, and ties between greedy tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import VARIANTS, random_config

from tl_looped import LoopedTransformer
from tl_looped.adapters import Source
from tl_looped.model.rotary import inverse_frequencies
from tl_looped.verification import Outcome
from tl_looped.verification.parity import (
    Ours,
    Runs,
    Theirs,
    difference,
    in_dtype,
    norms_of,
    parity,
    plan_runs,
    run_ours,
)
from tl_looped.verification.rounding import MARGIN

EPS = torch.finfo(torch.float32).eps


def test_the_bound_is_that_of_the_rounding_and_never_below_one_rounding() -> None:
    exact = torch.tensor([1.0, -4.0, 0.0], dtype=torch.float64)
    rounded = exact.float() + torch.tensor([0.0, 1e-5, 0.0])
    error = float((rounded.double() - exact).abs().max())
    assert difference(exact.float(), exact, rounded).bound == pytest.approx(MARGIN * error)
    assert difference(exact.float(), exact, exact.float()).bound == MARGIN * EPS * 4.0
    off = exact.clone()
    off[2] = 0.9 * MARGIN * error
    assert difference(off, exact, rounded).holds
    off[2] = 1.1 * MARGIN * error
    assert not difference(off, exact, rounded).holds
    off[2] = float("nan")
    assert not difference(off, exact, rounded).holds
    zeros = torch.zeros(2, dtype=torch.float64)
    assert difference(zeros, zeros, zeros).holds


@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_are_what_a_model_can_run(variant: str) -> None:
    tokens = torch.arange(40).reshape(4, 10) % 50
    model = LoopedTransformer.from_config(random_config(**VARIANTS[variant]))
    runs = plan_runs(model, tokens)
    assert runs.n_recurrences == (4, 1, 8)
    assert (runs.state is not None) == (model.cfg.initial_state.value == "random")
    assert runs.prompt.shape[1] + runs.n_greedy <= model.cfg.n_ctx
    ours = run_ours(model, runs, [], lambda n: None)
    assert ours.greedy.shape == (1, runs.prompt.shape[1] + runs.n_greedy)
    small = plan_runs(LoopedTransformer.from_config(random_config(n_ctx=1)), tokens)
    assert (small.tokens.shape[1], small.prompt.shape[1], small.n_greedy) == (1, 1, 0)


@pytest.mark.parametrize("gain", ["weight", "w", "scale_weight"])
def test_a_norm_is_the_module_that_holds_its_gain_whatever_that_is_called(gain: str) -> None:
    model = LoopedTransformer.from_config(random_config())
    names = [name for name in model.state_dict() if name.endswith(("ln1.w", "final_norm.w"))]
    assert len(names) > 1
    sources = {name: Source((f"net.{name.removesuffix('.w')}.{gain}",)) for name in names}
    expected = {name.removesuffix(".w"): f"net.{name.removesuffix('.w')}" for name in names}
    assert norms_of(model, sources) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = LoopedTransformer.from_config(random_config(dtype=dtype))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with in_dtype(model, torch.float64):
        assert model.cfg.dtype == torch.float64
    assert model.cfg.dtype == dtype
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def the_same(model: LoopedTransformer, ours: Ours) -> Theirs:
    logits = {n: narrow for n, (_, narrow) in ours.logits.items()}
    return Theirs(logits, {}, ours.greedy, {}, inverse_frequencies(model.cfg))


def found(model: LoopedTransformer, runs: Runs, ours: Ours, theirs: Theirs) -> Outcome:
    return parity(model, {}, runs, ours, theirs, "how", {}).outcome


def test_a_tie_of_greedy_tokens_is_no_difference_and_another_token_is() -> None:
    model = LoopedTransformer.from_config(random_config(tie_embeddings=False))
    runs = plan_runs(model, torch.arange(10)[None])
    first = runs.prompt.shape[1]
    ours = run_ours(model, runs, [], lambda n: None)
    chosen = int(ours.greedy[0, first])
    other = (chosen + 1) % model.cfg.d_vocab
    assert found(model, runs, ours, the_same(model, ours)) is Outcome.EXACT
    theirs = with_token(the_same(model, ours), first, other)
    assert found(model, runs, ours, theirs) is Outcome.WRONG
    with torch.no_grad():  # two tokens with one row of the unembedding are equally likely
        model.unembed.weight[other] = model.unembed.weight[chosen]
    ours = run_ours(model, runs, [], lambda n: None)
    (either,) = {chosen, other} - {int(ours.greedy[0, first])}
    theirs = with_token(the_same(model, ours), first, either)
    assert found(model, runs, ours, theirs) is Outcome.EXACT


def with_token(theirs: Theirs, at: int, token: int) -> Theirs:
    greedy = theirs.greedy.clone()
    greedy[0, at] = token
    return replace(theirs, greedy=greedy)


def test_a_prompt_that_differs_and_other_frequencies_are_wrong() -> None:
    model = LoopedTransformer.from_config(random_config())
    runs = plan_runs(model, torch.arange(10)[None])
    ours = run_ours(model, runs, [], lambda n: None)
    same = the_same(model, ours)
    assert found(model, runs, ours, same) is Outcome.EXACT
    for theirs in (
        with_token(same, 0, 1),
        replace(same, frequencies=same.frequencies[:-1]),
        replace(same, frequencies=same.frequencies * (1 + 1e-5)),
    ):
        assert found(model, runs, ours, theirs) is Outcome.WRONG
