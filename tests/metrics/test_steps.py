"""Step geometry and angular distance: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import affine, drift, negative_affine, rotation, still

from tl_looped.errors import InputError
from tl_looped.metrics.steps import angular_distance, step_geometry


def test_steps_of_a_contraction_go_straight_and_shrink() -> None:
    found = step_geometry(affine(10)[:, 0])
    assert found.size[0].isnan()
    assert found.turning_cosine[:2].isnan().all()
    assert found.acceleration[:2].isnan().all()
    torch.testing.assert_close(found.turning_cosine[2:], torch.ones(8).double())
    torch.testing.assert_close(found.size[2:], 0.8 * found.size[1:-1])
    torch.testing.assert_close(found.acceleration[2:], 0.2 * found.size[1:-1])


@pytest.mark.parametrize("period", [2.0, 3.0, 8.0, 7.3])
def test_steps_of_a_circle_turn_by_its_angle(period: float) -> None:
    theta = 2 * math.pi / period
    found = step_geometry(rotation(12, period))
    chord = 2 * 0.5 * math.sin(theta / 2)
    assert found.size[1:, 0].tolist() == pytest.approx([chord] * 11)
    assert found.turning_cosine[2:, 0].tolist() == pytest.approx([math.cos(theta)] * 10)
    change = 2 * chord * math.sin(theta / 2)
    assert found.acceleration[2:, 0].tolist() == pytest.approx([change] * 10)
    relative = change / math.sqrt(1.25)
    assert found.relative_acceleration[2:, 0].tolist() == pytest.approx([relative] * 10)


def test_steps_of_a_drift_a_change_of_sign_and_of_nothing() -> None:
    along = step_geometry(drift(6)[:, 0])
    assert along.size[1:].tolist() == pytest.approx([0.05] * 5)
    assert along.acceleration[2:].abs().max() < 1e-12
    back = step_geometry(negative_affine(6)[:, 0])
    assert back.turning_cosine[2:].tolist() == pytest.approx([-1.0] * 4)
    rest = step_geometry(still(6)[:, 0])
    assert rest.size[1:].tolist() == [0.0] * 5
    assert rest.turning_cosine.isnan().all()
    assert rest.acceleration[2:].tolist() == [0.0] * 4


def test_a_token_at_rest_is_left_out_of_the_turning_and_padding_of_everything() -> None:
    both = torch.cat((rotation(8)[:, 0], still(8)[:, 0, :1]), 1)
    found = step_geometry(both)
    alone = step_geometry(rotation(8)[:, 0])
    torch.testing.assert_close(found.turning_cosine, alone.turning_cosine, equal_nan=True)
    torch.testing.assert_close(found.size, alone.size / 2, equal_nan=True)
    masked = step_geometry(both, torch.tensor([1, 0]))
    torch.testing.assert_close(masked.size, alone.size, equal_nan=True)
    torch.testing.assert_close(masked.acceleration, alone.acceleration, equal_nan=True)


def test_non_finite_states_show_and_one_recurrence_has_no_step() -> None:
    states = affine(6)[:, 0].float()
    states[3, 1, 0] = math.inf
    found = step_geometry(states)
    assert not found.size[3:5].isfinite().any()
    assert found.size[5].isfinite()
    assert found.turning_cosine[3:].isnan().all()
    assert step_geometry(states[:1]).size.isnan().all()
    with pytest.raises(InputError, match="states"):
        step_geometry(states[:0])


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.3, math.pi / 2, 3.0, math.pi])
def test_angular_distance_is_the_angle_over_pi_at_any_size(angle: float) -> None:
    rows = [[1.0, 0.0], [5 * math.cos(angle), 5 * math.sin(angle)]]
    layers = torch.tensor(rows, dtype=torch.float64)
    found = angular_distance(layers[:, None])
    assert found.tolist() == pytest.approx([angle / math.pi], rel=1e-9, abs=1e-15)


def test_angular_distance_at_a_lag_averages_angles_over_real_tokens() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    layers = torch.stack(
        [torch.stack([east, east]), torch.stack([east, north]), torch.stack([-east, east])]
    )
    assert angular_distance(layers).tolist() == pytest.approx([0.25, 0.75])
    assert angular_distance(layers, lag=2).tolist() == pytest.approx([0.5])
    assert angular_distance(layers, 1, torch.tensor([1, 0])).tolist() == pytest.approx([0, 1])
    layers[1, 0] = 0
    assert angular_distance(layers).tolist() == pytest.approx([0.5, 0.5])
    assert angular_distance(torch.zeros(2, 3, 4)).isnan().all()
    assert angular_distance(layers[:1]).shape == (0,)
    for lag in (0, 3):
        with pytest.raises(InputError, match=r"lag.*\b1\b.*\b2\b"):
            angular_distance(layers, lag=lag)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_angular_distance_is_a_metric_and_blind_to_scale(seed: int, scale: float) -> None:
    x = torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(seed)).double()
    (ab, bc), ac = angular_distance(x), angular_distance(x, lag=2)[0]
    assert ac <= ab + bc + 1e-12
    scaled = x * torch.tensor([1.0, scale, 1.0]).double()[:, None, None]
    torch.testing.assert_close(angular_distance(scaled), torch.stack([ab, bc]))
