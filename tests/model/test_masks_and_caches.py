"""Masks, padding sides and key-value caches: exact, or refused at every door."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor
from transformers import DynamicCache

from tl_looped import InputError, LoopedKeyValueCache, LoopedTransformer
from tl_looped import interventions as iv
from tl_looped.metrics.spectrum import loop_spectrum
from tl_looped.metrics.states import state_distance
from tl_looped.transformer.prompt import check_mask
from tl_looped.transformer.run_options import check_cache

TOKENS = torch.tensor([[0, 0, 3, 1, 4], [2, 7, 1, 8, 2]])
REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
SIZES = TINY | {"dtype": "float64"}


@pytest.fixture
def model() -> LoopedTransformer:
    return LoopedTransformer.from_config(SIZES)


def additive(lowest: float) -> Tensor:
    return torch.zeros(REAL.shape, dtype=torch.float64).masked_fill(REAL == 0, lowest)


WRONG: dict[str, Tensor] = {
    "-inf": additive(-math.inf),
    "-1e9": additive(-1e9),
    "lowest": additive(torch.finfo(torch.float32).min),
    "NaN": REAL.double().masked_fill(REAL == 0, math.nan),
    "fractions": REAL * 0.5,
    "documents": REAL * 2,
    "negative": -REAL,
}


def spread(model: LoopedTransformer, mask: Tensor) -> Tensor:
    states = torch.stack([model.embed(TOKENS)] * 2)
    return state_distance(states[0], 2 * states[1], "rel", mask)


DOORS: dict[str, Callable[[LoopedTransformer, Tensor], Any]] = {
    "forward": lambda m, mask: m(TOKENS, attention_mask=mask),
    "loss": lambda m, mask: m(TOKENS, attention_mask=mask, return_type="loss"),
    "cached run": lambda m, mask: m.run_with_cache(TOKENS, attention_mask=mask)[0],
    "generate": lambda m, mask: m.generate(
        TOKENS, 2, attention_mask=mask, do_sample=False, verbose=False
    ),
    "lens": lambda m, mask: m.coda_lens(m.embed(TOKENS), attention_mask=mask),
    "loop map": lambda m, mask: m.loop_map(TOKENS, attention_mask=mask).run(2),
    "loss_fn": lambda m, mask: m.loss_fn(m(TOKENS), TOKENS, mask),
    "rows": lambda m, mask: torch.cat(m.token_rows(TOKENS, mask)),
    "distance": spread,
    "fixed point": lambda m, mask: (
        iv.fixed_point(m, TOKENS, 3, math.inf, attention_mask=mask).state
    ),
    "spectrum": lambda m, mask: torch.from_numpy(
        loop_spectrum(m, TOKENS, attention_mask=mask, n_iterations=8).fixed_point_residual.values
    ),
}


@pytest.mark.parametrize("mask", WRONG)
@pytest.mark.parametrize("door", DOORS)
def test_a_mask_is_zeros_and_ones(model: LoopedTransformer, door: str, mask: str) -> None:
    with pytest.raises(InputError):
        DOORS[door](model, WRONG[mask])


@pytest.mark.parametrize("mask", ["yes", [[1, 1], [1]], [["a"]], object()])
def test_what_is_no_mask_is_refused(model: LoopedTransformer, mask: Any) -> None:
    with pytest.raises(InputError):
        check_mask(model, mask, *TOKENS.shape)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float64, torch.uint8])
@pytest.mark.parametrize("door", DOORS)
def test_zeros_and_ones_mean_the_same_in_every_dtype(
    model: LoopedTransformer, door: str, dtype: torch.dtype
) -> None:
    run = DOORS[door]
    assert torch.equal(run(model, REAL.to(dtype)), run(model, REAL))


def test_padding_side_is_for_text(model: LoopedTransformer) -> None:
    for side in ("left", "right"):
        with pytest.raises(InputError):
            model(TOKENS, padding_side=side)
        with pytest.raises(InputError):
            model.loop_map(TOKENS, padding_side=side)
        with pytest.raises(InputError):
            model(model.embed(TOKENS), start_at_layer=0, padding_side=side)


def filled(model: LoopedTransformer) -> LoopedKeyValueCache:
    cache = LoopedKeyValueCache()
    model(TOKENS, past_kv_cache=cache)
    return cache


NEXT = torch.tensor([[5], [6]])
OTHERS: dict[str, Callable[[], LoopedTransformer]] = {
    "weights": lambda: LoopedTransformer.from_config(SIZES | {"seed": 1}),
    "layers": lambda: LoopedTransformer.from_config(SIZES | {"n_coda": 2}),
    "heads": lambda: LoopedTransformer.from_config(SIZES | {"n_key_value_heads": 1}),
    "dtype": lambda: LoopedTransformer.from_config(SIZES).float(),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_key_value_cache_is_its_models_own(
    model: LoopedTransformer, other: str, frozen: bool
) -> None:
    cache = filled(model)
    cache.frozen = frozen
    for given in (cache, copy.deepcopy(cache)):
        with pytest.raises(InputError):
            OTHERS[other]()(NEXT, past_kv_cache=given)
    whole = model(torch.cat((TOKENS, NEXT), 1))[:, -1:]
    torch.testing.assert_close(model(NEXT, past_kv_cache=cache), whole, rtol=1e-12, atol=1e-12)


def test_a_key_value_cache_is_of_the_models_present_dtype(model: LoopedTransformer) -> None:
    cache = filled(model)
    model.float()
    with pytest.raises(InputError):
        model(NEXT, past_kv_cache=cache)
    with pytest.raises(InputError):
        model.generate(NEXT, 1, past_kv_cache=cache, verbose=False)
    model(NEXT, past_kv_cache=filled(model))


def test_a_key_value_cache_can_be_kept_in_a_file(model: LoopedTransformer) -> None:
    cache = pickle.loads(pickle.dumps(filled(model)))
    whole = model(torch.cat((TOKENS, NEXT), 1))[:, -1:]
    torch.testing.assert_close(model(NEXT, past_kv_cache=cache), whole, rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError):
        OTHERS["layers"]()(NEXT, past_kv_cache=cache)


def test_other_libraries_caches_are_refused(model: LoopedTransformer) -> None:
    for cache in (DynamicCache(), {}, (None,)):
        with pytest.raises(InputError):
            check_cache(model, cache)  # behind the annotations, which tests check


@pytest.mark.parametrize("seed", [True, False])
def test_a_seed_is_an_integer(seed: bool) -> None:
    random = SIZES | {"initial_state": "random", "initial_state_std": 0.4}
    model = LoopedTransformer.from_config(random)
    with pytest.raises(InputError):
        model(TOKENS, state_seed=seed)
    with pytest.raises(InputError):
        model.generate(TOKENS, 1, state_seed=seed, verbose=False)
    with pytest.raises(InputError):
        model.loop_map(TOKENS, state_seed=seed)
    model.state_seed = seed
    with pytest.raises(InputError):
        model(TOKENS)
