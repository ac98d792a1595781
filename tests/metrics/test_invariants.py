"""What holds for every input: bounds, permutations, scale, rotation, order of a batch."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_looped.metrics import (
    attention_distance,
    colsum_concentration,
    cyclicity_index,
    fixed_point_distance,
    lowest_cosine_to_fixed_points,
    matrix_entropy,
    mixing_score,
    pairwise_attention_distance,
    pairwise_residual_cosine,
    residual_magnitude,
    sink_rate,
    sink_score,
    successive_difference,
)

quick = settings(deadline=None, max_examples=25, derandomize=True)
ROUNDING = 1e-9


@st.composite
def patterns(draw: st.DrawFn, layers: int = 1) -> Tensor:
    """``[layer, prompt, head, T, T]``: causal or not, sharp or flat, with exact zeros."""
    prompts, heads, length = draw(st.tuples(*[st.integers(1, 4)] * 2, st.integers(2, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (layers, prompts, heads, length, length)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64)
    scores = scores * draw(st.sampled_from([0.1, 1.0, 8.0, 200.0]))
    if draw(st.booleans()):
        scores = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
    return scores.softmax(-1)


@st.composite
def states(draw: st.DrawFn) -> Tensor:
    """``[recurrence, layer, prompt, pos, d_model]`` of any scale."""
    shape = draw(st.tuples(*[st.integers(2, 4)] * 2, *[st.integers(1, 5)] * 2, st.integers(2, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from([1e-8, 1e-3, 1.0, 1e4]))
    offset = draw(st.sampled_from([0.0, 3.0]))
    return scale * (torch.randn(shape, generator=generator, dtype=torch.float64) + offset)


def within(values: Tensor, low: float, high: float) -> bool:
    return bool(((values >= low - ROUNDING) & (values <= high + ROUNDING)).all())


@quick
@given(patterns())
def test_bounds_of_attention_metrics(pattern: Tensor) -> None:
    length = pattern.shape[-1]
    assert within(colsum_concentration(pattern), 0, 1)
    scores = torch.stack([sink_score(pattern, key) for key in range(length)])
    assert within(scores, 0, 1)
    torch.testing.assert_close(scores.sum(0), torch.ones_like(scores[0]))  # every query is spent
    assert within(sink_rate(pattern), 0, 1)
    assert within(mixing_score(pattern), 0, math.log(length))
    assert within(mixing_score(pattern, "log_t"), 0, 1)
    assert within(mixing_score(pattern, "per_token"), 0, math.log(length) / length)
    causal = pattern.tril()
    causal = causal / causal.sum(-1, keepdim=True)
    if causal.isfinite().all():
        assert within(mixing_score(causal, "per_row"), 0, 1)


@quick
@given(patterns())
def test_heads_and_prompts_may_be_permuted(pattern: Tensor) -> None:
    heads = torch.randperm(pattern.shape[2], generator=torch.Generator().manual_seed(3))
    prompts = torch.randperm(pattern.shape[1], generator=torch.Generator().manual_seed(4))
    moved = pattern[:, prompts][:, :, heads]
    for metric in (colsum_concentration, sink_score, mixing_score):
        torch.testing.assert_close(metric(moved), metric(pattern)[:, prompts][..., heads])
    torch.testing.assert_close(sink_rate(moved), sink_rate(pattern)[:, prompts])


@quick
@given(patterns())
def test_tokens_may_be_relabelled(pattern: Tensor) -> None:
    """Concentration and entropy do not know which token is which; a sink follows its key."""
    order = torch.randperm(pattern.shape[-1], generator=torch.Generator().manual_seed(5))
    moved = pattern[..., order, :][..., order]
    torch.testing.assert_close(colsum_concentration(moved), colsum_concentration(pattern))
    torch.testing.assert_close(mixing_score(moved), mixing_score(pattern))
    torch.testing.assert_close(sink_score(moved, 0), sink_score(pattern, int(order[0])))


@quick
@given(patterns(layers=3))
def test_attention_distance_is_a_metric(stack: Tensor) -> None:
    a, b, c = stack
    ab, bc, ac = (attention_distance(x, y) for x, y in ((a, b), (b, c), (a, c)))
    assert within(ab, 0, math.sqrt(2 * a.shape[-1]))
    assert ((ab + bc - ac) >= -ROUNDING).all()
    assert not attention_distance(a, a).any()
    pairs = pairwise_attention_distance(stack)
    expected = torch.stack([ab.mean(), bc.mean(), ac.mean()])
    torch.testing.assert_close(torch.stack([pairs[0, 1], pairs[1, 2], pairs[0, 2]]), expected)
    torch.testing.assert_close(pairs, pairs.T)


@quick
@given(states())
def test_bounds_of_state_metrics(x: Tensor) -> None:
    length, width = x.shape[-2:]
    entropy = matrix_entropy(x, "nats")
    assert within(entropy, 0, math.log(min(length, width)))
    assert within(successive_difference(x, "cosine")[1:], -1, 1)
    assert within(fixed_point_distance(x, "cosine"), -1, 1)
    lowest = lowest_cosine_to_fixed_points(x)
    assert (lowest <= fixed_point_distance(x, "cosine")[:, 0] + ROUNDING).all()
    flat = x.flatten(0, 1)
    cosine = pairwise_residual_cosine(flat)
    assert within(cosine, -1, 1)
    torch.testing.assert_close(cosine, cosine.T)
    torch.testing.assert_close(cosine.diagonal(), torch.ones(len(flat), dtype=torch.float64))
    assert within(cyclicity_index(cosine, x.shape[1]), -2, 2)
    sizes = {s: residual_magnitude(x, s) for s in ("mean", "max", "first", "rms")}
    assert (sizes["mean"] <= sizes["max"] * (1 + ROUNDING)).all()
    assert (sizes["first"] <= sizes["max"]).all()
    torch.testing.assert_close(sizes["rms"] * math.sqrt(width), sizes["mean"])


STATE_METRICS = {
    "entropy": (lambda x: matrix_entropy(x), 0),
    "skean": (lambda x: matrix_entropy(x, "skean"), 0),
    **{
        f"{kind} {form}": (lambda x, f=function, form=form: f(x, form), power)
        for kind, function in (
            ("successive", successive_difference),
            ("fixed point", fixed_point_distance),
        )
        for form, power in (("abs", 1), ("rel", 0), ("cosine", 0))
    },
    "lowest": (lowest_cosine_to_fixed_points, 0),
    "pairwise": (lambda x: pairwise_residual_cosine(x.flatten(0, 1)), 0),
    "magnitude": (residual_magnitude, 1),
}


@quick
@given(states(), st.sampled_from([1e-6, 0.5, 1e5]))
def test_scale(x: Tensor, factor: float) -> None:
    for name, (metric, power) in STATE_METRICS.items():
        expected = metric(x) * factor**power
        torch.testing.assert_close(
            metric(factor * x), expected, rtol=1e-6, atol=1e-9, equal_nan=True, msg=name
        )


@quick
@given(states())
def test_rotation(x: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    width = x.shape[-1]
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    for name, (metric, _) in STATE_METRICS.items():
        torch.testing.assert_close(
            metric(x @ turn), metric(x), rtol=1e-6, atol=1e-9, equal_nan=True, msg=name
        )


@quick
@given(states())
def test_prompts_may_be_permuted(x: Tensor) -> None:
    order = torch.randperm(x.shape[2], generator=torch.Generator().manual_seed(2))
    for name, (metric, _) in STATE_METRICS.items():
        value, moved = metric(x), metric(x[:, :, order])
        expected = value if name == "pairwise" else value[..., order]
        torch.testing.assert_close(moved, expected, equal_nan=True, msg=name)


@quick
@given(states())
def test_steps_bound_the_distance_to_the_last_state(x: Tensor) -> None:
    """No state is farther from the last one than the steps that lie between them."""
    steps = successive_difference(x)[1:]
    remaining = steps.flip(0).cumsum(0).flip(0)
    distance = fixed_point_distance(x)
    assert (distance[:-1] <= remaining * (1 + ROUNDING)).all()
    torch.testing.assert_close(distance[-2], steps[-1])
