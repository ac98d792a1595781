"""Intervals of few runs: exact enumeration and scipy as oracles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tl_looped import InputError
from tl_looped.metrics.bootstrap import (
    bootstrap_ci,
    hierarchical_bootstrap_ci,
    paired_contrast,
    sign_flip_p,
    t_interval,
)

ONE_TO_FIVE = np.arange(1.0, 6.0)
VALUES = st.lists(st.integers(-50, 50), min_size=1, max_size=8)


def test_bootstrap_of_one_to_five() -> None:
    means = np.array([np.mean(r) for r in itertools.product(ONE_TO_FIVE, repeat=5)])
    assert means.mean() == pytest.approx(3)
    assert means.std() == pytest.approx(0.632456, abs=1e-6)
    found = bootstrap_ci(ONE_TO_FIVE)
    assert (found.mean, found.n, found.n_resamples, found.seed) == (3.0, 5, 1000, 0)
    assert found.ideal_sd == pytest.approx(means.std(), abs=1e-12)
    # Four standard errors of 1,000 draws, of the mean and of the standard deviation.
    assert found.bootstrap_mean == pytest.approx(3, abs=4 * 0.632456 / math.sqrt(1000))
    assert found.bootstrap_sd == pytest.approx(0.632456, abs=4 * 0.632456 / math.sqrt(2000))
    assert found.bootstrap_sd != found.ideal_sd
    # Where the 2.5 % and 97.5 % quantiles of all 3125 resamples lie.
    exact = np.quantile(means, [0.025, 0.975])
    many = bootstrap_ci(ONE_TO_FIVE, n_resamples=20_000)
    assert [many.percentile.low, many.percentile.high] == pytest.approx(exact, abs=1e-12)


def test_intervals_are_those_of_scipy() -> None:
    x = np.random.default_rng(3).gamma(1.0, size=12)
    found = bootstrap_ci(x, n_resamples=500, confidence=0.9, seed=7)
    for method, interval in (("percentile", found.percentile), ("BCa", found.bca)):
        expected = stats.bootstrap(
            (x,),
            np.mean,
            n_resamples=500,
            confidence_level=0.9,
            method=method,
            random_state=np.random.default_rng(7),
        )
        assert interval.low == pytest.approx(expected.confidence_interval.low, abs=1e-12)
        assert interval.high == pytest.approx(expected.confidence_interval.high, abs=1e-12)
        assert found.bootstrap_sd == pytest.approx(expected.standard_error, abs=1e-12)
    assert found.bca.high > found.percentile.high  # skewed to the right


def test_t_interval_is_that_of_the_t_test() -> None:
    x = np.array([0.3, -0.2, 0.9, 0.4, 0.1])
    expected = stats.ttest_1samp(x, 0.0).confidence_interval(0.95)
    for found in (t_interval(x), bootstrap_ci(x).t):
        assert [found.low, found.high] == pytest.approx([expected.low, expected.high])
    # 2.776445 is Student's 97.5 % point at 4 degrees of freedom.
    half = 2.776445 * math.sqrt(2.5 / 5)
    found = t_interval(ONE_TO_FIVE)
    assert [found.low, found.high] == pytest.approx([3 - half, 3 + half], abs=1e-5)


@given(values=VALUES)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_sign_flips_equal_their_enumeration(values: list[int]) -> None:
    # Integers, so that ties are exact; then tenths, whose sums are rounded.
    flips = itertools.product((1, -1), repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in flips]
    expected = sum(s >= abs(sum(values)) for s in sums) / len(sums)
    assert sign_flip_p(np.array(values, dtype=float)) == expected
    assert sign_flip_p(np.array(values) / 10) == expected
    assert expected >= 2 / 2 ** len(values)


def test_sign_flips_of_five_runs() -> None:
    assert sign_flip_p(ONE_TO_FIVE) == 0.0625
    assert sign_flip_p(-1e-300 * ONE_TO_FIVE) == 0.0625
    assert sign_flip_p(np.full(5, 1e308)) == 0.0625
    assert sign_flip_p(np.zeros(5)) == 1.0
    assert sign_flip_p(np.array([0.1, 0.2, -0.3])) == 1.0  # a sum that is zero but for rounding
    x = np.array([0.3, -0.2, 0.9, 0.4, 0.1, 0.8])
    oracle = stats.permutation_test(
        (x,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flip_p(x) == pytest.approx(oracle.pvalue, abs=1e-12)
    shifted = bootstrap_ci(ONE_TO_FIVE, null=3.0)
    assert (shifted.sign_flip_p, shifted.null) == (1.0, 3.0)


def test_sign_flips_of_many_runs() -> None:
    x = np.ones(20)
    assert sign_flip_p(x) == 2 / 2**20
    with pytest.raises(InputError, match=r"\b20\b.*\b21\b"):
        sign_flip_p(np.ones(21))
    assert math.isnan(bootstrap_ci(np.arange(21.0)).sign_flip_p)


def test_paired_contrast_is_that_of_the_differences() -> None:
    common = np.array([10.0, -20.0, 30.0, 5.0, 0.0])
    effect = np.array([1.0, 1.2, 0.8, 1.1, 0.9])
    found = paired_contrast(common + effect, common, seed=4)
    assert found.mean == pytest.approx(1.0)
    assert found.seed == 4
    assert found.sign_flip_p == 0.0625
    expected = stats.ttest_rel(common + effect, common).confidence_interval(0.95)
    assert [found.t.low, found.t.high] == pytest.approx([expected.low, expected.high])
    reverse = paired_contrast(common, common + effect, seed=4)
    assert reverse.percentile.low == pytest.approx(-found.percentile.high)
    with pytest.raises(InputError, match=r"\b5\b.*\b4\b"):
        paired_contrast(common, effect[:4])


def test_the_seed_decides() -> None:
    x = np.array([0.3, -0.2, 0.9, 0.4, 0.1])
    assert bootstrap_ci(x, seed=1) == bootstrap_ci(x, seed=1)
    assert bootstrap_ci(x, seed=1).bootstrap_sd != bootstrap_ci(x, seed=2).bootstrap_sd
    # The same runs at every point of a curve: an affine image has the affine interval.
    line = bootstrap_ci(2 * x + 5, seed=1)
    assert line.percentile.low == pytest.approx(2 * bootstrap_ci(x, seed=1).percentile.low + 5)
    assert bootstrap_ci(torch.tensor(x), seed=1) == bootstrap_ci(x, seed=1)


def test_half_precision_and_gradients() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert bootstrap_ci(x.bfloat16().requires_grad_()) == bootstrap_ci(ONE_TO_FIVE)
    assert bootstrap_ci(x.half()) == bootstrap_ci(ONE_TO_FIVE)


def ends(interval: object) -> list[float]:
    return [interval.low, interval.high]  # type: ignore[attr-defined]


def test_one_run_says_nothing_about_runs() -> None:
    found = bootstrap_ci(np.array([0.7]))
    assert (found.mean, found.n, found.sign_flip_p) == (0.7, 1, 1.0)
    for interval in (found.percentile, found.bca, found.t):
        assert np.isnan(ends(interval)).all()
    assert np.isnan([found.bootstrap_sd, found.ideal_sd]).all()


def test_equal_runs_are_a_point() -> None:
    found = bootstrap_ci(np.full(3, 0.1))
    assert (found.mean, found.bootstrap_mean) == (0.1, 0.1)
    assert (found.bootstrap_sd, found.ideal_sd) == (0.0, 0.0)
    assert ends(found.percentile) == ends(found.t) == [0.1, 0.1]
    assert np.isnan(ends(found.bca)).all()
    prompts = hierarchical_bootstrap_ci(np.full((3, 4), 0.1))
    assert ends(prompts.percentile) == [0.1, 0.1]
    assert prompts.bootstrap_sd == 0.0


def test_runs_and_prompts() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6)) + 3 * rng.normal(size=(4, 1))
    n_resamples = 4000
    found = hierarchical_bootstrap_ci(x, n_resamples=n_resamples)
    ideal = math.sqrt(x.mean(1).var() / 4 + (x.var(1) / 6).mean() / 4)
    assert found.bootstrap_sd == pytest.approx(ideal, rel=4 / math.sqrt(2 * n_resamples))
    assert found.bootstrap_mean == pytest.approx(x.mean(), abs=4 * ideal / math.sqrt(n_resamples))
    assert found.mean == pytest.approx(x.mean())
    assert (found.n, found.n_prompts, found.n_resamples) == (4, (6, 6, 6, 6), n_resamples)
    # Without a spread of prompts it is the bootstrap over runs.
    runs = np.repeat(ONE_TO_FIVE[:, None], 3, axis=1)
    same = hierarchical_bootstrap_ci(runs, n_resamples=20_000)
    assert same.bootstrap_sd == pytest.approx(0.632456, rel=4 / math.sqrt(2 * 20_000))
    # The quantiles of all 3125 resamples of 1 to 5.
    means = [np.mean(r) for r in itertools.product(ONE_TO_FIVE, repeat=5)]
    assert ends(same.percentile) == pytest.approx(np.quantile(means, [0.025, 0.975]))


def test_the_seed_of_runs_and_prompts() -> None:
    x = np.random.default_rng(0).normal(size=(4, 6))
    for shared in (False, True):
        one, again, other = (
            hierarchical_bootstrap_ci(x, shared_prompts=shared, seed=seed) for seed in (1, 1, 2)
        )
        assert one == again
        assert one.bootstrap_sd != other.bootstrap_sd
        assert (one.seed, other.seed) == (1, 2)


def test_shared_prompts_do_not_average_away() -> None:
    # x_ij = a_i + b_j: prompts drawn together leave var(b) / m, drawn alone var(b) / (n m).
    a, b = np.arange(5.0), 6 * np.arange(4.0)
    x, n_resamples = a[:, None] + b, 4000
    close = 4 / math.sqrt(2 * n_resamples)
    for shared, expected in (
        (True, math.sqrt(a.var() / 5 + b.var() / 4)),
        (False, math.sqrt(a.var() / 5 + b.var() / 20)),
    ):
        found = hierarchical_bootstrap_ci(x, shared_prompts=shared, n_resamples=n_resamples)
        assert found.bootstrap_sd == pytest.approx(expected, rel=close)
        assert found.shared_prompts is shared


def test_runs_with_different_prompts_count_the_same() -> None:
    ragged = [np.array([0.0]), np.array([1.0, 1.0, 1.0])]
    found = hierarchical_bootstrap_ci(ragged, seed=1)
    assert found.mean == 0.5  # not 0.75
    assert found.n_prompts == (1, 3)
    assert ends(found.percentile) == [0.0, 1.0]
    with pytest.raises(InputError, match=r"\(1, 3\)"):
        hierarchical_bootstrap_ci(ragged, shared_prompts=True)


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="values"):
        bootstrap_ci(np.zeros(0))
    with pytest.raises(InputError, match=r"values.*nan.*\[1\]"):
        bootstrap_ci(np.array([1.0, math.nan]))
    with pytest.raises(InputError, match=r"values\[1\]"):
        hierarchical_bootstrap_ci([np.ones(2), np.ones(0)])
    with pytest.raises(InputError, match="values"):
        hierarchical_bootstrap_ci([])
    for bad in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(InputError, match="confidence"):
            bootstrap_ci(ONE_TO_FIVE, confidence=bad)
    with pytest.raises(InputError, match=r"n_resamples.*\b2\b.*\b1\b"):
        bootstrap_ci(ONE_TO_FIVE, n_resamples=1)
    with pytest.raises(InputError, match="seed"):
        hierarchical_bootstrap_ci(np.ones((2, 2)), seed=-1)
    with pytest.raises(InputError, match="null"):
        bootstrap_ci(ONE_TO_FIVE, null=math.inf)
