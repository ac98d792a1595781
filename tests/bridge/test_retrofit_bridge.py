"""A looped model made of a TransformerBridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_logits, assert_same
from feedforwards import feedforward, logits_of, random_tokens, with_layers
from test_attention_switches import KINDS as SWITCHES
from test_attention_switches import make
from test_checkpoints import small_tokenizer
from transformer_lens.model_bridge import TransformerBridge

from tl_looped import InputError, retrofit

STAGES: dict[str, Any] = {"prelude": [0, 1], "core": [3, 4], "coda": [6]}


@pytest.mark.parametrize("kind", ["llama-tied", "olmo2"])
def test_bridge_gives_its_weights_and_its_tokenizer(kind: str, tmp_path: Path) -> None:
    source = feedforward(kind)
    source.save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu", dtype=torch.float32)
    before = bridge(random_tokens())
    looped = retrofit(bridge, **STAGES, device="cpu")
    assert looped.tokenizer is bridge.tokenizer
    assert looped.cfg.model_name == tmp_path.name
    expected = logits_of(with_layers(source, [0, 1, 3, 4, 6]), random_tokens())
    assert_logits(looped, random_tokens(), expected)
    assert torch.equal(bridge(random_tokens()), before)
    if kind == "llama-tied":
        bridge.enable_compatibility_mode()
        with pytest.raises(InputError, match="processed by enable_compatibility_mode"):
            retrofit(bridge, **STAGES, device="cpu")


@pytest.mark.usefixtures("exact_bridges")
@pytest.mark.parametrize("kind", list(SWITCHES))
def test_bridge_of_a_model_with_biases_or_head_norms_has_its_numbers(
    kind: str, tokens: torch.Tensor
) -> None:
    model = make(kind)
    bridge = model.to_bridge(n_recurrences=3)
    logits, cache = model.run_with_cache(tokens, n_recurrences=3)
    found, theirs = bridge.run_with_cache(tokens)
    assert_same(found, logits)
    for name in ("hook_pattern", "hook_z", "hook_v"):
        expected = cache[f"blocks.4.attn.{name}"]
        other = theirs[f"blocks.4.attn.{name}"].reshape(expected.shape)
        assert_same(other, expected)
