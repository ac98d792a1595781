"""The summary's numbers against the metrics' own."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from results import FEW, C, K, N, P, R, curves, feedforward, only, result, with_numbers

from tl_looped.errors import DataError, InputError
from tl_looped.experiments.compare import cluster_rows
from tl_looped.experiments.reading import Missing, is_feedforward
from tl_looped.metrics import cyclicity_index
from tl_looped.metrics.bootstrap import Resampling
from tl_looped.metrics.clusters import FEATURES
from tl_looped.metrics.convergence import Verdict
from tl_looped.metrics.mirroring import MirroringInterval, mirroring_score
from tl_looped.report.mirrored import MirroringTable
from tl_looped.report.summary import Median, Verdicts, by_model, most_telling, summarise
from tl_looped.report.text import digits, model_name, value


def colsum_score(data: xr.Dataset, *others: xr.Dataset) -> MirroringInterval:
    """The score that stands in the summary table."""
    return only(data, *others).mirroring.scores["colsum_concentration"]


def test_verdicts_are_counted_over_prompts() -> None:
    data = with_numbers(result(), verdict=[3, 0, 5, 0, 0], settled_at=[-1, 4, -1, 6, 9])
    found = only(data).verdicts
    assert found == Verdicts(
        {Verdict.CONVERGED: 3, Verdict.ORBIT: 1, Verdict.NOT_CONVERGED: 1}, 5, 6.0, 3, None
    )
    data.attrs["confirmed"] = 0
    assert only(data).verdicts.confirmed is False


@pytest.mark.parametrize("bad", [7.0, -1.0, 0.5, math.nan])
def test_a_number_that_is_no_verdict(bad: float) -> None:
    with pytest.raises(DataError, match=re.escape(f"verdict holds {bad}")):
        only(with_numbers(result(), verdict=[0, 0, 0, 0, bad]))


def test_medians_over_the_prompts_that_have_the_number() -> None:
    nan, inf = math.nan, math.inf
    data = with_numbers(
        result(), rate=[0.5, nan, 0.7, 1.2, nan], half_life=[1.0, nan, 2.0, inf, inf]
    )
    found = only(data)
    assert found.rate == Median(0.7, 0.5, 1.2, 3, 5)
    assert found.half_life == Median(inf, 1.0, inf, 4, 5)
    empty = only(with_numbers(result(), rate=[nan] * 5)).rate
    assert isinstance(empty, Missing)
    assert "undefined for every prompt" in empty.reason


def test_no_rate_of_what_does_not_converge() -> None:
    """Of a drift or of a run on its way a slope can be fitted, and is no rate of convergence."""
    data = with_numbers(result(), verdict=[4, 0, 5, 2, 3], rate=[1.0, 0.25, 0.9, 0.75, 1.0])
    data = with_numbers(data, half_life=[math.inf, 0.5, 6.6, 2.4, math.inf])
    found = only(data)
    assert found.rate == Median(0.5, 0.25, 0.75, 2, 5)
    assert found.half_life == Median(1.45, 0.5, 2.4, 2, 5)
    for verdict in set(Verdict) - {Verdict.CONVERGED, Verdict.DEGENERATE}:
        data = with_numbers(result(), verdict=[verdict] * N, rate=[0.9] * N)
        assert only(data).rate == Missing("no prompt reaches a fixed point", applies=False)


def test_the_rate_in_a_row_is_of_the_run_of_its_verdict() -> None:
    """Not of a shorter run that has one: it would stand beside another run's verdict."""
    drift = with_numbers(result((P, K, C, 9), n=2), verdict=[4, 4], rate=[1.0, 1.0])
    short = with_numbers(result(), verdict=[0] * N, rate=[0.5] * N)
    runs = summarise({"short": short, "long": drift}, FEW)
    for name in ("verdicts", "rate", "half_life"):
        assert most_telling(runs, name).run == "long"
    assert most_telling(runs, "cyclicity").run == "short"  # the most prompts
    unjudged = summarise({"a": with_numbers(result(), rate=[0.5] * N), "b": result((P, K, C, 9))})
    assert most_telling(unjudged, "rate").run == "a"


