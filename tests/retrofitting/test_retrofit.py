"""Feedforward models made into looped ones: what they compute, and the files they are saved in."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_logits
from conftest import GOLDEN
from feedforwards import KINDS, feedforward, logits_of, random_tokens, with_layers
from rawcheckpoints import raw_config
from safetensors.torch import load_file
from test_checkpoints import small_tokenizer
from test_real_sizes import MODELS, closed_form, real_config
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM
from typer.testing import CliRunner

import tl_looped
from tl_looped import (
    ConfigError,
    InitialState,
    InputError,
    LoopedConfig,
    LoopedTransformer,
    NormLayout,
    retrofit,
)
from tl_looped.adapters import find_adapter
from tl_looped.adapters.mapping import stored_tensors
from tl_looped.cli import app

# Layers 2 and 5 are dropped.
STAGES: dict[str, Any] = {"prelude": [0, 1], "core": [3, 4], "coda": range(6, 7)}
KEPT = [0, 1, 3, 4, 6]
# The others have biases, norms on single heads, or heads of a width of their own.
IN_ORIGINAL_FORMAT = sorted(set(KINDS) - {"mistral-wide-heads", "qwen2", "qwen3"})
RETROFITS = ("retrofit_llama", "retrofit_tinyllama", "retrofit_olmo")


def made(kind: str, **options: Any) -> tuple[Any, LoopedTransformer]:
    source = feedforward(kind)
    return source, retrofit(source, **(STAGES | {"device": "cpu"} | options))


def same_bits(one: LoopedTransformer, other: LoopedTransformer) -> None:
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def differing(one: LoopedConfig, other: LoopedConfig) -> set[str]:
    left, right = one.to_json(), other.to_json()
    return {name for name in left if left[name] != right[name]}


# -- what they compute ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_retrofit_is_the_model_without_its_dropped_layers(kind: str) -> None:
    source, looped = made(kind)
    tokens = random_tokens()
    expected = logits_of(with_layers(source, KEPT), tokens)
    assert expected.std() > 0.5
    assert (expected - logits_of(source, tokens)).abs().max() > 0.5
    assert_logits(looped, tokens, expected, n_recurrences=1)
    # The adapter [0 | I] leaves the state no say: every recurrence repeats the first.
    assert_logits(looped, tokens, expected, n_recurrences=3, state_seed=7)
    assert looped.cfg.architecture.startswith("retrofit-")
    assert looped.loop.R == 4


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", ["llama-tied", "olmo2", "mistral", "qwen2", "qwen3"])
def test_virtual_loop_is_the_model_with_its_layers_repeated(kind: str, n: int) -> None:
    source, looped = made(kind, mode="virtual-loop", n_recurrences=n)
    tokens = random_tokens()
    repeated = with_layers(source, [0, 1, *([3, 4] * n), 6])
    assert_logits(looped, tokens, logits_of(repeated, tokens))
    assert not hasattr(looped, "injection")


def test_stages_left_out_are_all_layers_before_and_after_the_core() -> None:
    source, looped = made("llama", prelude=None, core=[2, 4], coda=None)
    layers = {"prelude": [0, 1], "core": [2, 4], "coda": [5, 6]}
    assert looped.cfg.source_layers == {"model": "LlamaForCausalLM"} | layers
    expected = logits_of(with_layers(source, [0, 1, 2, 4, 5, 6]), random_tokens())
    assert_logits(looped, random_tokens(), expected)


@pytest.mark.parametrize("mode", ["retrofit", "virtual-loop"])
def test_stages_may_be_empty(mode: str) -> None:
    source, looped = made("llama", prelude=[], core=[1, 5], coda=[], mode=mode, n_recurrences=1)
    expected = logits_of(with_layers(source, [1, 5]), random_tokens())
    assert_logits(looped, random_tokens(), expected)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_weights_have_the_dtype_that_is_asked_for(dtype: str) -> None:
    source, looped = made("llama-grouped-scaled-rope", dtype=dtype)
    assert {p.dtype for p in looped.parameters()} == {getattr(torch, dtype)} == {looped.cfg.dtype}
    expected = logits_of(with_layers(source, KEPT).to(getattr(torch, dtype)), random_tokens())
    found = looped(random_tokens()).detach()
    # In fp64 transformers normalises and rotates in fp32: what is rounded is as in an fp32 run.
    other = torch.float32 if dtype == "float64" else torch.float64
    converted = looped.to(other)(random_tokens()).detach()
    rounding = (found.double() - converted.double()).norm()
    assert (found - expected).double().norm() < 3 * rounding


@pytest.mark.parametrize("mode", ["retrofit", "virtual-loop"])
def test_source_is_neither_changed_nor_shared(mode: str) -> None:
    source = feedforward("llama-tied")
    source.train()
    source.model.layers[1].eval()
    modes = [module.training for module in source.modules()]
    before, config = deepcopy(source.state_dict()), source.config.to_dict()
    looped = retrofit(source, **STAGES, mode=mode, device="cpu")
    with torch.no_grad():
        for parameter in looped.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert [module.training for module in source.modules()] == modes
    assert source.config.to_dict() == config
    assert len(source.model.layers) == 7
    assert not looped.training


def test_unembedding_is_untied_in_a_retrofit_and_kept_tied_in_a_virtual_loop() -> None:
    _, looped = made("llama-tied")
    assert not looped.cfg.tie_embeddings
    assert torch.equal(looped.W_U, looped.W_E.T)
    assert looped.W_U.data_ptr() != looped.W_E.data_ptr()
    _, looped = made("llama-tied", mode="virtual-loop")
    assert looped.cfg.tie_embeddings
    assert looped.W_U.data_ptr() == looped.W_E.data_ptr()


def test_sliding_window_is_exact_up_to_its_width_and_refused_beyond() -> None:
    source = feedforward("mistral", sliding_window=9)
    looped = retrofit(source, **STAGES, device="cpu")
    assert looped.cfg.n_ctx == 9
    expected = logits_of(with_layers(source, KEPT), random_tokens(9))
    assert_logits(looped, random_tokens(9), expected)
    with pytest.raises(InputError, match=r"\b9\b"):
        looped(random_tokens(10))


def test_adapter_is_the_state_dropped_and_the_prelude_kept() -> None:
    _, looped = made("olmo2")
    state, prelude = looped.injection.weight.split(48, 1)
    assert torch.equal(prelude, torch.eye(48))
    assert not state.any()
    cfg = looped.cfg
    assert (cfg.initial_state, cfg.initial_state_std) == (InitialState.RANDOM, 0.008703882797784892)
    assert (cfg.norm_layout, cfg.embed_scale) == (NormLayout.POST, 1.0)


def test_hooks_and_caches_have_the_names_of_every_looped_model() -> None:
    _, looped = made("llama")
    with torch.no_grad():
        _, cache = looped.run_with_cache(random_tokens(8))
    assert cache.loop.R == 4
    assert len(looped.blocks) == 2 + 2 * 4 + 1
    # What enters the core is what left the prelude, in every recurrence.
    left = cache["blocks.1.hook_resid_post"]
    for r in range(4):
        assert torch.equal(cache[f"recurrence.{r}.hook_injected"], left)
        assert torch.equal(cache[f"blocks.{2 + 2 * r}.hook_resid_pre"], left)
    assert cache["blocks.5.attn.hook_pattern"].shape == (2, 4, 8, 8)


def test_training_moves_both_halves_of_the_adapter() -> None:
    _, looped = made("llama", n_recurrences=2)
    before = looped.injection.weight.detach().clone()
    looped.train()
    optimizer = torch.optim.SGD(looped.parameters(), lr=0.1)
    looped(random_tokens(20), return_type="loss").backward()
    optimizer.step()
    moved = (looped.injection.weight - before).abs()
    assert moved[:, :48].max() > 1e-4
    assert moved[:, 48:].max() > 1e-4
    looped.eval()
    tokens = random_tokens(20)
    change = looped(tokens, n_recurrences=2) - looped(tokens, n_recurrences=1)
    assert change.abs().max() > 1e-4


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IN_ORIGINAL_FORMAT)
def test_original_format_reloads_through_the_adapter(kind: str, tmp_path: Path) -> None:
    _, looped = made(kind, tokenizer=small_tokenizer())
    looped.save_pretrained(tmp_path, format="original")
    raw = json.loads((tmp_path / "config.json").read_text())
    adapter = find_adapter(raw, set(load_file(tmp_path / "model.safetensors")))
    assert adapter.name == ("retrofit-olmo" if "olmo" in kind else "retrofit-llama")
    again = LoopedTransformer.from_pretrained(tmp_path, device="cpu")
    same_bits(looped, again)
    assert differing(looped.cfg, again.cfg) == {"model_name"}
    assert again.cfg.source_layers == looped.cfg.source_layers
    assert again.tokenizer.get_vocab() == looped.tokenizer.get_vocab()
    tokens = random_tokens(12)
    assert torch.equal(again(tokens), looped(tokens))


@pytest.mark.parametrize("case", RETROFITS)
def test_original_format_is_that_of_the_published_checkpoints(case: str, tmp_path: Path) -> None:
    model = LoopedTransformer.from_pretrained(GOLDEN / case, device="cpu")
    model.save_pretrained(tmp_path, format="original")
    stored = load_file(GOLDEN / case / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(written[name], tensor), name
    raw, reference = json.loads((tmp_path / "config.json").read_text()), raw_config(case)
    # The module named there varies among the published files; older ones lack the state's mode.
    for config in (raw, reference):
        module = config.pop("auto_map")["AutoModelForCausalLM"]
        assert module.startswith("raven_modeling_minimal")
        config.pop("transformers_version", None)
        config.setdefault("initial_state_mode", "random")
    assert raw == reference


@pytest.mark.parametrize("case", [*RETROFITS, "huginn", "ouro"])
def test_sources_read_backwards_are_the_checkpoint(case: str) -> None:
    model = LoopedTransformer.from_pretrained(GOLDEN / case, device="cpu")
    stored = load_file(GOLDEN / case / "model.safetensors")
    adapter = find_adapter(raw_config(case), set(stored))
    stored.pop("freqs_cis", None)
    written = stored_tensors(adapter.sources(model.cfg), dict(model.named_parameters()))
    assert set(written) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("mode", ["retrofit", "virtual-loop"])
@pytest.mark.parametrize("kind", ["llama-tied", "olmo2", "qwen2", "qwen3"])
def test_native_format_keeps_everything(kind: str, mode: str, tmp_path: Path) -> None:
    _, looped = made(kind, mode=mode)
    looped.save_pretrained(tmp_path)
    again = LoopedTransformer.from_pretrained(tmp_path, device="cpu")
    same_bits(looped, again)
    assert differing(looped.cfg, again.cfg) == {"model_name"}


def test_half_precision_is_saved_as_it_is(tmp_path: Path) -> None:
    _, looped = made("llama", dtype="bfloat16")
    looped.save_pretrained(tmp_path, format="original")
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    same_bits(looped, LoopedTransformer.from_pretrained(tmp_path, device="cpu", dtype="bfloat16"))


def test_generation_config_is_the_sources(tmp_path: Path) -> None:
    source = feedforward("llama")
    assert made("llama")[1].generation_config == {}  # transformers' own guess is not taken over
    source.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    assert retrofit(tmp_path / "model", **STAGES, device="cpu").generation_config == {}
    asked = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(asked))
    looped = retrofit(tmp_path / "model", **STAGES, device="cpu")
    assert looped.generation_config == asked
    looped.save_pretrained(tmp_path / "saved")
    again = LoopedTransformer.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.generation_config == asked
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    in_memory = retrofit(loaded, **STAGES, device="cpu").generation_config
    assert asked.items() <= in_memory.items()


def test_folder_is_read_with_its_tokenizer(tmp_path: Path) -> None:
    source = feedforward("llama-tied")
    folder = tmp_path / "owner" / "small-llama"
    source.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    for where in (folder, str(folder)):
        looped = retrofit(where, **STAGES, device="cpu")
        assert looped.cfg.model_name == "small-llama"
        assert looped.cfg.source_layers["model"] == "small-llama"
        assert looped.tokenizer.bos_token_id == 1
        same_bits(looped, retrofit(source, **STAGES, device="cpu"))


# -- real sizes -------------------------------------------------------------------------------

LLAMA_1B = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
)  # fmt: skip
TINYLLAMA = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048, rms_norm_eps=1e-5,
)  # fmt: skip
OLMO_1B = Olmo2Config(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=16, vocab_size=100352, max_position_embeddings=4096, rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    pad_token_id=100277, bos_token_id=None, eos_token_id=100257,
)  # fmt: skip
LAST = {"prelude": range(4), "core": range(6, 12), "coda": range(12, 16)}
REAL: dict[str, tuple[Any, Any, dict[str, range]]] = {
    "Recurrent-Llama-3.2-r4": (LlamaForCausalLM, LLAMA_1B, LAST),
    "Recurrent-TinyLlama-3T-r4": (
        LlamaForCausalLM,
        TINYLLAMA,
        {"prelude": range(4), "core": range(10, 18), "coda": range(18, 22)},
    ),
    "Recurrent-OLMo-2-0425-r4": (Olmo2ForCausalLM, OLMO_1B, LAST),
}


@pytest.mark.parametrize("model", REAL)
def test_real_sizes_give_the_published_configuration(model: str) -> None:
    model_class, config, layers = REAL[model]
    with torch.device("meta"):
        source = model_class(config)
    looped = retrofit(source, **layers, n_recurrences=4, device="meta")
    published = MODELS[model][0].config(real_config(model))
    assert differing(looped.cfg, published) == {
        "model_name",
        "source_layers",
        "trained_recurrences",
    }
    assert sum(p.numel() for p in looped.parameters()) == closed_form(model)


# -- the command ------------------------------------------------------------------------------


def test_command_writes_what_the_function_makes(tmp_path: Path) -> None:
    source = feedforward("llama")
    source.save_pretrained(tmp_path / "source")
    arguments = ["retrofit", tmp_path / "source", tmp_path / "out", "--core", "3,4"]
    arguments += ["--prelude", "0-1", "--coda", "6", "--recurrences", "5"]
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    assert "(2, 2 x 5, 1), 13 effective layers, of source" in printed
    assert "core: layers 3, 4" in printed
    assert "original format" in printed
    again = LoopedTransformer.from_pretrained(tmp_path / "out", device="cpu")
    assert (again.cfg.architecture, again.loop.R) == ("retrofit-llama", 5)
    same_bits(again, retrofit(source, **STAGES, device="cpu"))
    arguments += ["--mode", "virtual-loop", "--overwrite"]
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "native format" in " ".join(result.output.split())
    again = LoopedTransformer.from_pretrained(tmp_path / "out", device="cpu")
    assert again.cfg.architecture == "virtual-loop"
    assert again.cfg.source_layers == {
        "model": "source", "prelude": [0, 1], "core": [3, 4], "coda": [6]
    }  # fmt: skip


def test_it_is_a_name_of_the_package() -> None:
    assert "retrofit" in tl_looped.__all__
    assert tl_looped.retrofit is retrofit
    with pytest.raises(AttributeError, match="'retrofitt'"):
        tl_looped.retrofitt  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop_norm": True}, "loop_norm=True would be read back as False"),
        ({"norm_layout": NormLayout.SANDWICH}, "norm_layout='sandwich'"),
        ({"default_prepend_bos": False}, "default_prepend_bos=False"),
        ({"d_head": 16}, "needs n_heads"),
        ({"architecture": "virtual-loop"}, "no checkpoint format of 'virtual-loop'"),
        ({"architecture": "huginn"}, "'huginn' is only read"),
    ],
)
def test_original_format_refuses_what_it_would_lose(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = made("llama")[1].cfg.to_json() | change
    values = {name: value for name, value in values.items() if name != "n_layers"}
    model = LoopedTransformer.from_config(LoopedConfig.from_json(values | {"device": "cpu"}))
    with pytest.raises(ConfigError, match=message):
        model.save_pretrained(tmp_path / "new", format="original")
    assert not (tmp_path / "new").exists()
