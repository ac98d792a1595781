"""Metrics of states: closed forms on toy loops, spectra, masks, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toys import (
    LOOPS,
    affine,
    cyclic_affine,
    drift,
    grower,
    iterate,
    negative_affine,
    rotation,
    start_state,
    still,
    uniform_causal,
)

from tl_looped.errors import InputError
from tl_looped.metrics import (
    cyclicity_index,
    fixed_point_distance,
    lowest_cosine_to_fixed_points,
    matrix_entropy,
    pairwise_residual_cosine,
    residual_magnitude,
    state_distance,
    successive_difference,
)


def test_steps_of_an_affine_contraction_shrink_by_its_factor() -> None:
    steps = successive_difference(affine(10, 0.8))[:, 0]
    assert steps[0].isnan()
    torch.testing.assert_close(steps[1:], steps[1] * 0.8 ** torch.arange(9, dtype=torch.float64))
    flipped = successive_difference(negative_affine(10, -0.9))[1:, 0]
    torch.testing.assert_close(flipped, flipped[0] * 0.9 ** torch.arange(9, dtype=torch.float64))
    cosine = successive_difference(negative_affine(10), "cosine")[1:, 0]
    torch.testing.assert_close(cosine, -torch.ones(9, dtype=torch.float64))


def test_steps_of_a_rotation_are_constant_chords() -> None:
    period, radius = 9.0, 0.5
    states = rotation(12, period, radius)
    chord = 2 * radius * math.sin(math.pi / period)
    size = math.sqrt(1 + radius**2)
    cosine = (1 + radius**2 * math.cos(2 * math.pi / period)) / size**2
    for form, expected in (("abs", chord), ("rel", chord / size), ("cosine", cosine)):
        steps = successive_difference(states, form)[1:, 0]
        torch.testing.assert_close(steps, torch.full((11,), expected, dtype=torch.float64))


def test_a_drift_keeps_its_step_while_the_relative_step_vanishes() -> None:
    velocity = torch.tensor([3.0, 4.0], dtype=torch.float64)
    states = iterate(lambda x: x + velocity, torch.zeros(2, 2, dtype=torch.float64), 50)
    assert successive_difference(states)[1:, 0].tolist() == pytest.approx([5.0] * 49)
    relative = successive_difference(states, "rel")[1:, 0]
    assert relative.tolist() == pytest.approx([1 / r for r in range(1, 50)])
    cosine = successive_difference(states, "cosine")[:, 0]
    assert cosine[:2].isnan().all()  # the first state is zero and has no direction
    assert cosine[2:].tolist() == pytest.approx([1.0] * 48)


def test_cosines_of_a_drift_follow_the_angle() -> None:
    speed, n = 0.05, 40
    cosine = fixed_point_distance(drift(n, speed), "cosine")[:, 0]
    expected = [math.cos(math.atan(speed * (n - 1)) - math.atan(speed * r)) for r in range(n)]
    assert cosine.tolist() == pytest.approx(expected)


def test_a_still_state_has_no_step() -> None:
    states = still(5)
    assert not successive_difference(states)[1:].any()
    assert not successive_difference(states, "rel")[1:].any()
    torch.testing.assert_close(
        successive_difference(states, "cosine")[1:], torch.ones(4, 1, dtype=torch.float64)
    )


def test_distance_of_a_two_layer_cyclic_map_to_its_two_fixed_points() -> None:
    states = cyclic_affine(60)
    assert states[-1, :, 0, 0].tolist() == pytest.approx([8 / 3, 10 / 3])
    distance = fixed_point_distance(states)
    ratios = distance[1:10] / distance[:9]  # rounding shows later
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.25), atol=1e-6, rtol=0)
    relative = fixed_point_distance(states, "rel")
    torch.testing.assert_close(relative[0], distance[0] / states[-1, :, 0, 0])
    assert not distance[-1].any()


def test_a_reference_of_twice_as_many_recurrences_shows_a_drift() -> None:
    """The distance to the last state vanishes for any map; to a later one it does not."""
    states = drift(20, 0.1)
    assert not fixed_point_distance(states[:10])[-1].any()
    later = fixed_point_distance(states[:10], reference=states[-1])
    assert later[-1].item() == pytest.approx(0.1 * 10)


def test_attention_along_the_recurrences() -> None:
    patterns = torch.stack([torch.eye(4).double(), uniform_causal(4), uniform_causal(4)])
    patterns = patterns[:, None, None, None]  # recurrence, layer, prompt, head, query, key
    step = successive_difference(patterns, "attention")
    assert step.shape == (3, 1, 1, 1)
    expected = math.sqrt(4 - (1 + 1 / 2 + 1 / 3 + 1 / 4))
    assert step.flatten()[1:].tolist() == pytest.approx([expected, 0.0])
    assert step.flatten()[0].isnan()
    distance = fixed_point_distance(patterns, "attention").flatten()
    assert distance.tolist() == pytest.approx([expected, 0.0, 0.0])


def test_one_recurrence_has_no_step() -> None:
    for form in ("abs", "rel", "cosine"):
        assert successive_difference(affine(1), form).isnan().all()
    assert not fixed_point_distance(affine(1)).any()


def test_lowest_cosine_tells_a_shared_fixed_point() -> None:
    """Two layers that go to e1 and e2 keep a cosine of 0, two that go to e1 reach 1."""
    e1, e2 = torch.eye(2, dtype=torch.float64)[:, None]
    towards = torch.linspace(0.0, 1.0, 6, dtype=torch.float64)[:, None, None]
    first = towards * e1 + (1 - towards) * e2
    distinct = torch.stack([first, e2.expand(6, 1, 2)], 1)
    lowest = lowest_cosine_to_fixed_points(distinct)
    assert lowest[-1].item() == pytest.approx(0.0, abs=1e-12)
    shared = torch.stack([first, first], 1)
    assert lowest_cosine_to_fixed_points(shared)[-1].item() == pytest.approx(1.0)
    assert lowest_cosine_to_fixed_points(shared)[0].item() == pytest.approx(0.0, abs=1e-12)


def test_residual_cosines_and_cyclicity_of_an_exact_cycle() -> None:
    layers = torch.eye(3, 5, dtype=torch.float64)[:, None].expand(3, 4, 5)  # layer, pos, d
    states = layers.repeat(6, 1, 1)  # six recurrences of three orthogonal layers
    cosine = pairwise_residual_cosine(states)
    index = torch.arange(18)
    expected = (index[:, None] % 3 == index[None] % 3).double()
    torch.testing.assert_close(cosine, expected)
    assert cyclicity_index(cosine, 3).item() == pytest.approx(1.0)
    assert cyclicity_index(cosine, 6).item() == pytest.approx(1.0 - 6 / 30)
    assert cyclicity_index(cosine[:3, :3], 3).isnan()
    assert cyclicity_index(torch.ones(4, 4), 1).isnan()
    assert cyclicity_index(torch.ones(6, 6), 3).item() == 0.0
    with pytest.raises(InputError, match=r"n_core=4\b.*\b18\b"):
        cyclicity_index(cosine, 4)


def test_residual_cosine_averages_tokens_before_prompts() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    c = torch.tensor([[0.0, 3.0], [0.0, 3.0]])
    states = torch.stack([torch.stack([a, a]), torch.stack([b, c])])  # layer, prompt, pos, d
    assert pairwise_residual_cosine(states)[0, 1].item() == pytest.approx((0.5 + 0.0) / 2)
    mask = torch.tensor([[1, 0], [1, 1]])
    assert pairwise_residual_cosine(states, mask)[0, 1].item() == pytest.approx((1.0 + 0.0) / 2)


def test_zero_states_are_left_out() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    y = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    assert state_distance(x, y, "cosine").item() == pytest.approx(math.sqrt(0.5))
    assert state_distance(y, x, "rel").item() == pytest.approx(1.0)
    assert state_distance(y, x, "abs").item() == pytest.approx(1.5)
    zeros = torch.zeros(2, 2)
    assert state_distance(x, zeros, "rel").isnan()
    assert state_distance(zeros, x, "cosine").isnan()
    both = pairwise_residual_cosine(torch.stack([x, y, zeros]))
    assert both[0, 1].item() == pytest.approx(math.sqrt(0.5))
    assert both[2].isnan().all()
    # A prompt without a cosine is left out of the mean over prompts, too.
    prompts = torch.stack([torch.stack([x, zeros]), torch.stack([y, y])])
    assert pairwise_residual_cosine(prompts)[0, 1].item() == pytest.approx(math.sqrt(0.5))


def test_magnitudes() -> None:
    states = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    values = {s: residual_magnitude(states, s).item() for s in ("mean", "max", "first", "rms")}
    expected = {"mean": 16 / 3, "max": 10.0, "first": 5.0, "rms": 16 / 3 / math.sqrt(2)}
    assert values == pytest.approx(expected)
    mask = torch.tensor([0, 1, 1])
    masked = {s: residual_magnitude(states, s, mask).item() for s in values}
    expected = {"mean": 5.5, "max": 10.0, "first": 1.0, "rms": 5.5 / math.sqrt(2)}
    assert masked == pytest.approx(expected)


def test_a_grower_converges_in_direction_only() -> None:
    states = grower(4000)
    assert successive_difference(states)[-1].item() == pytest.approx(5.0)
    assert successive_difference(states, "cosine")[-1].item() == pytest.approx(1.0, abs=1e-6)
    assert successive_difference(states, "rel")[-1].item() == pytest.approx(1 / 4000, rel=1e-2)


def orthogonal_rows(t: int, d: int, first: float = 1.0) -> Tensor:
    basis = torch.linalg.qr(
        torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).Q[:t]
    scale = torch.ones(t, 1, dtype=torch.float64)
    scale[0] = math.sqrt(first)
    return basis * scale


@pytest.mark.parametrize(
    ("x", "nats"),
    [
        (orthogonal_rows(6, 9), math.log(6)),
        (torch.diag(torch.tensor([2.0, 1.0, 1.0])), 0.867563),
        (torch.diag(torch.tensor([2.0, 1.0, 1.0])), 1.251629 * math.log(2)),
        (orthogonal_rows(16, 16, 100.0), 0.740436),
        (orthogonal_rows(16, 40, 100.0), 0.740436),
        (orthogonal_rows(16, 40, 100.0).T, 0.740436),
        (torch.outer(torch.arange(1.0, 5.0), torch.ones(3)), 0.0),
    ],
)
def test_matrix_entropy(x: Tensor, nats: float) -> None:
    assert matrix_entropy(x, "nats").item() == pytest.approx(nats, abs=1e-6)
    assert matrix_entropy(x, "bits").item() == pytest.approx(nats / math.log(2), abs=1e-6)
    most = math.log(min(x.shape))
    assert matrix_entropy(x, "norm_max").item() == pytest.approx(nats / most, abs=1e-6)
    assert matrix_entropy(1e-30 * x, "nats").item() == pytest.approx(nats, abs=1e-6)


def test_skean_entropy_centres_and_normalises() -> None:
    """Rows m + s_i e_i: after centring and normalising, the Gram matrix is that of a simplex."""
    t, d = 5, 8
    rows = torch.eye(t, d, dtype=torch.float64) + 3.0
    assert matrix_entropy(rows, "skean").item() == pytest.approx(math.log(t - 1))
    assert matrix_entropy(rows[:1], "skean").isnan()
    assert matrix_entropy(rows[:1].expand(4, d), "skean").isnan()


def test_degenerate_spectra() -> None:
    assert matrix_entropy(torch.zeros(3, 4)).isnan()
    assert matrix_entropy(torch.ones(1, 4)).item() == pytest.approx(0.0, abs=1e-9)
    assert matrix_entropy(torch.ones(1, 4), "norm_max").isnan()
    x = torch.stack([torch.eye(3), torch.eye(3), torch.eye(3)])
    x[1, 0, 0], x[2, 2, 1] = math.nan, math.inf
    assert matrix_entropy(x).isnan().tolist() == [False, True, True]


FORMS: dict[str, Callable[..., Tensor]] = {
    **{
        f"entropy {form}": lambda x, mask=None, form=form: matrix_entropy(x, form, mask)
        for form in ("nats", "bits", "norm_max", "skean")
    },
    **{
        statistic: lambda x, mask=None, s=statistic: residual_magnitude(x, s, mask)
        for statistic in ("mean", "max", "first", "rms")
    },
    **{
        f"successive {form}": lambda x, mask=None, form=form: successive_difference(x, form, mask)
        for form in ("abs", "rel", "cosine")
    },
    **{
        f"fixed point {form}": lambda x, mask=None, form=form: fixed_point_distance(x, form, mask)
        for form in ("abs", "rel", "cosine")
    },
    "lowest": lowest_cosine_to_fixed_points,
}


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("metric", FORMS)
def test_a_padded_batch_gives_the_unpadded_values(metric: str, left: bool) -> None:
    function, n = FORMS[metric], 7
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randn(4, 2, t, 5, generator=generator, dtype=torch.float64) for t in (7, 2, 4)]
    alone = torch.stack([function(x) for x in prompts], -1)
    wide = torch.full((4, 2, 3, n, 5), math.nan, dtype=torch.float64)
    mask = torch.zeros(3, n)
    for i, x in enumerate(prompts):
        rows = slice(n - x.shape[-2], n) if left else slice(x.shape[-2])
        wide[:, :, i, rows], mask[i, rows] = x, 1
    torch.testing.assert_close(function(wide, mask), alone, equal_nan=True)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("metric", FORMS)
def test_every_metric_takes_every_loop(metric: str, loop: str) -> None:
    """In fp32 and bf16 too, and always to fp64; defined wherever the loop's states are."""
    states = LOOPS[loop](12)
    value = FORMS[metric](states)
    assert value.dtype == torch.float64
    scale = 1 + value.nan_to_num().abs().max()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        rough = FORMS[metric](states.to(dtype))
        assert rough.dtype == torch.float64
        both = ~value.isnan() & ~rough.isnan()
        assert ((rough - value)[both].abs() <= tolerance * scale).all()
        if dtype == torch.float32:
            assert torch.equal(value.isnan(), rough.isnan())


