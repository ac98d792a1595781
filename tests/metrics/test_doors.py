"""One metric, three doors: tensors, a cache, a run that is watched. They agree on everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from closeness import SAME, assert_same_data
from conftest import Golden, exact_config
from torch import Tensor

from tl_looped import (
    InitialState,
    Injection,
    LoopedActivationCache,
    LoopedKeyValueCache,
    LoopedTransformer,
)
from tl_looped import metrics as all_metrics
from tl_looped.errors import DataError, InputError, MissingActivationError
from tl_looped.metrics import (
    StreamOptions,
    angular_distance,
    by_recurrence,
    colsum_concentration,
    cosine_similarity,
    distance_similarity,
    fixed_point_distance,
    from_cache,
    lowest_cosine_to_fixed_points,
    matrix_entropy,
    mixing_score,
    residual_magnitude,
    sink_rate,
    sink_score,
    step_geometry,
    stream,
    stream_batches,
    successive_difference,
)


@pytest.fixture
def golden_model(golden: Golden) -> LoopedTransformer:
    """In fp64, where the doors differ by nothing that rounding could excuse."""
    return golden.load(dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("without_gradients")


def on_tensors(states: Tensor, patterns: Tensor, before: Tensor) -> dict[str, Tensor]:
    """Every metric by the name of its variable, from ``[recurrence, layer, prompt, ...]``.

    ``before`` is the state of the layer before each of the states.
    """
    per_head = {
        "colsum_concentration": colsum_concentration(patterns),
        "sink_score": sink_score(patterns),
        "sink_score_above_uniform": sink_score(patterns, above_uniform=True),
        **{
            f"mixing_{form}": mixing_score(patterns, form)
            for form in ("raw", "per_token", "per_row", "log_t")
        },
        "successive_attention": successive_difference(patterns, "attention"),
        "fixed_point_attention": fixed_point_distance(patterns, "attention"),
    }
    forms = ("abs", "rel", "cosine")
    steps = step_geometry(states)
    return {
        "successive_direction": successive_difference(states, "direction"),
        "step_turning_cosine": steps.turning_cosine,
        "step_acceleration": steps.acceleration,
        "step_relative_acceleration": steps.relative_acceleration,
        "angular_distance": angular_distance(torch.stack([before, states]))[0],
        "token_cosine": cosine_similarity(states).movedim(-1, 0).transpose(2, 3),
        "token_distance_similarity": distance_similarity(states).movedim(-1, 0).transpose(2, 3),
        **{name: value.transpose(2, 3) for name, value in per_head.items()},
        "sink_rate": sink_rate(patterns),
        **{
            f"entropy_{f}": matrix_entropy(states, f) for f in ("nats", "bits", "norm_max", "skean")
        },
        **{f"residual_{s}": residual_magnitude(states, s) for s in ("mean", "max", "first", "rms")},
        **{f"successive_{form}": successive_difference(states, form) for form in forms},
        **{f"fixed_point_{form}": fixed_point_distance(states, form) for form in forms},
        "fixed_point_lowest_cosine": lowest_cosine_to_fixed_points(states),
    }


def test_the_three_doors_agree(golden: Golden, golden_model: LoopedTransformer) -> None:
    model = golden_model
    _, cache = model.run_with_cache(golden.tokens, state_seed=3)
    both = ("all", "token")
    data = from_cache(cache, both)
    loop = cache.loop
    patterns, states = cache.stack_recurrences("pattern"), cache.stack_recurrences("resid_post")
    before = torch.full_like(states, torch.nan)
    for r, layer in np.ndindex(loop.R, loop.k):
        if loop.index(r, layer) > 0:
            before[r, layer] = cache["resid_post", loop.index(r, layer) - 1]
    expected = on_tensors(states, patterns, before)
    state_out = {n for n in data.data_vars if str(n).endswith("_state_out")}
    assert set(data.data_vars) - state_out == set(expected)
    for name, value in expected.items():
        assert data[name].sizes["recurrence"] == loop.R
        np.testing.assert_allclose(data[name].values, value.numpy(), atol=SAME, rtol=SAME)
    assert data["sink_score"].dims == ("recurrence", "layer", "head", "prompt")
    assert data["entropy_bits"].dims == ("recurrence", "layer", "prompt")
    for options in ({}, {"states": "disk"}, {"batch_size": 1}):
        assert_same_data(stream(model, golden.tokens, both, state_seed=3, **options), data)


def test_a_loop_norm_has_states_of_its_own(golden: Golden, golden_model: LoopedTransformer) -> None:
    """Of Ouro's last layer, both states are kept: before and after the final norm."""
    _, cache = golden_model.run_with_cache(golden.tokens, state_seed=3)
    data = from_cache(cache, ["entropy_bits", "successive", "fixed_point"])
    names = {n for n in data.data_vars if str(n).endswith("_state_out")}
    if golden.name != "ouro":
        assert not names
        return
    states = cache.stack_recurrences("state_out")[:, None]
    for form in ("abs", "rel", "cosine"):
        for kind, function in (
            ("successive", successive_difference),
            ("fixed_point", fixed_point_distance),
        ):
            values = data[f"{kind}_{form}_state_out"]
            assert values.dims == ("recurrence", "prompt")
            np.testing.assert_allclose(values, function(states, form)[:, 0], atol=SAME)
    entropies = matrix_entropy(states[:, 0]).numpy()
    np.testing.assert_allclose(data["entropy_bits_state_out"], entropies, atol=SAME)


