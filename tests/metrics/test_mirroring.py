"""Mirroring: closed forms of the score and its nulls, scipy and brute-force kernels as oracles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tl_looped import InputError
from tl_looped.metrics.alignment import base_layer_cosine, linear_cka
from tl_looped.metrics.bootstrap import Resampling
from tl_looped.metrics.mirroring import (
    mirroring_interval,
    mirroring_score,
)

SEEDS = st.integers(0, 1000)


def curve(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def cloud(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_a_loop_that_is_the_feedforward_model() -> None:
    f = curve(8)
    found = mirroring_score(f[None, 2:6], f, prelude=f[:2], coda=f[6:], seed=3)
    assert found.pearson.tolist() == [pytest.approx(1.0, abs=1e-12)]
    assert found.spearman.tolist() == [pytest.approx(1.0, abs=1e-12)]
    assert found.rmse.tolist() == found.lag.tolist() == [0.0]
    assert found.lag_pearson.tolist() == [pytest.approx(1.0, abs=1e-12)]
    assert found.p_shift.tolist() == [1 / 4]  # the least that 3 shifts allow
    # The given order is one of 24, and counts where it is drawn.
    orders = np.random.default_rng(3)
    hits = sum((orders.permutation(4) == np.arange(4)).all() for _ in range(1000))
    assert found.p_permutation.tolist() == [(1 + hits) / 1001]
    assert (found.n_shifts, found.n_permutations, found.seed) == (3, 1000, 3)
    assert (found.statistic, found.max_lag) == ("pearson", 20)


@given(seed=SEEDS, a=st.floats(1e-3, 1e3), b=st.floats(-10, 10))
@settings(deadline=None, max_examples=8, derandomize=True)
def test_an_affine_image_correlates_perfectly(seed: int, a: float, b: float) -> None:
    f = curve(6, seed)
    found = mirroring_score((a * f + b)[None], f, n_permutations=20)
    assert found.pearson[0] == pytest.approx(1.0, abs=1e-9)
    assert found.rmse[0] == pytest.approx(
        math.sqrt(np.square((a - 1) * resampled(f) + b).mean()), rel=1e-9, abs=1e-12
    )
    upside_down = mirroring_score((-a * f + b)[None], f, n_permutations=20)
    assert upside_down.pearson[0] == pytest.approx(-1.0, abs=1e-9)
    assert upside_down.p_shift[0] == 1.0  # every order is at least as good as the worst


def resampled(f: np.ndarray) -> np.ndarray:
    """Piecewise linear, by a formula of its own: the sum of hat functions."""
    at = np.arange(101) / 100 * (len(f) - 1)
    hats = np.clip(1 - np.abs(at[:, None] - np.arange(len(f))), 0, None)
    return hats @ f


def test_a_reversed_ramp() -> None:
    ramp = np.arange(6.0)
    found = mirroring_score(np.stack([ramp, ramp[::-1]]), ramp)
    assert found.pearson.tolist() == pytest.approx([1.0, -1.0])
    assert found.spearman.tolist() == pytest.approx([1.0, -1.0])
    # Straight lines: every lag is as good, and the smallest wins.
    assert found.lag.tolist() == [0.0, 0.0]
    # The ramp is the best of all orders of its six layers, the reversed one the worst.
    assert found.p_shift.tolist() == [1 / 6, 1.0]
    assert found.p_permutation[0] < 0.01
    assert found.p_permutation[1] == 1.0


def test_scipy_agrees_on_virtual_feedforward_models() -> None:
    prelude, core, coda, f = curve(2, 1), curve(12, 2).reshape(3, 4), curve(1, 3), curve(9, 4)
    found = mirroring_score(core, f, prelude=prelude, coda=coda, n_permutations=5)
    for r in range(3):
        g = resampled(np.concatenate([prelude, core[r], coda]))
        pearson = stats.pearsonr(g, resampled(f)).statistic
        assert found.pearson[r] == pytest.approx(pearson, abs=1e-12)
        spearman = stats.spearmanr(g, resampled(f)).statistic
        assert found.spearman[r] == pytest.approx(spearman, abs=1e-12)
        assert found.rmse[r] == pytest.approx(np.sqrt(np.square(g - resampled(f)).mean()))


@pytest.mark.parametrize("statistic", ["pearson", "spearman", "rmse"])
def test_null_distributions(statistic: str) -> None:
    prelude, core, f = curve(1, 1), curve(3, 2), curve(7, 5)

    def score(block: np.ndarray) -> float:
        found = mirroring_score(block[None], f, prelude=prelude, n_permutations=1)
        value = float(getattr(found, statistic)[0])
        return -value if statistic == "rmse" else value

    shifts = [score(np.roll(core, s)) for s in (1, 2)]
    orders = {o: score(core[list(o)]) for o in itertools.permutations(range(3))}
    found = mirroring_score(core[None], f, prelude=prelude, statistic=statistic, seed=5)
    observed = score(core)
    assert found.p_shift[0] == (1 + sum(s >= observed for s in shifts)) / 3
    rng = np.random.default_rng(5)
    drawn = [orders[tuple(rng.permutation(3).tolist())] for _ in range(1000)]
    assert found.p_permutation[0] == (1 + sum(d >= observed for d in drawn)) / 1001


def bump(n: int, centre: float) -> np.ndarray:
    """A bump at a share of the depth."""
    return np.exp(-((np.linspace(0, 1, n) - centre) ** 2) / 0.01)


@pytest.mark.parametrize("lag", [-20, -7, 7, 20])
def test_lag_of_a_bump(lag: int) -> None:
    f, g = bump(101, 0.5), bump(101, 0.5 + lag / 100)
    found = mirroring_score(g[None], f, n_permutations=1)
    assert found.lag.tolist() == [lag]  # positive: the loop's bump is deeper
    assert found.lag_pearson.tolist() == [pytest.approx(1.0)]
    assert mirroring_score(g[None], f, n_permutations=1, max_lag=5).lag[0] == math.copysign(5, lag)
    assert mirroring_score(g[None], f, n_permutations=1, max_lag=0).lag[0] == 0


def test_lags_compare_the_overlap_alone() -> None:
    # The first 20 % of f and the last of g have no counterpart: they may be anything.
    shared = curve(81, 1)
    f = np.concatenate([shared, curve(20, 2)])
    g = np.concatenate([curve(20, 3), shared])
    found = mirroring_score(g[None], f, n_permutations=1)
    assert (found.lag[0], found.lag_pearson[0]) == (20.0, pytest.approx(1.0))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_constant_curves_have_no_correlation(value: float) -> None:
    flat, f = np.full(5, value), curve(6)
    for found in (mirroring_score(flat[None], f), mirroring_score(f[None], flat)):
        for name in ("pearson", "spearman", "lag", "lag_pearson", "p_shift", "p_permutation"):
            assert np.isnan(getattr(found, name)).all()
    assert mirroring_score(flat[None], flat).rmse.tolist() == [0.0]
    # Constant but for rounding.
    noisy = value * (1 + 1e-15 * curve(5)) if value else flat
    assert np.isnan(mirroring_score(noisy[None], f).pearson).all()


def test_values_that_are_not_finite_spoil_their_recurrence() -> None:
    core, f = curve(10).reshape(2, 5), curve(6)
    core[0, 3] = math.inf
    found = mirroring_score(core, f, n_permutations=50)
    clean = mirroring_score(core[1:], f, n_permutations=50)
    for name in ("pearson", "spearman", "rmse", "lag", "lag_pearson", "p_shift", "p_permutation"):
        value = getattr(found, name)
        assert math.isnan(value[0])
        assert value[1] == getattr(clean, name)[0]
    broken = mirroring_score(core, np.append(f, math.nan), statistic="rmse")
    assert np.isnan(broken.rmse).all()
    assert np.isnan(broken.p_permutation).all()


def test_a_block_of_one_layer_has_no_other_order() -> None:
    found = mirroring_score(curve(3).reshape(3, 1), curve(5), prelude=curve(2, 1))
    assert np.isfinite(found.pearson).all()
    assert np.isnan(found.p_shift).all()
    assert np.isnan(found.p_permutation).all()
    assert found.n_shifts == 0


def test_the_seed_decides_and_tensors_are_taken() -> None:
    core, f = torch.tensor(curve(12).reshape(2, 6)).bfloat16(), torch.tensor(curve(7, 1)).half()
    one = mirroring_score(core.requires_grad_(), f, seed=1)
    again = mirroring_score(core.detach().double().numpy(), f.double().numpy(), seed=1)
    assert one.p_permutation.tolist() == again.p_permutation.tolist()
    assert one.pearson.tolist() == again.pearson.tolist()
    other = mirroring_score(core.detach(), f, seed=2)
    assert one.p_permutation.tolist() != other.p_permutation.tolist()
    assert one.p_shift.tolist() == other.p_shift.tolist()


def test_wrong_curves() -> None:
    with pytest.raises(InputError, match=r"core.*prelude.*coda"):
        mirroring_score(curve(2)[:, None], curve(5))
    with pytest.raises(InputError, match="feedforward"):
        mirroring_score(curve(4)[None], curve(1))
    unchecked = getattr(mirroring_score, "__wrapped__", mirroring_score)  # of annotations
    with pytest.raises(InputError, match=r"statistic.*pearson.*spearman.*rmse"):
        unchecked(curve(4)[None], curve(4), statistic="kendall")
    for bad in ({"max_lag": 99}, {"max_lag": -1}, {"n_permutations": 0}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            mirroring_score(curve(4)[None], curve(4), **bad)


# -- activations --------------------------------------------------------------------------------


def hsic_cka(x: Tensor, y: Tensor) -> float:
    """Definition by centred Gram matrices: HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y))."""
    n = len(x)
    h = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(a: Tensor, b: Tensor) -> float:
        return float(torch.trace(h @ (a @ a.T) @ h @ (b @ b.T))) / (n - 1) ** 2

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


@pytest.mark.parametrize("tokens", [4, 7, 40])
def test_cka_is_that_of_gram_matrices(tokens: int) -> None:
    # 4: Gram matrices; 7: one width smaller; 40: features.
    x, y = cloud(tokens, 5) + 2, cloud(tokens, 9, seed=1) - 1
    assert float(linear_cka(x, y)) == pytest.approx(hsic_cka(x, y), abs=1e-12)
    mixed = torch.cat((x, y[:, :2]), -1)
    assert float(linear_cka(x, mixed)) == pytest.approx(hsic_cka(x, mixed), abs=1e-12)


@given(seed=SEEDS, scale=st.sampled_from([1e-160, 1e-3, 7.0, 1e160]), tokens=st.integers(2, 20))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_cka_does_not_see_rotation_shift_and_scale(seed: int, scale: float, tokens: int) -> None:
    x, y = cloud(tokens, 6, seed=seed), cloud(tokens, 4, seed=seed + 5000)
    turn = torch.linalg.qr(cloud(6, 6, seed=seed + 1))[0]
    assert float(linear_cka(scale * (x @ turn + 1), x)) == pytest.approx(1.0, abs=1e-10)
    value = float(linear_cka(x, y))
    assert 0 <= value <= 1 + 1e-12
    assert float(linear_cka(scale * (x @ turn), y)) == pytest.approx(value, abs=1e-10)
    assert float(linear_cka(y, x)) == pytest.approx(value, abs=1e-12)


def test_cka_of_what_has_nothing_in_common() -> None:
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 0], [0, 0]])
    y = torch.tensor([[0.0], [0], [1], [-1]])
    assert float(linear_cka(x, y)) == 0.0


def test_cka_of_every_pair_of_layers() -> None:
    x, y = cloud(3, 8, 5), cloud(2, 8, 4, seed=1)
    found = linear_cka(x[:, None], y[None])
    assert found.shape == (3, 2)
    assert float(found[2, 1]) == pytest.approx(hsic_cka(x[2], y[1]))


def test_cka_without_spread() -> None:
    x = cloud(5, 3)
    # The mean of three times 0.1 is not 0.1; rounding must not pass for a spread.
    flat = torch.full((3, 4), 0.1, dtype=torch.float64)
    assert linear_cka(flat, x[:3]).isnan()
    assert linear_cka(x[:3], flat).isnan()
    assert linear_cka(x[:1], x[:1]).isnan()
    assert linear_cka(x * torch.tensor([1, math.inf, 1]), x).isnan()
    with pytest.raises(InputError, match=r"\bx\b.*\by\b"):
        linear_cka(x, x[:4])


def test_half_precision_states() -> None:
    x, y = cloud(6, 4).half().requires_grad_(), cloud(6, 4, seed=1).bfloat16()
    assert torch.equal(linear_cka(x, y), linear_cka(x.double(), y.double()))
    assert torch.equal(base_layer_cosine(x, y), base_layer_cosine(x.double(), y.double()))


def test_cosine_with_the_base_layers() -> None:
    base = torch.tensor([[[1.0, 0], [0, 2]], [[1, 1], [1, 0]]])  # layer, pos, d
    states = torch.stack([3 * base, -base, base.flip(-1)])  # recurrence, layer, pos, d
    found = base_layer_cosine(states, base)
    expected = torch.tensor([[1, 1], [-1, -1], [0, 0.5]]).double()
    assert torch.allclose(found, expected)
    assert torch.allclose(base_layer_cosine(states * 1e-30, base * 1e30), expected)
    masked = base_layer_cosine(states, base, torch.tensor([1, 0]))
    assert masked[2].tolist() == pytest.approx([0, 1])


def test_cosine_leaves_zero_states_out() -> None:
    x, y = torch.ones(3, 2), torch.ones(3, 2)
    y[0] = 0
    y[1] = torch.tensor([1.0, -1.0])
    assert float(base_layer_cosine(x, y)) == pytest.approx(0.5)
    assert base_layer_cosine(x, torch.zeros(3, 2)).isnan()
    y[2, 0] = math.nan
    assert base_layer_cosine(x, y).isnan()
    with pytest.raises(InputError, match=r"\bbase\b"):
        base_layer_cosine(x, torch.ones(2, 2))
    with pytest.raises(InputError, match=r"\bbase\b"):
        base_layer_cosine(torch.ones(3, 4, 2), torch.ones(2, 4, 2))


def test_the_score_over_prompts_is_that_of_the_mean_curves_and_its_interval_of_resampled_ones() -> (
    None
):
    rng = np.random.default_rng(0)
    core, first, last = (rng.normal(size=shape) for shape in ((3, 4, 6), (2, 6), (1, 6)))
    target = rng.normal(size=(9, 5))
    found = mirroring_interval(
        core, target, prelude=first, coda=last, resampling=Resampling(60, 0.9, seed=2)
    )

    def scores(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        return mirroring_score(
            core @ ours, target @ theirs, prelude=first @ ours, coda=last @ ours, n_permutations=1
        ).pearson

    each = scores(np.full(6, 1 / 6), np.full(5, 1 / 5))
    assert found.by_recurrence == pytest.approx(each, abs=1e-12)
    assert found.score == pytest.approx(each.mean(), abs=1e-12)
    again, drawn = np.random.default_rng(2), []
    for _ in range(2):  # 50 resamples at a time
        ours, theirs = (again.multinomial(n, np.full(n, 1 / n), size=50) / n for n in (6, 5))
        drawn += [scores(*pair).mean() for pair in zip(ours, theirs, strict=True)]
    low, high = np.quantile(drawn[:60], [0.05, 0.95])
    assert (found.percentile.low, found.percentile.high) == pytest.approx((low, high), abs=1e-12)
    assert (found.n_prompts, found.left_out, found.paired) == ((6, 5), (0, 0), False)


def test_paired_prompts_are_drawn_and_left_out_together() -> None:
    f = np.stack([curve(8, seed) for seed in range(6)], axis=-1)
    same = mirroring_interval(f[None], f, paired=True)
    assert (same.percentile.low, same.percentile.high) == pytest.approx((1, 1))
    assert mirroring_interval(f[None], f).percentile.low < 0.99
    broken = f.copy()
    broken[3, 4] = math.inf
    found = mirroring_interval(broken[None], f, paired=True)
    assert (found.n_prompts, found.left_out) == ((5, 5), (1, 1))
    assert found.score == pytest.approx(1)
    none = mirroring_interval(f[None] * math.nan, f)
    assert math.isnan(none.score)
    assert (none.n_prompts, none.left_out) == ((0, 6), (6, 0))
    with pytest.raises(InputError, match=r"\b6\b.*\b5\b"):
        mirroring_interval(f[None], f[:, :5], paired=True)
