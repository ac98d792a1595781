"""TransformerLens's ActivationCache methods on looped models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VARIANTS, random_config
from torch import Tensor

from tl_looped import (
    InputError,
    InvalidDecompositionError,
    LoopedActivationCache,
    LoopedTransformer,
    NormLayout,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def model_of(variant: str = "pre", **changes: Any) -> LoopedTransformer:
    values = {"n_prelude": 1, "n_core": 2, "n_recurrences": 2, "n_coda": 1} | VARIANTS[variant]
    return LoopedTransformer.from_config(random_config(**(values | changes)))


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
    assert labels == [f"{layer}_{where}" for layer in range(4) for where in ("pre", "mid")]
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
    torch.testing.assert_close(normed[-1] @ variant.W_U + variant.b_U, logits, **CLOSE)


def test_accumulated_resid_takes_the_scale_of_the_layer_that_reads_it(tokens: Tensor) -> None:
    model = model_of("residual-injection")
    cache = cached(model, tokens)
    for layer, mlp_input, norm in ((4, False, "ln1"), (4, True, "ln2")):
        stack = cache.accumulated_resid(layer, apply_ln=True, mlp_input=mlp_input)
        expected = cache[f"blocks.{layer}.{norm}.hook_normalized"]
        torch.testing.assert_close(stack[-1], expected, **CLOSE)


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
    torch.testing.assert_close(one["z", 1], cached(model, tokens[:1])["z", 1][0], **CLOSE)


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
        torch.testing.assert_close(cache["result", layer], hooked["result", layer], **CLOSE)


def test_neuron_results_are_activations_times_output_rows(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    cache = cached(model, tokens)
    layer = model.loop.index(1, 1)
    results = cache.get_neuron_results(layer, neuron_slice=(0, 5), pos_slice=-1)
    rows = model.core[1].mlp.down.T[:5]
    expected = cache["post", layer][:, -1, :5, None] * rows
    torch.testing.assert_close(results, expected)
    every = cache.get_neuron_results(layer)
    torch.testing.assert_close(every.sum(-2), cache["mlp_out", layer], **CLOSE)
    torch.testing.assert_close(cache.get_neuron_results(layer, 7), every[..., 7:8, :].squeeze(-2))


def test_keys_items_and_moves_show_canonical_names(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    cache = cached(model, tokens)
    assert list(cache) == list(cache.keys()) == [name for name, _ in cache.items()]
    assert set(cache) == set(model.hook_dict)
    moved = cache.to(torch.device("meta"))
    assert moved is cache
    assert {value.device.type for value in cache.values()} == {"meta"}


# -- decompositions -------------------------------------------------------------------------------

DECOMPOSITIONS = {
    "decompose_resid": {},
    "stack_head_results": {},
    "stack_neuron_results": {"layer": 2},
    "get_full_resid_decomposition": {},
    "logit_attrs": {"residual_stack": torch.ones(1, 2, 9, 32), "tokens": 3},
}
NOT_A_SUM: dict[str, tuple[dict[str, Any], str]] = {
    "injection": (VARIANTS["pre-injection"], "injection"),
    "loop norm": ({"loop_norm": True}, "loop norm"),
    "residual norm": ({"norm_layout": NormLayout.RESIDUAL}, "ln_mid"),
    "norm before the coda": ({"pre_coda_norm": True}, "coda"),
}


@pytest.mark.parametrize("method", DECOMPOSITIONS)
@pytest.mark.parametrize("kind", NOT_A_SUM)
def test_sums_of_writes_are_refused_where_the_stream_is_no_sum(
    kind: str, method: str, tokens: Tensor
) -> None:
    changes, reason = NOT_A_SUM[kind]
    cache = cached(model_of(**changes), tokens)
    with pytest.raises(InvalidDecompositionError, match=reason):
        getattr(cache, method)(**DECOMPOSITIONS[method])


@pytest.mark.parametrize("layout", ["post", "sandwich"])
@pytest.mark.parametrize(
    "method", ["stack_head_results", "stack_neuron_results", "get_full_resid_decomposition"]
)
def test_head_and_neuron_writes_are_refused_behind_post_norms(
    layout: str, method: str, tokens: Tensor
) -> None:
    cache = cached(model_of(norm_layout=NormLayout(layout)), tokens)
    with pytest.raises(InvalidDecompositionError, match="ln1_post"):
        getattr(cache, method)(**DECOMPOSITIONS[method])


@pytest.mark.parametrize("state", ["zeros", torch.ones(2, 9, 32)], ids=["zeros", "given"])
def test_sums_of_writes_are_refused_if_the_loop_did_not_start_from_the_prelude(
    state: Any, tokens: Tensor
) -> None:
    cache = cached(model_of(), tokens, initial_state=state)
    with pytest.raises(InvalidDecompositionError, match="initial state"):
        cache.decompose_resid()


def test_logit_attributions_are_refused_while_the_final_gain_is_not_one(tokens: Tensor) -> None:
    model = model_of()
    torch.nn.init.uniform_(model.final_norm.w, 0.5, 2.0)
    with pytest.raises(InvalidDecompositionError, match="gain"):
        cached(model, tokens).logit_attrs(**DECOMPOSITIONS["logit_attrs"])


@pytest.mark.parametrize("layout", ["pre", "post", "sandwich"])
def test_sublayer_writes_sum_to_the_stream_of_a_plain_looped_model(
    layout: str, tokens: Tensor
) -> None:
    cache = cached(model_of(norm_layout=NormLayout(layout)), tokens)
    for layer in (1, 3, 5):
        writes, labels = cache.decompose_resid(layer, mlp_input=True, return_labels=True)
        assert len(labels) == 1 + 2 * layer + 1
        torch.testing.assert_close(writes.sum(0), cache["resid_mid", layer], **CLOSE)
    torch.testing.assert_close(cache.decompose_resid().sum(0), cache["resid_post", -1], **CLOSE)


def test_heads_neurons_and_logits_decompose_in_a_plain_looped_model(tokens: Tensor) -> None:
    model = model_of(n_key_value_heads=2, embed_scale=3.0)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        heads, labels = cache.stack_head_results(return_labels=True)
        assert labels[-1] == "L5H3"
        attention = cache.decompose_resid(mode="attn", incl_embeds=False)
        torch.testing.assert_close(heads.sum(0), attention.sum(0), **CLOSE)
        parts = cache.get_full_resid_decomposition()
        torch.testing.assert_close(parts.sum(0), cache["resid_post", -1], **CLOSE)
        attributions = cache.logit_attrs(parts, tokens=7)
        torch.testing.assert_close(attributions.sum(0), logits[..., 7], **CLOSE)
