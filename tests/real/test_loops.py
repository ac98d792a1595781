"""Loops made of pretrained layers, against the same layers of transformers run by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import rounding_bound
from torch import Tensor
from transformers import LlamaForCausalLM

from real.texts import LIGHTHOUSE
from tl_looped import LoopedTransformer, retrofit

N_LAYERS = 30

# Prelude, core and coda; between them layers are dropped.
SPLITS: dict[str, tuple[range, range, range]] = {
    "(4, 6, 4)": (range(4), range(10, 16), range(26, 30)),
    "(2, 4, 2)": (range(2), range(12, 16), range(28, 30)),
    "(12, 6, 12)": (range(12), range(12, 18), range(18, 30)),
    "(1, 28, 1)": (range(1), range(1, 29), range(29, 30)),
    "(0, 5, 0)": (range(0), range(3, 28, 6), range(0)),
}


class ByHand:
    """transformers' layers in any order: embedding, layers, final norm and unembedding."""

    def __init__(self, hf: LlamaForCausalLM, tokens: Tensor) -> None:
        n = tokens.shape[1]
        places = torch.arange(n)[None]
        self.hf = hf
        self.embedded: Tensor = hf.model.embed_tokens(tokens)
        self.given: dict[str, Any] = {
            "attention_mask": torch.full((n, n), -torch.inf).triu(1)[None, None],
            "position_ids": places,
            "position_embeddings": hf.model.rotary_emb(self.embedded, places),
        }

    def through(self, x: Tensor, layers: Iterable[int]) -> Tensor:
        for layer in layers:
            x = self.hf.model.layers[layer](x, **self.given)
        return x

    def read_out(self, x: Tensor) -> Tensor:
        return self.hf.lm_head(self.hf.model.norm(x))


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> Tensor:
    return tokenizer(LIGHTHOUSE, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def loop(virtual: Callable[..., LoopedTransformer]) -> tuple[LoopedTransformer, LoopedTransformer]:
    """The loop over layers 12 to 17, in fp32 and in fp64."""
    return virtual(), deepcopy(virtual()).double()


def assert_computed(
    model: LoopedTransformer, exact: LoopedTransformer, run: dict[str, Any], expected: Tensor
) -> None:
    """The logits are the expected ones but for rounding, which is small against them."""
    found = model(**run)
    bound = rounding_bound(exact(**run), found)
    assert bound < 0.01 * expected.std()
    torch.testing.assert_close(found, expected, atol=bound, rtol=0.0)


@pytest.fixture
def by_hand(hf: LlamaForCausalLM, tokens: Tensor) -> ByHand:
    return ByHand(hf, tokens)


def test_by_hand_is_transformers_in_its_own_order(
    by_hand: ByHand, hf: LlamaForCausalLM, tokens: Tensor
) -> None:
    found = by_hand.read_out(by_hand.through(by_hand.embedded, range(N_LAYERS)))
    assert torch.equal(found, hf(tokens).logits)


# Retrofits first: they take two gigabytes each, and the loop below stays in memory.


@pytest.mark.parametrize("split", SPLITS)
def test_a_retrofit_is_its_layers_and_its_adapter(
    real_folder: Path, by_hand: ByHand, tokens: Tensor, split: str
) -> None:
    prelude, core, coda = SPLITS[split]
    model = retrofit(str(real_folder), prelude=prelude, core=core, coda=coda, device="cpu")
    assert str(model.loop) == split.replace(f" {len(core)}, ", f" {len(core)} x 4, ", 1)
    exact = deepcopy(model).double()
    # As it was made, the adapter takes the prelude's output alone: any number of recurrences.
    e = by_hand.through(by_hand.embedded, prelude)
    one = by_hand.read_out(by_hand.through(by_hand.through(e, core), coda))
    assert_computed(model, exact, {"input": tokens, "n_recurrences": 1}, one)
    assert torch.equal(model(tokens, n_recurrences=3), model(tokens, n_recurrences=1))
    # One that sees the state, which starts as noise and goes round three times.
    torch.manual_seed(0)
    d = model.cfg.d_model
    adapter = torch.cat((0.5 * torch.eye(d), torch.eye(d)), 1)
    adapter += 0.1 / d**0.5 * torch.randn(d, 2 * d)
    for one_of_them in (model, exact):
        one_of_them.injection.weight.copy_(adapter)
    initial = torch.randn(e.shape)
    x = initial
    for _ in range(3):
        x = by_hand.through(torch.cat((x, e), -1) @ adapter.T, core)
    expected = by_hand.read_out(by_hand.through(x, coda))
    run = {"input": tokens, "n_recurrences": 3, "initial_state": initial}
    assert_computed(model, exact, run, expected)
    assert (expected - one).abs().max() > 1.0


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_virtual_loop_is_its_core_layers_in_a_row(
    loop: tuple[LoopedTransformer, LoopedTransformer], by_hand: ByHand, tokens: Tensor, n: int
) -> None:
    layers = [*range(12), *(list(range(12, 18)) * n), *range(18, 30)]
    expected = by_hand.read_out(by_hand.through(by_hand.embedded, layers))
    assert_computed(*loop, {"input": tokens, "n_recurrences": n}, expected)
    assert (loop[0](tokens, n_recurrences=1) - expected).abs().max() > 1.0
