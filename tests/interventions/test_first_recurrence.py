"""Skipped first recurrences, and starts that would leave nothing of the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from tl_looped import InputError, LoopedTransformer
from tl_looped import interventions as iv
from tl_looped.viz.reading import counted

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
SIZES = TINY | {"n_core": 2, "n_recurrences": 4, "dtype": "float64"}
KINDS: dict[str, dict[str, Any]] = {
    "skip-adapter": {"initial_state": "prelude-skip-adapter"},
    "embedded": {"initial_state": "prelude"},
    "random": {"initial_state": "random", "initial_state_std": 0.4},
    "without injection": {"injection": "none"},
    "without coda": {"injection": "none", "n_coda": 0},
    "loop norm": {
        "injection": "none", "n_coda": 0, "n_prelude": 0, "loop_norm": True,
        "norm_layout": "sandwich",
    },
    "skip-adapter without coda": {"initial_state": "prelude-skip-adapter", "n_coda": 0},
}  # fmt: skip


def made(kind: str) -> LoopedTransformer:
    return LoopedTransformer.from_config(SIZES | KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skipped", [[0], [1], [3], [0, 1], [0, 2], [1, 2, 3], [0, 1, 2]], ids=str)
def test_a_run_without_recurrences_is_a_shorter_run(kind: str, skipped: list[int]) -> None:
    model = made(kind)
    short = model(TOKENS, n_recurrences=4 - len(skipped))
    with model.intervening(iv.SkipRecurrences(skipped)):
        torch.testing.assert_close(model(TOKENS), short, rtol=1e-12, atol=1e-12)
    with model.intervening(*(iv.SkipRecurrences(r) for r in skipped)):
        torch.testing.assert_close(model(TOKENS), short, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeated", [0, 2, 3])
def test_a_run_that_repeats_recurrences_is_a_longer_run(kind: str, repeated: int) -> None:
    model = made(kind)
    with model.intervening(iv.RepeatRecurrence(repeated, 2)):
        found = model(TOKENS)
    longer = model(TOKENS, n_recurrences=6)
    torch.testing.assert_close(found, longer, rtol=1e-12, atol=1e-12)


def test_what_the_first_recurrence_that_is_left_injects_cannot_be_scaled() -> None:
    model = made("skip-adapter")
    changes = iv.SkipRecurrences(0), iv.ScaleInjection(0.5, 1)
    with model.intervening(*changes), pytest.raises(InputError):
        model(TOKENS)


@pytest.mark.parametrize("kind", ["without injection", "without coda", "loop norm"])
def test_zeros_that_erase_the_prompt_are_refused(kind: str) -> None:
    model = made(kind)
    with pytest.raises(InputError):
        model(TOKENS, initial_state="zeros")
    with pytest.raises(InputError):
        model.generate(TOKENS, 1, initial_state="zeros", verbose=False)
    with model.intervening(iv.ReplaceInitialState("zeros")), pytest.raises(InputError):
        model(TOKENS)
    # As what it is, a tensor, it can be run: every prompt gets the same.
    rows = model(TOKENS, initial_state=torch.zeros(2, 5, 8))
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-12, atol=1e-12)


def test_zeros_beside_an_injection_are_a_start() -> None:
    model = made("random")
    zeros = model(TOKENS, initial_state=torch.zeros(2, 5, 8))
    assert torch.equal(model(TOKENS, initial_state="zeros"), zeros)
    with model.intervening(iv.ReplaceInitialState("zeros")):
        assert torch.equal(model(TOKENS), zeros)


@pytest.mark.parametrize("prompt", [TOKENS, [3, 1], "Tom", None, True, 1.0], ids=str)
def test_a_view_is_of_a_row_of_the_run(prompt: Any) -> None:
    with pytest.raises(InputError):
        counted("prompt", prompt, 2)
    assert (counted("prompt", np.int64(1), 2), counted("prompt", -1, 2)) == (1, 1)
