"""What accelerate and torch.device("meta") do to a model works, or is refused by name."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from conftest import TINY

from tl_looped import InputError, LoopedTransformer

TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def model() -> LoopedTransformer:
    return LoopedTransformer.from_config(TINY)


def test_offloaded_weights_are_refused(model: LoopedTransformer) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for run in (model, model.run_with_cache, model.loop_map):
        with pytest.raises(InputError, match="from_pretrained"):
            run(TOKENS)


def test_dispatch_to_one_device_changes_nothing(model: LoopedTransformer) -> None:
    want = model(TOKENS)
    moved = copy.deepcopy(model)
    accelerate.dispatch_model(moved, {"": "cpu"})
    assert torch.equal(moved(TOKENS), want)
    assert moved.hf_device_map == {"": "cpu"}


def test_another_spread_than_the_models_own_is_refused(model: LoopedTransformer) -> None:
    for placed in ({"": 0}, {"embed": "cpu", "core": "disk"}, {"embed": "cpu", "core": 0}):
        with pytest.raises(InputError, match="from_pretrained"):
            model.hf_device_map = placed


def test_under_meta_a_model_has_shapes_and_no_values(model: LoopedTransformer) -> None:
    with torch.device("meta"):
        empty = LoopedTransformer.from_config(TINY | {"device": "cpu"})
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty.cfg.device == "meta"
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in empty.named_parameters()} == shapes