def test_depth_holds_prelude_and_coda(plain: LoopedTransformer, tokens: Tensor) -> None:
    _, cache = plain.run_with_cache(tokens)
    data = from_cache(cache, "all", by="depth")
    loop = plain.loop
    assert data.sizes["effective_layer"] == loop.n_layers
    assert data["label"].values.tolist() == loop.labels()
    for i in (0, 1, loop.index(2, 1), loop.n_layers - 1):
        expected = matrix_entropy(cache["resid_post", i]).numpy()
        np.testing.assert_allclose(data["entropy_bits"].isel(effective_layer=i), expected)
    outside = data.isel(effective_layer=data["stage"].values != "core")
    assert (outside["in_recurrence"] == -1).all()
    assert not outside["sink_rate"].isnull().any()
    assert outside["fixed_point_rel"].isnull().all()
    assert outside["successive_abs"].isnull().all()
    folded = by_recurrence(data)
    assert_same_data(folded, from_cache(cache, "all"))
    assert_same_data(by_recurrence(folded), folded)
    one = data["colsum_concentration"].isel(effective_layer=loop.index(3, 2))
    xr.testing.assert_equal(
        one.drop_vars(["effective_layer", "label", "stage", "in_recurrence", "layer_in_stage"]),
        folded["colsum_concentration"].sel(recurrence=3, layer=2, drop=True),
    )


def injected() -> LoopedTransformer:
    return LoopedTransformer.from_config(
        exact_config(
            injection=Injection.LINEAR,
            initial_state=InitialState.RANDOM,
            initial_state_std=0.5,
            initializer_range=0.2,
        )
    )


LENGTHS = (6, 3, 9, 6, 4)


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (n,), generator=generator) for n in LENGTHS]


@pytest.mark.parametrize("states", ["recompute", "disk"])
@pytest.mark.parametrize("batching", ["length", "padded"])
def test_prompts_of_different_lengths(prompts: list[Tensor], batching: str, states: str) -> None:
    model = injected()
    data = stream(
        model, prompts, "all", by="depth", batching=batching, states=states, n_recurrences=5,
        state_seed=2, batch_size=3,
    )  # fmt: skip
    assert data["n_tokens"].values.tolist() == list(LENGTHS)
    assert data.attrs["state_seed"] == 2
    assert data.attrs["n_recurrences"] == 5
    for number, prompt in enumerate(prompts):
        _, cache = model.run_with_cache(prompt, n_recurrences=5, state_seed=2)
        alone = from_cache(cache, "all", by="depth")
        assert_same_data(data.isel(prompt=[number]).assign_coords(prompt=[0]), alone)


