"""Limiting behaviour: the labels that the reconstruction was checked on, and closed forms."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import drift, grower, rotation

from tl_looped.errors import InputError
from tl_looped.metrics import limiting_behavior
from tl_looped.metrics.limiting import (
    LimitingBehavior,
    classify_limiting_behavior,
    cooccurrence,
    cosine_similarity,
    distance_similarity,
    label_percentages,
)

FIXED, SLIDER, ORBIT, UNKNOWN, UNDEFINED = LimitingBehavior
R = 128
AFTER = torch.arange(1, R + 1, dtype=torch.float64)


def around_a_constant(radius: Tensor, period: float = math.inf) -> Tensor:
    """A unit constant plus a turning vector of the given radius, ``[recurrence, pos=1, d=3]``."""
    angle = 2 * math.pi * AFTER / period
    states = torch.stack([torch.ones(R).double(), radius * angle.cos(), radius * angle.sin()], -1)
    return states[:, None]


def label(states: Tensor, on: str = "cosine"):
    found = limiting_behavior(states, on)
    return LimitingBehavior(int(found.labels)), bool(found.late), float(found.period)


@pytest.mark.parametrize(
    ("rate", "expected", "late"),
    [
        (0.5, FIXED, False),
        (0.8, FIXED, False),
        (0.9, FIXED, True),
        (0.95, FIXED, True),
        (0.98, SLIDER, False),
    ],
)
@pytest.mark.parametrize("start", [2.0, 3.0, 5.0])
def test_contractions(rate: float, expected: LimitingBehavior, late: bool, start: float) -> None:
    assert label(around_a_constant(start * rate**AFTER))[:2] == (expected, late)


@pytest.mark.parametrize(
    ("period", "radius", "found"),
    [(8, 0.17, 8), (8, 0.2, 8), (2, 0.3, 2), (7.3, 0.3, 64 / 9), (16, 0.5, 16), (32, 0.5, 32)],
)
def test_orbits_and_their_closed_form(period: float, radius: float, found: float) -> None:
    states = around_a_constant(torch.full((R,), radius).double(), period)
    theta = 2 * math.pi / period
    expected = (1 + radius**2 * (theta * (R - AFTER)).cos()) / (1 + radius**2)
    torch.testing.assert_close(cosine_similarity(states)[0], expected)
    assert label(states)[0] is ORBIT
    assert label(states)[2] == pytest.approx(found)
    amplitude = float(limiting_behavior(states).amplitude)
    if period != 7.3:  # on a bin the amplitude is exact, between two it reads low
        assert amplitude == pytest.approx(radius**2 / (1 + radius**2), rel=0.01)
    else:
        assert 0.85 <= amplitude * (1 + radius**2) / radius**2 < 1


@pytest.mark.parametrize("radius", [0.1, 0.16])
def test_a_small_orbit_counts_as_a_fixed_point(radius: float) -> None:
    assert 2 * radius**2 / (1 + radius**2) < 0.05
    assert label(around_a_constant(torch.full((R,), radius).double(), 8))[:2] == (FIXED, False)


@pytest.mark.parametrize(
    ("speed", "expected", "late"),
    [(0.01, SLIDER, False), (0.003, FIXED, True), (0.05, FIXED, True), (1.0, FIXED, False)],
)
def test_drifts_and_their_closed_form(speed: float, expected: LimitingBehavior, late: bool) -> None:
    states = drift(R + 1, speed)[1:, 0]
    closed = (math.atan(speed * R) - (speed * AFTER).atan()).cos()
    torch.testing.assert_close(cosine_similarity(states)[0], closed)
    assert label(states)[:2] == (expected, late)


@pytest.mark.parametrize(
    ("rate", "expected", "late"),
    [(0.9, FIXED, False), (0.97, FIXED, True), (0.99, ORBIT, False)],
)
def test_damped_spirals(rate: float, expected: LimitingBehavior, late: bool) -> None:
    found = label(around_a_constant(rate**AFTER, 8))
    assert found[:2] == (expected, late)
    assert found[2] == pytest.approx(8) if expected is ORBIT else math.isnan(found[2])


def test_noise_and_a_random_walk_are_unknown() -> None:
    noise = torch.randn(R, 100, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (limiting_behavior(noise).labels == UNKNOWN).all()
    assert (limiting_behavior(noise.cumsum(0)).labels == UNKNOWN).all()


def test_the_distance_twin_is_the_cosine_at_equal_norms_and_sees_a_radial_drift() -> None:
    circle = rotation(R)[:, 0]
    torch.testing.assert_close(distance_similarity(circle), cosine_similarity(circle))
    assert label(circle, "distance") == label(circle)
    radial = (1 + AFTER / 20)[:, None, None] * torch.tensor([[0.6, 0.8]]).double()
    torch.testing.assert_close(
        distance_similarity(radial)[0], 1 - ((R - AFTER) / (20 + R)).square() / 2
    )
    assert label(radial)[0] is FIXED
    assert label(radial, "distance")[0] is SLIDER
    assert set(limiting_behavior(grower(R)[:, 0], "distance").labels.tolist()) == {SLIDER}


def test_a_breathing_norm_is_an_orbit_of_the_distance_alone() -> None:
    breathing = (1 + 0.5 * (2 * math.pi * AFTER / 16).cos())[:, None, None] * torch.ones(1, 4)
    assert label(breathing)[0] is FIXED
    assert label(breathing.double(), "distance")[0::2] == (ORBIT, 16.0)


def test_a_non_finite_series_is_undefined_and_leaves_its_neighbours_alone() -> None:
    series = cosine_similarity(rotation(R)[:, 0]).repeat(4, 1)
    series[1, 3], series[2, -1], series[3, 70] = math.nan, math.inf, -math.inf
    found = classify_limiting_behavior(series)
    assert found.labels.tolist() == [ORBIT, UNDEFINED, UNDEFINED, UNDEFINED]
    assert found.amplitude[1:].isnan().all()
    assert found.period[1:].isnan().all()
    zero = torch.zeros(R, 1, 3)
    assert limiting_behavior(zero).labels.tolist() == [UNDEFINED]
    assert limiting_behavior(zero, "distance").labels.tolist() == [UNDEFINED]


def test_a_constant_series_below_one_has_no_oscillation() -> None:
    found = classify_limiting_behavior(torch.full((3, R), 0.3))
    assert found.labels.tolist() == [UNKNOWN] * 3
    assert found.share.isnan().all()
    assert found.amplitude.tolist() == [0.0] * 3


def test_a_smaller_window_needs_fewer_recurrences() -> None:
    series = cosine_similarity(rotation(17)[:, 0])
    assert classify_limiting_behavior(series, window=16).labels.tolist() == [ORBIT]
    assert classify_limiting_behavior(series, window=16).period.tolist() == [8.0]
    with pytest.raises(InputError, match=r"window.*\b65\b"):
        classify_limiting_behavior(series)
    for wrong in ({"window": 4}, {"tau": 0.0}, {"tau": math.nan}, {"rho": 0.3}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            classify_limiting_behavior(series, **wrong)
    with pytest.raises(InputError, match=r"\bon\b"):
        limiting_behavior(rotation(R)[:, 0], "norm")


def test_only_the_window_and_not_the_trivial_last_value_is_looked_at() -> None:
    series = torch.full((1, R), 0.3).double()
    series[:, -1] = 1.0
    assert classify_limiting_behavior(series).amplitude.item() == 0
    series[:, : R - 65] = torch.rand(1, R - 65).double() * 0.1
    assert classify_limiting_behavior(series).slope.item() == pytest.approx(0.0, abs=1e-12)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_every_series_is_judged_alone(seed: int, n: int) -> None:
    walk = torch.randn(n, 2, R, generator=torch.Generator().manual_seed(seed)).cumsum(-1) / 10
    together = classify_limiting_behavior(walk)
    alone = [classify_limiting_behavior(row) for row in walk.flatten(0, 1)]
    assert together.labels.flatten().tolist() == [int(one.labels) for one in alone]
    torch.testing.assert_close(together.slope.flatten(), torch.stack([one.slope for one in alone]))


def test_many_tokens_take_about_a_second() -> None:
    series = torch.rand(256, 128, R, generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    classify_limiting_behavior(series)
    assert time.process_time() - start < 3


def test_gradients_and_inference_mode() -> None:
    states = rotation(R)[:, 0].requires_grad_()
    assert label(states)[0] is ORBIT
    with torch.inference_mode():
        assert label(rotation(R)[:, 0])[0] is ORBIT


def test_cooccurrence_of_labels_at_the_same_token() -> None:
    labels = torch.tensor([[FIXED, FIXED, ORBIT, SLIDER], [FIXED, ORBIT, ORBIT, FIXED]])
    found = cooccurrence(labels)
    assert found[FIXED].tolist() == pytest.approx([1, 1 / 3, 1 / 3, 0, 0])
    assert found[ORBIT].tolist() == pytest.approx([1 / 2, 0, 1, 0, 0])
    assert found[SLIDER].tolist() == [1, 1, 0, 0, 0]
    assert found[UNKNOWN].isnan().all()
    mask = torch.tensor([0, 1, 1, 1])
    assert cooccurrence(labels, mask)[FIXED].tolist() == pytest.approx([1, 1 / 2, 1 / 2, 0, 0])
    pooled = cooccurrence(torch.stack([labels, labels]), torch.stack([mask, 1 - mask]))
    torch.testing.assert_close(pooled, found, equal_nan=True)
    with pytest.raises(InputError, match="labels"):
        cooccurrence(labels + 4)


def test_percentages_of_real_tokens_and_of_prompts() -> None:
    labels = torch.tensor([[FIXED, FIXED, ORBIT], [FIXED, FIXED, FIXED]])
    found = label_percentages(labels)
    assert found.tokens.tolist() == pytest.approx([500 / 6, 0, 100 / 6, 0, 0])
    assert found.examples.tolist() == [100, 0, 50, 0, 0]
    masked = label_percentages(labels[None], torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert masked.tokens.tolist() == [[100, 0, 0, 0, 0]]
    assert masked.examples.tolist() == [[100, 0, 0, 0, 0]]


def cycle(k: int, n: int, transient: int = 0, seed: int = 0) -> Tensor:
    """``[recurrence, pos=2, d=8]``: k random states over and over, after a random transient."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(transient + k, 2, 8, dtype=torch.float64, generator=generator)
    place = torch.arange(n)
    return draw[torch.where(place < transient, place, transient + (place - transient) % k)]


