"""TransformerLens's ActivationCache methods on looped models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import VARIANTS, exact_config
from torch import Tensor

from tl_looped import InputError, LoopedActivationCache, LoopedTransformer


def model_of(variant: str = "pre", **changes: Any) -> LoopedTransformer:
    values = {"n_prelude": 1, "n_core": 2, "n_recurrences": 2, "n_coda": 1} | VARIANTS[variant]
    return LoopedTransformer.from_config(exact_config(**(values | changes)))


def cached(model: LoopedTransformer, tokens: Tensor, **run: Any) -> LoopedActivationCache:
    with torch.no_grad():
        return model.run_with_cache(tokens, **run)[1]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> LoopedTransformer:
    return model_of(request.param)


# -- reading and stacking -------------------------------------------------------------------------


def test_accumulated_resid_is_the_stream_at_every_sublayer(
    variant: LoopedTransformer, tokens: Tensor
) -> None:
    cache = cached(variant, tokens)
    stack, labels = cache.accumulated_resid(3, incl_mid=True, mlp_input=True, return_labels=True)
    expected = [
        cache.cache_dict[f"blocks.{layer}.hook_resid_{where}"]
        for layer in range(4)
        for where in ("pre", "mid")
    ]
    places = [variant.loop.locate(layer).label for layer in range(4)]
    assert labels == [f"{place}.{where}" for place in places for where in ("pre", "mid")]
    assert torch.equal(stack, torch.stack(expected))
    sliced = cache.accumulated_resid(3, incl_mid=True, mlp_input=True, pos_slice=(2, 5))
    assert torch.equal(sliced, stack[:, :, 2:5])
    last = cache.accumulated_resid(pos_slice=-1)
    assert torch.equal(last[-1], cache["resid_post", -1][:, -1])


def test_accumulated_resid_through_the_final_norm_unembeds_to_the_logits(
    variant: LoopedTransformer, tokens: Tensor
) -> None:
    with torch.no_grad():
        logits, cache = variant.run_with_cache(tokens)
        normed = cache.accumulated_resid(apply_ln=True)
    assert_same(normed[-1] @ variant.W_U + variant.b_U, logits)


def test_accumulated_resid_takes_the_scale_of_the_layer_that_reads_it(tokens: Tensor) -> None:
    model = model_of("residual-injection")
    cache = cached(model, tokens)
    for layer, mlp_input, norm in ((4, False, "ln1"), (4, True, "ln2")):
        stack = cache.accumulated_resid(layer, apply_ln=True, mlp_input=mlp_input)
        expected = cache[f"blocks.{layer}.{norm}.hook_normalized"]
        assert_same(stack[-1], expected)


def test_a_layer_without_a_norm_at_its_input_has_no_scale_to_apply(tokens: Tensor) -> None:
    cache = cached(model_of("post-qk-norm"), tokens)
    with pytest.raises(KeyError, match=r"Layer 3 has no ln1|blocks\.3\.ln1\.hook_scale"):
        cache.accumulated_resid(3, apply_ln=True)


def test_stack_activation_stacks_effective_layers(
    variant: LoopedTransformer, tokens: Tensor
) -> None:
    cache = cached(variant, tokens)
    n = variant.loop.n_layers
    patterns = cache.stack_activation("pattern")
    assert torch.equal(
        patterns, torch.stack([cache[f"blocks.{i}.attn.hook_pattern"] for i in range(n)])
    )
    assert torch.equal(cache.stack_activation("pattern", 3), patterns[:3])
    posts = [cache[f"blocks.{i}.mlp.hook_post"] for i in range(n)]
    assert torch.equal(cache.stack_activation("post", sublayer_type="mlp"), torch.stack(posts))


def test_slicing_the_batch_keeps_class_and_geometry(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    cache = cached(model, tokens, state_seed=3)
    model.set_recurrences(1)
    row, rest = cache.apply_slice_to_batch_dim(1), cache.apply_slice_to_batch_dim((0, 1))
    for part in (row, rest):
        assert isinstance(part, LoopedActivationCache)
        assert (part.loop, part.state_seed) == (cache.loop, 3)
        assert part.model.cfg.n_layers == cache.loop.n_layers
    assert not row.has_batch_dim
    assert rest.has_batch_dim
    for name, value in cache.items():
        assert torch.equal(row[name], value[1])
        assert torch.equal(rest[name], value[:1])


def test_removing_the_batch_dimension_keeps_class_and_geometry(tokens: Tensor) -> None:
    model = model_of("sandwich-loop-norm")
    full, cache = cached(model, tokens[:1]), cached(model, tokens[:1])
    alone = cache.remove_batch_dim()
    assert alone is cache
    assert not alone.has_batch_dim
    assert alone.loop == full.loop
    for name, value in full.items():
        assert torch.equal(alone[name], value[0])
    assert torch.equal(alone["resid_post", (1, 1)], full["resid_post", (1, 1)][0])
    assert torch.equal(alone.accumulated_resid(), full.accumulated_resid()[:, 0])
    at_once = cached(model, tokens[:1], remove_batch_dim=True)
    assert not at_once.has_batch_dim
    assert torch.equal(at_once["z", (1, 0)], alone["z", (1, 0)])


def test_removing_the_batch_dimension_of_two_rows_is_refused(tokens: Tensor) -> None:
    model = model_of()
    with pytest.raises(AssertionError, match="Cannot remove batch dimension"):
        cached(model, tokens).remove_batch_dim()
    for two in (tokens, tokens.numpy(), tokens.tolist()):
        with pytest.raises(InputError, match="batch dimension of 2 prompts"):
            model.run_with_cache(two, remove_batch_dim=True)
    with pytest.raises(InputError, match="batch dimension of 2 prompts"):
        model.run_with_cache(input=tokens, remove_batch_dim=True)
    one = cached(model, tokens[0].tolist(), remove_batch_dim=True)
    assert_same(one["z", 1], cached(model, tokens[:1])["z", 1][0])


def test_compute_head_results_equals_hook_result(
    variant: LoopedTransformer, tokens: Tensor
) -> None:
    cache = cached(variant, tokens)
    assert "blocks.0.attn.hook_result" not in cache
    variant.set_use_attn_result(True)
    hooked = cached(variant, tokens)
    variant.set_recurrences(1)
    cache.compute_head_results()
    for layer in range(cache.loop.n_layers):
        assert_same(cache["result", layer], hooked["result", layer])


def test_neuron_results_are_activations_times_output_rows(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    cache = cached(model, tokens)
    layer = model.loop.index(1, 1)
    results = cache.get_neuron_results(layer, neuron_slice=(0, 5), pos_slice=-1)
    rows = model.core[1].mlp.down.T[:5]
    expected = cache["post", layer][:, -1, :5, None] * rows
    torch.testing.assert_close(results, expected)
    every = cache.get_neuron_results(layer)
    assert_same(every.sum(-2), cache["mlp_out", layer])
    torch.testing.assert_close(cache.get_neuron_results(layer, 7), every[..., 7:8, :].squeeze(-2))


def test_keys_items_and_moves_show_canonical_names(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    cache = cached(model, tokens)
    assert list(cache) == list(cache.keys()) == [name for name, _ in cache.items()]
    assert set(cache) == set(model.hook_dict)
    moved = cache.to(torch.device("meta"))
    assert moved is cache
    assert {value.device.type for value in cache.values()} == {"meta"}