def test_a_padded_cache_knows_its_mask(prompts: list[Tensor]) -> None:
    model = injected()
    alone = stream(model, prompts, "all", state_seed=2)
    for left in (False, True):
        tokens, mask = torch.zeros(5, 9, dtype=torch.long), torch.zeros(5, 9)
        for i, row in enumerate(prompts):
            place = slice(9 - len(row), 9) if left else slice(len(row))
            tokens[i, place], mask[i, place] = row, 1
        _, cache = model.run_with_cache(tokens, attention_mask=mask, state_seed=2)
        assert_same_data(from_cache(cache, "all"), alone)
        assert_same_data(from_cache(cache, "all", attention_mask=mask), alone)
        part = cache.apply_slice_to_batch_dim([1, 3])
        chosen = alone.isel(prompt=[1, 3]).assign_coords(prompt=[0, 1])
        assert_same_data(from_cache(part, "all"), chosen)
        one = cache.apply_slice_to_batch_dim(1)
        assert_same_data(from_cache(one, "all"), chosen.isel(prompt=[0]))
        with pytest.raises(InputError, match="differs from the one"):
            from_cache(cache, attention_mask=torch.ones(5, 9))


def test_a_cache_without_batch_dimension(plain: LoopedTransformer, tokens: Tensor) -> None:
    _, one = plain.run_with_cache(tokens[:1], remove_batch_dim=True)
    _, batch = plain.run_with_cache(tokens[:1])
    assert_same_data(from_cache(one, "all"), from_cache(batch, "all"))


def test_a_plain_cache_of_a_looped_model(plain: LoopedTransformer, tokens: Tensor) -> None:
    """TransformerLens's own class; it does not remember the number of recurrences."""
    from transformer_lens import ActivationCache

    _, looped = plain.run_with_cache(tokens, n_recurrences=6)
    cache = ActivationCache(looped.cache_dict, plain)
    assert plain.loop.R == 4
    with pytest.raises(InputError, match=r"\b20\b.*\b15\b.*\b4\b"):
        from_cache(cache)
    with plain.with_recurrences(6):
        assert_same_data(from_cache(cache, "all"), from_cache(looped, "all"))
    with plain.with_recurrences(8), pytest.raises(MissingActivationError, match=r"\b21\b.*\b27\b"):
        from_cache(cache, "signature")


def test_a_later_run_as_the_reference(plain: LoopedTransformer, tokens: Tensor) -> None:
    _, cache = plain.run_with_cache(tokens, n_recurrences=4)
    _, longer = plain.run_with_cache(tokens, n_recurrences=8)
    data = from_cache(cache, "fixed_point", reference=longer)
    expected = fixed_point_distance(
        cache.stack_recurrences("resid_post"), reference=longer.stack_recurrences("resid_post")[-1]
    )
    np.testing.assert_allclose(data["fixed_point_abs"], expected, atol=SAME)
    assert (data["fixed_point_abs"].isel(recurrence=-1) > 1e-3).all()
    streamed = stream(plain, tokens, "fixed_point", n_recurrences=4, reference_recurrences=8)
    assert_same_data(streamed, data)
    assert streamed.attrs["reference_recurrences"] == 8


def test_hooks_act_while_a_run_is_watched(plain: LoopedTransformer, tokens: Tensor) -> None:
    def halve(x: Tensor, hook: Any) -> Tensor:
        return x / 2

    with plain.hooks(fwd_hooks=[("blocks.(1, 0).hook_resid_post", halve)]):
        watched = stream(plain, tokens, "all")
        _, cache = plain.run_with_cache(tokens)
    assert_same_data(watched, from_cache(cache, "all"))
    plain_size = stream(plain, tokens, "magnitude")["residual_mean"]
    assert (plain_size != watched["residual_mean"]).any()
    assert not any(point.is_active for point in plain.hook_dict.values())


