"""Verdicts, limiting behaviours, matrices and lenses of labelled results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import CASES, TOLERANCE, Golden, load_golden, random_config
from torch import Tensor

from tl_looped import InitialState, Injection, LoopedTransformer
from tl_looped.errors import InputError
from tl_looped.metrics import (
    CONVERGENCE,
    Verdict,
    convergence_of_result,
    cooccurrence,
    cyclicity_index,
    label_percentages,
    lens_over_cache,
    limiting_behavior_of_states,
    limiting_of_result,
    over_cache,
    pairwise_attention_distance,
    pairwise_over_cache,
    pairwise_residual_cosine,
    stream_metrics,
    verdict_of_states,
)

pytestmark = pytest.mark.usefixtures("without_gradients")


def contracting(**changes: object) -> LoopedTransformer:
    """A loop that the injection holds: small weights, so that it converges."""
    return LoopedTransformer.from_config(
        random_config(
            injection=Injection.LINEAR,
            initial_state=InitialState.RANDOM,
            initial_state_std=0.5,
            initializer_range=0.05,
            **changes,
        )
    )


PROMPTS = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2, 6]), torch.tensor([5, 3, 5, 8, 9])]


def test_verdicts_of_a_stream_are_those_of_the_states() -> None:
    model = contracting()
    data = stream_metrics(model, PROMPTS, CONVERGENCE, n_recurrences=10, state_seed=1)
    longer = stream_metrics(model, PROMPTS, CONVERGENCE, n_recurrences=20, state_seed=1)
    verdicts = convergence_of_result(data, longer)
    for number, prompt in enumerate(PROMPTS):
        states = [
            model.run_with_cache(prompt, n_recurrences=n, state_seed=1, names_filter="residual")[
                1
            ].stack_recurrences("resid_post")[:, :, 0]
            for n in (10, 20)
        ]
        expected = verdict_of_states(*states)
        assert verdicts["verdict"][number] == expected.verdict
        assert verdicts["settled_at"][number] == expected.settled_at
        np.testing.assert_allclose(verdicts["rate"][number], expected.rate, rtol=1e-4)
    assert verdicts["verdict_name"].values.tolist() == [
        Verdict(v).name for v in verdicts["verdict"].values
    ]
    assert (verdicts["verdict_name"] == "CONVERGED").all()
    assert verdicts.attrs["confirmed"] == 1
    alone = convergence_of_result(data)
    assert alone.attrs["confirmed"] == 0
    assert (alone["verdict"] == verdicts["verdict"]).all()


@pytest.mark.parametrize("name", CASES)
def test_verdicts_of_the_golden_cases(name: str) -> None:
    golden = load_golden(name)
    model = golden.load()
    data = stream_metrics(model, golden.tokens, CONVERGENCE, n_recurrences=12, state_seed=3)
    # Without patterns, as the stream: both with fused attention, whose rounding the rate sees.
    _, cache = model.run_with_cache(
        golden.tokens, n_recurrences=12, state_seed=3, names_filter="residual"
    )
    expected = verdict_of_states(cache.stack_recurrences("resid_post"))
    verdicts = convergence_of_result(data)
    assert verdicts["verdict"].values.tolist() == expected.verdict.tolist()
    np.testing.assert_allclose(verdicts["rate"], expected.rate, rtol=1e-5)
    of_cache = convergence_of_result(over_cache(cache, CONVERGENCE))
    xr.testing.assert_allclose(of_cache, verdicts)


def test_limiting_behaviour_of_tokens() -> None:
    model = contracting()
    data = stream_metrics(model, PROMPTS, "token", n_recurrences=20, state_seed=1)
    labels = limiting_of_result(data, window=16)
    assert labels["limiting_label"].dims == ("layer", "token", "prompt")
    for number, prompt in enumerate(PROMPTS):
        _, cache = model.run_with_cache(prompt, n_recurrences=20, state_seed=1)
        states = cache.stack_recurrences("resid_post")[:, :, 0]
        expected = limiting_behavior_of_states(states, window=16).labels.numpy()
        found = labels["limiting_label"].isel(prompt=number).values
        assert found[:, : len(prompt)].tolist() == expected.tolist()
        assert (found[:, len(prompt) :] == 4).all()  # UNDEFINED: there is no token
    assert labels["limiting_label"].attrs["labels"].startswith("0:FIXED 1:SLIDER")
    # What the counts take: [prompt, layer, token] and a mask of real tokens.
    values = torch.from_numpy(labels["limiting_label"].transpose("prompt", "layer", "token").values)
    mask = torch.arange(5)[None] < torch.from_numpy(labels["n_tokens"].values)[:, None]
    shown = cooccurrence(values.long(), mask)
    assert shown.diagonal()[0] == 1.0
    assert shown[4].isnan().all()  # padding is not counted
    tokens = label_percentages(values.long().transpose(0, 1), mask).tokens
    torch.testing.assert_close(tokens.sum(-1), torch.full((3,), 100.0, dtype=torch.float64))


@pytest.mark.parametrize("name", ["huginn", "ouro"])
def test_matrices_of_a_run(name: str) -> None:
    golden = load_golden(name)
    model = golden.load()
    _, cache = model.run_with_cache(golden.tokens, **golden.run)
    data = pairwise_over_cache(cache)
    assert data["pairwise_attention_distance"].dims == ("effective_layer", "other_layer", "prompt")
    patterns, states = cache.stack_activation("pattern"), cache.stack_activation("resid_post")
    mean = data.mean("prompt")
    np.testing.assert_allclose(
        mean["pairwise_attention_distance"], pairwise_attention_distance(patterns), atol=1e-9
    )
    np.testing.assert_allclose(
        mean["pairwise_residual_cosine"], pairwise_residual_cosine(states), atol=1e-9
    )
    loop = model.loop
    for prompt in range(2):
        core = states[loop.p : loop.p + loop.k * loop.R, prompt]
        expected = cyclicity_index(pairwise_residual_cosine(core), loop.k)
        np.testing.assert_allclose(data["cyclicity_index"][prompt], expected, atol=1e-9)
    only = pairwise_over_cache(cache, ("cosine",))
    assert set(only.data_vars) == {"pairwise_residual_cosine", "cyclicity_index"}


def test_matrices_of_a_padded_run() -> None:
    model = contracting()
    tokens = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    tokens[0, :3], tokens[1] = PROMPTS[1], PROMPTS[0]
    _, batch = model.run_with_cache(tokens, attention_mask=mask, state_seed=1)
    _, alone = model.run_with_cache(PROMPTS[1], state_seed=1)
    a, b = pairwise_over_cache(batch).isel(prompt=[0]), pairwise_over_cache(alone)
    for name in a.data_vars:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5)


def test_lenses_of_a_run(golden: Golden, golden_model: LoopedTransformer) -> None:
    _, cache = golden_model.run_with_cache(golden.tokens, **golden.run)
    data = lens_over_cache(cache)
    assert data["rank"].dims == ("lens", "recurrence", "layer", "prompt")
    final = golden.tensors["logits"][:, -1]
    assert data["token"].values.tolist() == final.argmax(-1).tolist()
    end = data.sel(lens="coda").isel(recurrence=-1, layer=-1)
    assert not end["rank"].any()
    np.testing.assert_allclose(end["kl_to_final"], 0.0, atol=1e-9)
    probability = final.double().softmax(-1).amax(-1)
    np.testing.assert_allclose(end["probability"], probability, atol=1e-4)
    assert data["kl_to_previous"].isel(recurrence=0).isnull().all()
    np.testing.assert_allclose(data["kl_to_last"].isel(recurrence=-1), 0.0, atol=1e-9)
    assert ("exit_distribution" in data) == (golden.name == "ouro")
    if golden.name == "ouro":
        expected = golden.tensors["exit_pdf"][:, -1].T
        torch.testing.assert_close(
            torch.from_numpy(data["exit_distribution"].values), expected, **TOLERANCE
        )
        # The exit logits of two recurrences are another fact of the reference.
        logits = [golden.tensors[f"exit_logits.{t}"][:, -1].double() for t in (0, 1)]
        p, q = (x.log_softmax(-1) for x in reversed(logits))
        np.testing.assert_allclose(
            data["kl_to_previous"].isel(recurrence=1), (p.exp() * (p - q)).sum(-1), rtol=1e-3
        )


def small(**changes: object) -> xr.Dataset:
    return stream_metrics(contracting(), PROMPTS, CONVERGENCE, n_recurrences=6, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convergence_of_result(small().drop_vars("residual_mean")), "lacks residual_mean"),
        (lambda: convergence_of_result(small(), small()), "with 12 recurrences"),
        (lambda: convergence_of_result(small(reference_recurrences=12)), "leave reference_rec"),
        (lambda: limiting_of_result(small()), "compute the group 'token'"),
        (
            lambda: limiting_of_result(
                stream_metrics(contracting(), PROMPTS, "token", n_recurrences=6)
            ),
            r"window \+ 1 = 65 recurrences",
        ),
        (
            lambda: pairwise_over_cache(contracting().run_with_cache(PROMPTS[0])[1], ("patterns",)),
            "which must be some of attention, cosine",
        ),
    ],
)
def test_refusals(call: Callable[[], xr.Dataset], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_a_longer_run_of_another_seed_is_refused() -> None:
    model = contracting()
    data = stream_metrics(model, PROMPTS, CONVERGENCE, n_recurrences=2, state_seed=1)
    longer = stream_metrics(model, PROMPTS, CONVERGENCE, n_recurrences=4, state_seed=2)
    with pytest.raises(InputError, match="belongs to another run"):
        convergence_of_result(data, longer)


def test_a_prompt_that_diverges_has_no_verdict(plain: LoopedTransformer) -> None:
    def explode(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[1] = torch.inf
        return x

    tokens = torch.arange(12).reshape(2, 6)
    with plain.hooks(fwd_hooks=[("blocks.(2, 1).hook_resid_post", explode)]):
        data = stream_metrics(plain, tokens, CONVERGENCE, n_recurrences=6)
    names = convergence_of_result(data)["verdict_name"].values
    assert names[1] == "UNDEFINED"
    assert names[0] != "UNDEFINED"
