"""What is called on a looped model and on its bridge gives the same, at one recurrence.

The calls are those of tests/surface. A bridge has other names for its hooks, and gives the names
that a looped model has as aliases; so caches are compared name by name of the looped model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import CACHE, MODEL, SIZES, STAGES, TOKENS, done
from comparing import assert_alike, shared
from letters import letters
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from tl_looped import InputError, LoopedConfig, LoopedTransformer

pytestmark = pytest.mark.usefixtures("exact_bridges")
KINDS: dict[str, dict[str, Any]] = {"full": {}, "grouped": {"n_key_value_heads": 2}}

OTHER_NAMES = ("hook_dict", "hook_embed", "mod_dict", "hooks", "add_caching_hooks", "cache_all")
OTHER_NAMES += ("cache_some", "setup", "is_caching", "all_composition_scores")
OTHER_ARGUMENTS: dict[str, tuple[int, ...]] = {
    "forward": (9, 19, 23, 24, 27, 28),  # .loss, the last layer's output, HookedTransformer's own
    "run_with_cache": (2, 3),  # places; a plain dict has one name of each activation
    "run_with_hooks": (2,),  # places
    "add_hook": (1, 3, 5),  # hook_fn, no prepend, no level
    "add_perma_hook": (1,),
    "input_to_embed": (1,),  # no key-value cache
    "generate": (19, 20),  # no return_dict_in_generate
    "unembed": (0,),  # stop_at_layer=n_layers gives logits
    "ln_final": (0,),
    # Biases that there are not are None, keys and values are not repeated for query heads.
    **dict.fromkeys(("b_Q", "b_O", "b_in", "b_out", "W_K", "W_V", "b_K", "b_V"), (0,)),
}
# Of a padded row, what is computed at padding: a bridge lets it look at all tokens.
PADDED = ("forward", 25)


def pair(kind: str, folder: Path) -> tuple[LoopedTransformer, Any]:
    stages: dict[str, Any] = {f"n_{stage}": n for stage, n in STAGES.items()}
    cfg = LoopedConfig(
        **SIZES, **stages, **KINDS[kind], eps=1e-5, dtype=torch.float64, device="cpu",
        default_prepend_bos=True, init_mode="fan_in",
    )  # fmt: skip
    model = LoopedTransformer.from_config(cfg, letters(folder))
    return model, model.to_bridge()


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pair(request.param, tmp_path_factory.mktemp("letters"))


def by_our_names(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Two results, with each cache in them as a dict of what both have under our names."""
    if isinstance(theirs, tuple) and len(theirs) == 2 and isinstance(theirs[1], ActivationCache):
        return tuple(zip(*map(by_our_names, ours, theirs), strict=True))  # type: ignore[return-value]
    if not isinstance(theirs, ActivationCache):
        return ours, theirs
    found = {name: theirs[name] for name in shared(ours.cache_dict)}
    for name in found:
        if name.endswith("hook_attn_scores"):  # the mask is fp64's lowest number there
            found[name] = found[name].masked_fill(ours[name].isinf(), -torch.inf)
    return {name: ours[name] for name in found}, found


def chosen() -> list[Any]:
    return [
        pytest.param(key, i, id=f"{key.split('.')[1]}-{i}")
        for key, calls in MODEL.items()
        for i in range(len(calls))
        if (name := key.split(".")[1]) not in OTHER_NAMES
        and hasattr(TransformerBridge, name)
        and i not in OTHER_ARGUMENTS.get(name, ())
        and (name, i) != PADDED
    ]


@pytest.mark.parametrize(("key", "i"), chosen())
def test_a_call_of_the_model_gives_the_same(both: Any, key: str, i: int) -> None:
    ours, theirs = (done(MODEL[key][i], model) for model in both)
    assert_alike(*by_our_names(ours, theirs), key)


def test_composition_scores_are_the_bridges(both: Any) -> None:
    for mode in "QKV":
        ours, theirs = (model.all_composition_scores(mode) for model in both)
        assert_alike(ours.scores, theirs.scores, mode)
        assert ours.layer_indices == theirs.layer_indices
        assert both[0].all_head_labels(labels="transformer_lens") == theirs.head_labels


BY_NAME = ("__iter__", "keys", "values", "items", "cache_dict")


@pytest.mark.parametrize("key", [key for key in CACHE if key.split(".")[1] not in BY_NAME])
def test_a_call_of_the_cache_gives_the_same(both: Any, key: str) -> None:
    for call in CACHE[key]:
        results = []
        for model in both:
            with torch.no_grad():
                _, cache = model.run_with_cache(TOKENS)
            results.append(done(call, model, cache))
        assert_alike(*by_our_names(*results), key)


def test_grouped_keys_are_repeated_for_query_heads_here(tmp_path: Path) -> None:
    model, bridge = pair("grouped", tmp_path)
    for name in ("W_K", "W_V"):
        ours, theirs = getattr(model, name), getattr(bridge, name)
        assert torch.equal(ours, theirs.repeat_interleave(2, 1))
    for name in ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out"):
        with pytest.raises(AttributeError):
            getattr(bridge, name)
        assert not getattr(model, name).any()


def test_what_a_bridge_says_of_its_layers(both: Any) -> None:
    model, bridge = both
    layers = list(range(model.loop.n_layers))
    for of in (model, bridge):
        assert of.composition_layer_indices() == layers
        assert [set(kind.split("+")) >= {"attn", "mlp"} for kind in of.layer_types()] == [True] * 4
        assert set(of.block_submodules(1)) >= {"attn", "mlp", "ln1", "ln2"}
    for name in ("QK_for_attn_layers", "OV_for_attn_layers"):
        ours, theirs = getattr(model, name)(), getattr(bridge, name)()
        assert ours[0] == theirs[0] == layers
        assert_alike(ours[1], theirs[1], name)
    for path in ("attn.W_O", "mlp.W_in", "ln2.w"):
        given = (path.split(".")[0], path, torch.neg)
        assert_alike(*(list(of.stack_params_for(*given)) for of in (model, bridge)), path)
    with pytest.raises(InputError, match="ln3"):
        model.stack_params_for("ln3", "ln3.w")
    with pytest.raises(InputError, match="W_X"):
        model.stack_params_for("attn", "attn.W_X")
    ours, theirs = model.get_params(), bridge.get_params()
    for name in ("blocks.2.attn.W_Q", "blocks.0.mlp.W_out", "unembed.W_U", "embed.W_E"):
        assert_alike(ours[name], theirs[name], name)