def test_a_run_cached_by_a_hook_leaves_a_watched_one_alone(plain: LoopedTransformer) -> None:
    tokens = torch.arange(6)[None]
    seen: list[str] = []
    with plain.readers([("blocks.0.hook_resid_post", lambda x, hook: seen.append(hook.name))]):
        _, cache = plain.run_with_cache(tokens, names_filter="residual")
    assert seen == ["blocks.0.hook_resid_post"]
    assert ("resid_post", 0) in cache


def test_only_what_is_asked_for_is_computed(plain: LoopedTransformer, tokens: Tensor) -> None:
    data = stream(plain, tokens, "entropy_bits")
    assert set(data.data_vars) == {"entropy_bits"}
    assert data["entropy_bits"].attrs == {"long_name": "residual entropy", "units": "bits"}
    _, cache = plain.run_with_cache(tokens, names_filter="residual")
    assert_same_data(from_cache(cache, "entropy_bits"), data)
    with pytest.raises(MissingActivationError, match=r"'pattern'.*\b0\b.*\b15\b"):
        from_cache(cache, "sink_rate")


def test_batches_can_be_saved_one_by_one(plain: LoopedTransformer, prompts: list[Tensor]) -> None:
    options = StreamOptions(batch_size=2)
    batches = list(stream_batches(plain, prompts, "signature", options))
    assert [b["prompt"].values.tolist() for b in batches] == [[1], [4], [0, 3], [2]]
    joined = by_recurrence(xr.concat(batches, "prompt").sortby("prompt"))
    xr.testing.assert_allclose(joined, stream(plain, prompts, "signature"))


def test_tokens_of_prompts_of_different_lengths(prompts: list[Tensor]) -> None:
    model = injected()
    data = stream(model, prompts, "token", n_recurrences=4, state_seed=2, batch_size=2)
    assert data["token_cosine"].dims == ("recurrence", "layer", "token", "prompt")
    for number, prompt in enumerate(prompts):
        one = data.isel(prompt=number)
        _, cache = model.run_with_cache(prompt, n_recurrences=4, state_seed=2)
        expected = cosine_similarity(cache.stack_recurrences("resid_post")[:, :, 0])
        found = one["token_cosine"].values
        np.testing.assert_allclose(found[:, :, : len(prompt)], expected.movedim(-1, 0), atol=SAME)
        assert np.isnan(found[:, :, len(prompt) :]).all()
    padded = stream(
        model, prompts, "token", n_recurrences=4, state_seed=2, batch_size=2, batching="padded"
    )
    assert_same_data(padded, data)


def test_one_recurrence_and_none() -> None:
    model, tokens = injected(), torch.arange(7)[None]
    one = stream(model, tokens, "all", n_recurrences=1)
    for name in one.data_vars:
        if str(name).startswith(("successive", "step")):
            assert one[name].isnull().all(), name
    assert not one["fixed_point_abs"].any()
    none = stream(model, tokens, "signature", n_recurrences=0, by="depth")
    assert none["stage"].values.tolist() == ["prelude", "prelude", "coda"]
    with pytest.raises(InputError, match="no recurrence"):
        by_recurrence(none)


