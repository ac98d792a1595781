"""TransformerLens's logit lens, which came with 4.x, on looped models."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_rounded_once, assert_same
from conftest import Golden
from test_transformerlens_cache import cached, model_of
from torch import Tensor
from transformer_lens.tools.analysis.logit_lens import logit_lens

from tl_looped import LoopedTransformer


@pytest.fixture
def golden_model(golden: Golden) -> LoopedTransformer:
    return golden.load(dtype=torch.float64)


def test_the_last_entry_of_the_logit_lens_is_the_models_logits(golden, golden_model) -> None:
    logits, cache = golden_model.run_with_cache(golden.tokens, **golden.run)
    from_cache = logit_lens(cache, positions=None)
    assert_same(from_cache.values[-1], logits)
    assert_same(cache.logit_lens(positions=None).values, from_cache.values)
    own_run = logit_lens(golden_model, golden.tokens, positions=None, incl_mid=True)
    assert_same(own_run.values[-1], golden_model(golden.tokens))
    first, last = golden_model.loop.locate(0).label, golden_model.loop.locate(-1).label
    assert own_run.labels[:2] == [f"{first}.pre", f"{first}.mid"]
    assert own_run.labels[-2:] == [f"{last}.mid", "final_post"]
    assert len(own_run.labels) == 2 * golden_model.loop.n_layers + 1


def test_the_logit_lens_reads_each_stream_through_final_norm_and_unembedding(
    variant: LoopedTransformer, tokens: Tensor
) -> None:
    torch.nn.init.uniform_(variant.final_norm.w, 0.5, 2.0)
    cache = cached(variant, tokens)
    targets = tokens.roll(-1, 1)
    lens = cache.logit_lens(positions=None, targets=targets, return_type="log_probs")
    for layer in range(variant.loop.n_layers):
        x = cache.cache_dict[f"blocks.{layer}.hook_resid_pre"]
        scale = (x.pow(2).mean(-1, keepdim=True) + variant.cfg.eps).sqrt()
        logits = x / scale * variant.final_norm.w @ variant.W_U
        expected = logits.log_softmax(-1).gather(-1, targets[..., None])
        assert_rounded_once(lens.values[layer], expected)
        rank = (logits > logits.gather(-1, targets[..., None])).sum(-1)
        assert torch.equal(lens.rank_trajectory()[layer], rank)


def test_the_logit_lens_of_an_old_cache_keeps_the_runs_number_of_layers(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    logits, cache = model.run_with_cache(tokens)
    model.set_recurrences(1)
    lens = cache.logit_lens()
    assert len(lens.labels) == 1 + 2 * 2 + 1 + 1
    assert_same(lens.values[-1], logits[:, -1])


def test_the_logit_lens_refuses_training_mode(tokens: Tensor) -> None:
    model = model_of().train()
    with pytest.raises(ValueError, match="evaluation"):
        logit_lens(model, tokens)