def test_a_state_that_is_not_finite_shows() -> None:
    states = start_state()[None, None].repeat(3, 1, 1, 1)
    states[1, 0, 2, 1] = math.nan
    for name, function in FORMS.items():
        if name != "first":
            assert function(states)[1:].isnan().any(), name
    prompts = torch.ones(2, 2, 3, 4)
    prompts[1, 0, 0, 0] = math.inf
    assert pairwise_residual_cosine(prompts)[0, 1].isnan()
    assert not pairwise_residual_cosine(prompts)[0, 0].isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: successive_difference(affine(3), "l1"), "form.*abs.*rel.*l1"),
        (lambda: state_distance(torch.ones(3, 2), torch.ones(3, 2), "attention"), "form must be"),
        (lambda: matrix_entropy(torch.ones(3, 2), "log"), "form.*nats.*bits.*log"),
        (lambda: residual_magnitude(torch.ones(3, 2), "median"), "statistic must be one of"),
        (lambda: residual_magnitude(torch.ones(3, 2), "mean", torch.ones(2)), "mask must be"),
        (lambda: residual_magnitude(torch.ones(0, 2)), "hold no token"),
        (lambda: matrix_entropy(torch.ones(3, 2), "nats", torch.zeros(3)), "without any real"),
    ],
)
def test_refusals(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]])
def test_all_pairs_token_by_token_are_the_cosines_of_pairs(monkeypatch, mask) -> None:
    """Whatever the size of a block: against each pair by itself, in fp64."""
    states = torch.randn(4, 2, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    states[1, 0, 3] = 0  # left out of its pairs
    real = None if mask is None else torch.tensor(mask)
    wanted = [
        [state_distance(a, b, "cosine", real).mean() for b in states.unbind()]
        for a in states.unbind()
    ]
    for block in (1, 8 * 4 * 6 * 2, 2**30):
        monkeypatch.setattr("tl_looped.metrics.states.BLOCK_BYTES", block)
        found = pairwise_residual_cosine(states, real)
        torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=1e-13, atol=1e-13)
