"""Closed forms of the metrics on toy attentions and toy maps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tl_looped.metrics import (
    colsum_concentration,
    fixed_point_distance,
    pairwise_attention_distance,
    successive_difference,
)


def sink(n: int) -> Tensor:
    return torch.eye(n)[0].expand(n, n)


def uniform_causal(n: int) -> Tensor:
    return torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]


def previous_token(n: int) -> Tensor:
    return torch.eye(n).roll(1, 0).index_copy(0, torch.tensor([0]), torch.eye(n)[:1])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (torch.eye(8), 0.0),
        (torch.eye(8)[torch.randperm(8)], 0.0),
        (torch.full((8, 8), 1 / 8), 0.0),
        (sink(8), 1.0),
        ((torch.eye(8) + sink(8)) / 2, 0.2610276),
        (previous_token(8), 2 * math.log(2) / (8 * math.log(8))),
        (uniform_causal(2), 0.188722),
        (uniform_causal(4), 0.172191),
        (uniform_causal(8), 0.151172),
        (uniform_causal(64), 0.097376),
        (uniform_causal(128), 0.085198),
    ],
)
def test_colsum_concentration(pattern: Tensor, expected: float) -> None:
    assert colsum_concentration(pattern).item() == pytest.approx(expected, abs=1e-6)


def test_colsum_concentration_is_per_head_and_undefined_for_one_token() -> None:
    heads = torch.stack([torch.eye(8), sink(8)])[None]
    assert colsum_concentration(heads)[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    assert colsum_concentration(torch.ones(3, 1, 1)).isnan().all()


def test_attention_distances() -> None:
    n = 8
    harmonic = sum(1 / i for i in range(1, n + 1))
    layers = torch.stack([torch.eye(n), sink(n), uniform_causal(n)])[:, None]
    distance = pairwise_attention_distance(layers)
    assert distance[0, 1].item() == pytest.approx(math.sqrt(2 * (n - 1)), abs=1e-6)
    assert distance[0, 2].item() == pytest.approx(math.sqrt(n - harmonic), abs=1e-6)
    assert math.sqrt(n - harmonic) == pytest.approx(2.298291, abs=1e-6)
    assert torch.equal(distance, distance.T)
    assert not distance.diagonal().any()
    assert distance.max() <= math.sqrt(2 * n)


def test_attention_distance_averages_over_heads_of_the_same_index() -> None:
    one = torch.stack([torch.eye(4), sink(4)])
    assert pairwise_attention_distance(torch.stack([one, one]))[0, 1] == 0
    swapped = torch.stack([one, one.flip(0)])
    assert pairwise_attention_distance(swapped)[0, 1].item() == pytest.approx(math.sqrt(6))


def test_attention_distance_keeps_small_differences() -> None:
    base = uniform_causal(16).double()
    near = base.clone()
    near[5, 0], near[5, 1] = near[5, 0] + 1e-9, near[5, 1] - 1e-9
    distance = pairwise_attention_distance(torch.stack([base, near])[:, None])
    assert distance[0, 1].item() == pytest.approx(math.sqrt(2) * 1e-9, rel=1e-5)


def iterate(step, start: Tensor, n: int) -> Tensor:
    """[recurrence, layer=1, pos, d] of a one-layer loop."""
    states = [start]
    for _ in range(n - 1):
        states.append(step(states[-1]))
    return torch.stack(states)[:, None]


def test_steps_of_an_affine_contraction_shrink_by_its_factor() -> None:
    states = iterate(lambda x: 0.8 * x + 1.0, torch.randn(5, 6, dtype=torch.float64), 10)
    steps = successive_difference(states)[:, 0]
    assert steps[0].isnan()
    torch.testing.assert_close(steps[1:], steps[1] * 0.8 ** torch.arange(9, dtype=torch.float64))


def test_steps_of_a_rotation_are_constant_chords() -> None:
    theta, radius = 0.7, 2.0
    turn = torch.tensor(
        [[math.cos(theta), math.sin(theta)], [-math.sin(theta), math.cos(theta)]]
    ).double()
    states = iterate(lambda x: x @ turn, torch.tensor([[radius, 0.0]]).double(), 12)
    chord = torch.tensor(2 * radius * math.sin(theta / 2), dtype=torch.float64)
    torch.testing.assert_close(successive_difference(states)[1:, 0], chord.expand(11))
    relative = successive_difference(states, "rel")[1:, 0]
    torch.testing.assert_close(relative, (chord / radius).expand(11))


def test_a_drift_keeps_its_step_while_the_relative_step_vanishes() -> None:
    velocity = torch.tensor([3.0, 4.0])
    states = iterate(lambda x: x + velocity, torch.zeros(2, 2), 50)
    assert successive_difference(states)[1:, 0].tolist() == pytest.approx([5.0] * 49)
    assert successive_difference(states, "rel")[1:, 0].tolist() == pytest.approx(
        [1 / r for r in range(1, 50)]
    )


def test_distance_of_a_two_layer_cyclic_map_to_its_two_fixed_points() -> None:
    """x1 = x2 / 2 + 1, x2 = x1 / 2 + 2 has the fixed points 8/3 and 10/3 and rate 1/4 a loop."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    rows = []
    for _ in range(60):
        first = x / 2 + 1
        x = first / 2 + 2
        rows.append(torch.stack([first, x]))
    states = torch.stack(rows)
    assert states[-1, :, 0, 0].tolist() == pytest.approx([8 / 3, 10 / 3])
    distance = fixed_point_distance(states)
    ratios = distance[1:10] / distance[:9]  # rounding shows later
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.25), atol=1e-6, rtol=0)
    relative = fixed_point_distance(states, "rel")
    torch.testing.assert_close(relative[0], distance[0] / states[-1, :, 0, 0])
    assert not distance[-1].any()
