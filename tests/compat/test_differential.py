"""Whatever can be called on a HookedTransformer gives the same on a looped model of one recurrence.

The calls are in calls.py, the mistakes in mistakes.py. Where the two differ on purpose,
tests/surface/verdicts.toml says why, and test_differences.py holds both sides.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import CACHE, MODEL, PROCESSING, TOKENS, Call, done
from closeness import SAME
from comparing import ROUNDED, assert_alike, assert_same_mistake
from mistakes import MISTAKES
from plain import KINDS, Twins, make_twins
from snapshots import snapshot
from torch import Tensor

# Calls that TransformerLens itself answers on some of the layouts only.
ONLY = {
    "cache.logit_attrs": ["full"],
    "model.set_use_attn_in": ["full", "tied"],
    "model.fold_value_biases": ["full"],
}


@pytest.fixture(scope="module", params=KINDS)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return make_twins(request.param, tmp_path_factory.mktemp("letters"))


def numbered(calls: dict[str, list[Call]]) -> list[Any]:
    return [
        pytest.param(kind, key, i, id=f"{kind}-{key.split('.')[1]}-{i}")
        for kind in KINDS
        for key in calls
        for i in range(len(calls[key]))
        if kind in ONLY.get(key, KINDS)
    ]


@pytest.mark.parametrize(("twins", "key", "i"), numbered(MODEL), indirect=["twins"])
def test_a_call_of_the_model_gives_the_same(twins: Twins, key: str, i: int) -> None:
    theirs, ours = (done(MODEL[key][i], model) for model in (twins.hooked, twins.looped))
    assert_alike(ours, theirs, key, ROUNDED if key in PROCESSING else SAME)


@pytest.mark.parametrize(("twins", "key", "i"), numbered(CACHE), indirect=["twins"])
def test_a_call_of_the_cache_gives_the_same(twins: Twins, key: str, i: int) -> None:
    results = []
    for model in (twins.hooked, twins.looped):
        with torch.no_grad():
            _, cache = model.run_with_cache(TOKENS)
        results.append(done(CACHE[key][i], model, cache))
    assert_alike(results[1], results[0], key)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises_an_error_of_the_same_family(twins: Twins, mistake: str) -> None:
    caught = []
    for model in (twins.hooked, twins.looped):
        with pytest.raises(Exception) as error:
            done(MISTAKES[mistake], model)
        caught.append(error.value)
    assert_same_mistake(caught[1], caught[0])


def as_transformer_lens(name: str, stored: Tensor, shape: torch.Size) -> Tensor:
    """What is stored as [out, in], in TransformerLens's order of dimensions."""
    short = name.split(".")[-1].lstrip("_")
    if short in ("W_Q", "W_K", "W_V"):
        return stored.unflatten(0, (shape[0], -1)).transpose(1, 2)
    if short == "W_O":
        return stored.T.unflatten(0, (shape[0], -1))
    return stored.T if short in ("W_in", "W_gate", "W_out", "W_U") else stored


def test_the_gradient_of_every_weight_is_the_same(twins: Twins) -> None:
    for model in (twins.hooked, twins.looped):
        model.zero_grad()
        model(TOKENS, return_type="loss").backward()
    theirs = {name: weight.grad for name, weight in twins.hooked.named_parameters()}
    stored = dict(twins.looped.named_parameters())
    if twins.looped.cfg.tie_embeddings:  # one weight here, two there
        theirs["embed.W_E"] = theirs["embed.W_E"] + theirs.pop("unembed.W_U").T
    compared = set()
    for name, expected in theirs.items():
        where = twins.looped.parameter_of(name)
        if where is None:
            assert name.split(".")[-1].lstrip("_").startswith("b_")
            continue
        grad = stored[where.name].grad
        assert grad is not None
        assert expected.abs().max() > 0
        ours = as_transformer_lens(name, grad[where.rows], expected.shape)
        assert_alike(ours, expected, name)
        compared.add(where.name)
    assert compared == set(stored)
    for model in (twins.hooked, twins.looped):
        model.zero_grad()


OTHER_VALUES = ("uses_rms_norm", "init_mode", "initializer_range", "tokenizer_name")
OTHER_VALUES += ("tokenizer_prepends_bos",)
FIELDS = [
    name
    for name, member in snapshot("3.5.1")["config"]["HookedTransformerConfig"].items()
    if member.kind == "field" and name not in OTHER_VALUES
]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_configuration_has_the_same_value(twins: Twins, field: str) -> None:
    theirs, ours = getattr(twins.hooked.cfg, field), getattr(twins.looped.cfg, field)
    assert ours == theirs
