"""A padded batch on a bridge, in the precisions whose lowest number TransformerLens cannot add."""

from __future__ import annotations

import pytest
import torch
from closeness import rounding_bound
from conftest import exact_config, with_gains
from torch import Tensor

from tl_looped import LoopedTransformer


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_padding_on_the_left_leaves_every_number_finite(dtype: torch.dtype, tokens: Tensor) -> None:
    """Its softmax is in fp32, where fp64's lowest number is -inf; in fp16 scores go beyond it."""
    model = with_gains(LoopedTransformer.from_config(exact_config(qk_bias=True)))
    for block in model.blocks:  # every score far below zero
        block.weights.attn.q_bias.fill_(1.0)
        block.weights.attn.k_bias.fill_(-100.0)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    exact = model(tokens, attention_mask=mask)[mask.bool()]
    bridge = model.to(dtype).to_bridge()
    logits, cache = bridge.run_with_cache(tokens, attention_mask=mask)
    for name, value in cache.cache_dict.items():
        assert not bool(value.isnan().any()), name
    alone = bridge(tokens[:1, 3:])[0]  # TransformerLens's fp32 softmax is in both
    bound = rounding_bound(exact[: len(alone)], alone)
    torch.testing.assert_close(
        logits[mask.bool()].double(), exact, atol=2 * bound, rtol=0.0, check_dtype=False
    )
