"""Tables over seeds: closed forms, pairing, what is left out, and what is decided."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tl_looped import InputError
from tl_looped.metrics import mirroring_score, paired_contrast
from tl_looped.metrics.bootstrap import Resampling
from tl_looped.metrics.mirroring import permutation_p, permuted_mirroring
from tl_looped.paper.section51.statistics import joint_permutation_p
from tl_looped.paper.statistics import (
    Contrast,
    condition_table,
    contrast_table,
    decision,
    seed_table,
)

NAN = math.nan
FEW = Resampling(n_resamples=50)


def grid(**values: list[float]) -> pd.DataFrame:
    """One value a condition and seed."""
    rows = [(name, seed, v) for name, row in values.items() for seed, v in enumerate(row)]
    return pd.DataFrame(rows, columns=["name", "seed", "value"])


def with_prompts(**values: list[list[float]]) -> pd.DataFrame:
    rows = [
        (name, seed, prompt, v)
        for name, seeds in values.items()
        for seed, row in enumerate(seeds)
        for prompt, v in enumerate(row)
    ]
    return pd.DataFrame(rows, columns=["name", "seed", "prompt", "value"])


# -- conditions ---------------------------------------------------------------------------------


def test_values_1_to_5_have_their_closed_forms() -> None:
    many = Resampling(n_resamples=20_000)
    row = condition_table(grid(a=[1, 2, 3, 4, 5]), ["name"], resampling=many).iloc[0]
    assert row["mean"] == 3
    assert row["sd"] == pytest.approx(math.sqrt(2.5))
    half = 2.7764451051977987 * math.sqrt(0.5)
    assert (row["t_low"], row["t_high"]) == pytest.approx((3 - half, 3 + half))
    # 1.96 standard errors of 0.632456, less what the few values take off.
    assert row["percentile_low"] == pytest.approx(3 - 1.2, abs=0.11)
    assert math.isnan(row["hierarchical_low"])
    assert (row["n_seeds"], row["seeds"], row["n_resamples"]) == (5, "0 1 2 3 4", 20_000)


def test_every_seed_counts_the_same_whatever_its_number_of_prompts() -> None:
    table = with_prompts(a=[[0.0] * 9, [1.0]])
    row = condition_table(table, ["name"]).iloc[0]
    assert row["mean"] == 0.5
    assert row["n_prompts"] == "9 1"
    assert not row["shared_prompts"]


def test_what_is_nan_is_left_out_and_counted() -> None:
    table = with_prompts(a=[[1.0, NAN, 3.0], [NAN, NAN, NAN], [5.0, 6.0, 7.0]], b=[[NAN, NAN, NAN]])
    a, b = condition_table(table, ["name"]).to_dict("records")
    assert a["mean"] == 4
    assert (a["seeds"], a["n_prompts"], a["n_left_out"]) == ("0 2", "2 3", 4)
    assert math.isnan(b["mean"])
    assert (b["n_seeds"], b["n_left_out"]) == (0, 3)


def test_prompts_are_drawn_once_for_all_seeds_where_all_ran_the_same() -> None:
    # Seeds that agree on every prompt: a draw of prompts shifts them together.
    prompts = list(np.linspace(0, 1, 8))
    row = condition_table(with_prompts(a=[prompts] * 3), ["name"]).iloc[0]
    assert row["shared_prompts"]
    assert (row["t_low"], row["t_high"]) == (0.5, 0.5)
    error = np.std(prompts) / math.sqrt(8)
    width = row["hierarchical_high"] - row["hierarchical_low"]
    assert width == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_factors_that_do_not_tell_rows_apart_are_refused() -> None:
    table = grid(a=[1, 2]).assign(block=4)
    both = pd.concat([table, table.assign(block=8)])
    with pytest.raises(InputError, match=r"two rows for .*'a'"):
        condition_table(both, ["name"])
    assert len(condition_table(both, ["name", "block"])) == 2
    with pytest.raises(InputError, match="must have the columns norm"):
        condition_table(table, ["norm"])
    with pytest.raises(InputError, match="infinity"):
        condition_table(grid(a=[1, math.inf]), ["name"])


# -- contrasts ----------------------------------------------------------------------------------


def test_a_contrast_pairs_the_seeds_that_both_have() -> None:
    table = grid(a=[11, 22, 33, NAN], b=[10, 20, 30, 40])
    row = contrast_table(table, ["name"], [Contrast("name", "a", "b")]).iloc[0]
    assert row["contrast"] == "a - b"
    assert row["differences"] == "1 2 3"
    assert (row["mean"], row["sd"], row["seeds"]) == (2, 1, "0 1 2")
    # All of one sign: two of eight assignments reach the sum.
    assert row["sign_flip_p"] == row["least_p"] == 0.25


def test_contrasts_are_made_within_every_combination_of_the_other_factors() -> None:
    rows = [
        (norm, flag, seed, base + 10 * flag + seed * (1 + flag))
        for norm, base in (("pre", 0), ("post", 100))
        for flag in (True, False)
        for seed in (0, 1)
    ]
    table = pd.DataFrame(rows, columns=["norm", "injected", "seed", "value"])
    contrast = [Contrast("injected", True, False)]
    found = contrast_table(table, ["norm", "injected"], contrast, words="{norm}: {contrast}")
    assert found["norm"].tolist() == ["pre", "post"]
    assert found["mean"].tolist() == [10.5, 10.5]
    assert found["says"].str.startswith("pre: injected True - False").tolist() == [True, False]
    main = contrast_table(table, ["norm", "injected"], contrast, over=["norm"])
    assert main["differences"].tolist() == ["10 11"]
    assert main["norm"].tolist() == ["post pre"]
    twice = pd.concat([table.assign(prompt=0), table.assign(prompt=1, value=table["value"] + 2)])
    means = seed_table(twice, ["norm", "injected"])
    assert means["value"].tolist() == (table["value"] + 1).tolist()


def test_a_main_effect_compares_the_same_combinations() -> None:
    """Pre has 4 and 12 layers, post 4 alone, or 12 in one seed of two: 4 is what both have."""
    rows = [("pre", n, s, n + s) for n in (4, 12) for s in (0, 1)]
    rows += [("post", 4, 0, 1.0), ("post", 4, 1, 3.0)]
    columns = ["norm", "layers", "seed", "value"]
    contrast = [Contrast("norm", "pre", "post")]
    found = contrast_table(
        pd.DataFrame(rows, columns=columns), columns[:2], contrast, over=["layers"]
    )
    assert found["differences"].tolist() == ["3 2"]
    assert found["layers"].tolist() == ["4"]
    more = pd.DataFrame([*rows, ("post", 12, 1, 5.0)], columns=columns)
    found = contrast_table(more, columns[:2], contrast, over=["layers"])
    # Seed 1 alone has both: (5 + 13) / 2 - (3 + 5) / 2.
    assert found["seeds"].tolist() == ["1"]
    assert found["differences"].tolist() == ["5"]
    assert found["layers"].tolist() == ["4 12"]
    gap = pd.DataFrame([*rows, ("post", 12, 1, float("nan"))], columns=columns)
    found = contrast_table(gap, columns[:2], contrast, over=["layers"])
    assert found["differences"].tolist() == ["3 2"]


def test_factors_that_are_not_there_are_named() -> None:
    table = pd.DataFrame([("a", "p", 0, 9.0)], columns=["name", "other", "seed", "value"])
    contrast = [Contrast("other", "p", "q")]
    with pytest.raises(InputError, match="over must be among"):
        contrast_table(table, ["name", "other"], contrast, over=["norm"])
    with pytest.raises(InputError, match="contrast of 'other'"):
        contrast_table(table, ["name", "other"], contrast, over=["other"])


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    st.lists(st.integers(-50, 50), min_size=2, max_size=6),
    st.lists(st.integers(-50, 50), min_size=6, max_size=6),
)
def test_swapping_a_contrast_changes_its_sign_alone(a: list[int], b: list[int]) -> None:
    table = grid(a=list(map(float, a)), b=[float(x) for x in b[: len(a)]])
    there, back = (
        contrast_table(table, ["name"], [Contrast("name", *names)], resampling=FEW).iloc[0]
        for names in (("a", "b"), ("b", "a"))
    )
    assert there["mean"] == pytest.approx(-back["mean"])
    assert there["t_low"] == pytest.approx(-back["t_high"])
    assert there["sign_flip_p"] == back["sign_flip_p"]
    assert there["decided"] == back["decided"]
    d = np.array(a) - np.array(b[: len(a)])
    if np.ptp(d):
        expected = stats.ttest_1samp(d, 0).confidence_interval(0.95)
        assert (there["t_low"], there["t_high"]) == pytest.approx(tuple(expected))


# -- what is decided ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "decided", "says"),
    [
        ([1.0], False, "one seed says nothing"),
        ([0.0, 0.0, 0.0], False, "there is none in any of the 3 seeds"),
        ([1.0, -1.0, 2.0], False, "over 3 seeds includes 0"),
        ([1.0, 1.1, 1.2], False, "cannot fall below 0.25 with 3 seeds"),
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], True, "above 0"),
        ([-1.0, -1.1, -1.2, -1.3, -1.4, -1.5], True, "below 0"),
        # t leaves out 0, and 3 of the 64 assignments with either sign are as large.
        ([5.0, 5, 5, 5, 5, -0.1], False, "sign-flip p = 0.0625 is not small"),
    ],
)
def test_a_difference_is_decided_only_if_interval_and_exact_test_agree(
    differences: list[float], decided: bool, says: str
) -> None:
    x = np.array(differences)
    found = decision("a - b", paired_contrast(x, np.zeros_like(x)))
    assert found[0] is decided
    assert found[1].startswith(f"a - b (mean {x.mean():+.3g}): ")
    assert says in found[1]
    assert ("this scale cannot decide" in found[1]) is not decided


# -- mirroring over seeds -----------------------------------------------------------------------


def test_the_permuted_score_is_the_mean_over_recurrences_of_the_mirroring_score() -> None:
    rng = np.random.default_rng(0)
    core, control, first, last = rng.random((3, 5)), rng.random(9), rng.random(2), rng.random(1)
    found = permuted_mirroring(core, control, prelude=first, coda=last)
    score = mirroring_score(core, control, prelude=first, coda=last)
    assert found.score == pytest.approx(score.pearson.mean(), abs=1e-14)
    assert found.n_orders == 120
    # More orders than are drawn: the same draws as there.
    one = permuted_mirroring(core[:1], control, prelude=first, coda=last, n_permutations=50)
    alone = mirroring_score(core[:1], control, prelude=first, coda=last, n_permutations=50)
    assert one.p == alone.p_permutation[0]


def test_few_orders_are_all_counted() -> None:
    rng = np.random.default_rng(1)
    core, control = rng.random((2, 4)), rng.random(7)
    every = [
        mirroring_score(core[:, list(order)], control).pearson.mean()
        for order in itertools.permutations(range(4))
    ]
    found = permuted_mirroring(core, control)
    assert found.p == sum(r >= every[0] - 1e-12 for r in every) / 24


def test_a_block_that_is_the_control_beats_every_other_order() -> None:
    ramp = np.arange(6.0)
    found = permuted_mirroring(np.stack([ramp, 2 * ramp + 1]), ramp, n_permutations=2000)
    assert found.score == pytest.approx(1)
    assert found.null.max() <= found.score + 1e-12
    assert found.p == 1 / 720
    backwards = permuted_mirroring(ramp[None, ::-1].copy(), ramp)
    assert backwards.score == pytest.approx(-1)
    assert backwards.p == 1


def test_orders_are_the_same_at_every_recurrence() -> None:
    # The second recurrence undoes the first: any common order has the mean 0.
    ramp = np.array([0.0, 3, 1, 2])
    found = permuted_mirroring(np.stack([ramp, -ramp]), np.arange(4.0))
    assert found.score == pytest.approx(0, abs=1e-15)
    assert np.abs(found.null).max() < 1e-15
    assert found.p == 1


def test_curves_without_spread_and_blocks_without_orders_have_no_p() -> None:
    flat = permuted_mirroring(np.ones((2, 4)), np.arange(4.0))
    assert math.isnan(flat.score)
    assert math.isnan(flat.p)
    single = permuted_mirroring(
        np.array([[1.0]]), np.arange(3.0), prelude=np.array([0.0]), coda=np.array([2.0])
    )
    assert single.score == pytest.approx(1)
    assert math.isnan(single.p)
    with pytest.raises(InputError, match="at least two layers"):
        permuted_mirroring(np.array([[1.0]]), np.arange(3.0))
    with pytest.raises(InputError, match="n_permutations"):
        permuted_mirroring(np.ones((1, 4)), np.arange(4.0), n_permutations=0)


def test_ties_count_and_nan_does_not() -> None:
    null = np.array([0.5, 0.5 + 1e-14, 0.4, NAN])
    assert permutation_p(null, 0.5) == pytest.approx(3 / 5)


def test_a_block_whose_layers_are_alike_has_a_score_and_no_order() -> None:
    found = permuted_mirroring(
        np.full((2, 4), 0.5), np.arange(4.0), prelude=np.array([0.0]), coda=np.array([1.0])
    )
    assert found.score > 0.5
    assert math.isnan(found.p)
    assert np.isnan(found.null).all()


def test_the_joint_p_of_few_orders_is_exact() -> None:
    rng = np.random.default_rng(0)
    control = np.array([0.0, 1.0, 3.0, 2.0, 5.0])
    cores = rng.standard_normal((2, 1, 3)) + np.arange(3)
    found = [permuted_mirroring(core, control) for core in cores]
    p, least = joint_permutation_p(found, float(np.mean([one.score for one in found])))
    pairs = [
        np.mean([permuted_mirroring(core[:, list(order)], control).score
                 for core, order in zip(cores, orders, strict=True)])
        for orders in itertools.product(itertools.permutations(range(3)), repeat=2)
    ]  # fmt: skip
    assert len(pairs) == 36
    assert p == pytest.approx(np.mean(np.array(pairs) >= pairs[0] - 1e-12))
    assert least == 1 / 36
    alone, least = joint_permutation_p(found[:1], found[0].score)
    assert alone == found[0].p
    assert least == 1 / 6
