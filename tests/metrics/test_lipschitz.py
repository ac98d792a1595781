"""Bounds on the change of attention: they hold, and the first two only where they may."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import SAME
from conftest import Golden, load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_looped.errors import InputError, MissingActivationError
from tl_looped.metrics.lipschitz import attention_lipschitz_bounds, attention_lipschitz_from_cache

HOOKS = ("hook_resid_pre", "ln1.hook_normalized", "hook_rot_q", "hook_rot_k", "hook_pattern")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_bounds_of_two_tokens_by_hand() -> None:
    """One dimension, q = k = x: row 0 is (1, 0); row 1 is a softmax over x1 x0 and x1^2."""
    x, before = torch.tensor([[[0.0], [1.0]]]).double(), torch.tensor([[[0.0], [2.0]]]).double()
    one = torch.ones(1, 1, 1).double()
    found = attention_lipschitz_bounds(x, before, one, one)
    change = 1 / (1 + math.exp(-4)) - 1 / (1 + math.exp(-1))
    assert found.change.item() == pytest.approx(math.sqrt(2) * change)
    assert found.paper.item() == pytest.approx(2.0)
    assert found.spectral.item() == pytest.approx(1.5)
    assert found.queries_keys.item() == pytest.approx(1.5)
    assert found.ratios["spectral"].item() == pytest.approx(math.sqrt(2) * change / 1.5)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.integers(0, 10**6), st.floats(1e-4, 3), st.floats(0.1, 5), st.sampled_from([(1, 1), (3, 2)])
)
def test_all_three_hold_for_plain_attention_and_are_ordered(
    seed: int, moved: float, size: float, heads: tuple[int, int]
) -> None:
    x = draw(seed, 2, 5, 6) * size
    before = x + moved * draw(seed + 1, 2, 5, 6)
    W_Q, W_K = draw(seed + 2, heads[0], 6, heads[1]), draw(seed + 3, heads[0], 6, heads[1])
    found = attention_lipschitz_bounds(x, before, W_Q, W_K)
    for ratio in found.ratios.values():
        assert (ratio <= 1).all()
    assert (found.spectral <= found.paper * (1 + 1e-12)).all()


def test_nothing_moved_gives_no_ratio_and_a_non_finite_prompt_is_nan() -> None:
    x, W = draw(0, 2, 5, 6), draw(1, 2, 6, 3)
    still = attention_lipschitz_bounds(x, x, W, W)
    assert not still.change.any()
    assert not still.queries_keys.any()
    assert still.ratios["paper"].isnan().all()
    bad = x.clone()
    bad[1, 2, 0] = math.nan
    found = attention_lipschitz_bounds(bad, x + 0.1, W, W)
    assert found.change[1].isnan().all()
    assert found.queries_keys[1].isnan().all()
    assert found.spectral[1].isnan().all()
    assert found.ratios["spectral"][0].isfinite().all()


def test_padding_changes_nothing_on_either_side() -> None:
    x, before, W_Q, W_K = draw(0, 1, 5, 6), draw(1, 1, 5, 6), draw(2, 2, 6, 3), draw(3, 2, 6, 3)
    alone = attention_lipschitz_bounds(x, before, W_Q, W_K)
    for left in (0, 2):
        pad = (0, 0, left, 2 - left)
        wide = [torch.nn.functional.pad(a, pad, value=math.nan) for a in (x, before)]
        mask = torch.nn.functional.pad(torch.ones(1, 5), (left, 2 - left))
        found = attention_lipschitz_bounds(*wide, W_Q, W_K, attention_mask=mask)
        for name in ("change", "paper", "spectral", "queries_keys"):
            torch.testing.assert_close(getattr(found, name), getattr(alone, name))


def test_given_queries_and_keys_are_the_plain_ones_when_they_are_x_w() -> None:
    x, before, W_Q, W_K = draw(0, 2, 5, 6), draw(1, 2, 5, 6), draw(2, 2, 6, 3), draw(3, 2, 6, 3)
    plain = attention_lipschitz_bounds(x, before, W_Q, W_K)
    project = [torch.einsum("btd,hdk->bthk", a, W) for a in (x, before) for W in (W_Q, W_K)]
    found = attention_lipschitz_bounds(x, before, W_Q, W_K, *project, assume_plain=True)
    for name in ("change", "paper", "spectral", "queries_keys"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name))
    careful = attention_lipschitz_bounds(x, before, W_Q, W_K, *project)
    assert careful.paper.isnan().all()
    assert careful.spectral.isnan().all()


def test_wrong_input_names_the_argument() -> None:
    x, W = draw(0, 2, 5, 6), draw(1, 2, 6, 3)
    with pytest.raises(InputError, match="q, k, q_before"):
        attention_lipschitz_bounds(x, x, W, W, q=draw(0, 2, 5, 2, 3))
    few = draw(0, 2, 5, 1, 3)
    with pytest.raises(InputError, match="Repeat grouped keys"):
        attention_lipschitz_bounds(x, x, W, W, few, few, few, few)


def test_the_bound_of_queries_and_keys_holds_in_every_reference_case(golden: Golden) -> None:
    model = golden.load(dtype=torch.float64)
    _, cache = model.run_with_cache(
        golden.tokens, names_filter=lambda name: name.endswith(HOOKS), **golden.run
    )
    ratios = []
    for r in range(1, model.loop.R):
        for layer in range(model.loop.k):
            found = attention_lipschitz_from_cache(cache, layer, r)
            patterns = [cache["pattern", (s, layer)].double() for s in (r, r - 1)]
            actual = (patterns[0] - patterns[1]).flatten(-2).norm(dim=-1)
            torch.testing.assert_close(found.change, actual, atol=SAME, rtol=SAME)
            assert found.paper.isnan().all()
            assert found.spectral.isnan().all()
            ratios.append(found.ratios["queries_keys"])
    worst = torch.stack(ratios)
    assert (worst <= 1).all()
    assert worst.max() > 0.01


def test_a_cache_without_the_hooks_or_the_recurrence_says_so() -> None:
    golden = load_golden("ouro")
    model = golden.load()
    _, cache = model.run_with_cache(golden.tokens, names_filter=lambda n: n.endswith("rot_q"))
    with pytest.raises(MissingActivationError, match=r"ln1\.hook_normalized"):
        attention_lipschitz_from_cache(cache, 0, 1)
    with pytest.raises(InputError, match=r"recurrence.*\b1\b"):
        attention_lipschitz_from_cache(cache, 0, 0)


@pytest.mark.parametrize("folded", [False, True])
def test_the_attention_input_has_the_gain_once(folded: bool) -> None:
    golden = load_golden("ouro")
    model = golden.load()
    if folded:
        model.enable_compatibility_mode()
    _, cache = model.run_with_cache(golden.tokens, names_filter=lambda n: n.endswith(HOOKS))
    found = attention_lipschitz_from_cache(cache, 1, 2, assume_plain=True)
    layer = golden.load().blocks[model.loop.index(2, 1)]
    x, before = (cache["normalized", (r, 1), "ln1"] * layer.ln1.w for r in (2, 1))
    weights = layer.attn.W_Q, layer.attn.W_K
    plain = attention_lipschitz_bounds(x, before, *weights)
    if folded:  # the gain is part of W: the product is one, the split into B and kappa another
        gain = layer.ln1.w[:, None]
        x, before = (cache["normalized", (r, 1), "ln1"] for r in (2, 1))
        plain = attention_lipschitz_bounds(x, before, gain * weights[0], gain * weights[1])
    torch.testing.assert_close(found.spectral, plain.spectral)
    torch.testing.assert_close(found.paper, plain.paper)
