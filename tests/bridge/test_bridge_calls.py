"""Generation and losses as TransformerBridge has them: the same answers from a model and a bridge.

The bridge has no loop, no key-value cache and no transformers model to generate with; but its
``generate`` is TransformerLens's own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import SAMPLES, assert_same
from conftest import VARIANTS, exact_config
from torch import Tensor
from transformers import StoppingCriteria

from tl_looped import LoopedTransformer

pytestmark = pytest.mark.usefixtures("without_gradients")
PROMPTS = ["Tom has 3 boxes with 12 pens", "She"]
RUN: dict[str, Any] = {"max_new_tokens": 7, "verbose": False}


def a_pair(dtype: torch.dtype) -> tuple[LoopedTransformer, Any]:
    model = LoopedTransformer.from_pretrained("demo-control", device="cpu", dtype=dtype)
    return model, model.to_bridge()


@pytest.fixture(scope="module")
def pair() -> tuple[LoopedTransformer, Any]:
    return a_pair(torch.float64)


@pytest.fixture(scope="module")
def single() -> tuple[LoopedTransformer, Any]:
    """In fp32: TransformerLens gives NaN in fp64 where padding comes first."""
    return a_pair(torch.float32)


def both(pair: Any, prompt: Any, **options: Any) -> tuple[Any, Any]:
    """What the model and the bridge generate, from the same state of the generator."""
    found = []
    for each in pair:
        torch.manual_seed(3)
        found.append(each.generate(prompt, **RUN | options))
    return found[0], found[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.4},
        {"top_k": 4, "temperature": 1.5, "freq_penalty": 0.7, "repetition_penalty": 1.2},
        {"top_p": 0.8, "stop_at_eos": False},
        {"prepend_bos": True},
        {"padding_side": "right"},
        {"return_type": "tokens", "eos_token_id": [21, 18]},
        {"return_type": "tokens", "eos_token_id": 21},
        {"stop_strings": [" 2", "boxes"]},
    ],
)
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[1], ""])
def test_text_goes_on_as_from_the_bridge(pair: Any, prompt: str, options: dict[str, Any]) -> None:
    if not prompt:
        options = options | {"prepend_bos": True}
    ours, theirs = both(pair, prompt, **options)
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def test_several_texts_go_on_as_from_the_bridge(single: Any) -> None:
    for options in ({}, {"eos_token_id": [21, 18]}):
        ours, theirs = both(single, PROMPTS, return_type="tokens", do_sample=False, **options)
        assert torch.equal(ours, theirs)


def test_padded_tokens_go_on_as_from_the_bridge(single: Any) -> None:
    model = single[0]
    tokens, mask = model.tokenize(PROMPTS, padding_side="left")
    assert not mask.all()
    run = {"do_sample": False, "stop_at_eos": False}
    for told in ({"attention_mask": mask.long()}, {"padding_side": "left"}):
        ours, theirs = both(single, tokens, **run, **told)
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, model.generate(PROMPTS, return_type="tokens", **RUN | run))


def test_logits_tokens_and_activations_come_as_from_the_bridge(pair: Any) -> None:
    asked = {"output_logits": True, "return_cache": True, "return_input_tokens": True}
    asked |= {"do_sample": False, "names_filter": lambda name: name == "blocks.3.hook_resid_post"}
    (ours, cache, ids), (theirs, _, their_ids) = both(pair, PROMPTS[0], **asked)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ids, their_ids)
    assert_same(torch.stack(ours.logits, 1), pair[0](ours.sequences[:, :-1])[:, ids.shape[1] - 1 :])
    for our, their in zip(ours.logits, theirs.logits, strict=True):
        # TransformerLens's softmax is in fp32 whatever the model is in.
        bound = SAMPLES * torch.finfo(torch.float32).eps * float(their.abs().max())
        torch.testing.assert_close(our, their, atol=bound, rtol=0.0)
    _, expected = pair[0].run_with_cache(theirs.sequences)
    assert list(cache.cache_dict) == ["blocks.3.hook_resid_post"]
    assert_same(cache["resid_post", 3], expected["resid_post", 3])
    (text, ids), (their_text, their_ids) = both(pair, PROMPTS[0], return_input_tokens=True)
    assert text == their_text
    assert torch.equal(ids, their_ids)


class Seldom(StoppingCriteria):
    """Ends a row at a token that stands in it for the second time."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return (input_ids[:, :-1] == input_ids[:, -1:]).any(-1)


def test_stopping_criteria_end_as_in_the_bridge(pair: Any) -> None:
    tokens = pair[0].to_tokens(PROMPTS[0])
    for criteria in (Seldom(), [Seldom()]):
        run = {"stopping_criteria": criteria, "do_sample": False, "max_new_tokens": 12}
        for stop in (True, False):
            ours, theirs = both(pair, torch.cat((tokens, tokens.flip(1))), stop_at_eos=stop, **run)
            assert torch.equal(ours, theirs)
            assert ours.shape[1] < tokens.shape[1] + 12


@pytest.mark.parametrize("size", [1, 2, 9, 25])
def test_a_stream_is_cut_as_in_the_bridge(pair: Any, size: int) -> None:
    pieces = [
        list(each.generate_stream(PROMPTS[0], 7, size, do_sample=False, verbose=False))
        for each in pair
    ]
    assert pieces[0] == pieces[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_of_labels_is_the_bridges(name: str, tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS[name]))
    bridge = model.to_bridge()
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    labels[0, 2:4] = -100
    mask[1, :3] = 0
    logits = model(tokens, attention_mask=mask)
    for per_token in (False, True):
        ours = model(
            tokens,
            return_type="loss",
            labels=labels,
            attention_mask=mask,
            loss_per_token=per_token,
        )
        assert_same(ours, bridge._causal_labels_loss(logits, labels, mask, per_token))
