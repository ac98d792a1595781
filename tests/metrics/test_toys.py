"""Every toy loop through the metrics of steps, angles, paths, verdicts and limits."""

from __future__ import annotations

import math

import pytest
import torch
from toys import LOOPS

from tl_looped.metrics import (
    LimitingBehavior,
    Verdict,
    angular_distance,
    convergence_verdict,
    limiting_behavior,
    pca_trajectory,
    state_distance,
    step_geometry,
    successive_difference,
)

R = 160


@pytest.mark.parametrize("loop", LOOPS)
def test_steps(loop: str) -> None:
    states = LOOPS[loop](12)
    steps = step_geometry(states)
    torch.testing.assert_close(steps.size, successive_difference(states), equal_nan=True)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b, of the single token of the one-token loops.
    if states.shape[-2] == 1:
        now, before = steps.size[2:], steps.size[1:-1]
        cosine = steps.turning_cosine[2:].nan_to_num()
        expected = (now.square() + before.square() - 2 * now * before * cosine).clamp(min=0).sqrt()
        torch.testing.assert_close(steps.acceleration[2:], expected, atol=1e-7, rtol=1e-6)


# Turning cosines of steps: straight on, back and forth, or by the angle of the circle.
TURNS = {
    "affine contraction": 1.0,
    "two-layer cyclic affine": 1.0,
    "rotation plus a constant": math.cos(2 * math.pi / 8),
    "drift": 1.0,
    "negative lambda": -1.0,
    "projective grower": 1.0,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_turning(loop: str) -> None:
    cosine = step_geometry(LOOPS[loop](12)).turning_cosine[2:]
    if loop == "identity":
        assert cosine.isnan().all()  # steps of zero point nowhere
    else:
        torch.testing.assert_close(cosine, torch.full_like(cosine, TURNS[loop]))


@pytest.mark.parametrize("loop", LOOPS)
def test_angles_are_the_arc_cosines_of_cosines(loop: str) -> None:
    states = LOOPS[loop](6).flatten(0, 1)
    angle = angular_distance(states)
    if states.shape[-2] == 1:
        cosine = state_distance(states[:-1], states[1:], "cosine")
        torch.testing.assert_close(angle, cosine.arccos() / math.pi, atol=1e-7, rtol=0)
    assert ((angle >= 0) & (angle <= 1)).all()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_path_keeps_its_distances_in_as_many_components_as_it_has(loop: str) -> None:
    states = LOOPS[loop](20)[:, 0, 0]  # the first token
    n = min(states.shape)
    path = pca_trajectory(states, n).coordinates
    torch.testing.assert_close(torch.cdist(path, path), torch.cdist(states, states))


VERDICTS = {
    "affine contraction": Verdict.CONVERGED,
    "two-layer cyclic affine": Verdict.CONVERGED,
    "rotation plus a constant": Verdict.ORBIT,
    "drift": Verdict.DRIFT,
    "negative lambda": Verdict.CONVERGED,
    "identity": Verdict.CONVERGED,
    "projective grower": Verdict.PROJECTIVE,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_verdicts(loop: str) -> None:
    long = LOOPS[loop](2 * R)
    result = convergence_verdict(long[:R], long)
    assert Verdict(int(result.verdict)) is VERDICTS[loop]


LIMITS = {
    "affine contraction": LimitingBehavior.FIXED,
    "two-layer cyclic affine": LimitingBehavior.FIXED,
    "rotation plus a constant": LimitingBehavior.ORBIT,
    "drift": LimitingBehavior.FIXED,  # its angle has stopped; the cosine sees no more
    "identity": LimitingBehavior.FIXED,
    "projective grower": LimitingBehavior.FIXED,
}


@pytest.mark.parametrize("loop", LIMITS)
def test_limits(loop: str) -> None:
    labels = limiting_behavior(LOOPS[loop](R)[:, 0]).labels
    assert (labels == LIMITS[loop]).all()