def test_a_model_that_diverges_gives_nan_from_there_on(plain: LoopedTransformer) -> None:
    def explode(x: Tensor, hook: Any) -> Tensor:
        return x * torch.nan

    tokens = torch.arange(6)[None]
    with plain.hooks(fwd_hooks=[("blocks.(2, 1).hook_resid_post", explode)]):
        data = stream(plain, tokens, "all")
    before, after = data.isel(recurrence=slice(0, 2)), data.isel(recurrence=3)
    for name in data.data_vars:
        assert after[name].isnull().all(), name
        reference = str(name).startswith("fixed_point")
        if reference:
            assert before[name].isnull().all(), name
        elif not str(name).startswith(("successive", "step")):
            assert not before[name].isnull().any(), name


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, t: stream(m, t, "entropy"), InputError, "there is no 'entropy'; groups"),
        (lambda m, t: stream(m, t, []), InputError, "none was given"),
        (lambda m, t: stream(m, t, by="layer"), InputError, "by must be"),
        (lambda m, t: stream(m, [], "signature"), InputError, "no prompt"),
        (lambda m, t: stream(m, t, batch_size=0), InputError, "at least 1, got 0"),
        (lambda m, t: stream(m, t, states="ram"), InputError, "states must be one of"),
        (lambda m, t: stream(m, t, batching="none"), InputError, "batching must be one of"),
        (
            lambda m, t: stream(m, t, states="disk", reference_recurrences=8),
            InputError,
            "needs states=recompute",
        ),
        (
            lambda m, t: stream(m, [t[0], torch.zeros(99, dtype=torch.long)]),
            InputError,
            "prompt 1 has 99 tokens, more than the context",
        ),
    ],
)
def test_refusals(
    plain: LoopedTransformer,
    tokens: Tensor,
    call: Callable[[LoopedTransformer, Tensor], xr.Dataset],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        call(plain, tokens)


def test_a_folder_that_cannot_be_written(
    plain: LoopedTransformer, tokens: Tensor, tmp_path: Any
) -> None:
    with pytest.raises(DataError, match="no file can be made in"):
        stream(plain, tokens, states="disk", folder=tmp_path / "missing")
    stream(plain, tokens, states="disk", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(plain: LoopedTransformer, tokens: Tensor) -> None:
    """/dev/full accepts nothing; a temporary file on it is what a full disk is."""
    from tl_looped.metrics.spill import Spill

    with Spill() as spill, open("/dev/full", "r+b") as full:
        spill._file.close()
        spill._file = full
        with pytest.raises(DataError, match=r"No space left.*states='recompute'"):
            spill.put("x", torch.ones(100_000))


def test_rows_of_tokens(plain: LoopedTransformer, tokens: Tensor) -> None:
    mask = torch.ones(2, 9)
    mask[1, :4] = 0
    rows = plain.token_rows(tokens, mask)
    assert [len(row) for row in rows] == [9, 5]
    assert torch.equal(rows[1], tokens[1, 4:])
    assert [len(row) for row in plain.token_rows([[1, 2, 3], [4]])] == [3, 1]
    assert [row.tolist() for row in plain.token_rows([1, 2, 3])] == [[1, 2, 3]]


def test_a_cache_of_a_run_with_early_exits_is_refused(golden_model: LoopedTransformer) -> None:
    from tl_looped.exits import ExitAt

    _, cache = golden_model.run_with_cache(torch.arange(8)[None], exit_rule=ExitAt(1))
    assert isinstance(cache, LoopedActivationCache)
    with pytest.raises(MissingActivationError, match="of layer"):
        from_cache(cache)


def test_rows_of_texts_in_a_tuple() -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    texts = ("Tom has 3 boxes.", "She reads.")
    rows = model.token_rows(texts)
    for row, text in zip(rows, texts, strict=True):
        assert torch.equal(row, model.to_tokens(text)[0])


def test_a_run_behind_a_key_value_cache_is_no_whole_prompt(plain: LoopedTransformer) -> None:
    kv = LoopedKeyValueCache()
    plain(torch.tensor([[1, 2, 3]]), past_kv_cache=kv)
    _, cache = plain.run_with_cache(torch.tensor([[4, 5]]), past_kv_cache=kv)
    assert cache.n_past == 3
    with pytest.raises(InputError, match=r"\b3\b"):
        all_metrics.from_cache(cache, ["signature"])
    _, whole = plain.run_with_cache(torch.tensor([[1, 2, 3]]), past_kv_cache=LoopedKeyValueCache())
    all_metrics.from_cache(whole, ["signature"])
