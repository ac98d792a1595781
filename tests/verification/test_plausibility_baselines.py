"""Baselines and tests of small samples, against closed forms and published values."""

import math
from decimal import Decimal

import pytest

from tl_looped.verification.baselines import (
    adaptive_bits_per_byte,
    mean_and_error,
    sign_test,
    wilson,
)
from tl_looped.verification.plausible_answers import load_problems, number_in
from tl_looped.verification.plausible_continuations import degenerate
from tl_looped.verification.texts import bundled_texts, texts_digest

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(
    successes: int, n: int, low: float, high: float
) -> None:
    below, above = wilson(successes, n)
    assert round(below, 4) == low
    assert round(above, 4) == high


def test_an_interval_of_all_successes_is_that_of_none_mirrored() -> None:
    none, every = wilson(0, 12), wilson(12, 12)
    assert every[0] == pytest.approx(1 - none[1], abs=1e-15)
    for n in range(1, 30):
        assert wilson(0, n)[0] == 0.0
        assert wilson(n, n)[1] == 1.0


def test_sign_tests_are_binomial_tails() -> None:
    assert sign_test([1.0] * 5) == 2**-5
    assert sign_test([1.0] * 3 + [-1.0]) == 5 / 16
    assert sign_test([-1.0, -2.0]) == 1.0
    assert sign_test([0.0]) == 1.0
    assert sign_test([0.0, 1.0]) == 0.5


def test_the_error_of_a_mean_is_that_of_the_textbook() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_and_error([1.0]) == (1.0, math.inf)


def test_the_adaptive_model_learns_what_repeats_and_not_what_does_not() -> None:
    repeated = adaptive_bits_per_byte(["ab" * 500])
    assert repeated < 0.1
    # All bytes once: the first is uniform, and each new one costs more than 8 bits.
    assert adaptive_bits_per_byte([bytes(range(128)).decode()]) > 7.0
    assert adaptive_bits_per_byte(["a"]) == pytest.approx(8.0)


def test_order_zero_is_the_rule_of_succession() -> None:
    # (n_a + 2 / 256) / (n + 2) at every step.
    expected = -sum(math.log2((n + 2 / 256) / (n + 2)) for n in range(4)) / 4
    assert adaptive_bits_per_byte(["aaaa"], order=0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She pays 2 + 3 = 5.\n#### 5", "5"),
        ("#### 1,234", "1234"),
        ("#### $18.00", "18"),
        ("#### -7", "-7"),
        ("#### 42.", "42"),
        ("#### 3\n\nQuestion: 9 apples\n#### 9", "3"),  # what comes after is the next problem
        ("So the answer is $1,250.50 in total", "1250.50"),
        ("He needs 15 minutes.", "15"),
        ("25% of 80 is 20 dollars", "20"),
        ("between 3-5 miles", "-5"),  # as GSM8K's own scripts read it
        (".5 of it", "0.5"),
        ("there is none", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_number_of_an_answer(text: str, value: str | None) -> None:
    assert number_in(text) == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    ("tokens", "is_degenerate"),
    [
        ([5] * 24, True),
        ([1, 2] * 12, True),
        ([1, 2, 3] * 8, True),
        ([9, *[1, 2, 3, 4] * 5], False),  # a longer cycle is a sentence
        (list(range(24)), False),
        ([0, 90, 91, 92] * 6, True),  # mostly special
        (list(range(13)) + [90] * 11, False),
    ],
)
def test_degenerate_continuations(tokens: list[int], is_degenerate: bool) -> None:
    assert (degenerate(tokens, {90, 91, 92}) is not None) == is_degenerate


def test_the_texts_are_our_own_and_of_several_registers() -> None:
    texts = bundled_texts()
    words = sum(len(one.text.split()) for one in texts)
    assert 1500 <= words <= 2500
    assert len({one.register for one in texts}) >= 6
    assert len(texts_digest()) == 64
    problems = [one.text for one in texts if one.register == "word problem"]
    assert all(number_in(text) is not None for text in problems)


def test_a_smaller_set_of_problems_is_part_of_a_larger_one() -> None:
    problems, rows = load_problems("bundled", 5, seed=3)
    more, more_rows = load_problems("bundled", 12, seed=3)
    assert len(problems) == len(rows) == 5
    assert set(rows) < set(more_rows)
    assert [one for one in more if one in problems] == problems
    assert load_problems("bundled", 5, seed=4)[1] != rows
