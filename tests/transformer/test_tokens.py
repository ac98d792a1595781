"""Text and tokens: TransformerLens's method names, padding, losses and generation on text."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import exact_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformer_lens.utilities.tokenize_utils import get_attention_mask
from transformers import PreTrainedTokenizerFast

from tl_looped import (
    Injection,
    InputError,
    LoopedTransformer,
    NormLayout,
    SingleTokenError,
    TokenizerError,
)
from tl_looped.model.config import InitialState
from tl_looped.transformer.prompt import padding_of

pytestmark = pytest.mark.once

BOS, EOS, PAD = 0, 1, 2
TEXTS = ["the cat sat", "on", "on the mat"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and " the" as one token."""
    pieces = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += ["Ġt", "he", "Ġthe"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    bpe = Tokenizer(models.BPE(vocab, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LoopedTransformer:
    """Huginn's kind: random initial state, injection, norms on the residual sum."""
    cfg = exact_config(
        d_vocab=len(tokenizer),
        n_prelude=1,
        n_core=2,
        n_recurrences=2,
        n_ctx=24,
        default_prepend_bos=True,
        norm_layout=NormLayout.RESIDUAL,
        injection=Injection.LINEAR,
        initial_state=InitialState.RANDOM,
        initial_state_std=0.5,
    )
    return LoopedTransformer.from_config(cfg, tokenizer)


@pytest.fixture(scope="module")
def id_of(tokenizer: PreTrainedTokenizerFast) -> Any:
    return tokenizer.convert_tokens_to_ids


def test_to_tokens_prepends_bos_as_asked(model, id_of) -> None:
    on = [id_of("o"), id_of("n"), id_of("Ġthe")]
    assert model.to_tokens("on the").tolist() == [[BOS, *on]]
    assert model.to_tokens("on the", prepend_bos=False).tolist() == [on]
    assert model.to_tokens("", prepend_bos=True).tolist() == [[BOS]]


def test_to_tokens_pads_on_the_side_asked_for(model, id_of) -> None:
    long, short = [BOS, id_of("o"), id_of("n")], [BOS, id_of("a")]
    assert model.to_tokens(["on", "a"]).tolist() == [long, [*short, PAD]]
    assert model.to_tokens(["on", "a"], padding_side="left").tolist() == [long, [PAD, *short]]
    _, mask = model.tokenize(["on", "a"], padding_side="left")
    assert mask.tolist() == [[True, True, True], [False, True, True]]


def test_defaults_of_text_are_those_of_the_configuration_and_the_tokenizer(model) -> None:
    fits = LoopedTransformer.from_config(exact_config(d_vocab=len(model.tokenizer)))
    fits.set_tokenizer(deepcopy(model.tokenizer), default_padding_side="left")
    assert fits.tokenizer.padding_side == "left"
    assert fits.cfg.default_prepend_bos is False
    rows = model.to_tokens(["on", "a"], prepend_bos=False, padding_side="left")
    assert torch.equal(fits.to_tokens(["on", "a"]), rows)
    fits.cfg.default_prepend_bos = True
    fits.tokenizer.padding_side = "right"
    assert torch.equal(fits.to_tokens(["on", "a"]), model.to_tokens(["on", "a"]))
    assert fits.to_str_tokens("a") == ["<s>", "a"]
    assert fits.get_token_position("a", "a") == 1


def test_text_beyond_the_context_is_refused_or_cut(model) -> None:
    text = "a" * 30
    with pytest.raises(InputError, match="31 tokens, the context holds 24"):
        model.to_tokens(text)
    assert torch.equal(model.to_tokens(text, truncate=True), model.to_tokens("a" * 23))


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (lambda m: m.to_tokens("", prepend_bos=False), TokenizerError, "gives no token"),
        (lambda m: m.to_tokens([]), InputError, "no text"),
        (lambda m: m.to_tokens("a", padding_side="top"), InputError, "padding_side .*'top'"),
        (lambda m: m.to_single_token("on"), SingleTokenError, r"\['o', 'n'\]"),
        (lambda m: m.to_single_token(""), SingleTokenError, r"\[\]"),
        (lambda m: m.to_single_token("a" * 30), SingleTokenError, "16 more"),
        (lambda m: m.get_token_position("x", "on the"), SingleTokenError, "'x'"),
        (lambda m: m.get_token_position("o", "on", mode="middle"), InputError, "mode .*'middle'"),
        (lambda m: m.get_token_position("o", m.to_tokens(["on", "no"])), SingleTokenError, "seq"),
        (lambda m: m.to_str_tokens(m.to_tokens(["on", "no"])), InputError, "one sequence"),
        (lambda m: m.generate("on", return_type="json"), InputError, "return_type"),
    ],
)
def test_what_cannot_be_tokenised_is_refused(model, call, error, reason) -> None:
    with pytest.raises(error, match=reason):
        call(model)


def test_what_transformer_lens_asserts_is_an_assertion_here(model) -> None:
    for error in (AssertionError, TokenizerError, InputError):
        with pytest.raises(error):
            model.to_single_token("on")
        with pytest.raises(error):
            model.get_token_position("x", "on the")
    with pytest.raises(AssertionError):
        model.run_with_cache("on", names_filter="blocks.0.attn.hook_result")


def test_a_model_without_a_tokenizer_asks_for_token_ids(model) -> None:
    alone = LoopedTransformer.from_config(exact_config(n_recurrences=1))
    with pytest.raises(TokenizerError, match="no tokenizer"):
        alone("on")


def test_tokens_come_back_as_strings(model, id_of) -> None:
    tokens = model.to_tokens("on the")
    assert model.to_str_tokens("on the") == ["<s>", "o", "n", " the"]
    assert (
        model.to_str_tokens(tokens) == model.to_str_tokens(tokens[0]) == ["<s>", "o", "n", " the"]
    )
    assert model.to_str_tokens(["on", "a"], prepend_bos=False) == [["o", "n"], ["a"]]
    assert model.to_string(tokens[0]) == "<s>on the"
    assert model.to_string(tokens) == ["<s>on the"]
    assert model.to_string([id_of("o"), id_of("n")]) == "on"
    assert model.to_string(id_of("Ġthe")) == " the"
    assert model.to_single_str_token(model.to_single_token(" the")) == " the"
    assert model.to_str_tokens("", prepend_bos=False) == []
    assert model.to_str_tokens(["", "a"]) == [["<s>"], ["<s>", "a"]]
    assert model.to_str_tokens([]) == model.to_str_tokens(torch.zeros(1, 0).long()) == []
    text = "naïve 東京"
    assert model.to_string(model.to_tokens(text, prepend_bos=False)[0]) == text


def test_get_token_position_finds_the_first_and_the_last(model) -> None:
    text = "on the mat on"
    assert model.get_token_position("o", text) == 1
    assert model.get_token_position("o", text, prepend_bos=False) == 0
    assert model.get_token_position("o", text, mode="last") == len(model.to_tokens(text)[0]) - 2
    assert model.get_token_position(BOS, model.to_tokens(text)) == 0


def test_residual_directions_are_columns_of_the_unembedding(model) -> None:
    the = model.to_single_token(" the")
    for one in (" the", the, torch.tensor(the), torch.tensor([the])):
        assert torch.equal(model.tokens_to_residual_directions(one), model.W_U[:, the])
    many = torch.tensor([[3, 4], [the, 6]])
    directions = model.tokens_to_residual_directions(many)
    assert directions.shape == (2, 2, 32)
    assert torch.equal(directions[1, 0], model.W_U[:, the])


def test_text_runs_as_its_tokens(model) -> None:
    tokens = model.to_tokens(TEXTS[0])
    assert torch.equal(model(TEXTS[0]), model(tokens))
    without = model.to_tokens(TEXTS[0], prepend_bos=False)
    assert torch.equal(model(TEXTS[0], prepend_bos=False), model(without))


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_unequal_length_run_as_they_do_alone(model, side: str) -> None:
    logits = model(TEXTS, padding_side=side)
    for row, text in zip(logits, TEXTS, strict=True):
        alone = model(text)[0]
        real = row[-len(alone) :] if side == "left" else row[: len(alone)]
        assert_same(real, alone)


def test_token_batches_padded_on_the_left_are_masked(model) -> None:
    tokens, mask = model.tokenize(TEXTS, padding_side="left")
    masked = model(tokens, attention_mask=mask)
    assert_same(model(tokens)[mask], masked[mask])


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("pad", ["<pad>", "<s>", "</s>"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_one_side_is_what_transformerlens_takes_for_it(
    model, side: str, pad: str, prepend_bos: bool
) -> None:
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = pad, side
    p, a = tokenizer.pad_token_id, 9
    tokens = torch.tensor([[p, p, p, a, p], [p, a, p, a, a], [a, a, a, p, p], [BOS, a, a, a, a]])
    expected = get_attention_mask(tokenizer, tokens, prepend_bos).bool()
    before, model.tokenizer = model.tokenizer, tokenizer
    try:
        found = padding_of(model, tokens, prepend_bos, side)
        assert torch.equal(found, expected)
        assert padding_of(model, tokens[:, 1:2].clamp(min=a), prepend_bos, side) is None
        logits = model(tokens, padding_side=side, prepend_bos=prepend_bos)
        assert_same(logits[expected], model(tokens, attention_mask=expected)[expected])
        with pytest.raises(InputError, match="padding_side"):
            model(tokens, padding_side="top")
        tokenizer.pad_token = None
        with pytest.raises(InputError, match="attention_mask="):
            model(tokens, padding_side=side)
    finally:
        model.tokenizer = before


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_texts_is_the_mean_over_real_tokens(model, side: str) -> None:
    alone = [model(text, return_type="loss", loss_per_token=True)[0] for text in TEXTS]
    loss = model(TEXTS, return_type="loss", padding_side=side)
    torch.testing.assert_close(loss, torch.cat(alone).mean())
    per_token = model(TEXTS, return_type="loss", padding_side=side, loss_per_token=True)
    torch.testing.assert_close(per_token.sum(-1), torch.stack([row.sum() for row in alone]))


def continuation(model: LoopedTransformer, text: str) -> Tensor:
    """The four most likely next tokens, each from a run on all before it."""
    tokens = model.to_tokens(text)
    for _ in range(4):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), 1)
    return tokens


def test_greedy_generation_of_a_batch_equals_single_prompts(model) -> None:
    batch = model.generate(TEXTS, return_type="tokens", **GREEDY)
    for row, text in zip(batch, TEXTS, strict=True):
        expected = continuation(model, text)
        assert torch.equal(row[-expected.shape[1] :], expected[0])
        assert torch.equal(model.generate(text, return_type="tokens", **GREEDY), expected)


def test_generation_returns_what_it_was_given_unless_told_otherwise(model) -> None:
    tokens = model.to_tokens("on the")
    expected = continuation(model, "on the")
    text = model.to_string(expected[0, 1:])
    assert model.generate("on the", **GREEDY) == text
    assert model.generate(["on the"], **GREEDY) == [text]
    assert torch.equal(model.generate(tokens, **GREEDY), expected)
    assert model.generate(tokens, return_type="str", **GREEDY) == text


def test_seeded_sampling_is_reproducible_and_leaves_the_global_generator_alone(model) -> None:
    sample = {"max_new_tokens": 6, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    before = torch.get_rng_state()
    first, again, other = (model.generate(TEXTS, seed=seed, **sample) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_only_the_likeliest_token_is_greedy(model) -> None:
    sample = GREEDY | {"do_sample": True, "top_k": 1, "return_type": "tokens"}
    assert torch.equal(model.generate("on", **sample), continuation(model, "on"))


def test_generation_stops_at_eos(model) -> None:
    expected = continuation(model, "on")
    start = expected.shape[1] - 4
    eos = int(expected[0, start + 1])
    stop = int((expected[0, start:] == eos).nonzero()[0]) + start + 1
    run = GREEDY | {"stop_at_eos": True, "eos_token_id": eos, "return_type": "tokens"}
    assert torch.equal(model.generate("on", **run), expected[:, :stop])
    batch = model.generate(TEXTS, **run)
    for row, text in zip(batch, TEXTS, strict=True):
        free = continuation(model, text)[0]
        new = free[-4:].tolist()
        kept = new[: new.index(eos) + 1] if eos in new else new
        filled = kept + [eos] * (4 - len(kept))
        assert row[len(row) - batch.shape[1] :].tolist()[-4:] == filled


def test_generation_without_an_eos_token_says_so(model) -> None:
    model.tokenizer.eos_token = None
    try:
        with pytest.raises(InputError, match="eos_token_id="):
            model.generate("on", max_new_tokens=1, verbose=False)
    finally:
        model.tokenizer.eos_token = "</s>"


def test_a_tokenizer_can_be_set(model: LoopedTransformer) -> None:
    tokenizer = model.tokenizer
    small = LoopedTransformer.from_config(exact_config(d_vocab=len(tokenizer) - 1))
    with pytest.raises(TokenizerError, match="vocabulary"):
        small.set_tokenizer(tokenizer)
    fits = LoopedTransformer.from_config(exact_config(d_vocab=len(tokenizer)))
    with pytest.raises(InputError, match="default_padding_side"):
        fits.set_tokenizer(tokenizer, "middle")
    fits.set_tokenizer(tokenizer, tokenizer.padding_side)
    assert torch.equal(fits.to_tokens("on the"), model.to_tokens("on the", prepend_bos=False))
