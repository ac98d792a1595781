"""Whatever can be called on a HookedTransformer gives the same on a looped model of one recurrence.

The calls are in calls.py, the mistakes in mistakes.py. Where the two differ on purpose,
tests/surface/verdicts.toml says why, and test_differences.py holds both sides.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from calls import CACHE, MODEL, TOKENS, Call
from comparing import assert_alike, assert_same_mistake
from mistakes import MISTAKES
from plain import KINDS, Twins, make_twins

# Calls that TransformerLens itself answers on some of the layouts only.
ONLY = {"cache.logit_attrs": ["full"], "model.set_use_attn_in": ["full", "tied"]}
OPEN = {
    "model.forward": (9, 24),
    "model.blocks": (1,),
    "model.setup": (0,),
    "model.to_str_tokens": (6,),
    "model.input_to_embed": (0, 1, 2),
    "model.generate": (2, 3, 15, 16, 4, 5, 17, 19, 20, 21, 22, 12),
    "model.generate_stream": (0, 1, 2, 3, 4, 5),
    "model.all_composition_scores": (0, 1, 2),
    "model.n_params_total": (0,),
    "model.to": (1,),
    "no composition mode": (0,),
    "no such way to factor": (0,),
    "three rows of which only two are": (0,),
    "an end that nobody knows": (0,),
}


@pytest.fixture(scope="module", params=KINDS)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return make_twins(request.param, tmp_path_factory.mktemp("letters"))


def done(call: Call, model: Any, subject: Any = None) -> Any:
    """A call's result; hooks and gradients are gone behind it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(model if subject is None else subject)
    finally:
        model.reset_hooks(including_permanent=True)
        model.zero_grad()
        model.is_caching = False
        torch.set_grad_enabled(True)


def numbered(calls: dict[str, list[Call]]) -> list[Any]:
    return [
        pytest.param(kind, key, i, id=f"{kind}-{key.split('.')[1]}-{i}", marks=_marks(key, i))
        for kind in KINDS
        for key in calls
        for i in range(len(calls[key]))
        if kind in ONLY.get(key, KINDS)
    ]


def _marks(key: str, i: int) -> Any:
    return pytest.mark.xfail(strict=False) if i in OPEN.get(key, ()) else ()


@pytest.mark.parametrize(("twins", "key", "i"), numbered(MODEL), indirect=["twins"])
def test_a_call_of_the_model_gives_the_same(twins: Twins, key: str, i: int) -> None:
    theirs, ours = (done(MODEL[key][i], model) for model in (twins.hooked, twins.looped))
    assert_alike(ours, theirs, key)


@pytest.mark.parametrize(("twins", "key", "i"), numbered(CACHE), indirect=["twins"])
def test_a_call_of_the_cache_gives_the_same(twins: Twins, key: str, i: int) -> None:
    results = []
    for model in (twins.hooked, twins.looped):
        with torch.no_grad():
            _, cache = model.run_with_cache(TOKENS)
        results.append(done(CACHE[key][i], model, cache))
    assert_alike(results[1], results[0], key)


@pytest.mark.parametrize("mistake", [pytest.param(x, marks=_marks(x, 0)) for x in MISTAKES])
def test_a_mistake_raises_an_error_of_the_same_family(twins: Twins, mistake: str) -> None:
    caught = []
    for model in (twins.hooked, twins.looped):
        with pytest.raises(Exception) as error:
            done(MISTAKES[mistake], model)
        caught.append(error.value)
    assert_same_mistake(caught[1], caught[0])
