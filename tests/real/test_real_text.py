"""What a pretrained model reads: BOS, conversations, losses, and what its loop cannot do."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from real.texts import LIGHTHOUSE, PROMPTS
from tl_looped import InputError, LoopedTransformer
from tl_looped import interventions as iv

CHAT = [{"role": "user", "content": "Name a fruit."}]


@pytest.fixture(scope="module")
def model(virtual: Callable[..., LoopedTransformer]) -> LoopedTransformer:
    return virtual()


def test_text_is_read_as_the_tokenizer_reads_it(model: LoopedTransformer, tokenizer: Any) -> None:
    assert model.to_tokens(LIGHTHOUSE)[0].tolist() == tokenizer(LIGHTHOUSE).input_ids
    assert model.to_tokens(LIGHTHOUSE, prepend_bos=True)[0, 0] == tokenizer.bos_token_id
    assert model.to_str_tokens("In 2024") == ["In", " ", "2", "0", "2", "4"]


def test_the_text_of_a_conversation_gets_no_second_bos(
    model: LoopedTransformer, tokenizer: Any
) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text).input_ids
    assert model.chat_text(CHAT) == text
    for prepend_bos in (None, True, False):
        assert model.to_tokens(text, prepend_bos=prepend_bos)[0].tolist() == expected


def test_every_method_takes_a_conversation(
    model: LoopedTransformer, hf: LlamaForCausalLM, tokenizer: Any
) -> None:
    given = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = given["input_ids"]
    assert torch.equal(model.to_tokens(CHAT), tokens)
    logits = model(CHAT)
    assert torch.equal(logits, model(tokens))
    cache = model.run_with_cache(CHAT)[1]
    assert torch.equal(cache["resid_post", 29], model.run_with_cache(tokens)[1]["resid_post", 29])
    assert logits[0, -1].argmax() == hf(tokens).logits[0, -1].argmax()


def test_losses_of_a_bf16_model_are_fp32_numbers(model: LoopedTransformer) -> None:
    half = deepcopy(model).to(torch.bfloat16)
    for text in PROMPTS:
        tokens = half.to_tokens(text)
        logits = half(tokens)
        assert logits.dtype == torch.bfloat16
        found = half(tokens, return_type="loss")
        assert found.dtype == torch.float32
        expected = F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])
        # Sums of some ten numbers, in fp32 both; a bf16 number of this size is off by 1/128.
        assert abs(float(found - expected)) <= 16 * torch.finfo(torch.float32).eps * float(expected)
        assert float(found) != float(found.to(torch.bfloat16))


def test_zeros_are_no_initial_state_of_a_loop_that_injects_nothing(
    model: LoopedTransformer,
) -> None:
    with pytest.raises(InputError), model.intervening(iv.ReplaceInitialState("zeros")):
        model(PROMPTS[0])


def test_a_cache_that_memory_cannot_hold_is_refused_with_advice_that_helps(
    model: LoopedTransformer,
) -> None:
    tokens = torch.zeros(64, 8_000, dtype=torch.long)
    with pytest.raises(Exception, match="TiB") as raised:
        model.run_with_cache(tokens, n_recurrences=8)
    assert "device='cpu'" not in str(raised.value)  # it is there already