def test_what_is_not_there_is_missing_with_its_reason() -> None:
    found = only(result())
    for name in ("verdicts", "rate", "half_life", "cyclicity"):
        assert "the results hold no" in getattr(found, name).reason
    assert found.mirroring == Missing("no feedforward result among the runs")


def test_cyclicity_is_that_of_the_core() -> None:
    matrix = np.random.default_rng(0).random((P + K * R + C,) * 2)
    dims = ("effective_layer", "other_layer")
    data = result().assign(pairwise_residual_cosine=(dims, matrix))
    core = torch.from_numpy(matrix[P : P + K * R, P : P + K * R])
    assert only(data).cyclicity == pytest.approx(float(cyclicity_index(core, K)), abs=1e-12)
    for shape, said in (((0, 1, 0, 4), "4 recurrence"), ((1, 3, 1, 1), "1 recurrence")):
        n = shape[0] + shape[1] * shape[3] + shape[2]
        flat = result(shape).assign(pairwise_residual_cosine=(dims, np.ones((n, n))))
        assert said in only(flat).cyclicity.reason


def test_the_mirroring_score_is_the_metric_of_the_mean_curves() -> None:
    data, base = result(), feedforward(7)
    score = colsum_score(data, base)
    mean, f = curves(data).mean(-1), curves(base).mean(-1)
    each = mirroring_score(
        mean[P : P + K * R].reshape(R, K), f, prelude=mean[:P], coda=mean[P + K * R :]
    ).pearson
    assert score.score == pytest.approx(each.mean(), abs=1e-9)
    assert score.by_recurrence == pytest.approx(each, abs=1e-9)
    assert score.percentile.low < score.score < score.percentile.high
    assert (score.n_prompts, score.left_out, score.paired) == ((N, N), (0, 0), True)


def test_an_affine_image_of_the_feedforward_curve_mirrors_it() -> None:
    base = feedforward(P + K + C)
    values = base["colsum_concentration"].to_numpy()
    looped = np.concatenate((values[:P], *[values[P : P + K]] * R, values[P + K :]))
    dims = base["colsum_concentration"].dims
    data = result().assign(colsum_concentration=(dims, 3 * looped + 2))
    score = colsum_score(data, base)
    assert (score.score, score.percentile.low, score.percentile.high) == pytest.approx(
        (1, 1, 1), abs=1e-12
    )
    # Drawn by themselves, the prompts differ between the two.
    unpaired = only(data, base.assign_attrs(prompts_digest="others")).mirroring.scores[
        "colsum_concentration"
    ]
    assert not unpaired.paired
    assert unpaired.score == pytest.approx(1, abs=1e-12)
    assert unpaired.percentile.low < 0.99


