"""Verdicts, limiting behaviours, matrices and lenses of labelled results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from closeness import SAME
from conftest import CASES, TOLERANCE, Golden, exact_config, load_golden
from torch import Tensor

from tl_looped import InitialState, Injection, LoopedTransformer, NormLayout
from tl_looped.errors import InputError
from tl_looped.metrics import (
    CONVERGENCE,
    Verdict,
    attention_lipschitz_from_cache,
    convergence_verdict,
    cooccurrence,
    cyclicity_index,
    fixed_point_distance,
    from_cache,
    label_percentages,
    lens_trajectory,
    lenses_from_cache,
    limiting_behavior,
    pairwise_attention_distance,
    pairwise_from_cache,
    pairwise_residual_cosine,
    state_distance,
    stream,
)

pytestmark = pytest.mark.usefixtures("without_gradients")


def contracting(carried: float = 0.05) -> LoopedTransformer:
    """A loop that forgets its state: only a small share of it goes through the injection."""
    model = LoopedTransformer.from_config(
        exact_config(
            injection=Injection.LINEAR, initial_state=InitialState.RANDOM, initial_state_std=0.5
        )
    )
    with torch.no_grad():
        model.injection.weight[:, : model.cfg.d_model] *= carried
    return model


PROMPTS = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2, 6]), torch.tensor([5, 3, 5, 8, 9])]


def test_verdicts_of_a_stream_are_those_of_the_states() -> None:
    model = contracting()
    data = stream(model, PROMPTS, CONVERGENCE, n_recurrences=10, state_seed=1)
    longer = stream(model, PROMPTS, CONVERGENCE, n_recurrences=20, state_seed=1)
    verdicts = convergence_verdict(data, longer)
    for number, prompt in enumerate(PROMPTS):
        states = [
            model.run_with_cache(prompt, n_recurrences=n, state_seed=1, names_filter="residual")[
                1
            ].stack_recurrences("resid_post")[:, :, 0]
            for n in (10, 20)
        ]
        expected = convergence_verdict(*states)
        assert verdicts["verdict"][number] == expected.verdict
        assert verdicts["settled_at"][number] == expected.settled_at
        np.testing.assert_allclose(verdicts["rate"][number], expected.rate, rtol=1e-4)
    assert verdicts["verdict_name"].values.tolist() == [
        Verdict(v).name for v in verdicts["verdict"].values
    ]
    assert (verdicts["verdict_name"] == "CONVERGED").all()
    assert verdicts.attrs["confirmed"] == 1
    alone = convergence_verdict(data)
    assert alone.attrs["confirmed"] == 0
    assert (alone["verdict"] == verdicts["verdict"]).all()


@pytest.mark.parametrize("name", CASES)
def test_verdicts_of_the_golden_cases(name: str) -> None:
    golden = load_golden(name)
    model = golden.load(dtype=torch.float64)
    data = stream(model, golden.tokens, CONVERGENCE, n_recurrences=12, state_seed=3)
    # Without patterns, as the stream: both with fused attention, whose rounding the rate sees.
    _, cache = model.run_with_cache(
        golden.tokens, n_recurrences=12, state_seed=3, names_filter="residual"
    )
    expected = convergence_verdict(cache.stack_recurrences("resid_post"))
    verdicts = convergence_verdict(data)
    assert verdicts["verdict"].values.tolist() == expected.verdict.tolist()
    np.testing.assert_allclose(verdicts["rate"], expected.rate, rtol=1e-5)
    of_cache = convergence_verdict(from_cache(cache, CONVERGENCE))
    xr.testing.assert_allclose(of_cache, verdicts)


def test_limiting_behaviour_of_tokens() -> None:
    model = contracting()
    data = stream(model, PROMPTS, "token", n_recurrences=20, state_seed=1)
    labels = limiting_behavior(data, window=16)
    assert labels["limiting_label"].dims == ("layer", "token", "prompt")
    for number, prompt in enumerate(PROMPTS):
        _, cache = model.run_with_cache(prompt, n_recurrences=20, state_seed=1)
        states = cache.stack_recurrences("resid_post")[:, :, 0]
        expected = limiting_behavior(states, window=16).labels.numpy()
        found = labels["limiting_label"].isel(prompt=number).values
        assert found[:, : len(prompt)].tolist() == expected.tolist()
        assert (found[:, len(prompt) :] == 4).all()  # UNDEFINED: there is no token
    assert labels["limiting_label"].attrs["labels"].startswith("0:FIXED 1:SLIDER")
    # What the counts take: [prompt, layer, token] and a mask of real tokens.
    values = torch.from_numpy(labels["limiting_label"].transpose("prompt", "layer", "token").values)
    mask = torch.arange(5)[None] < torch.from_numpy(labels["n_tokens"].values)[:, None]
    shown = cooccurrence(values.long(), mask)
    assert shown[0, 0] == 1.0
    assert shown[4].isnan().all()  # padding is not counted
    tokens = label_percentages(values.long().transpose(0, 1), mask).tokens
    torch.testing.assert_close(tokens.sum(-1), torch.full((3,), 100.0, dtype=torch.float64))


@pytest.mark.parametrize("name", ["huginn", "ouro"])
def test_matrices_of_a_run(name: str) -> None:
    golden = load_golden(name)
    model = golden.load()
    _, cache = model.run_with_cache(golden.tokens, **golden.run)
    data = pairwise_from_cache(cache)
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
    only = pairwise_from_cache(cache, ("cosine",))
    assert set(only.data_vars) == {"pairwise_residual_cosine", "cyclicity_index"}


def test_matrices_of_a_padded_run() -> None:
    model = contracting()
    tokens = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    tokens[0, :3], tokens[1] = PROMPTS[1], PROMPTS[0]
    _, batch = model.run_with_cache(tokens, attention_mask=mask, state_seed=1)
    _, alone = model.run_with_cache(PROMPTS[1], state_seed=1)
    a, b = pairwise_from_cache(batch).isel(prompt=[0]), pairwise_from_cache(alone)
    for name in a.data_vars:
        np.testing.assert_allclose(a[name], b[name], atol=SAME)


def test_lenses_of_a_run(golden: Golden, golden_model: LoopedTransformer) -> None:
    _, cache = golden_model.run_with_cache(golden.tokens, **golden.run)
    data = lenses_from_cache(cache)
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
    return stream(contracting(), PROMPTS, CONVERGENCE, n_recurrences=6, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convergence_verdict(small().drop_vars("residual_mean")), "lacks residual_mean"),
        (lambda: convergence_verdict(small(), small()), "with 12 recurrences"),
        (lambda: convergence_verdict(small(reference_recurrences=12)), "leave reference_rec"),
        (lambda: limiting_behavior(small()), "compute the group 'token'"),
        (
            lambda: limiting_behavior(stream(contracting(), PROMPTS, "token", n_recurrences=6)),
            r"window \+ 1 = 65 recurrences",
        ),
        (
            lambda: pairwise_from_cache(contracting().run_with_cache(PROMPTS[0])[1], ("patterns",)),
            "which must be some of attention, cosine",
        ),
    ],
)
def test_refusals(call: Callable[[], xr.Dataset], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_a_longer_run_of_another_seed_is_refused() -> None:
    model = contracting(carried=5.0)
    data = stream(model, PROMPTS, CONVERGENCE, n_recurrences=2, state_seed=1)
    longer = stream(model, PROMPTS, CONVERGENCE, n_recurrences=4, state_seed=2)
    with pytest.raises(InputError, match="belongs to another run"):
        convergence_verdict(data, longer)


def test_a_prompt_that_diverges_has_no_verdict(plain: LoopedTransformer) -> None:
    def explode(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[1] = torch.inf
        return x

    tokens = torch.arange(12).reshape(2, 6)
    with plain.hooks(fwd_hooks=[("blocks.(2, 1).hook_resid_post", explode)]):
        data = stream(plain, tokens, CONVERGENCE, n_recurrences=6)
    names = convergence_verdict(data)["verdict_name"].values
    assert names[1] == "UNDEFINED"
    assert names[0] != "UNDEFINED"


def changing(**changes: object) -> LoopedTransformer:
    """A loop whose states keep changing, and depend on their start."""
    return LoopedTransformer.from_config(
        exact_config(
            injection=Injection.LINEAR,
            initial_state=InitialState.RANDOM,
            initial_state_std=0.5,
            **changes,
        )
    )


def cached(model: LoopedTransformer, tokens: Tensor, R: int = 3, **kwargs: object) -> Any:
    return model.run_with_cache(tokens, n_recurrences=R, **{"state_seed": 1, **kwargs})[1]


TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])


@pytest.mark.parametrize("other", ["one prompt", "another order", "shorter", "seed", "mask"])
def test_a_reference_must_be_of_the_same_run(other: str) -> None:
    model = changing()
    mask = torch.ones(3, 5)
    mask[0, :2] = 0
    reference = {
        "one prompt": lambda: cached(model, TOKENS[:1], 6),
        "another order": lambda: cached(model, TOKENS.flip(0), 6),
        "shorter": lambda: cached(model, TOKENS[:, :4], 6),
        "seed": lambda: cached(model, TOKENS, 6, state_seed=2),
        "mask": lambda: cached(model, TOKENS, 6, attention_mask=mask),
    }[other]()
    with pytest.raises(InputError, match="reference"):
        from_cache(cached(model, TOKENS), "fixed_point", reference=reference)


def test_a_result_with_a_reference_says_so_and_gets_no_verdict() -> None:
    model = changing()
    data = from_cache(cached(model, TOKENS), CONVERGENCE, reference=cached(model, TOKENS, 6))
    assert data.attrs["reference_recurrences"] == 6
    with pytest.raises(InputError, match="reference_recurrences"):
        convergence_verdict(data)


@pytest.mark.parametrize("change", ["seed", "prompts"])
def test_a_longer_run_of_equal_norms_is_refused_too(change: str) -> None:
    """Behind Huginn's norms all states have about the same size, whatever they are."""
    model = changing(norm_layout=NormLayout.RESIDUAL)
    data = stream(model, TOKENS, CONVERGENCE, n_recurrences=4, state_seed=1)
    tokens, seed = (TOKENS, 2) if change == "seed" else (TOKENS.flip(0), 1)
    longer = stream(model, tokens, CONVERGENCE, n_recurrences=8, state_seed=seed)
    with pytest.raises(InputError, match="belongs to another run"):
        convergence_verdict(data, longer)


