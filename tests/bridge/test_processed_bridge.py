"""The bridge of a model that is processed: its logits are the model's."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_same
from conftest import VARIANTS, exact_config, with_gains
from torch import Tensor

from tl_looped import LoopedTransformer

pytestmark = pytest.mark.usefixtures("without_gradients", "exact_bridges")


@pytest.mark.parametrize("fold_ln", [False, True])
@pytest.mark.parametrize("kind", VARIANTS)
def test_a_centred_models_bridge_is_centred(kind: str, fold_ln: bool, tokens: Tensor) -> None:
    model = with_gains(LoopedTransformer.from_config(exact_config(**VARIANTS[kind])))
    before = model(tokens)
    model.enable_compatibility_mode(fold_ln=fold_ln, center_unembed=True)
    bridge = model.to_bridge()
    centred = before - before.mean(-1, keepdim=True)
    assert_same(bridge(tokens), centred, float(before.abs().max()))
    assert_same(bridge(tokens), model(tokens), float(before.abs().max()))
    model.enable_compatibility_mode(no_processing=True)  # the bridge follows
    assert_same(bridge(tokens), before)
    assert torch.equal(model(tokens), before)
