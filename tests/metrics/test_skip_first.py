"""One token with a norm far above the others': what it decides, and what is left without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_config
from results import C, K, N, P, R, result, with_numbers
from torch import Tensor

from tl_looped import ConfigError, InputError, LoopedTransformer
from tl_looped.experiments.identity import run_hash
from tl_looped.experiments.prompts import load_prompts
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.metrics import CONVERGENCE, convergence_verdict, from_cache, stream
from tl_looped.metrics.catalogue import OUTPUTS, PER_TOKEN
from tl_looped.metrics.convergence import Verdict
from tl_looped.metrics.entropy import matrix_entropy
from tl_looped.metrics.heavy_tokens import find_heavy_token
from tl_looped.metrics.states import residual_magnitude, state_distance, successive_difference
from tl_looped.metrics.steps import step_geometry
from tl_looped.plots.captions import caption_of
from tl_looped.report.summary import summarise
from tl_looped.report.text import row

OF_STATES = [n for n in OUTPUTS if n.startswith(("entropy", "residual", "successive", "fixed"))]
OF_STATES = [n for n in OF_STATES if not n.endswith("attention")] + ["step_acceleration"]


def sink_and_others(n: int, rate: float = 0.25, others: float = 0.8) -> Tensor:
    """``[recurrence, layer=1, pos=4, d=3]``: position 0 is 10,000 times as large, and faster."""
    r = torch.arange(n, dtype=torch.float64)[:, None]
    generator = torch.Generator().manual_seed(0)
    point, away = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    rates = torch.tensor([rate, others, others, others], dtype=torch.float64)
    states = point + (rates**r)[..., None] * away
    states[:, 0] *= 1e4
    return states[:, None]


def test_the_rate_is_the_sink_s_the_relative_rate_is_not() -> None:
    states = sink_and_others(6)
    found = convergence_verdict(states)
    assert found.rate.item() == pytest.approx(0.25, abs=0.01)
    others = convergence_verdict(states, skip_first=1)
    assert others.rate.item() == pytest.approx(0.8, abs=1e-9)
    assert convergence_verdict(states[:, :, 1:]).rate.item() == others.rate.item()
    assert 0.6 < found.relative_rate.item() < 0.85
    each = convergence_verdict(sink_and_others(12), per_token=True)
    assert each.rate.tolist() == pytest.approx([0.25, 0.8, 0.8, 0.8], abs=1e-6)


def test_each_token_is_judged_alone() -> None:
    states = sink_and_others(64)
    states[:, :, 2] += torch.arange(64)[:, None, None]
    mask = torch.tensor([1, 1, 1, 0])
    found = convergence_verdict(states, attention_mask=mask, per_token=True)
    converged, drift, undefined = Verdict.CONVERGED, Verdict.DRIFT, Verdict.UNDEFINED
    assert found.verdict.tolist() == [converged, converged, drift, undefined]
    skipped = convergence_verdict(states, attention_mask=mask, skip_first=1, per_token=True)
    assert skipped.verdict.tolist() == [undefined, converged, drift, undefined]


def test_skipping_is_leaving_out_on_either_side_of_the_padding() -> None:
    x = torch.randn(5, 2, 3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    kept = [slice(2, 6), slice(2, 4), slice(4, 6)]
    functions: dict[str, Any] = {
        "entropy": lambda s, **k: matrix_entropy(s, "norm_max", **k),
        "max": lambda s, **k: residual_magnitude(s, "max", **k),
        "rms": lambda s, **k: residual_magnitude(s, "rms", **k),
        "rel": lambda s, **k: successive_difference(s, "rel", **k),
        "direction": lambda s, **k: state_distance(s, s.flip(0), "direction", **k),
        "turn": lambda s, **k: step_geometry(s, **k).turning_cosine,
    }
    for name, function in functions.items():
        whole = function(x, attention_mask=mask, skip_first=2)
        for prompt, where in enumerate(kept):
            alone = function(x[:, :, prompt, where])
            torch.testing.assert_close(
                whole[..., prompt], alone, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name
            )
    first = residual_magnitude(x, "first", mask, skip_first=2)
    assert torch.equal(first, residual_magnitude(x, "first", mask))


@pytest.mark.parametrize("bad", [-1, True, 6, 4])
def test_what_cannot_be_skipped(bad: int) -> None:
    x, mask = torch.ones(2, 6, 3), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with pytest.raises(InputError, match="skip_first"):
        residual_magnitude(x, "mean", mask, skip_first=bad)
    with pytest.raises(InputError, match="patterns are compared whole"):
        successive_difference(torch.eye(3).expand(2, 1, 3, 3), "attention", skip_first=1)


def test_both_doors_skip_alike_and_leave_patterns_and_tokens_whole() -> None:
    model = LoopedTransformer.from_config(random_config(n_recurrences=3)).double()
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    everything = ["all", "token"]
    whole = stream(model, tokens, everything, by="depth")
    streamed = stream(model, tokens, everything, by="depth", skip_first=1)
    _, cache = model.run_with_cache(tokens)
    cached = from_cache(cache, everything, by="depth", skip_first=1)
    assert streamed.attrs["skip_first"] == cached.attrs["skip_first"] == 1
    assert "skip_first" not in whole.attrs
    for name in whole:
        values = streamed[name].to_numpy()
        np.testing.assert_allclose(values, cached[name].to_numpy(), rtol=1e-9, atol=1e-12)
        if name == "residual_max":  # of whichever token
            continue
        changed = not np.allclose(values, whole[name].to_numpy(), rtol=1e-6, equal_nan=True)
        assert changed == (
            (name in OF_STATES and name != "residual_first")
            or name in ("step_turning_cosine", "step_relative_acceleration", "angular_distance")
        ), name
    assert set(PER_TOKEN) <= set(whole)
    states = cache.stack_activation("resid_post")[:, :, 1:]
    expected = matrix_entropy(states, "norm_max")
    np.testing.assert_allclose(cached["entropy_norm_max"].to_numpy(), expected.numpy(), rtol=1e-9)


def test_verdicts_refuse_a_longer_run_that_skips_others() -> None:
    model = LoopedTransformer.from_config(random_config(n_recurrences=4))
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    data = stream(model, tokens, CONVERGENCE, skip_first=1)
    longer = stream(model, tokens, CONVERGENCE, n_recurrences=8)
    with pytest.raises(InputError, match=r"\b0\b.*skip_first.*\b1\b"):
        convergence_verdict(data, longer)
    found = convergence_verdict(data)
    assert found["relative_rate"].dims == ("prompt",)


def test_an_experiment_s_hash_changes_only_if_it_skips() -> None:
    prompts = load_prompts(PromptSet("sentence"))
    spec = Experiment("demo", recurrences=4)
    skipping = Experiment("demo", recurrences=4, skip_first=1)
    assert "skip_first" not in spec.to_dict()
    assert Experiment.from_toml(skipping.to_toml()) == skipping
    assert run_hash(spec, prompts, "x") != run_hash(skipping, prompts, "x")
    with pytest.raises(ConfigError, match=r"skip_first.*\b1\b"):
        Experiment("demo", skip_first=0)


def heavy(share: float, first: bool = True, **extra: Any) -> Any:
    """A result of prompts of 10 tokens, the heaviest of which has that share of all norms."""
    n = P + K * R + C
    dims, ones = ("effective_layer", "prompt"), np.ones((n, N))
    data = result(**extra).assign(
        residual_mean=(dims, ones),
        residual_max=(dims, 10 * share * ones),
        residual_first=(dims, (10 * share if first else 0.5) * ones),
    )
    return data.assign_coords(n_tokens=("prompt", [10] * (N - 1) + [3]))


def test_a_heavy_token_is_said_in_reports_and_captions() -> None:
    found = find_heavy_token(heavy(0.9))
    assert (found.prompts, found.of, found.is_first) == (N - 1, N - 1, True)
    assert found.most == pytest.approx(0.9)
    assert not find_heavy_token(heavy(0.9, first=False)).is_first
    assert find_heavy_token(heavy(0.5)) is None
    assert find_heavy_token(result()) is None
    # At layers outside the core it says nothing about the loop.
    outside = heavy(0.1)
    outside["residual_max"][0] = 9.0
    assert find_heavy_token(outside) is None
    data = with_numbers(heavy(0.9), verdict=[0] * N, rate=[0.25] * N)
    (note,) = row(summarise({"a": data}), {"a": "run0"}).notes
    assert "In 4 of 4 prompts the first token holds more than half of the summed norm" in note
    assert "(up to 90 %)" in note
    assert "--skip-first 1" in note
    each = with_numbers(data, relative_rate=[0.75] * N)
    rates = [
        next(
            cell.note
            for cell in row(summarise({"a": d}), {"a": "run0"}).cells
            if cell.label == "Rate"
        )
        for d in (data, each, with_numbers(heavy(0.2), rate=[0.25] * N, relative_rate=[0.75] * N))
    ]
    assert ["every token counts alike: 0.750" in note for note in rates] == [False, True, False]
    assert "the first token holds" in caption_of(data, ["residual_mean"])
    assert "token holds" not in caption_of(data, ["colsum_concentration"])
    skipped = heavy(0.2, skip_first=1)
    assert row(summarise({"a": skipped}), {"a": "run0"}).notes == ()
    assert "metrics of states leave out the first token" in caption_of(
        skipped, ["colsum_concentration", "residual_mean"]
    ).replace("Metrics", "metrics")
    assert len({one.identity for one in summarise({"a": data, "b": skipped})}) == 2
