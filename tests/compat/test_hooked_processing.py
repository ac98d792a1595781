"""HookedTransformer's weight processing and state dicts, and ours, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_same
from hooked import CLOSE, KINDS, hooked_config, some_tokens, without_injection
from test_against_transformers import write_retrofit
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.pretrained.weight_conversions import convert_llama_weights

from tl_looped import InputError, LoopedTransformer

pytestmark = pytest.mark.usefixtures("without_gradients")

OFF = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}
ASKED: dict[str, dict[str, bool]] = {
    "unprocessed": OFF,
    "folded": OFF | {"fold_ln": True},
    "centred": OFF | {"center_unembed": True},
    "by default": {},
    "all that is skipped": OFF | {"center_writing_weights": True, "fold_value_biases": True},
}
STACKS = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out", "b_Q", "b_K", "b_V", "b_O")


def hooked_of(kind: str, source: Any, **asked: bool) -> HookedTransformer:
    cfg = hooked_config(kind)
    hooked = HookedTransformer(cfg)
    hooked.load_and_process_state_dict(convert_llama_weights(source, cfg), **asked)
    return hooked.eval()


def weights_of(model: Any) -> dict[str, Tensor]:
    stacks = {name: getattr(model, name) for name in (*STACKS, "b_in", "b_out")}
    # Detached: PyTorch compares no parameter with another kind of tensor.
    return stacks | {name: getattr(model, name).detach() for name in ("W_E", "W_U", "b_U")}


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_keywords_show_the_same_weights(kind: str, what: str, tmp_path: Path) -> None:
    asked, tokens = ASKED[what], some_tokens()
    rope, kv_heads = KINDS[kind]
    hooked = hooked_of(kind, write_retrofit(rope, tmp_path, kv_heads), **asked)
    # Where HookedTransformer processes by default, a looped model is asked to.
    ours = {"fold_ln": True, "center_unembed": True} if what == "by default" else asked
    looped = LoopedTransformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float64, **ours)
    shown = weights_of(looped)
    for name, theirs in weights_of(hooked).items():
        # While it loads, TransformerLens folds and centres in fp32 whatever the weights are.
        torch.testing.assert_close(shown[name], theirs.detach(), **CLOSE, msg=name)
    torch.testing.assert_close(looped(tokens), hooked(tokens), **CLOSE)
    assert looped.cfg.normalization_type == hooked.cfg.normalization_type
    ids = torch.tensor([3, 7])
    torch.testing.assert_close(
        looped.tokens_to_residual_directions(ids),
        hooked.tokens_to_residual_directions(ids),
        **CLOSE,
    )


@pytest.mark.parametrize("what", ["unprocessed", "folded"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_state_dict_is_loaded(kind: str, what: str, tmp_path: Path) -> None:
    rope, kv_heads = KINDS[kind]
    hooked = hooked_of(kind, write_retrofit(rope, tmp_path, kv_heads), **ASKED[what])
    retrofit = LoopedTransformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    other = without_injection(retrofit)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_and_process_state_dict(hooked.state_dict(), **OFF)
    assert torch.equal(other.W_in, hooked.W_in)
    assert torch.equal(other.W_K, hooked.W_K)
    torch.testing.assert_close(other(some_tokens()), hooked(some_tokens()), **CLOSE)
    # And it is processed as there.
    processed = hooked_of(kind, write_retrofit(rope, tmp_path, kv_heads))
    other.load_and_process_state_dict(hooked.state_dict())
    torch.testing.assert_close(other(some_tokens()), processed(some_tokens()), **CLOSE)
    other.set_recurrences(2)
    with pytest.raises(InputError, match=r"blocks\.2\..*blocks\.5\..*differ.*set_recurrences"):
        other.load_and_process_state_dict(hooked.state_dict())


def test_the_methods_on_state_dicts_agree(tmp_path: Path) -> None:
    hooked = hooked_of("grouped", write_retrofit("llama", tmp_path, 2), **OFF)
    looped = LoopedTransformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    state = hooked.state_dict()
    for method, ours, theirs in (
        ("center_unembed", {}, {}),
        ("fold_layer_norm", {}, {"fold_biases": False, "center_weights": False}),
        ("fold_value_biases", {}, {}),
    ):
        expected = getattr(hooked, method)({k: v.clone() for k, v in state.items()}, **theirs)
        found = getattr(looped, method)({k: v.clone() for k, v in state.items()}, **ours)
        assert set(found) == set(expected)
        for name, value in expected.items():
            if value.dtype == torch.float64:
                assert_same(found[name], value)
            else:
                assert torch.equal(found[name], value)


def test_small_numbers_agree(tmp_path: Path) -> None:
    hooked = hooked_of("full", write_retrofit("llama", tmp_path, 4), **OFF)
    native = without_injection(
        LoopedTransformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    )
    # HookedTransformer counts the biases that it has and a looped model has not, all of them zero.
    biases = sum(p.numel() for n, p in hooked.named_parameters() if ".b_" in n)
    assert native.n_params_total == hooked.n_params_total - biases
