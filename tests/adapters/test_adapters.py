"""Adapters: what they read from configs, how families are told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import CASES, GOLDEN, Golden, load_golden
from rawcheckpoints import load_changed, raw_config, read_config, tensor_names
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tl_looped import (
    ConfigError,
    InitialState,
    Injection,
    LoopedTransformer,
    NormLayout,
    RotaryStyle,
)
from tl_looped.adapters import HuginnAdapter, find_adapter

pytestmark = pytest.mark.every_family

LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
RETROFIT = {
    "norm_layout": NormLayout.PRE,
    "injection": Injection.LINEAR,
    "initial_state": InitialState.RANDOM,
    "initial_state_std": 0.008703882797784892,
    "embed_scale": 1.0,
    "n_recurrences": 5,
    "loop_norm": False,
    "pre_coda_norm": False,
    "exit_gate": False,
    "qk_bias": False,
    "qk_norm": False,
    "tie_embeddings": False,
    "rotary_style": RotaryStyle.HALF,
    "rotary_in_fp32": False,
    "rope_scaling": None,
    "d_model": 64,
    "d_head": 16,
    "n_heads": 4,
    "d_mlp": 96,
    "d_vocab": 97,
}
FACTS: dict[str, dict[str, Any]] = {
    "huginn": RETROFIT
    | {
        "architecture": "huginn",
        "norm_layout": NormLayout.RESIDUAL,
        "initial_state_std": 0.07905694150420949,
        "embed_scale": 8.0,
        "pre_coda_norm": True,
        "qk_bias": True,
        "tie_embeddings": True,
        "rotary_style": RotaryStyle.INTERLEAVED,
        "rotary_in_fp32": True,
        "rotary_base": 50000.0,
        "eps": 1e-6,
        "n_ctx": 64,
        "n_kv_heads": 4,
        "d_mlp": 88,
        "default_prepend_bos": True,
    },
    "retrofit_llama": RETROFIT
    | {
        "architecture": "retrofit-llama",
        "rotary_base": 500000.0,
        "rope_scaling": LLAMA3,
        "eps": 1e-5,
        "n_ctx": 131072,
        "n_kv_heads": 2,
        "default_prepend_bos": None,
    },
    "retrofit_tinyllama": RETROFIT
    | {
        "architecture": "retrofit-llama",
        "rotary_base": 10000.0,
        "eps": 1e-5,
        "n_ctx": 2048,
        "n_kv_heads": 1,
        "default_prepend_bos": None,
    },
    "retrofit_olmo": RETROFIT
    | {
        "architecture": "retrofit-olmo",
        "norm_layout": NormLayout.POST,
        "qk_norm": True,
        "rotary_base": 500000.0,
        "eps": 1e-6,
        "n_ctx": 4096,
        "n_kv_heads": 4,
        "default_prepend_bos": None,
    },
    "ouro": RETROFIT
    | {
        "architecture": "ouro",
        "norm_layout": NormLayout.SANDWICH,
        "injection": Injection.NONE,
        "initial_state": InitialState.PRELUDE,
        "initial_state_std": 0.0,
        "n_recurrences": 4,
        "loop_norm": True,
        "exit_gate": True,
        "exit_threshold": 1.0,
        "rotary_base": 1e6,
        "eps": 1e-6,
        "n_ctx": 65536,
        "n_kv_heads": 2,
        "default_prepend_bos": None,
    },
}
SHAPES = {
    "huginn": (2, 4, 2),
    "retrofit_llama": (2, 3, 2),
    "retrofit_tinyllama": (1, 4, 1),
    "retrofit_olmo": (2, 3, 2),
    "ouro": (0, 3, 0),
}
RAVEN = [case for case in CASES if case != "ouro"]


# -- what is read from the config -------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_config_has_the_facts_of_the_family(case: str) -> None:
    cfg = read_config(case)
    assert {name: getattr(cfg, name) for name in FACTS[case]} == FACTS[case]
    assert (cfg.n_prelude, cfg.n_core, cfg.n_coda) == SHAPES[case]
    p, k, c = SHAPES[case]
    assert cfg.n_layers == p + k * cfg.n_recurrences + c


def test_huginn_embed_scale_is_the_root_of_the_width() -> None:
    stale = {"embed_scale": 3.0, "std": 0.25}
    cfg = read_config("huginn", init_values=stale)
    assert (cfg.embed_scale, cfg.initial_state_std) == (8.0, 0.25)


def test_retrofit_embed_scale_is_read() -> None:
    cfg = read_config("retrofit_llama", init_values={"embed_scale": 3.0, "std": 0.25})
    assert (cfg.embed_scale, cfg.initial_state_std) == (3.0, 0.25)


@pytest.mark.parametrize("case", [case for case in RAVEN if case != "huginn"])
def test_retrofits_do_not_read_the_stale_keys(case: str) -> None:
    assert read_config(case, rope_base=3.0, block_size=7).to_json() == read_config(case).to_json()


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("huginn", "injection_type", "add"),
        ("huginn", "test_time_noise", 0.1),
        ("retrofit_llama", "test_time_noise", 1),
        ("retrofit_olmo", "nonlin_name", "GELU"),
        ("retrofit_llama", "bias", True),
        ("huginn", "state_init", "zero"),
        ("huginn", "padded_vocab_size", 4096),
        ("retrofit_olmo", "initial_state_mode", "zeros"),
        ("ouro", "use_sliding_window", True),
        ("ouro", "hidden_act", "gelu"),
        ("ouro", "rope_scaling", {"rope_type": "yarn"}),
        ("ouro", "attention_bias", True),
    ],
)
def test_unsupported_value_is_refused_by_name(case: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(case, **{key: value})
    assert key in str(caught.value)
    assert repr(value) in str(caught.value)


# -- telling families apart -------------------------------------------------------------------


@pytest.mark.parametrize("config_of", RAVEN)
@pytest.mark.parametrize("names_of", RAVEN)
def test_tensor_names_decide_the_raven_family(config_of: str, names_of: str) -> None:
    adapter = find_adapter(raw_config(config_of), tensor_names(names_of))
    assert adapter.name == FACTS[names_of]["architecture"]


OTHER_MODULE = {
    "huginn": "raven_modeling_minimal_olmo",
    "retrofit_llama": "raven_modeling_minimal_olmo",
    "retrofit_tinyllama": "raven_modeling_minimal_huginn",
    "retrofit_olmo": "raven_modeling_minimal_llama",
    "ouro": "raven_modeling_minimal",
}


def test_class_and_module_names_change_nothing(golden: Golden, tmp_path: Path) -> None:
    names = {
        "auto_map": {"AutoModelForCausalLM": f"{OTHER_MODULE[golden.name]}.RavenForCausalLM"},
        "block_class_name": "TransformerPreNormBlock",
        "norm_class_name": "LayerNorm",
        "architecture_class_name": "GPT",
    }
    model = load_changed(golden.name, tmp_path, **names)
    logits = model(golden.tokens, **golden.run)
    assert torch.equal(logits, golden.load()(golden.tokens, **golden.run))


def test_model_type_and_architecture_each_suffice() -> None:
    for case in CASES:
        names = tensor_names(case)
        only_type = raw_config(case, architectures=None)
        only_class = raw_config(case, model_type=None)
        wanted = FACTS[case]["architecture"]
        assert find_adapter(only_type, names).name == wanted
        assert find_adapter(only_class, names).name == wanted


# -- initial states ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["embed-init", "skip-adapter"])
def test_olmo_modes_start_from_the_prelude(mode: str, tmp_path: Path) -> None:
    model = load_changed("retrofit_olmo", tmp_path, initial_state_mode=mode)
    _, cache = model.run_with_cache(load_golden("retrofit_olmo").tokens)
    e = cache["prelude.1.hook_resid_post"]
    assert torch.equal(cache["hook_initial_state"], e)
    assert torch.equal(cache["recurrence.0.hook_state_in"], e)
    first = e if mode == "skip-adapter" else model.injection(torch.cat((e, e), -1))
    assert torch.equal(cache["recurrence.0.hook_injected"], first)
    for r in range(1, 5):
        state = cache[f"recurrence.{r - 1}.hook_state_out"]
        injected = model.injection(torch.cat((state, e), -1))
        assert torch.equal(cache[f"recurrence.{r}.hook_injected"], injected)


def test_olmo_modes_are_three_starts() -> None:
    modes = ("random", "embed-init", "skip-adapter", None)
    found = [read_config("retrofit_olmo", initial_state_mode=m).initial_state for m in modes]
    assert found == [
        InitialState.RANDOM,
        InitialState.PRELUDE,
        InitialState.PRELUDE_SKIP_ADAPTER,
        InitialState.RANDOM,
    ]


@pytest.mark.parametrize("case", ["retrofit_llama", "retrofit_tinyllama", "huginn"])
@pytest.mark.parametrize("mode", ["embed-init", "skip-adapter", "anything"])
def test_only_olmo_reads_the_mode(case: str, mode: str) -> None:
    cfg = read_config(case, initial_state_mode=mode)
    assert cfg.initial_state is InitialState.RANDOM


# -- tokenizer --------------------------------------------------------------------------------


def test_ouro_special_tokens_are_corrected(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "ouro", tmp_path / "model")
    words = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3}
    start = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=start)),
        bos_token=start, eos_token=start, pad_token=start,
    ).save_pretrained(folder)  # fmt: skip
    model = LoopedTransformer.from_pretrained(folder, device="cpu")
    ids = model.tokenizer
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 0)
    assert model.to_tokens("a").tolist() == [[3]]
    assert model.to_tokens("a", prepend_bos=True).tolist() == [[1, 3]]


def own_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Letters with ids 0 to 93, then the special tokens."""
    letters = {chr(33 + i): i for i in range(94)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(letters, unk_token="!")), **special
    )


