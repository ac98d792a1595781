"""Convergence verdicts: every toy loop, at several lengths."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import affine, cyclic_affine, drift, grower, iterate, negative_affine, rotation, still

from tl_looped.errors import InputError
from tl_looped.metrics import convergence_verdict
from tl_looped.metrics.convergence import (
    ConvergenceResult,
    Verdict,
    a_posteriori_bound,
    fixed_point_residual,
    half_life,
)
from tl_looped.metrics.convergence_states import (
    convergence_series,
    min_layer_cosine,
)

CONVERGED, PROJECTIVE, DEGENERATE, ORBIT, DRIFT, NOT_CONVERGED, UNDEFINED = Verdict


def judge(loop, n: int, longer: bool = True, **kwargs) -> ConvergenceResult:
    return convergence_verdict(loop(n), loop(2 * n) if longer else None, **kwargs)


@pytest.mark.parametrize("longer", [True, False])
@pytest.mark.parametrize(
    ("loop", "verdicts"),
    [
        (affine, {8: NOT_CONVERGED, 32: NOT_CONVERGED, 64: CONVERGED, 128: CONVERGED}),
        (cyclic_affine, {8: NOT_CONVERGED, 16: CONVERGED, 128: CONVERGED}),
        (rotation, {8: NOT_CONVERGED, 32: ORBIT, 128: ORBIT}),
        (drift, {8: DRIFT, 32: DRIFT, 128: DRIFT, 1024: PROJECTIVE}),
        (negative_affine, {8: NOT_CONVERGED, 64: NOT_CONVERGED, 128: CONVERGED, 256: CONVERGED}),
        (still, {4: CONVERGED, 32: CONVERGED, 128: CONVERGED}),
        (grower, {16: DRIFT, 64: PROJECTIVE, 128: PROJECTIVE, 512: PROJECTIVE}),
    ],
)
def test_verdicts_of_the_toy_loops(loop, verdicts: dict[int, Verdict], longer: bool) -> None:
    found = {n: Verdict(int(judge(loop, n, longer).verdict)) for n in verdicts}
    assert found == verdicts


def test_rates_are_exact_above_the_noise_and_close_within_it() -> None:
    assert judge(affine, 64).rate.item() == pytest.approx(0.8, abs=1e-9)
    assert judge(affine, 256).rate.item() == pytest.approx(0.8, abs=1e-5)
    assert judge(cyclic_affine, 64).rate.item() == pytest.approx(0.25, abs=1e-9)
    assert judge(negative_affine, 128).rate.item() == pytest.approx(0.9, abs=1e-9)
    assert judge(rotation, 64).rate.item() == pytest.approx(1.0, abs=1e-9)
    single = convergence_verdict(affine(256).float())
    assert single.rate.item() == pytest.approx(0.8, abs=2e-3)
    assert judge(affine, 64).half_life.item() == pytest.approx(math.log(2) / -math.log(0.8))
    assert half_life(torch.tensor([0.5, 1.0, 1.5, math.nan])).tolist() == pytest.approx(
        [1.0, math.inf, math.inf, math.nan], nan_ok=True
    )


def test_the_first_recurrence_that_settles() -> None:
    assert judge(still, 8).settled_at.item() == 1
    assert judge(still, 8).rate.isnan()
    assert judge(rotation, 64).settled_at.item() == -1
    found = judge(affine, 64)
    states = affine(64)[:, 0]
    relative = ((states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1)).mean(-1)
    first = int(found.settled_at)
    assert (relative[first - 1 :] <= 1e-4).all()
    assert relative[first - 2] > 1e-4
    # Three steps are the least: two after the last large one are too few.
    assert convergence_verdict(affine(first + 2)).settled_at.item() == -1
    assert convergence_verdict(affine(first + 3)).settled_at.item() == first


@pytest.mark.parametrize("period", [2.0, 2.5, 3.0, 5.3, 7.3, 8.0, 16.0])
@pytest.mark.parametrize("n", [64, 101])
def test_orbits_of_any_period_and_phase(period: float, n: int) -> None:
    found = judge(lambda r: rotation(r, period), n)
    assert found.verdict.item() == ORBIT
    # Two turns of 2.5 are five recurrences, after which it repeats itself.
    expected = 5.0 if period == 2.5 else period
    assert abs(found.period.item() - expected) <= 0.5


@pytest.mark.parametrize("k", [2, 3, 4, 5, 7, 12, 20, 31])
@pytest.mark.parametrize("transient", [0, 2])
def test_whatever_repeats_itself_is_an_orbit(k: int, transient: int) -> None:
    """Cycles of random states: steps of all sizes, every harmonic."""
    generator = torch.Generator().manual_seed(k)
    draw = torch.randn(transient + k, 1, 3, 4, dtype=torch.float64, generator=generator)

    def states(n: int) -> Tensor:
        place = torch.arange(n)
        return draw[torch.where(place < transient, place, transient + (place - transient) % k)]

    for longer in (True, False):
        found = judge(states, 2 * k + 1 + transient, longer)
        assert (found.verdict.item(), found.period.item()) == (ORBIT, k)


@pytest.mark.parametrize("rate", [-0.9, -0.5])
def test_an_alternating_contraction_that_is_not_there_yet_is_no_orbit(rate: float) -> None:
    """It comes back ever closer to where it was, but by a fixed share of its steps."""
    for n in range(4, 200, 7):
        found = judge(lambda m: 1 + negative_affine(m, rate), n).verdict.item()
        assert found in (NOT_CONVERGED, CONVERGED)


def test_a_late_arc_of_less_than_a_quarter_of_a_turn_looks_straight() -> None:
    # The chord of a quarter is 2 sqrt(2) / pi = 0.900 of its arc.
    for turns, straight in ((0.24, True), (0.26, False)):
        states = 10 * rotation(64, period=31 / turns)  # 31 late steps
        states[..., 2] = 0.0
        assert (convergence_verdict(states).verdict.item() == DRIFT) is straight


def test_an_orbit_that_divides_the_run_is_not_fooled_by_the_distance_to_its_double() -> None:
    series = convergence_series(rotation(64), rotation(128))
    assert series.distance_2r is not None
    assert series.residual is not None
    assert series.distance_2r.item() == pytest.approx(0, abs=1e-12)
    chord = 2 * 0.5 * math.sin(math.pi / 8)
    assert series.residual.item() == pytest.approx(chord / math.sqrt(1.25))


def spiral(n: int, rate: float) -> Tensor:
    r = torch.arange(n, dtype=torch.float64)
    angle = 2 * math.pi * r / 8
    plane = rate**r * torch.stack([angle.cos(), angle.sin()])
    return torch.cat([plane, torch.ones(1, n)]).T[:, None, None]


@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_fixed_point_that_is_left_once_is_no_orbit(back: int) -> None:
    """The run is there again at any lag over ``back``, and at its double."""
    there, out = torch.randn(
        2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    states = there + 0.5 ** torch.arange(40).double()[:, None, None, None] * out
    states[39 - back] = out - there
    found = convergence_verdict(states)
    assert found.verdict.item() == NOT_CONVERGED
    assert found.period.isnan()


def test_a_damped_spiral_is_no_orbit_and_converges_in_the_end() -> None:
    assert judge(lambda n: spiral(n, 0.9), 64).verdict.item() == NOT_CONVERGED
    assert judge(lambda n: spiral(n, 0.9), 128).verdict.item() == CONVERGED
    assert judge(lambda n: spiral(n, 0.9), 128).rate.item() == pytest.approx(0.9, abs=1e-9)
    assert judge(lambda n: spiral(n, 1.1), 64).verdict.item() == NOT_CONVERGED


def test_a_random_walk_is_none_of_them() -> None:
    noise = torch.randn(256, 1, 5, 64, generator=torch.Generator().manual_seed(0))
    walk = noise.double().cumsum(0)
    assert convergence_verdict(walk[:128], walk).verdict.item() == NOT_CONVERGED
    assert convergence_verdict(noise[:128], noise).verdict.item() == NOT_CONVERGED


def test_white_noise_of_few_dimensions_comes_back_by_chance_but_not_turn_after_turn() -> None:
    noise = torch.randn(128, 1, 200, 1, 4, generator=torch.Generator().manual_seed(0))
    found = convergence_verdict(noise).verdict
    assert (found == NOT_CONVERGED).double().mean() > 0.97
    assert not (found == CONVERGED).any()


def test_layers_that_share_one_limit_are_degenerate() -> None:
    shared = affine(64).repeat(1, 3, 1, 1)
    found = convergence_verdict(shared)
    assert found.verdict.item() == DEGENERATE
    assert found.converged.item()
    growing = convergence_verdict(grower(128).repeat(1, 2, 1, 1))
    assert growing.verdict.item() == DEGENERATE
    assert growing.projective.item()
    assert not growing.converged.item()
    # Layers with limits of their own are not, and neither is a shared state without a limit.
    apart = torch.cat((affine(64), -affine(64)), 1)
    assert convergence_verdict(apart).verdict.item() == CONVERGED
    assert convergence_verdict(rotation(64).repeat(1, 2, 1, 1)).verdict.item() == ORBIT


def test_the_lowest_layer_cosine() -> None:
    a, b, c = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8]), torch.tensor([1.0, 0.1])
    layers = torch.stack([a, b, c])[:, None]
    assert min_layer_cosine(layers).item() == pytest.approx(0.6)
    assert min_layer_cosine(layers[:1]).isnan()
    assert min_layer_cosine(torch.ones(3, 2, 1)).isnan()
    assert min_layer_cosine(torch.zeros(3, 2, 4)).isnan()


def test_prompts_are_judged_alone_and_padding_is_not_looked_at() -> None:
    loops = (affine, drift, grower)
    batch = torch.stack([loop(64)[:, :, :1].expand(-1, -1, 3, -1) for loop in loops], 2).clone()
    assert convergence_verdict(batch).verdict.tolist() == [CONVERGED, DRIFT, PROJECTIVE]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    batch[:, :, 0, 2] = torch.randn(64, 1, 4, generator=torch.Generator().manual_seed(0)).double()
    batch[:, :, 2, 0] = math.nan
    found = convergence_verdict(batch, attention_mask=mask)
    assert found.verdict.tolist() == [CONVERGED, DRIFT, PROJECTIVE]
    assert found.rate[0].item() == pytest.approx(0.8, abs=1e-9)
    assert convergence_verdict(batch).verdict.tolist() == [NOT_CONVERGED, DRIFT, UNDEFINED]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_state_is_undefined(value: float) -> None:
    states = affine(64).repeat(1, 2, 1, 1)
    states[40, 0, 1, 2] = value
    found = convergence_verdict(states)
    assert found.verdict.item() == UNDEFINED
    assert found.rate.isnan()
    assert found.settled_at.item() == -1
    assert not found.converged.item()


def test_the_zero_map_converges_and_a_run_too_short_is_undefined() -> None:
    assert judge(lambda n: iterate(lambda x: 0 * x, torch.ones(2, 3).double(), n), 8).verdict == 0
    assert judge(lambda n: torch.zeros(n, 1, 2, 3), 8).verdict.item() == CONVERGED
    assert judge(affine, 3).verdict.item() == UNDEFINED
    assert judge(affine, 1).verdict.item() == UNDEFINED


def test_a_doubled_run_unmasks_a_slow_drift_and_says_that_it_was_asked() -> None:
    creeping = drift(64, 5e-5)
    alone = convergence_verdict(creeping)
    assert not alone.confirmed
    assert alone.bound.item() == math.inf  # its rate is 1, so the bound is not fooled either
    assert judge(lambda n: drift(n, 5e-5), 64).confirmed
    assert judge(lambda n: drift(n, 5e-5), 64).verdict.item() == DRIFT
    assert judge(lambda n: drift(n, 5e-5), 64).settled_at.item() == 1


def test_the_tolerance_follows_the_dtype_unless_given() -> None:
    assert convergence_verdict(affine(24)).verdict.item() == NOT_CONVERGED
    half = convergence_verdict(affine(24).bfloat16())
    assert half.eps == 1e-2
    assert half.verdict.item() == CONVERGED
    assert convergence_verdict(affine(24), eps=1e-2).verdict.item() == CONVERGED
    with pytest.raises(InputError, match="eps"):
        convergence_verdict(affine(24), eps=0.0)


def test_the_residual_and_the_bound() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    found = fixed_point_residual(x, x + torch.tensor([0.0, 1.0]))
    assert found[0].item() == pytest.approx(0.2)
    assert not found[1].isfinite()
    assert fixed_point_residual(x, x)[1].isnan()
    rates = torch.tensor([0.0, 0.8, 1.0, 2.0, math.nan, -0.1, math.nan])
    steps = torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0])
    assert a_posteriori_bound(rates, steps).tolist() == pytest.approx(
        [0, 2.0, math.inf, math.inf, math.nan, math.nan, 0], nan_ok=True
    )


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.floats(-0.95, 0.95), st.integers(5, 40))
def test_the_bound_holds_for_a_contraction(rate: float, n: int) -> None:
    states = affine(n, rate)[:, 0]
    last_step = (states[-1] - states[-2]).norm(dim=-1)
    error = (states[-1] - 1 / (1 - rate)).norm(dim=-1)
    bound = a_posteriori_bound(torch.full_like(last_step, abs(rate)), last_step)
    # The two are equal for a positive rate, so rounding decides.
    assert (error <= bound * (1 + 1e-9) + 1e-13).all()


def test_the_series_alone_give_the_verdict_of_the_states() -> None:
    series = convergence_series(affine(64), affine(128))
    assert convergence_verdict(series).verdict.item() == CONVERGED
    moved = replace(series, distance_2r=torch.tensor(6e-4))
    assert convergence_verdict(moved).verdict.item() != CONVERGED
    moving = replace(series, residual=torch.tensor(2e-4))
    assert convergence_verdict(moving).verdict.item() != CONVERGED
    with pytest.raises(InputError, match=r"residual.*distance_2r"):
        convergence_verdict(replace(series, residual=None))


def test_wrong_input_names_the_argument() -> None:
    with pytest.raises(InputError, match=r"states_2r.*\b16\b"):
        convergence_verdict(affine(16), affine(31))
    with pytest.raises(InputError, match="states_2r"):
        convergence_verdict(affine(16), affine(32, 0.5))
    with pytest.raises(InputError, match="states"):
        convergence_verdict(torch.zeros(0, 1, 2, 3))
