"""The virtual loop at one recurrence is transformers' Llama, with pretrained weights.

transformers normalises and rotates in fp32 whatever its model is, so both are compared in fp32, by
what rounding does to the run at hand: the same run in fp64 beside it (``closeness``).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import rounding_bound
from torch import Tensor
from transformers import LlamaForCausalLM

from real.texts import LIGHTHOUSE, PROMPTS
from tl_looped import LoopedActivationCache, LoopedKeyValueCache, LoopedTransformer

N_LAYERS = 30


@pytest.fixture(scope="module")
def once(virtual: Callable[..., LoopedTransformer]) -> LoopedTransformer:
    """One recurrence of the loop over layers 12 to 17: every layer once, in order."""
    model = virtual()
    assert (model.cfg.n_layers, str(model.loop)) == (N_LAYERS, "(12, 6 x 1, 12)")
    return model


@pytest.fixture(scope="module")
def exact(once: LoopedTransformer) -> LoopedTransformer:
    return deepcopy(once).double()


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> Tensor:
    return tokenizer(LIGHTHOUSE, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def theirs(hf: LlamaForCausalLM, tokens: Tensor) -> Any:
    with torch.no_grad():
        return hf(tokens, labels=tokens, output_attentions=True, output_hidden_states=True)


@pytest.fixture(scope="module")
def caches(
    once: LoopedTransformer, exact: LoopedTransformer, tokens: Tensor
) -> tuple[LoopedActivationCache, LoopedActivationCache]:
    """What the model has in fp32 and in fp64."""
    with torch.no_grad():
        return once.run_with_cache(tokens)[1], exact.run_with_cache(tokens)[1]


def assert_rounded(found: Tensor, expected: Tensor, in_fp64: Tensor) -> None:
    """They are the same but for rounding, which is small against them."""
    bound = rounding_bound(in_fp64, found)
    assert bound < 0.01 * expected.std()
    torch.testing.assert_close(found, expected, atol=bound, rtol=0.0)


def test_logits(
    once: LoopedTransformer, exact: LoopedTransformer, tokens: Tensor, theirs: Any
) -> None:
    assert tokens.shape[1] > 50
    assert_rounded(once(tokens), theirs.logits, exact(tokens))
    # Far above the bound, which is what a rotation by other angles or another eps would be.
    assert theirs.logits.std() > 1.0


def test_attention_patterns(caches: tuple[Any, Any], theirs: Any) -> None:
    ours, in_fp64 = caches
    assert len(theirs.attentions) == N_LAYERS
    # Rounding accumulates over layers, and not evenly: layer 0 has next to none of it.
    found, expected = ours.stack_activation("pattern"), torch.stack(theirs.attentions)
    assert_rounded(found, expected, in_fp64.stack_activation("pattern"))


def test_residual_stream(caches: tuple[Any, Any], theirs: Any) -> None:
    ours, in_fp64 = caches
    for layer in range(N_LAYERS):  # transformers normalises what it calls the last state
        name = ("resid_pre", layer)
        if layer == 0:
            assert torch.equal(ours[name], theirs.hidden_states[0])
        else:
            # The first token's state is rounded a hundred times as coarsely as the others'.
            for part in (slice(0, 1), slice(1, None)):
                states = ours[name], theirs.hidden_states[layer], in_fp64[name]
                assert_rounded(*(state[:, part] for state in states))
    largest = max(state.norm(dim=-1).max() for state in theirs.hidden_states)
    assert largest > 20_000  # the massive activation of the first token


def test_loss(
    once: LoopedTransformer, exact: LoopedTransformer, tokens: Tensor, theirs: Any
) -> None:
    found = once(tokens, return_type="loss", loss_per_token=True)
    in_fp64 = exact(tokens, return_type="loss", loss_per_token=True)
    expected = F.cross_entropy(theirs.logits[0, :-1], tokens[0, 1:], reduction="none")
    assert_rounded(found, expected[None], in_fp64)
    bound = rounding_bound(in_fp64, found)
    assert abs(float(once(tokens, return_type="loss")) - float(theirs.loss)) < bound
    assert 1.0 < theirs.loss < 4.0  # nats per token: it has learnt English


def test_rows_padded_on_the_left(
    once: LoopedTransformer, exact: LoopedTransformer, hf: LlamaForCausalLM, tokenizer: Any
) -> None:
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    mask = batch.attention_mask
    assert len({int(length) for length in mask.sum(1)}) == len(PROMPTS)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    expected = hf(**batch, position_ids=places).logits
    found = once(batch.input_ids, attention_mask=mask)
    in_fp64 = exact(batch.input_ids, attention_mask=mask)
    real = mask.bool()
    assert_rounded(found[real], expected[real], in_fp64[real])
    for row, prompt in enumerate(PROMPTS):
        alone = hf(**tokenizer(prompt, return_tensors="pt")).logits[0]
        assert_rounded(found[row][real[row]], alone, in_fp64[row][real[row]])


@pytest.mark.parametrize("pieces", [[12, 1, 1, 20, 1], [1] * 8], ids=["pieces", "single"])
def test_logits_behind_a_key_value_cache(
    once: LoopedTransformer,
    exact: LoopedTransformer,
    tokens: Tensor,
    theirs: Any,
    pieces: list[int],
) -> None:
    """Read in pieces: greedy tokens hardly change if each piece is put one position too far."""

    def read(model: LoopedTransformer) -> Tensor:
        cache = LoopedKeyValueCache()
        parts = tokens[:, : sum(pieces)].split(pieces, 1)
        return torch.cat([model(part, past_kv_cache=cache) for part in parts], 1)

    assert_rounded(read(once), theirs.logits[:, : sum(pieces)], read(exact))


# -- generation ----------------------------------------------------------------------------------


def greedy(hf: LlamaForCausalLM, n: int, **prompt: Tensor) -> Tensor:
    """transformers' tokens, none of them a near tie: any correct run gives the same."""
    found = hf.generate(
        **prompt, max_new_tokens=n, do_sample=False, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    new = found.sequences[:, prompt["input_ids"].shape[1] :]
    best = torch.stack(found.scores, 1).topk(2).values
    ended = (new == 2).cumsum(1) - (new == 2).int() > 0  # rows are filled up behind their EOS
    assert (best[..., 0] - best[..., 1])[~ended].min() > 0.01  # rounding is 1e-4
    return found.sequences


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_generation(
    once: LoopedTransformer, hf: LlamaForCausalLM, tokens: Tensor, cached: bool
) -> None:
    prompt, n = tokens[:, :12], 40 if cached else 12
    expected = greedy(hf, n, input_ids=prompt)
    options: dict[str, Any] = {"do_sample": False, "verbose": False}
    found = once.generate(prompt, max_new_tokens=n, use_past_kv_cache=cached, **options)
    assert found.tolist() == expected.tolist()


def test_greedy_generation_of_rows_padded_on_the_left(
    once: LoopedTransformer, hf: LlamaForCausalLM, tokenizer: Any
) -> None:
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    expected = greedy(hf, 24, **batch)[:, batch.input_ids.shape[1] :]
    replies = tokenizer.batch_decode(expected, skip_special_tokens=True)
    options: dict[str, Any] = {"do_sample": False, "verbose": False, "max_new_tokens": 24}
    found = once.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
    assert found[:, batch.input_ids.shape[1] :].tolist() == expected.tolist()
    # The same from text: the model's own padding, and no BOS where the tokenizer adds none.
    texts = once.generate(PROMPTS, **options)
    assert texts == [prompt + reply for prompt, reply in zip(PROMPTS, replies, strict=True)]


def test_chat_ends_where_the_model_ends_its_turn(
    once: LoopedTransformer, hf: LlamaForCausalLM, tokenizer: Any
) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = greedy(hf, 40, **prompt)[0, prompt["input_ids"].shape[1] :]
    assert expected[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(expected)
    found = once.generate(
        messages, max_new_tokens=40, do_sample=False, verbose=False, return_type="tokens"
    )
    assert found[0, -len(expected) :].tolist() == expected.tolist()
