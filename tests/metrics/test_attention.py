"""Attention metrics: closed forms on toy attentions, masks, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toys import (
    ATTENTIONS,
    half_half,
    identity,
    previous_token,
    sink,
    uniform_causal,
)

from tl_looped.errors import InputError
from tl_looped.metrics import (
    attention_distance,
    colsum_concentration,
    mixing_score,
    pairwise_attention_distance,
    sink_rate,
    sink_score,
)


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


def random_pattern(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Causal, ``[*shape, shape[-1]]``."""
    n = shape[-1]
    scores = torch.randn(*shape, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return scores.masked_fill(torch.ones(n, n).triu(1) > 0, -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (identity(8), 0.0),
        (identity(8)[[3, 1, 7, 0, 2, 6, 5, 4]], 0.0),
        (torch.full((8, 8), 1 / 8), 0.0),
        (sink(8), 1.0),
        (half_half(8), 0.2610276),
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
    assert colsum_concentration(pattern.float()).item() == pytest.approx(expected, abs=1e-6)


def test_column_sums_that_are_not_divided_by_the_length_give_another_number() -> None:
    """1 + sum c ln c / ln T, the equation as printed, is 2.20938; ours is in [0, 1]."""
    column = uniform_causal(8).sum(0)
    printed = 1 + float((column * column.log()).sum()) / math.log(8)
    assert printed == pytest.approx(2.20938, abs=1e-5)
    assert printed == pytest.approx(1 + 8 * colsum_concentration(uniform_causal(8)).item())


@pytest.mark.parametrize("n", [2, 8, 9, 10, 64])
def test_sink_score_of_the_toys(n: int) -> None:
    assert sink_score(sink(n)).item() == pytest.approx(1.0)
    assert sink_score(identity(n)).item() == pytest.approx(1 / n)
    assert sink_score(half_half(n)).item() == pytest.approx(0.5 + 1 / (2 * n))
    assert sink_score(previous_token(n)).item() == pytest.approx(2 / n)
    uniform = uniform_causal(n)
    assert sink_score(uniform).item() == pytest.approx(harmonic(n) / n)
    assert sink_rate(uniform[None]).item() == float(n <= 9)
    for key in range(n):
        above = sink_score(uniform, key, above_uniform=True).item()
        assert above == pytest.approx(0.0, abs=1e-12)
        visible = sink_score(uniform, key, denominator="visible").item()
        assert visible == pytest.approx((harmonic(n) - harmonic(key)) / (n - key))


def test_uniform_attention_crosses_the_threshold_between_nine_and_ten_tokens() -> None:
    assert sink_score(uniform_causal(9)).item() == pytest.approx(0.3143, abs=1e-4)
    assert sink_score(uniform_causal(10)).item() == pytest.approx(0.2929, abs=1e-4)


def test_sink_rate_counts_heads() -> None:
    heads = torch.stack([sink(8), identity(8)])
    assert sink_rate(heads).item() == 0.5
    assert sink_rate(torch.stack([heads, heads.flip(0)])).tolist() == [0.5, 0.5]
    assert sink_rate(heads, threshold=1.0).item() == 0.5
    assert sink_rate(heads, threshold=1.0, strict=True).item() == 0.0
    assert sink_rate(heads, threshold=0.125, strict=True).item() == 0.5
    assert sink_rate(heads, threshold=0.125).item() == 1.0
    assert sink_rate(heads, key=7, threshold=0.1).item() == 0.5


@pytest.mark.parametrize(
    ("pattern", "form", "expected"),
    [
        (identity(8), "raw", 0.0),
        (sink(8), "raw", 0.0),
        (previous_token(8), "raw", 0.0),
        (uniform_causal(8), "raw", 1.325575),
        (uniform_causal(8), "raw", math.log(math.factorial(8)) / 8),
        (uniform_causal(64), "raw", 3.205753),
        (uniform_causal(64), "per_token", 0.050090),
        (uniform_causal(64), "log_t", math.log(math.factorial(64)) / 64 / math.log(64)),
        (uniform_causal(8), "per_row", 1.0),
        (uniform_causal(64), "per_row", 1.0),
        (identity(64), "per_row", 0.0),
        (half_half(8), "raw", 0.606504),
        (half_half(8), "raw", 7 / 8 * math.log(2)),
        (half_half(8), "per_row", sum(math.log(2) / math.log(i) for i in range(2, 9)) / 7),
    ],
)
def test_mixing_score(pattern: Tensor, form: str, expected: float) -> None:
    assert mixing_score(pattern, form).item() == pytest.approx(expected, abs=1e-6)
    assert mixing_score(pattern.float(), form).item() == pytest.approx(expected, abs=1e-6)


def test_a_single_token() -> None:
    one = torch.ones(3, 1, 1)
    assert colsum_concentration(one).isnan().all()
    assert sink_score(one).tolist() == [1.0, 1.0, 1.0]
    assert not mixing_score(one).any()
    assert not mixing_score(one, "per_token").any()
    assert mixing_score(one, "per_row").isnan().all()
    assert mixing_score(one, "log_t").isnan().all()
    assert not attention_distance(one, one).any()


def test_attention_distances() -> None:
    n = 8
    layers = torch.stack([identity(n), sink(n), uniform_causal(n)])[:, None]
    distance = pairwise_attention_distance(layers)
    assert distance[0, 1].item() == pytest.approx(math.sqrt(2 * (n - 1)))
    assert distance[0, 2].item() == pytest.approx(math.sqrt(n - harmonic(n)))
    assert distance[0, 2].item() == pytest.approx(2.298291, abs=1e-6)
    assert torch.equal(distance, distance.T)
    assert not distance.diagonal().any()
    assert distance.max() <= math.sqrt(2 * n)
    assert attention_distance(identity(n), sink(n)).item() == pytest.approx(math.sqrt(14))


def test_attention_distance_averages_over_heads_of_the_same_index() -> None:
    one = torch.stack([identity(4), sink(4)])
    assert pairwise_attention_distance(torch.stack([one, one]))[0, 1] == 0
    swapped = torch.stack([one, one.flip(0)])
    assert pairwise_attention_distance(swapped)[0, 1].item() == pytest.approx(math.sqrt(6))
    assert attention_distance(*swapped).tolist() == pytest.approx([math.sqrt(6)] * 2)


def test_attention_distance_keeps_small_differences() -> None:
    base = uniform_causal(16)
    near = base.clone()
    near[5, 0], near[5, 1] = near[5, 0] + 1e-9, near[5, 1] - 1e-9
    expected = pytest.approx(math.sqrt(2) * 1e-9, rel=1e-5)
    assert pairwise_attention_distance(torch.stack([base, near])[:, None])[0, 1].item() == expected
    assert attention_distance(base, near).item() == expected


METRICS: dict[str, Callable[..., Tensor]] = {
    "colsum": colsum_concentration,
    "sink": lambda x, mask=None: sink_score(x, attention_mask=mask),
    "sink of the second": lambda x, mask=None: sink_score(x, 1, mask),
    "above uniform": lambda x, mask=None: sink_score(x, attention_mask=mask, above_uniform=True),
    "visible": lambda x, mask=None: sink_score(x, 1, mask, "visible"),
    "rate": lambda x, mask=None: sink_rate(x, attention_mask=mask),
    **{
        form: lambda x, mask=None, form=form: mixing_score(x, form, mask)
        for form in ("raw", "per_token", "per_row", "log_t")
    },
}


def padded(pattern: Tensor, n: int, left: bool) -> tuple[Tensor, Tensor]:
    """``[head, T, T]`` in a larger one whose padding attends anywhere, and the mask."""
    t = pattern.shape[-1]
    whole = random_pattern(len(pattern), n, seed=9)
    start = n - t if left else 0
    rows = slice(start, start + t)
    whole[:, rows] = 0.0
    whole[:, rows, rows] = pattern
    mask = torch.zeros(n)
    mask[rows] = 1
    return whole, mask


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("toy", ATTENTIONS)
def test_a_padded_batch_gives_the_unpadded_values(toy: str, metric: str, left: bool) -> None:
    function = METRICS[metric]
    prompts = [torch.stack([ATTENTIONS[toy](n), random_pattern(n)]) for n in (5, 9, 3)]
    alone = torch.stack([function(prompt) for prompt in prompts])
    rows, masks = zip(*(padded(prompt, 9, left) for prompt in prompts), strict=True)
    batch = function(torch.stack(rows), torch.stack(masks))
    torch.testing.assert_close(batch, alone, atol=1e-12, rtol=1e-12, equal_nan=True)


@pytest.mark.parametrize("left", [True, False])
def test_distances_of_a_padded_batch(left: bool) -> None:
    a, b = random_pattern(2, 5, seed=1), random_pattern(2, 5, seed=2)
    (wide_a, mask), (wide_b, _) = padded(a, 8, left), padded(b, 8, left)
    wide_b[..., (0 if left else -1), :] = torch.eye(8, dtype=torch.float64)[0]
    torch.testing.assert_close(attention_distance(wide_a, wide_b, mask), attention_distance(a, b))
    both, wide = torch.stack([a, b])[:, None], torch.stack([wide_a, wide_b])[:, None]
    torch.testing.assert_close(
        pairwise_attention_distance(wide, mask[None]), pairwise_attention_distance(both)
    )


def test_what_padding_holds_does_not_matter() -> None:
    whole, mask = padded(random_pattern(2, 5), 8, left=True)
    expected = colsum_concentration(whole, mask)
    whole[:, :3] = math.nan
    assert torch.equal(colsum_concentration(whole, mask), expected)
    clean = whole.nan_to_num()
    assert torch.equal(mixing_score(whole, "raw", mask), mixing_score(clean, "raw", mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_is_computed_in_full(metric: str, dtype: torch.dtype) -> None:
    pattern = random_pattern(4, 12).to(dtype)
    value = METRICS[metric](pattern)
    assert value.dtype == torch.float64
    exact = pattern.double()
    torch.testing.assert_close(
        value, METRICS[metric](exact / exact.sum(-1, keepdim=True)), atol=3e-3, rtol=3e-3
    )


def test_a_nan_stays_where_it_is() -> None:
    heads = torch.stack([uniform_causal(6), sink(6), identity(6)])
    heads[1, 3, 2] = math.nan
    for metric, function in METRICS.items():
        if metric != "rate":
            value = function(heads)
            enters = metric in ("colsum", "raw", "per_token", "per_row", "log_t")
            assert value.isnan().tolist() == [False, enters, False], metric
    column = torch.stack([uniform_causal(6), sink(6)])
    column[1, 3, 0] = math.nan
    assert sink_score(column).isnan().tolist() == [False, True]
    assert sink_rate(torch.stack([column, column[[0, 0]]])).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: colsum_concentration(torch.ones(3, 4)), "pattern must be .* whole sequence"),
        (
            lambda: colsum_concentration(torch.ones(3, 3)),
            "must sum to 1 .* sums are 3 to 3",
        ),
        (
            lambda: mixing_score(torch.eye(3) * 2 - torch.ones(3, 3) / 3),
            "must be at least 0",
        ),
        (lambda: mixing_score(torch.eye(3), "bits"), "form.*raw.*per_token.*bits"),
        (lambda: sink_score(torch.eye(3), 3), r"key .*2, got 3"),
        (lambda: sink_score(torch.eye(3), denominator="T"), "denominator must be one of"),
        (lambda: sink_rate(torch.eye(3)[None], threshold=30.0), "threshold .*1, got 30"),
        (lambda: colsum_concentration(torch.eye(3), torch.ones(4)), "mask must be"),
        (lambda: colsum_concentration(torch.eye(3), torch.zeros(3)), "without any real token"),
        # Two prompts of two heads: a mask of prompts is not one of heads.
        (lambda: mixing_score(torch.eye(3).expand(2, 3, 3), "raw", torch.ones(2, 3)), "must be"),
        (
            lambda: sink_rate(random_pattern(2, 4), attention_mask=torch.tensor([0, 1, 1, 1])),
            "padded batch without its attention_mask",
        ),
    ],
)
def test_refusals(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_rows_of_zeros_are_undefined_and_padding_is_not() -> None:
    """A diverged state leaves zeros from its token on; a padded one on the left, before others."""
    diverged = torch.stack([uniform_causal(5), uniform_causal(5)])
    diverged[1, 2:] = 0.0
    assert colsum_concentration(diverged).isnan().tolist() == [False, True]
    assert mixing_score(diverged).isnan().tolist() == [False, True]
    assert colsum_concentration(torch.zeros(3, 3)).isnan()
    padding = uniform_causal(5)
    padding[0] = 0.0
    with pytest.raises(InputError, match="attention_mask"):
        colsum_concentration(padding)


def test_a_short_prompt_has_no_score_for_a_late_key() -> None:
    whole, mask = padded(random_pattern(2, 3), 5, left=False)
    long = random_pattern(2, 5)
    score = sink_score(torch.stack([whole, long]), 4, torch.stack([mask, torch.ones(5)]))
    assert score.isnan().tolist() == [[True, True], [False, False]]
    rate = sink_rate(torch.stack([whole, long]), 0.3, 4, torch.stack([mask, torch.ones(5)]))
    assert rate.isnan().tolist() == [True, False]


@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]])
def test_all_pairs_row_by_row_are_the_distances_of_pairs(monkeypatch, mask) -> None:
    """Whatever the size of a block: against each pair by itself, in fp64."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 2, 3, 7, 7, generator=generator, dtype=torch.float64)
    real = None if mask is None else torch.tensor(mask)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1).expand(2, 1, 7, 7)
    if real is not None:
        hidden = hidden | (real[:, None, None, :] == 0)
    patterns = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num()
    wanted = [
        [attention_distance(a, b, real).mean() for b in patterns.unbind()]
        for a in patterns.unbind()
    ]
    for block in (1, 8 * 4 * 7 * 3, 2**30):
        monkeypatch.setattr("tl_looped.metrics.attention_patterns.BLOCK_BYTES", block)
        found = pairwise_attention_distance(patterns, real)
        torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=1e-13, atol=1e-13)
        assert torch.equal(found, found.T)
        assert bool((found.diagonal() == 0).all())