@pytest.mark.parametrize("case", CASES)
def test_a_tokenizer_of_its_own_keeps_its_special_tokens(case: str, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / case, tmp_path / "model")
    for special in ({"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<p>"}, {}):
        own_tokenizer(**special).save_pretrained(folder)
        found = LoopedTransformer.from_pretrained(folder, device="meta").tokenizer
        kinds = ("bos_token", "eos_token", "pad_token")
        assert {kind: getattr(found, kind) for kind in kinds} == dict.fromkeys(kinds) | special


def test_special_tokens_that_are_not_declared_are_the_familys() -> None:
    tokenizer = own_tokenizer(eos_token="<e>", additional_special_tokens=["<b>", "<p>"])
    b, p = tokenizer.convert_tokens_to_ids(["<b>", "<p>"])

    class Family(HuginnAdapter):
        special_token_ids: ClassVar = {"bos": b, "eos": 7, "pad": 7}

    assert Family().special_tokens(tokenizer) == {"bos": "<b>"}  # 7 is a letter
    assert HuginnAdapter().special_tokens(tokenizer) == {}  # it has no 65504
    assert p != b


def test_ouro_keeps_a_choice_that_is_not_the_shipped_mistake(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "ouro", tmp_path / "model")
    words = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")),
        eos_token="<|endoftext|>", pad_token="<|im_end|>",
    ).save_pretrained(folder)  # fmt: skip
    ids = LoopedTransformer.from_pretrained(folder, device="meta").tokenizer
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize("case", CASES)
def test_retrofits_do_not_carry_the_special_tokens_of_huginn(case: str, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / case, tmp_path / "model")
    asked = {"bos_token_id": 65504, "eos_token_id": 65505, "pad_token_id": 3, "top_k": 5}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    found = LoopedTransformer.from_pretrained(folder, device="meta").generation_config
    kept = {"pad_token_id": 3, "top_k": 5} if case.startswith("retrofit") else asked
    assert found == kept