@pytest.mark.parametrize("on", ["cosine", "distance"])
@pytest.mark.parametrize("k", [*range(2, 17), 31, 32, 33, 47, 63, 64])
def test_whatever_repeats_within_the_window_is_an_orbit(k: int, on: str) -> None:
    """A cycle of random states has every harmonic, and no one frequency."""
    found = limiting_behavior(cycle(k, R, transient=R - 65), on)
    assert (found.labels == ORBIT).all()
    assert found.period.tolist() == [k, k]
    assert not found.late.any()


@pytest.mark.parametrize("k", [4, 10, 11, 32])
def test_an_orbit_that_is_away_for_one_recurrence_is_no_fixed_point(k: int) -> None:
    """A tenth of the recurrences and fewer away from the last state: the share is not asked."""
    states = torch.zeros(R, 1, 3, dtype=torch.float64)
    states[:, :, 0] = 1.0
    states[(R - 1 - k // 2) % k :: k, 0] = torch.tensor([0.0, 1.0, 0.0]).double()
    assert label(states) == (ORBIT, False, k)


@pytest.mark.parametrize("back", [1, 2, 10, 31])
def test_a_fixed_point_that_is_left_once_is_no_orbit(back: int) -> None:
    states = cycle(1, R)
    states[R - 1 - back] = cycle(2, R, seed=1)[0]
    found = limiting_behavior(states)
    assert (found.labels == FIXED).all()
    assert found.period.isnan().all()


def test_a_square_wave_is_an_orbit() -> None:
    """Two states there, two states back: a 4-cycle whose similarity is 1, 1, -1, -1."""
    wave = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()[torch.arange(R) % 4]
    assert label(torch.stack([wave, 0.1 + 0 * wave], -1)[:, None]) == (ORBIT, False, 4)


def test_a_longer_cycle_and_one_under_the_threshold_are_not() -> None:
    assert (limiting_behavior(cycle(65, R)).labels != ORBIT).all()
    small = 1 + 0.01 * cycle(5, R)
    assert (1 - cosine_similarity(small)).max() < 0.05
    assert (limiting_behavior(small).labels == FIXED).all()


def test_an_irrational_rotation_has_the_period_of_a_fourier_bin() -> None:
    golden = (1 + math.sqrt(5)) / 2 + 5
    found = label(around_a_constant(torch.full((R,), 0.4).double(), golden))
    assert found[0] is ORBIT
    assert found[2] == 64 / round(64 / golden)
    assert found[2] != round(found[2])