def test_the_interval_has_a_seed_and_needs_two_prompts() -> None:
    runs = {"run": result(), "base": feedforward()}
    first, again, other = (
        summarise(runs, Resampling(200, seed=seed))[0].mirroring.scores["colsum_concentration"]
        for seed in (1, 1, 2)
    )
    assert first.percentile == again.percentile
    assert first.percentile != other.percentile
    one = colsum_score(result(n=1), feedforward(n=1))
    assert math.isfinite(one.score)
    assert math.isnan(one.percentile.low)
    assert math.isnan(one.percentile.high)
    for bad in ({"n_resamples": 1}, {"confidence": 1.0}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            Resampling(**bad)


def test_prompts_with_values_that_are_not_finite_are_left_out() -> None:
    data, base = result(), feedforward()
    clean = colsum_score(data.isel(prompt=slice(1, None)), base.isel(prompt=slice(1, None)))
    for bad in (math.nan, math.inf):
        broken = data.copy(deep=True)
        broken["colsum_concentration"][P + 1, 0, 0] = bad
        score = colsum_score(broken, base)
        assert score.score == clean.score
        assert (score.n_prompts, score.left_out) == ((N - 1, N - 1), (1, 1))
    broken["colsum_concentration"][0] = math.nan
    assert "every prompt" in only(broken, base).mirroring.reason
    flat = base.assign(colsum_concentration=base["colsum_concentration"] * 0 + 0.1)
    assert "constant over depth" in only(data, flat).mirroring.reason


def test_which_feedforward_result() -> None:
    data, base = result(), feedforward()
    assert "no feedforward" in only(data, base.assign_attrs(model="toy")).mirroring.reason
    assert "2 feedforward results (other0, other1)" in only(data, base, base).mirroring.reason
    named = data.assign_attrs(spec='{"feedforward": "other1"}')
    found = only(named, base, base).mirroring
    assert isinstance(found, MirroringTable)
    assert found.against == "other1"
    assert "'other1' is not among" in only(named, base).mirroring.reason
    # By its model, and of two the one on the same prompts.
    by_name = data.assign_attrs(spec='{"feedforward": "base"}')
    elsewhere = base.assign_attrs(prompts_digest="others")
    assert (
        only(by_name, elsewhere, base, base.assign_attrs(model="x")).mirroring.against == "other1"
    )
    assert colsum_score(data, elsewhere).paired is False
    assert only(base, data).mirroring == Missing("no loop: every layer ran once")


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.75, "0.750"), (29.0, "29.0"), (123.4, "123"), (12345.0, "12300"), (-0.5, "−0.500"),
        (0.0, "0"), (math.inf, "∞"), (-math.inf, "−∞"), (math.nan, "undefined"),
        (1.5e-7, "1.50e−7"), (0.000123, "0.000123"),
    ],
)  # fmt: skip
def test_three_digits(x: float, text: str) -> None:
    assert digits(x) == text


def test_settings_as_text() -> None:
    assert value("a <b>") == "a <b>"
    assert value(np.int64(3)) == "3"
    assert value({"seeds": [0, 1], "é": None}) == '{"seeds": [0, 1], "é": null}'


def test_other_starts_and_dtypes_are_models_of_their_own() -> None:
    changes = ({}, {"state_seed": 7}, {"initial_state": "zeros"}, {"dtype": "torch.bfloat16"})
    runs = {f"run{i}": result(**change) for i, change in enumerate(changes)}
    found = summarise(runs, FEW)
    assert [len(one) for one in by_model(found)] == [1, 1, 1, 1]
    assert [model_name(one) for one in found] == [
        "toy", "toy, state seed 7", "toy, initial state zeros", "toy, bfloat16",
    ]  # fmt: skip


def test_a_loop_that_ran_once_is_no_feedforward_model() -> None:
    assert is_feedforward(feedforward())
    assert is_feedforward(feedforward(trained_recurrences=1))
    assert not is_feedforward(feedforward(trained_recurrences=4))


def test_clusters_are_means_over_recurrences() -> None:
    rng = np.random.default_rng(1)

    def with_features(data: xr.Dataset) -> xr.Dataset:
        size = data.sizes["effective_layer"]
        return data.assign({f: (("effective_layer",), 1 + rng.random(size)) for f in FEATURES})

    loop, base = with_features(result()), with_features(feedforward())
    loop, base = (d.expand_dims(prompt=range(2)) for d in (loop.drop_dims("prompt"),
                                                           base.drop_dims("prompt")))  # fmt: skip
    rows = pd.DataFrame(cluster_rows("a", "b", {"a": loop, "b": base}, []))
    assert rows["agreement"].nunique() > 1
    found = only(loop, base).clusters
    assert (found.agreement, found.low, found.high, found.rand_index) == pytest.approx(
        (rows["agreement"].mean(), rows["agreement"].min(), rows["agreement"].max(),
         rows["rand_index"].mean())
    )  # fmt: skip
