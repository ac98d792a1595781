"""TransformerLens's fields of a configuration, and what setting one of a model does."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import exact_config
from refusals import refused
from transformer_lens.config import TransformerBridgeConfig

from tl_looped import (
    ArgumentTypeError,
    ConfigError,
    GatedHookError,
    Injection,
    InputError,
    LoopedConfig,
    LoopedTransformer,
    NormLayout,
    RotaryStyle,
)
from tl_looped.model.tl_fields import FIXED

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
FLAGS = {
    "use_attn_result": "attn.hook_result",
    "use_split_qkv_input": "hook_q_input",
    "use_attn_in": "hook_attn_in",
    "use_hook_mlp_in": "hook_mlp_in",
}


@pytest.fixture
def model() -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config())


# -- values ---------------------------------------------------------------------------------------


def test_every_field_of_transformerlens_can_be_read() -> None:
    theirs = TransformerBridgeConfig(d_model=8, d_head=4, n_layers=2, n_ctx=8)
    names = set(vars(theirs)) | set(inspect.signature(TransformerBridgeConfig).parameters)
    cfg = exact_config()
    missing = {name for name in names - {"kwargs"} if not hasattr(cfg, name)}
    assert not missing
    assert cfg.head_dim == cfg.d_head


@pytest.mark.parametrize("n_recurrences", [1, 4])
def test_fields_that_follow_from_others(n_recurrences: int) -> None:
    cfg = LoopedConfig(
        d_model=24, d_head=6, n_heads=4, n_key_value_heads=2, d_mlp=10, d_vocab=11, n_ctx=9,
        n_prelude=1, n_core=2, n_recurrences=n_recurrences, rotary_style=RotaryStyle.INTERLEAVED,
        norm_layout=NormLayout.SANDWICH, qk_norm=True, qk_norm_per_head=True, tie_embeddings=True,
        architecture="ouro",
    )  # fmt: skip
    expected = {
        "attn_scale": math.sqrt(6), "use_attn_scale": True, "rotary_dim": 6, "d_vocab_out": 11,
        "rotary_adjacent_pairs": True, "rotary_interleaved_cos_sin": True, "use_qk_norm": True,
        "use_normalization_before_and_after": True, "tie_word_embeddings": True,
        "original_architecture": "OuroForCausalLM", "parallel_attn_mlp": False,
        "n_params": (1 + 2 * n_recurrences) * (4 * 24 * 6 * 4 + 3 * 24 * 10),
        "use_NTK_by_parts_rope": False, "window_size": None, "attention_dir": "causal",
    }  # fmt: skip
    assert {name: getattr(cfg, name) for name in expected} == expected
    plain = replace(cfg, norm_layout=NormLayout.POST, rotary_style=RotaryStyle.HALF,
                    qk_norm_per_head=False, tie_embeddings=False, architecture="mine")  # fmt: skip
    for name in ("use_normalization_before_and_after", "rotary_adjacent_pairs", "use_qk_norm"):
        assert getattr(plain, name) is False
    assert plain.tie_word_embeddings is False
    assert plain.original_architecture is None


def test_llama_3_scaling_is_transformerlenss_by_parts() -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.5,
               "high_freq_factor": 3.0, "original_max_position_embeddings": 64}  # fmt: skip
    cfg = exact_config(rope_scaling=scaling)
    assert cfg.use_NTK_by_parts_rope
    assert (cfg.NTK_by_parts_factor, cfg.NTK_by_parts_low_freq_factor) == (32.0, 1.5)
    assert (cfg.NTK_by_parts_high_freq_factor, cfg.NTK_original_ctx_len) == (3.0, 64)


def test_what_is_saved_has_none_of_them() -> None:
    cfg = exact_config()
    assert not FIXED & set(cfg.to_json())
    assert not FIXED & {field.name for field in fields(cfg)}
    assert LoopedConfig.from_json(cfg.to_json()) == cfg


def test_what_is_said_of_the_tokenizer_is_the_tokenizers() -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    for tokenizer in (model.tokenizer, None):
        model.tokenizer = tokenizer
        habits = (model.cfg.tokenizer_prepends_bos, model.cfg.tokenizer_appends_eos)
        if tokenizer is None:
            assert (*habits, model.cfg.tokenizer_name) == (None, None, None)
            continue
        ids = tokenizer.encode("word")
        assert habits == (ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id)
        assert model.cfg.tokenizer_name == tokenizer.name_or_path
        for side in ("left", "right"):
            model.set_tokenizer(tokenizer, side)
            assert model.cfg.default_padding_side == side
        assert LoopedConfig.from_dict(model.cfg.to_dict()) == model.cfg
        assert copy.copy(model.cfg).tokenizer_name is None
    with refused(ConfigError, "tokenizer_name", "set_tokenizer"):
        model.cfg.tokenizer_name = "gpt2"


# -- setting --------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "window_size": 128, "use_local_attn": True, "attn_scale": 1.0, "use_attn_scale": False,
    "parallel_attn_mlp": True, "attn_only": True, "attention_dir": "bidirectional", "n_params": 3,
    "d_vocab_out": 7, "rotary_dim": 4, "rotary_adjacent_pairs": True, "num_experts": 4,
    "use_normalization_before_and_after": True, "attn_scores_soft_cap": 30.0,
    "output_logits_soft_cap": 30.0, "post_embedding_ln": True, "use_hook_tokens": True,
    "positional_embedding_type": "standard", "load_in_4bit": True, "use_yarn_rope": True,
    "scale_attn_by_inverse_layer_idx": True, "final_rms": False, "trust_remote_code": True,
}  # fmt: skip


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_what_no_looped_model_honours_is_refused(
    model: LoopedTransformer, name: str, owned: bool
) -> None:
    cfg = model.cfg if owned else copy.copy(model.cfg)
    before = getattr(cfg, name)
    with refused(ConfigError, name, repr(WRONG[name]), repr(before)):
        setattr(cfg, name, WRONG[name])
    setattr(cfg, name, before)  # what it is may be said
    assert getattr(cfg, name) == before
    assert LoopedConfig.from_dict({**cfg.to_dict(), name: before}) == cfg
    with refused(ConfigError, name):
        LoopedConfig.from_dict({**cfg.to_dict(), name: WRONG[name]})


MADE: dict[str, tuple[Any, str]] = {
    "eps": (1e-3, "replace"), "d_model": (64, "replace"), "norm_layout": ("post", "replace"),
    "embed_scale": (2.0, "replace"), "n_core": (1, "replace"), "qk_norm": (True, "replace"),
    "n_layers": (3, "set_recurrences"), "device": ("meta", "model.to"),
    "dtype": (torch.float16, "model.to"), "n_devices": (2, "device_map"),
    "normalization_type": ("RMSPre", "enable_compatibility_mode"),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_what_a_model_was_made_from_is_refused(model: LoopedTransformer, name: str) -> None:
    value, how = MADE[name]
    before = getattr(model.cfg, name)
    with refused(ConfigError, name, how):
        setattr(model.cfg, name, value)
    assert getattr(model.cfg, name) == before
    setattr(model.cfg, name, before)
    copied = copy.copy(model.cfg)
    setattr(copied, name, value)  # a copy belongs to no model
    assert getattr(copied, name) == value


def test_another_model_can_be_made_of_a_changed_copy(model: LoopedTransformer) -> None:
    cfg = copy.copy(model.cfg)
    cfg.eps, cfg.n_recurrences = 0.5, 2
    other = LoopedTransformer.from_config(cfg)
    other.load_state_dict(model.state_dict())
    assert (other.loop.R, other.cfg.n_layers) == (2, other.loop.n_layers)
    assert not torch.allclose(other(TOKENS), model(TOKENS, n_recurrences=2))
    cfg.injection, cfg.n_prelude = Injection.NONE, -1
    with refused(ConfigError, "n_prelude", "-1"):
        LoopedTransformer(cfg)


def test_what_a_run_reads_may_be_set_and_is_checked(model: LoopedTransformer) -> None:
    before = model(TOKENS)
    model.cfg.rotary_base = 10
    assert model.cfg.rotary_base == 10.0
    assert type(model.cfg.rotary_base) is float
    expected = LoopedTransformer.from_config(replace(model.cfg))
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model(TOKENS), expected(TOKENS))
    assert not torch.equal(model(TOKENS), before)
    model.cfg.rotary_style = "interleaved"
    assert model.cfg.rotary_style is RotaryStyle.INTERLEAVED
    for name, value in {"rotary_base": -1, "rotary_style": "none", "n_ctx": 0}.items():
        kept = getattr(model.cfg, name)
        with refused(ConfigError, name):
            setattr(model.cfg, name, value)
        assert getattr(model.cfg, name) == kept
    model.cfg.n_ctx = 2
    with refused(InputError, "context of 2"):
        model(TOKENS)
    model.cfg.note_of_mine = "kept"
    assert model.cfg.note_of_mine == "kept"


def test_setting_the_recurrences_sets_those_of_the_model(model: LoopedTransformer) -> None:
    model.cfg.n_recurrences = 2
    assert model.loop.R == model.cfg.n_recurrences == 2
    assert model.cfg.n_layers == len(model.blocks) == model.loop.n_layers
    with refused(ConfigError, "view", "n_recurrences"):
        model.view_at(3).cfg.n_recurrences = 1


# -- flags ----------------------------------------------------------------------------------------


def hooks_named(model: LoopedTransformer, suffix: str) -> list[str]:
    return [name for name in model.run_with_cache(TOKENS)[1] if name.endswith(f".{suffix}")]


@pytest.mark.parametrize("flag", FLAGS)
def test_setting_a_flag_is_what_the_method_does(model: LoopedTransformer, flag: str) -> None:
    name = f"blocks.3.{FLAGS[flag]}"
    assert name not in dict.keys(model.hook_dict)
    setattr(model.cfg, flag, True)
    assert name in dict.keys(model.hook_dict)
    assert len(hooks_named(model, FLAGS[flag])) == model.loop.n_layers
    seen: list[str] = []
    model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: seen.append(hook.name))])
    assert seen == [name]
    model.add_hook(name, lambda x, hook: x)
    with refused(GatedHookError, name, "reset_hooks"):
        setattr(model.cfg, flag, False)
    assert getattr(model.cfg, flag) is True
    model.reset_hooks()
    setattr(model.cfg, flag, False)
    assert name not in dict.keys(model.hook_dict)


def test_flags_that_exclude_each_other_are_refused_either_way(model: LoopedTransformer) -> None:
    model.cfg.use_attn_in = True
    with refused(InputError, "use_split_qkv_input", "use_attn_in"):
        model.cfg.use_split_qkv_input = True
    assert model.cfg.use_split_qkv_input is False
    with refused(ConfigError, "use_split_qkv_input", "use_attn_in"):
        replace(model.cfg, use_split_qkv_input=True)
    with refused(ArgumentTypeError, "use_attn_in"):
        model.cfg.use_attn_in = 2


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_reach_views_and_views_reach_the_model(model: LoopedTransformer, flag: str) -> None:
    view, suffix = model.view_at(2), FLAGS[flag]
    setattr(view.cfg, flag, True)
    assert getattr(model.cfg, flag) is getattr(view.cfg, flag) is True
    assert view.is_current
    assert len(hooks_named(view, suffix)) == view.loop.n_layers
    assert len(hooks_named(model, suffix)) == model.loop.n_layers
    setattr(model.cfg, flag, False)
    assert not view.is_current
    assert not hooks_named(model.view_at(2), suffix)


def test_the_configuration_of_a_view_that_is_gone_reaches_its_model(
    model: LoopedTransformer,
) -> None:
    cfg = model.view_at(2).cfg
    gc.collect()
    cfg.use_attn_result = True
    assert cfg.use_attn_result is model.cfg.use_attn_result is True
    assert hooks_named(model, "attn.hook_result")


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_has_a_configuration_of_its_own(
    model: LoopedTransformer, copying: Any
) -> None:
    other = copying(model)
    other.cfg.use_attn_result = True
    assert "blocks.0.attn.hook_result" in dict.keys(other.hook_dict)
    assert "blocks.0.attn.hook_result" not in dict.keys(model.hook_dict)
    assert model.cfg.use_attn_result is False
    other.cfg.use_attn_result = False
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_configuration_outlives_its_model_and_copies_belong_to_none() -> None:
    model = LoopedTransformer.from_config(exact_config())
    copies = [copy.copy(model.cfg), copy.deepcopy(model.cfg), replace(model.cfg)]
    copies.append(pickle.loads(pickle.dumps(model.cfg)))
    for cfg in copies:
        assert cfg == model.cfg
        assert vars(cfg) == vars(model.cfg)
        cfg.use_attn_result = True
        cfg.d_model = 8
    assert not model.cfg.use_attn_result
    kept = model.cfg
    del model
    gc.collect()
    kept.d_model = 8
    assert kept.d_model == 8


def test_a_model_keeps_its_configuration() -> None:
    model = LoopedTransformer.from_config(exact_config())
    own = model.cfg
    for one in (model, model.view_at(2)):
        with refused(ConfigError, "from_config"):
            one.cfg = replace(own, use_attn_result=True)
        one.cfg = one.cfg
    assert model.cfg is own


# -- TransformerLens's methods of a configuration ---------------------------------------------


def test_dicts_and_unwrap() -> None:
    cfg = exact_config(rotary_style=RotaryStyle.INTERLEAVED)
    given = cfg.to_dict()
    assert given["attn_scale"] == cfg.attn_scale
    assert given["window_size"] is None
    assert set(vars(cfg)) <= set(given)
    assert LoopedConfig.from_dict(given) == LoopedConfig.unwrap(given) == cfg
    assert LoopedConfig.unwrap(cfg) is cfg
    given["d_model"] = 1
    assert cfg.d_model != 1
    with refused(ConfigError, "no_such_field"):
        LoopedConfig.from_dict({**cfg.to_dict(), "no_such_field": 1})
    with refused(ConfigError, "lacks", "n_core"):
        LoopedConfig.unwrap(TransformerBridgeConfig(d_model=8, d_head=4, n_layers=2, n_ctx=8))
    assert cfg.is_layer_norm_activation() is False


def test_the_seed_of_everything_is_set() -> None:
    state = torch.get_rng_state(), np.random.get_state()
    cfg = exact_config()
    draws = []
    for _ in range(2):
        cfg.set_seed_everywhere(7)
        draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1]
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
