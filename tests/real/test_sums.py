"""Decompositions and streamed metrics of a stream with massive activations, norms up to 25,000."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_same, assert_same_data
from torch import Tensor

from real import memory_of_streaming
from real.texts import LIGHTHOUSE
from tl_looped import LoopedActivationCache, LoopedTransformer, metrics


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> Tensor:
    return tokenizer(LIGHTHOUSE, return_tensors="pt").input_ids[:, :24]


@pytest.fixture(scope="module")
def exact(virtual: Callable[..., LoopedTransformer]) -> LoopedTransformer:
    """The loop over layers 12 to 17, run twice, in fp64."""
    return deepcopy(virtual().view_at(2)).double()


@pytest.fixture(scope="module")
def cache(exact: LoopedTransformer, tokens: Tensor) -> LoopedActivationCache:
    with torch.no_grad():
        return exact.run_with_cache(tokens)[1]


def test_massive_activations_are_there(cache: LoopedActivationCache) -> None:
    norms = cache["resid_post", (1, 3)][0].norm(dim=-1)
    assert norms.argmax() == 0
    assert norms[0] > 20_000
    assert norms[0] > 20 * norms[1:].max()


@pytest.mark.parametrize("layer", [1, 12, (0, 0), (1, 3), 35, None])
def test_components_sum_to_the_stream(cache: LoopedActivationCache, layer: Any) -> None:
    parts = cache.decompose_resid(layer=layer)
    name = ("resid_post", 35) if layer is None else ("resid_pre", layer)
    assert_same(parts.sum(0), cache[name])
    raw = cache.decompose_resid(layer=layer, raw=True)
    assert_same(raw.sum(0), cache[name])  # no norm and no injection is between the writes


@pytest.mark.parametrize("layer", [(1, 0), 35])
def test_heads_and_neurons_sum_to_the_stream(cache: LoopedActivationCache, layer: Any) -> None:
    heads = cache.stack_head_results(layer=layer, incl_remainder=True)
    assert_same(heads.sum(0), cache["resid_pre", layer])
    last = {"layer": layer, "pos_slice": -1, "incl_remainder": True}
    assert_same(cache.stack_neuron_results(**last).sum(0), cache["resid_pre", layer][:, -1])


def test_attributions_sum_to_the_logit(
    exact: LoopedTransformer, cache: LoopedActivationCache, tokens: Tensor, tokenizer: Any
) -> None:
    token = tokenizer(" lamp").input_ids[0]
    parts = cache.decompose_resid(by="recurrence")
    found = cache.logit_attrs(parts, tokens=token).sum(0)
    assert_same(found, exact(tokens)[..., token])


def test_components_in_fp32_sum_within_the_rounding_of_adding_them(
    virtual: Callable[..., LoopedTransformer], tokens: Tensor
) -> None:
    cache = virtual().run_with_cache(tokens, n_recurrences=2)[1]
    parts = cache.decompose_resid()
    # Adding n numbers one after another: each sum is rounded once, and none is larger than this.
    largest = parts.abs().sum(0)
    bound = torch.finfo(torch.float32).eps * len(parts) * largest
    assert ((parts.sum(0) - cache["resid_post", 35]).abs() <= bound).all()


# -- streaming -----------------------------------------------------------------------------------


def test_streamed_metrics_are_those_of_the_cache(
    exact: LoopedTransformer, cache: LoopedActivationCache, tokens: Tensor
) -> None:
    names = ["signature", "magnitude", "successive", "fixed_point"]
    assert_same_data(metrics.stream(exact, tokens, names), metrics.from_cache(cache, names))


def test_streamed_steps_are_from_the_recurrence_before(
    exact: LoopedTransformer, tokens: Tensor
) -> None:
    """By the states of the run: of three recurrences, so that the last step is not the first."""
    looped = exact.view_at(3)
    data = metrics.stream(looped, tokens, ["successive"])
    cache = looped.run_with_cache(tokens, names_filter=lambda n: n.endswith("resid_post"))[1]
    steps = data["successive_abs"].squeeze("prompt").transpose("recurrence", "layer")
    for r in (1, 2):
        for layer in range(6):
            moved = cache["resid_post", (r, layer)] - cache["resid_post", (r - 1, layer)]
            size = moved[0].norm(dim=-1)
            found = torch.tensor(float(steps.sel(recurrence=r, layer=layer)), dtype=torch.float64)
            # Differences of states that are far larger: the first token's norm is 25,000.
            largest = float(cache["resid_post", (r, layer)].abs().max())
            assert_same(found, size.mean(), scale=largest)
    assert not torch.isclose(*torch.tensor(steps.sel(layer=0).values[1:]), rtol=1e-3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read on Linux")
def test_a_prompt_of_1600_tokens_streams_in_bounded_memory(real_folder: Path) -> None:
    script = memory_of_streaming.__file__
    run = [sys.executable, script, str(real_folder), "1600"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    forward, streamed, one, whole = map(int, done.stdout.split())
    # Patterns of two recurrences are compared, which is less than all that one computes, and a
    # layer's activations are there while they are read.
    layer = one / len(memory_of_streaming.LAYERS["core"])
    assert streamed - forward < one + layer
    assert streamed < whole / 2
