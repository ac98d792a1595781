"""TransformerLens's training loop and model protocols, both of 4.x, on looped models."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from conftest import VARIANTS
from test_transformerlens_tools import TOKENS, small
from torch import Tensor
from torch.utils.data import Dataset
from transformer_lens import model_protocol, patching
from transformer_lens.tools import training
from typing_extensions import get_protocol_members


class Cycles(Dataset):
    """Sequences that count upwards modulo ten."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"tokens": (torch.arange(8) + i) % 10}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss_and_moves_the_shared_core(variant: str) -> None:
    model = small(variant)
    tokens = torch.stack([Cycles()[i]["tokens"] for i in range(10)])
    before, core = model(tokens, return_type="loss"), model.core[0].mlp.down.clone()
    config = training.TrainConfig(5, 8, lr=3e-3, device="cpu", print_every=None)
    assert training.train(model, config, Cycles()) is model
    with pytest.raises(ValueError, match="evaluation mode"):
        patching.get_act_patch_resid_pre(model, TOKENS, None, lambda logits: logits.mean())
    model.eval()
    assert not any(module.training for module in model.modules())
    assert model(tokens, return_type="loss") < 0.5 * before
    assert not torch.equal(model.core[0].mlp.down, core)
    assert {id(p) for p in model.parameters()} >= {id(p) for p in model.core.parameters()}


PROTOCOLS = [
    model_protocol.TransformerLensModel,
    model_protocol.TransformerLensModelWithWeights,
    model_protocol.TrainableTransformerLensModel,
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_model_satisfies_the_protocols_statically(protocol: Any) -> None:
    model = small()
    assert isinstance(model, protocol)
    for member in get_protocol_members(protocol):
        # What isinstance looks at from Python 3.12 on; it does not see submodules of an nn.Module.
        inspect.getattr_static(model, member)
