"""TransformerLens's direct logit attribution, unmodified, on looped models."""

from __future__ import annotations

import pytest
import torch
from conftest import Golden
from torch import Tensor
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("unit", ["component", "head", "layer"])
@torch.no_grad()
def test_direct_logit_attribution_explains_the_logit(golden: Golden, unit: str) -> None:
    model = golden.load()
    _, cache = model.run_with_cache(golden.tokens, **golden.run)
    found = direct_logit_attribution(
        model, cache=cache, answer_tokens=7, incorrect_tokens=9, unit=unit, pos=None
    )
    logits = golden.tensors["logits"]
    # The unit "layer" is the cumulative stream, whose last entry is the whole of it.
    total = found.attribution[-1] if unit == "layer" else found.attribution.sum(0)
    assert relative(total, logits[..., 7] - logits[..., 9]) < 1e-4
    assert len(found.labels) == found.attribution.shape[0] == len(set(found.labels))
