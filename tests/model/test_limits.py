"""Absurd sizes are refused at once, with the limit and how to raise it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from tl_looped import (
    ArgumentTypeError,
    ConfigError,
    LoopedConfig,
    LoopedTransformer,
    RecurrenceCountError,
)
from tl_looped.experiments.spec import Experiment
from tl_looped.metrics.spectrum import reached_state
from tl_looped.model import limits
from tl_looped.training.recurrences import Constant, PoissonLogNormal

TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def model() -> LoopedTransformer:
    return LoopedTransformer.from_config(TINY)


DOORS: dict[str, Callable[[LoopedTransformer, Any], Any]] = {
    "forward": lambda m, n: m(TOKENS, n_recurrences=n),
    "run_with_cache": lambda m, n: m.run_with_cache(TOKENS, n_recurrences=n),
    "run_with_hooks": lambda m, n: m.run_with_hooks(TOKENS, n_recurrences=n),
    "generate": lambda m, n: m.generate(TOKENS, 1, n_recurrences=n, verbose=False),
    "generate_stream": lambda m, n: next(
        m.generate_stream(TOKENS, 1, n_recurrences=n, verbose=False)
    ),
    "set_recurrences": lambda m, n: m.set_recurrences(n),
    "recurrences": lambda m, n: m.with_recurrences(n).__enter__(),
    "estimate_cache_bytes": lambda m, n: m.estimate_cache_bytes(n_recurrences=n),
    "view_at": lambda m, n: m.view_at(n),
}


@pytest.mark.parametrize("n", [10**8, 2**63, 10**24, limits.most_layers])
@pytest.mark.parametrize("door", DOORS)
def test_no_door_builds_blocks_without_end(model: LoopedTransformer, door: str, n: int) -> None:
    # More than 64 bits are no integer to most doors; options that go on are read further in.
    kinds = (RecurrenceCountError,) if n < 2**63 else (RecurrenceCountError, ArgumentTypeError)
    with pytest.raises(kinds):
        DOORS[door](model, n)
    assert (model.loop.R, len(model.blocks)) == (2, 4)


@pytest.mark.parametrize("n", [True, False])
@pytest.mark.parametrize("door", DOORS)
def test_true_is_no_number_of_recurrences(model: LoopedTransformer, door: str, n: bool) -> None:
    with pytest.raises(RecurrenceCountError):
        DOORS[door](model, n)


@pytest.mark.parametrize("n", [2.0, "2", None, np.bool_(True), torch.tensor(True), [2]], ids=str)
def test_what_is_no_number_is_no_number_of_recurrences(n: Any) -> None:
    with pytest.raises(RecurrenceCountError):
        limits.checked_recurrences(n)


def test_integers_of_other_libraries_are_numbers() -> None:
    for n in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert limits.checked_recurrences(n) == 3


def test_the_limit_counts_layers_and_can_be_raised(
    model: LoopedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "most_layers", 9)
    model.set_recurrences(7)
    with pytest.raises(RecurrenceCountError):
        model.set_recurrences(8)
    monkeypatch.setattr(limits, "most_layers", 10)
    model.set_recurrences(8)
    assert len(model.blocks) == 10


def test_the_map_and_its_states_have_the_same_limit(model: LoopedTransformer) -> None:
    loop = model.loop_map(TOKENS)
    for run in (loop.run, lambda n: reached_state(loop, n)):
        with pytest.raises(RecurrenceCountError):
            run(10**8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_recurrences": 10**9},
        {"n_recurrences": 2**63},
        {"n_core": 10**9},
        {"n_core": 10**9, "n_recurrences": 0},
        {"n_prelude": 10**9},
        {"n_coda": 10**9},
        {"d_model": 2**40},
        {"d_mlp": 2**40},
        {"d_vocab": 2**40},
        {"n_heads": 2**40},
        {"d_head": 2**40},
        {"n_key_value_heads": 2**40, "n_heads": 2**40},
    ],
    ids=str,
)
def test_a_configuration_has_sizes_that_can_be_built(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        LoopedConfig.from_json(TINY | wrong)


def test_experiments_and_training_know_the_limit() -> None:
    for n in (10**7, 10**24):
        with pytest.raises(ConfigError):
            Experiment("demo", recurrences=n)
        with pytest.raises(ConfigError):
            Experiment("demo", reference_recurrences=n)
        # What has more than 64 bits is not a number of recurrences at all.
        with pytest.raises((ConfigError, ArgumentTypeError)):
            Constant(n)
        with pytest.raises(ConfigError):
            PoissonLogNormal(float(n))
