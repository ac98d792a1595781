"""Where a looped model of one recurrence differs from HookedTransformer on purpose: both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import TEXT, TOKENS
from mistakes import REFUSED_HERE
from plain import Twins, make_twins
from torch import Tensor

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
    assert prepends == [True, False]
    named = twins.looped.tokenizer.name_or_path
    assert [m.cfg.tokenizer_name for m in (twins.hooked, twins.looped)] == [None, named]


def test_no_token_is_no_text(twins: Twins) -> None:
    theirs, ours = (m.to_str_tokens("", prepend_bos=False) for m in (twins.hooked, twins.looped))
    assert (theirs, ours) == ([""], [])


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


def test_a_reply_is_text_as_the_prompt_was_with_all_that_was_written(twins: Twins) -> None:
    """TransformerLens leaves special tokens out of it, and one text of a list loses its list."""
    pad = twins.hooked.tokenizer.pad_token_id
    options = {"max_new_tokens": 2, "verbose": False, "stop_at_eos": False, "do_sample": False}
    replies = []
    for model in (twins.hooked, twins.looped):
        # The unembedding has no hook: what it reads is edited until it writes the pad token.
        weight = model.unembed.W_U[:, pad].detach()

        def towards_pad(x: Tensor, hook: Any, weight: Tensor = weight) -> Tensor:
            return 1e3 * weight.expand_as(x)

        with model.hooks(fwd_hooks=[("ln_final.hook_normalized", towards_pad)]):
            replies.append([model.generate(text, **options) for text in ("a cat.", ["a cat."])])
    assert replies == [["a cat.", "a cat."], ["a cat.<pad><pad>", ["a cat.<pad><pad>"]]]


def test_a_stream_of_text_is_text(twins: Twins) -> None:
    """As in TransformerBridge; HookedTransformer gives tokens, whatever return_type says."""
    options = {"max_new_tokens": 3, "max_tokens_per_yield": 2, "verbose": False}
    theirs, ours = (
        list(m.generate_stream("a cat.", **options)) for m in (twins.hooked, twins.looped)
    )
    assert all(isinstance(piece, Tensor) for piece in theirs)
    assert all(isinstance(piece, str) for piece in ours)


def test_a_row_out_of_range_is_a_bad_value(twins: Twins) -> None:
    for model, kind in ((twins.hooked, IndexError), (twins.looped, ValueError)):
        with pytest.raises(kind):
            model.run_with_cache(TOKENS)[1].apply_slice_to_batch_dim(5)


def test_a_model_without_a_tokenizer_writes_on(twins: Twins) -> None:
    """It has no stop token; HookedTransformer wants one, or stop_at_eos=False."""
    for model in (twins.hooked, twins.looped):
        tokenizer, model.tokenizer = model.tokenizer, None
        try:
            if model is twins.hooked:
                with pytest.raises(AssertionError):
                    model.generate(TOKENS, max_new_tokens=2, verbose=False)
            else:
                assert model.generate(TOKENS, max_new_tokens=2, verbose=False).shape == (2, 9)
        finally:
            model.tokenizer = tokenizer
