"""Names of hooks: canonical as TransformerLens's get_act_name spells them, aliases, refusals."""

from __future__ import annotations

import pytest
import torch
from conftest import exact_config
from transformer_lens.utilities import get_act_name

from tl_looped import GatedHookError, HookNameError, LoopedTransformer, MissingActivationError
from tl_looped._compat import LISTS_BRIDGE_NAMES
from tl_looped.model.config import NormLayout

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
INPUTS = ("q_input", "k_input", "v_input")


@pytest.fixture
def model() -> LoopedTransformer:
    model = LoopedTransformer.from_config(exact_config())
    model.set_use_split_qkv_input(True)
    return model


@pytest.mark.parametrize("short", INPUTS)
def test_a_split_input_has_the_name_of_get_act_name(model: LoopedTransformer, short: str) -> None:
    name = get_act_name(short, 3)
    assert name == f"blocks.3.hook_{short}"
    bridge = f"blocks.3.attn.hook_{short}"
    point = model.hook_dict[name]
    assert point.name == name
    assert model.hook_dict[bridge] is point
    assert model.hook_name(bridge) == model.hook_name(name) == name
    block = model.blocks[3]
    assert getattr(block, f"hook_{short}") is getattr(block.attn, f"hook_{short}") is point
    assert model.mod_dict[name] is point
    _, cache = model.run_with_cache(TOKENS)
    assert name in list(cache.keys())
    assert bridge not in list(cache.keys())
    assert cache[short, 3] is cache[bridge] is cache[name]


@pytest.mark.parametrize("spelling", ["blocks.3.hook_q_input", "blocks.3.attn.hook_q_input"])
def test_filters_take_either_spelling_and_cache_once(
    model: LoopedTransformer, spelling: str
) -> None:
    _, cache = model.run_with_cache(TOKENS, names_filter=[spelling])
    assert list(cache.keys()) == ["blocks.3.hook_q_input"]


def test_an_activation_is_listed_once(model: LoopedTransformer) -> None:
    names, points = list(model.hook_dict.canonical), model.hook_dict.canonical.values()
    assert len({id(point) for point in points}) == len(names)
    _, cache = model.run_with_cache(TOKENS)
    assert set(cache.keys()) == set(names)
    calls: list[str] = []
    with model.hooks([(lambda name: "q_input" in name, lambda x, hook: calls.append(hook.name))]):
        model(TOKENS)
    assert calls == [f"blocks.{i}.hook_q_input" for i in range(model.loop.n_layers)]


def test_hook_dict_lists_what_transformerlenss_tools_look_for(model: LoopedTransformer) -> None:
    also = set(model.hook_dict) - set(model.hook_dict.canonical)
    bridge = {f"blocks.{i}.attn.hook_{n}" for i in range(model.loop.n_layers) for n in INPUTS}
    assert also == (bridge if LISTS_BRIDGE_NAMES else set())
    model.set_use_split_qkv_input(False)
    assert list(model.hook_dict) == list(model.hook_dict.canonical)
    for name in ("blocks.3.hook_q_input", "blocks.3.attn.hook_q_input"):
        with pytest.raises(GatedHookError, match=r"set_use_split_qkv_input\(True\)"):
            model.hook_dict[name]


@pytest.mark.parametrize("name", ["hook_pos_embed", "hook_tokens"])
def test_hooks_that_no_looped_model_has_say_why(model: LoopedTransformer, name: str) -> None:
    with pytest.raises(HookNameError) as refusal:
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: x)])
    assert name in str(refusal.value)
    assert "near matches" not in str(refusal.value)
    _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(MissingActivationError, match=name):
        cache[name]


OURS = {
    "blocks.2.hook_in": "blocks.2.hook_resid_pre",
    "blocks.2.hook_out": "blocks.2.hook_resid_post",
    "blocks.2.attn.q.hook_out": "blocks.2.attn.hook_q",
    "blocks.2.attn.o.hook_in": "blocks.2.attn.hook_z",
    "blocks.2.attn.hook_out": "blocks.2.hook_attn_out",
    "blocks.2.mlp.hook_out": "blocks.2.hook_mlp_out",
    "embed.hook_out": "hook_embed",
}


@pytest.mark.parametrize("name", OURS)
def test_a_bridges_name_is_told_in_ours(model: LoopedTransformer, name: str) -> None:
    with pytest.raises(HookNameError, match=repr(OURS[name])):
        model.hook_name(name)
    _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]), names_filter="blocks.2.hook_mlp_out")
    with pytest.raises(MissingActivationError, match=repr(OURS[name])):
        cache[name]


def test_behind_a_post_norm_a_bridges_sublayer_output_is_no_hook_here() -> None:
    model = LoopedTransformer.from_config(exact_config(norm_layout=NormLayout.SANDWICH))
    _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]), names_filter="blocks.2.hook_mlp_out")
    for name in ("blocks.2.attn.hook_out", "blocks.2.mlp.hook_out"):
        with pytest.raises(HookNameError, match="near matches"):
            model.hook_name(name)
        with pytest.raises(MissingActivationError, match="names_filter"):
            cache[name]
    with pytest.raises(HookNameError, match=r"'blocks\.2\.hook_attn_out'"):
        model.hook_name("blocks.2.ln1_post.hook_out")
