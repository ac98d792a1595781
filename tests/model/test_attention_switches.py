"""Value biases and norms on single heads (Qwen2, Qwen3), through every door of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import exact_config, with_gains
from torch import Tensor

from tl_looped import ConfigError, LoopedKeyValueCache, LoopedTransformer

KINDS: dict[str, dict[str, Any]] = {
    "biases": {"qk_bias": True, "v_bias": True, "n_key_value_heads": 2},
    "value bias alone": {"v_bias": True},
    "head norms": {"qk_norm": True, "qk_norm_per_head": True, "n_key_value_heads": 2},
}


def make(kind: str, **changes: Any) -> LoopedTransformer:
    config = exact_config(**(KINDS[kind] | changes))
    return with_gains(LoopedTransformer.from_config(config))


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest) -> LoopedTransformer:
    return make(request.param)


def test_values_are_those_of_the_weights_that_are_shown(tokens: Tensor) -> None:
    model = make("biases")
    _, cache = model.run_with_cache(tokens)
    i = model.loop.index(1, 0)
    x = cache[f"blocks.{i}.ln1.hook_normalized"] * model.blocks[i].ln1.w
    for which, repeats in (("q", 1), ("k", 2), ("v", 2)):
        W, b = (getattr(model, f"{letter}_{which.upper()}")[i] for letter in "Wb")
        expected = torch.einsum("btd,hdk->bthk", x, W) + b
        found = cache[f"blocks.{i}.attn.hook_{which}"].repeat_interleave(repeats, 2)
        assert_same(found, expected)
    assert model.tl_parameters()[f"blocks.{i}.attn.b_V"].abs().max() > 0.1
    # Two query heads share a key-value head, and so its bias.
    assert torch.equal(model.b_V[i, 0], model.b_V[i, 1])
    assert not torch.equal(model.b_V[i, 1], model.b_V[i, 2])


def test_each_head_is_normalised_by_itself(tokens: Tensor) -> None:
    model = make("head norms")
    _, cache = model.run_with_cache(tokens)
    for name, heads in (("q", 4), ("k", 2)):
        normalised = cache[f"blocks.2.attn.{name}_norm.hook_normalized"]
        raw = cache[f"blocks.2.attn.hook_{name}"]
        assert normalised.shape == raw.shape == (2, 9, heads, 8)
        scale = (raw.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
        torch.testing.assert_close(normalised, raw / scale)
        assert getattr(model.core[0].attn, f"{name}_norm").w.shape == (8,)


def test_positions_of_a_cache_are_positions_and_not_heads(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    _, whole = model.run_with_cache(tokens)
    _, last = model.run_with_cache(tokens, pos_slice=-1)
    for name in whole:
        if "pattern" in name or "scores" in name:
            continue
        part = last[name]
        per_head = whole[name].ndim == 4
        expected = whole[name][:, -1:] if per_head else whole[name][..., -1:, :]
        assert torch.equal(part.reshape(expected.shape), expected), name


def test_key_value_cache_gives_the_logits_of_a_whole_run(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    past = LoopedKeyValueCache()
    pieces = [model(tokens[:, part], past_kv_cache=past) for part in (slice(0, 4), slice(4, 9))]
    assert_same(torch.cat(pieces, 1), model(tokens))


def test_heads_results_add_up_to_the_attention_output(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    plain = model(tokens)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    logits, cache = model.run_with_cache(tokens)
    assert_same(logits, plain)
    result = cache["blocks.3.attn.hook_result"].sum(2)
    assert_same(result, cache["blocks.3.hook_attn_out"])


def test_estimated_bytes_are_those_of_a_cache(model: LoopedTransformer, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    n_bytes = sum(tensor.nbytes for tensor in cache.cache_dict.values())
    assert model.estimate_cache_bytes(batch=2, pos=9) == n_bytes


def test_saved_model_gives_the_same_bits(
    model: LoopedTransformer, tokens: Tensor, tmp_path
) -> None:
    model.save_pretrained(tmp_path)
    again = LoopedTransformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    assert torch.equal(again(tokens), model(tokens))


def test_padding_on_the_left_changes_nothing(model: LoopedTransformer, tokens: Tensor) -> None:
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), tokens), 1)
    mask = (torch.arange(12) >= 3).expand(2, -1).long()
    found = model(padded, attention_mask=mask)[:, 3:]
    assert_same(found, model(tokens))


def test_head_norms_without_norms_are_refused() -> None:
    with pytest.raises(ConfigError, match="set qk_norm=True with it"):
        exact_config(qk_norm_per_head=True)
