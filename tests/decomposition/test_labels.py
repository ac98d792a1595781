"""Labels are TransformerLens's own on request, and by default of models without a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VARIANTS, exact_config
from torch import Tensor

from tl_looped import InputError, LoopedTransformer
from tl_looped._compat import ActivationCache

pytestmark = pytest.mark.usefixtures("without_gradients")

CALLS: dict[str, list[dict[str, Any]]] = {
    "accumulated_resid": [{}, {"layer": 3, "incl_mid": True, "mlp_input": True}],
    "decompose_resid": [{}, {"layer": 2}, {"mode": "attn"}, {"layer": 3, "mlp_input": True}],
    "stack_head_results": [{"layer": -1}, {"layer": 4, "incl_remainder": True}],
    "stack_neuron_results": [{"layer": 2, "neuron_slice": (3, 6)}],
    "get_full_resid_decomposition": [{"layer": 3, "expand_neurons": False}],
}


def feedforward() -> LoopedTransformer:
    changes = {"n_prelude": 0, "n_core": 6, "n_coda": 0, "n_recurrences": 1}
    model = LoopedTransformer.from_config(exact_config(**changes))
    model.cfg.trained_recurrences = 1
    return model


@pytest.mark.parametrize("method", CALLS)
def test_labels_are_those_of_transformerlens(method: str, tokens: Tensor) -> None:
    looped = LoopedTransformer.from_config(exact_config())
    for model in (looped, feedforward()):
        model.set_use_attn_result(True)
        _, cache = model.run_with_cache(tokens)
        theirs = ActivationCache(dict(cache.cache_dict), cache.model)
        for options in CALLS[method]:
            _, expected = getattr(theirs, method)(return_labels=True, **options)
            stack, found = getattr(cache, method)(labels="transformer_lens", **options)
            # What there is in a looped model alone: the initial state, if there is one.
            assert found == expected
            assert len(found) == len(stack)
            plain = getattr(cache, method)(**options)
            assert torch.equal(plain, stack)
            by_default = getattr(cache, method)(return_labels=True, **options)[1]
            places = getattr(cache, method)(labels="looped", **options)[1]
            assert places != expected
            assert by_default == (places if model is looped else expected)


def test_the_number_of_recurrences_changes_no_form(tokens: Tensor) -> None:
    for model in (feedforward(), LoopedTransformer.from_config(exact_config(n_recurrences=1))):
        first = model.all_head_labels[0]
        for n in (1, 3):
            _, cache = model.run_with_cache(tokens, n_recurrences=n)
            assert cache.model.all_head_labels[0] == first
            assert cache.stack_head_results(return_labels=True)[1][0] == first
            assert len(cache.model.all_head_labels) == 4 * cache.loop.n_layers
        assert first == ("prelude.0h0" if model.cfg.has_loop else "L0H0")


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_is_made_or_trained_as_a_loop_has_one(kind: str) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS[kind]))
    assert model.cfg.has_loop
    model.cfg.trained_recurrences = 1
    assert model.cfg.has_loop, "it has a prelude, a coda or a norm of the loop"
    plain = feedforward()
    assert not plain.cfg.has_loop
    for trained in (None, 4, 1.5):
        plain.cfg.trained_recurrences = trained
        assert plain.cfg.has_loop


def test_labels_of_heads_are_a_list_and_a_method(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config())
    labels = model.all_head_labels
    assert isinstance(labels, list)
    assert labels == labels() == model.attn_head_labels == labels(labels="looped")
    heads = [f"L{i}H{h}" for i in range(model.loop.n_layers) for h in range(4)]
    assert labels("transformer_lens") == heads
    assert feedforward().all_head_labels() == heads[: 6 * 4]
    place = model.loop.index(2, 1)
    assert labels[4 * place + 3] == "r2.l1h3"


def test_the_initial_state_and_other_stages_are_named_too(tokens: Tensor) -> None:
    changes = VARIANTS["pre-injection"]
    model = LoopedTransformer.from_config(exact_config(**changes))
    _, cache = model.run_with_cache(tokens)
    _, labels = cache.decompose_resid(labels="transformer_lens")
    writes = [f"{i}_{kind}" for i in range(model.loop.n_layers) for kind in ("attn_out", "mlp_out")]
    assert sorted(labels) == sorted(["embed", "initial_state", *writes])


def test_groups_have_no_labels_of_transformerlens(tokens: Tensor) -> None:
    _, cache = feedforward().run_with_cache(tokens)
    assert cache.decompose_resid(by="recurrence", return_labels=True)[1] == ["embed", "r0"]
    with pytest.raises(InputError, match="by='recurrence'"):
        cache.decompose_resid(by="recurrence", labels="transformer_lens")
    for method in CALLS:
        with pytest.raises(InputError, match="labels"):
            getattr(cache, method)(layer=2, labels="hooked")
    with pytest.raises(InputError, match="labels"):
        cache.model.all_head_labels(labels="hooked")