def test_distances_count_relative_to_the_norm_of_their_own_layer() -> None:
    """A small layer that drifts beside a large one that stands still has not converged."""
    model = changing()
    results = []
    for n in (16, 32):

        def hold(x: Tensor, hook: Any) -> Tensor:
            if hook.layer_in_stage > 0:
                return torch.full_like(x, 1000.0)
            return torch.full_like(x, (1 + 0.008 * hook.recurrence) / x.shape[-1] ** 0.5)

        names = [f"recurrence.{r}.blocks.{i}.hook_resid_post" for r in range(n) for i in range(3)]
        with model.with_recurrences(n), model.hooks(fwd_hooks=[(name, hold) for name in names]):
            _, cache = model.run_with_cache(TOKENS[:1], names_filter="residual")
        results.append(from_cache(cache, CONVERGENCE))
    assert convergence_verdict(*results, eps=1e-2)["verdict_name"].item() != "CONVERGED"


@pytest.mark.parametrize("left", [True, False])
def test_lenses_and_bounds_know_the_mask_of_the_run(left: bool) -> None:
    model = changing()
    tokens, mask = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5)
    rows = [TOKENS[0, :3], TOKENS[1]]
    for i, row in enumerate(rows):
        place = slice(5 - len(row), 5) if left else slice(len(row))
        tokens[i, place], mask[i, place] = row, 1
    padded = cached(model, tokens, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = cached(model, row)
        a, b = (lens_trajectory(cache).coda_lens.kl_to_final for cache in (padded, alone))
        torch.testing.assert_close(a[..., i], b[..., 0], atol=SAME, rtol=0)
        a, b = (attention_lipschitz_from_cache(cache, 1, 2).change for cache in (padded, alone))
        torch.testing.assert_close(a[i], b[0], atol=SAME, rtol=0)


def test_tokens_count_from_the_first_real_one() -> None:
    model = changing()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    padded = from_cache(cached(model, TOKENS[:2] * mask, attention_mask=mask), "token")
    alone = from_cache(cached(model, TOKENS[0, 2:]), "token")
    found = padded["token_cosine"].isel(prompt=0, token=slice(3))
    np.testing.assert_allclose(found, alone["token_cosine"].isel(prompt=0), atol=SAME)
    assert padded["token_cosine"].isel(prompt=0, token=slice(3, 5)).isnull().all()


def test_a_part_of_the_positions_is_no_prompt() -> None:
    with pytest.raises(InputError, match=r"\b3\b.*\b5\b"):
        from_cache(cached(changing(), TOKENS, pos_slice=(1, 4)), "magnitude")


def test_attributes_can_be_stored() -> None:
    for seed in (3, 2**100):
        data = stream(changing(), TOKENS, "magnitude", n_recurrences=1, state_seed=seed)
        assert int(data.attrs["state_seed"]) == seed
        for value in data.attrs.values():
            assert type(value) in (str, float) or -(2**63) <= value < 2**63


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: stream(m, [TOKENS, TOKENS]), "2 arrays of tokens"),
        (lambda m: stream(m, [[1, 2], []]), "prompt 1 must be a sequence"),
        (
            lambda m: stream(m, ["a", [1, 2]]),
            "item 1 of the input is a list, item 0 is a text",
        ),
        (
            lambda m: stream(m, TOKENS.tolist(), attention_mask=torch.ones(3, 5)),
            "attention_mask is for tokens",
        ),
        (
            lambda m: stream(m, TOKENS, state_seed=1, initial_state="zeros"),
            "initial_state and state_seed",
        ),
        (lambda m: lenses_from_cache(cached(m, TOKENS, 0)), "no recurrence"),
        (lambda m: attention_lipschitz_from_cache(cached(m, TOKENS, 1), 0, 1), "no two in a row"),
        (
            lambda m: convergence_verdict(stream(m, TOKENS, CONVERGENCE).isel(recurrence=slice(2))),
            "2 of its run's 4 recurrences",
        ),
        (
            lambda m: fixed_point_distance(torch.ones(3, 2, 4, 5), reference=torch.ones(4, 5)),
            "reference must have the same shape",
        ),
    ],
)
def test_more_refusals(call: Callable[[LoopedTransformer], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(changing())


def test_cosines_of_states_beyond_the_range_of_fp32_norms() -> None:
    x = torch.full((1, 16), 3e38)
    assert state_distance(x, x, "cosine").item() == pytest.approx(1.0)
    tiny = torch.full((1, 16), 1e-40)
    assert state_distance(tiny, -tiny, "cosine").item() == pytest.approx(-1.0)
