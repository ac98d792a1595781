"""The random initial state: its distribution, and that it depends on seed and position alone."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from closeness import assert_same
from conftest import VARIANTS, exact_config, load_golden

from tl_looped import InputError, LoopedTransformer
from tl_looped.model.initial_state import truncated_normal


def test_moments_of_a_normal_cut_at_three_sigma() -> None:
    draw = truncated_normal(seed=1, start=0, stop=2000, d=128)
    assert draw.abs().max() <= 3
    assert draw.abs().max() > 2.99
    n = draw.numel()
    assert abs(draw.mean()) < 4 / math.sqrt(n)
    # The variance of a standard normal cut at c is 1 - 2 c phi(c) / (2 Phi(c) - 1).
    phi = math.exp(-4.5) / math.sqrt(2 * math.pi)
    variance = 1 - 6 * phi / math.erf(3 / math.sqrt(2))
    assert math.sqrt(variance) == pytest.approx(0.98658, abs=1e-5)
    assert draw.std() == pytest.approx(math.sqrt(variance), abs=4 / math.sqrt(2 * n))


def test_rows_do_not_depend_on_the_range_asked_for() -> None:
    whole = truncated_normal(seed=5, start=0, stop=40, d=13)
    assert torch.equal(truncated_normal(5, 7, 29, 13), whole[7:29])
    assert not torch.equal(truncated_normal(6, 0, 40, 13), whole)
    assert whole.unique().numel() == whole.numel()


def test_known_values_so_that_results_keep_across_versions() -> None:
    draw = truncated_normal(0, 0, 1, 3)[0].tolist()
    assert draw == pytest.approx([-2.2302484, -0.69909299, -1.21347085], abs=1e-8)
    # The same from the standard library's inverse and numpy's own uniforms of that stream.
    normal, uniforms = NormalDist(), np.random.Generator(np.random.Philox(key=0)).random(3)
    low = normal.cdf(-3)
    assert draw == pytest.approx([normal.inv_cdf(low + u * (1 - 2 * low)) for u in uniforms])


@pytest.mark.parametrize("name", ["huginn", "retrofit_llama"])
def test_scale_follows_the_checkpoints_rule(name: str) -> None:
    """Huginn: sqrt(2/5) at any width; retrofits: the stale 0.0087039 of their config."""
    golden = load_golden(name)
    model = golden.load()
    _, cache = model.run_with_cache(golden.tokens, names_filter="hook_initial_state")
    sigma = math.sqrt(2 / 5) if name == "huginn" else 0.008703882797784892
    expected = truncated_normal(0, 0, 11, 64) * sigma
    torch.testing.assert_close(cache["hook_initial_state"][1].double(), expected, atol=1e-6, rtol=0)


@pytest.fixture
def model() -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))


def test_same_seed_same_logits_and_another_seed_other_logits(model, tokens) -> None:
    first = model(tokens, state_seed=3)
    torch.rand(5)  # the global generator has no say
    assert torch.equal(model(tokens, state_seed=3), first)
    assert not torch.allclose(model(tokens, state_seed=4), first)
    model.state_seed = 3
    assert torch.equal(model(tokens), first)


def test_rows_do_not_depend_on_their_batch(model, tokens) -> None:
    together = model(tokens)
    for i in range(len(tokens)):
        assert_same(model(tokens[i : i + 1])[0], together[i])


def test_the_seed_is_recorded_in_the_cache(model, tokens) -> None:
    assert model.run_with_cache(tokens)[1].state_seed == 0
    assert model.run_with_cache(tokens, state_seed=11)[1].state_seed == 11
    zeros = model.run_with_cache(tokens, initial_state="zeros")[1]
    assert zeros.state_seed is None
    assert not zeros["hook_initial_state"].any()


def test_a_recorded_state_reproduces_the_run(model, tokens) -> None:
    name = "hook_initial_state"
    logits, cache = model.run_with_cache(tokens, state_seed=9, names_filter=name)
    assert torch.equal(model(tokens, initial_state=cache["hook_initial_state"]), logits)


def test_a_given_state_is_never_edited_in_place(model, tokens) -> None:
    state = torch.ones(2, 9, 32)

    def overwrite(value, hook):
        value[:] = 5.0
        return value

    with torch.no_grad():
        model.run_with_hooks(
            tokens, initial_state=state, fwd_hooks=[("hook_initial_state", overwrite)]
        )
    assert torch.equal(state, torch.ones(2, 9, 32))


def test_seed_out_of_range_is_an_error(model, tokens) -> None:
    with pytest.raises(InputError, match="state_seed must be from 0"):
        model(tokens, state_seed=-1)
