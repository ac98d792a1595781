"""Where a looped model of one recurrence differs from HookedTransformer on purpose: both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import TEXT, TOKENS
from mistakes import REFUSED_HERE
from plain import Twins, make_twins

from tl_looped import InputError


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return make_twins("grouped", tmp_path_factory.mktemp("letters"))


def test_biases_add_up_in_the_models_dtype(twins: Twins) -> None:
    assert twins.hooked.accumulated_bias(2).dtype is torch.float32
    assert twins.looped.accumulated_bias(2).dtype is torch.float64


def test_the_tokenizer_is_the_one_that_was_given(twins: Twins) -> None:
    """TransformerLens loads it again, to write BOS by itself and take it away where it must."""
    bos = twins.looped.tokenizer.bos_token_id
    assert twins.hooked.tokenizer.encode("a")[0] == bos
    assert bos not in twins.looped.tokenizer.encode("a")
    prepends = [m.cfg.tokenizer_prepends_bos for m in (twins.hooked, twins.looped)]
    assert prepends == [True, None]


def test_text_that_is_too_long_is_not_cut_unasked(twins: Twins) -> None:
    text = "a" * 100
    assert twins.hooked.to_tokens(text).shape == (1, twins.hooked.cfg.n_ctx)
    with pytest.raises(InputError, match="truncate=True"):
        twins.looped.to_tokens(text)


@pytest.mark.parametrize("mistake", REFUSED_HERE)
def test_what_has_no_meaning_is_refused(twins: Twins, mistake: str) -> None:
    REFUSED_HERE[mistake](twins.hooked)
    with pytest.raises(InputError):
        REFUSED_HERE[mistake](twins.looped)
    twins.hooked.reset_hooks()


def test_heads_have_a_common_input_in_grouped_attention(twins: Twins) -> None:
    with pytest.raises(AssertionError):
        twins.hooked.set_use_attn_in(True)
    twins.hooked.cfg.use_attn_in = False
    twins.looped.set_use_attn_in(True)
    _, cache = twins.looped.run_with_cache(TOKENS)
    twins.looped.set_use_attn_in(False)
    heads = twins.looped.cfg.n_heads
    assert cache["attn_in", 1].shape == (*TOKENS.shape, heads, twins.looped.cfg.d_model)


def test_the_gain_of_the_final_norm_counts_in_logits(twins: Twins) -> None:
    """HookedTransformer attributes to the unembedding alone unless the norm was folded into it."""
    answers, last = torch.tensor([3, 4]), {"pos_slice": -1}
    attributions: list[Any] = []
    for model in (twins.hooked, twins.looped):
        with torch.no_grad():
            logits, cache = model.run_with_cache(TOKENS)
            parts = cache.decompose_resid(**last)
            found = cache.logit_attrs(parts, tokens=answers, **last).sum(0)
        attributions.append((found, logits[torch.arange(2), -1, answers]))
    (theirs, logits), (ours, same_logits) = attributions
    torch.testing.assert_close(ours, same_logits)
    assert (theirs - logits).abs().max() > 0.01


def test_padding_on_the_right_is_no_text(twins: Twins) -> None:
    """HookedTransformer makes a mask by itself for padding on the left only."""
    texts = ["a cat.", TEXT]
    ours, theirs = (
        m(texts, return_type="loss", padding_side="right") for m in (twins.looped, twins.hooked)
    )
    tokens, mask = twins.looped.tokenize(texts, padding_side="right")
    counted = twins.hooked(tokens, attention_mask=mask.int(), return_type="loss")
    torch.testing.assert_close(ours, counted)
    assert (theirs - counted).abs() > 1e-3


def test_the_configuration_says_how_weights_are_drawn_here_and_which_norm(twins: Twins) -> None:
    theirs, ours = twins.hooked.cfg, twins.looped.cfg
    assert (theirs.init_mode, ours.init_mode) == ("gpt2", "normal")
    assert (theirs.initializer_range, ours.initializer_range) == (0.8 / 24**0.5, 0.02)
    # HookedTransformer goes by normalization_type alone, TransformerBridge by this field too.
    assert (theirs.normalization_type, ours.normalization_type) == ("RMS", "RMS")
    assert (theirs.uses_rms_norm, ours.uses_rms_norm) == (False, True)


def test_weights_that_are_not_there_are_not_counted(twins: Twins) -> None:
    zero = sum(
        weight.numel()
        for name, weight in twins.hooked.named_parameters()
        if twins.looped.parameter_of(name) is None
    )
    assert zero > 0
    # HookedTransformer counts grouped keys and values too.
    assert twins.looped.n_params_total == twins.hooked.n_params_total - zero
