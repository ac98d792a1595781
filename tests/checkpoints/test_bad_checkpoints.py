"""Checkpoints that are refused: damaged, hostile, incomplete, unknown."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from feedforwards import feedforward
from refusals import refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_looped import (
    CheckpointError,
    ConfigError,
    LoopedTransformer,
    TLLoopedError,
    TokenizerError,
    UnknownArchitectureError,
    retrofit,
)
from tl_looped.adapters import all_aliases

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the Ouro checkpoint."""
    made = tmp_path / "model"
    made.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "ouro" / file, made)
    return made


def load(folder: Path | str, **kwargs: Any) -> LoopedTransformer:
    return LoopedTransformer.from_pretrained(folder, device="cpu", **kwargs)


def change_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))


# -- checkpoints ------------------------------------------------------------------------------


def test_all_wrong_tensors_are_listed_at_once(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(95, 64)
    tensors["lm_head.weight"] = torch.zeros(97, 63)
    tensors["model.rotary.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors")
    with refused(
        CheckpointError,
        "a ouro model",
        "missing: model.norm.weight [64]",
        "missing: model.layers.1.self_attn.k_proj.weight [32, 64]",
        "shape: model.layers.0.mlp.up_proj.weight is [95, 64], expected [96, 64]",
        "shape: lm_head.weight is [97, 63], expected [97, 64]",
        "unexpected: model.rotary.inv_freq [8]",
    ):
        load(folder)


def test_wrong_shape_behind_an_index_is_refused(tmp_path: Path) -> None:
    made = shutil.copytree(GOLDEN / "huginn", tmp_path / "model")
    tensors = load_file(made / "model.safetensors")
    name = "transformer.coda.1.attn.qk_bias"
    save_file(tensors | {name: torch.zeros(2, 1, 4, 15)}, made / "model.safetensors")
    with refused(CheckpointError, f"{name} is [2, 1, 4, 15]", "[4, 16]"):
        load(made)


def test_unknown_architecture_lists_the_known_ones(folder: Path) -> None:
    change_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    known = ("huginn", "ouro", "retrofit-llama", "retrofit-olmo", "tl_looped", "register_adapter")
    known += ("tl_looped.retrofit(", "tl-looped analyze --feedforward")
    with refused(UnknownArchitectureError, "'gpt2'", "GPT2LMHeadModel", *known):
        load(folder)


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_opened(folder: Path, name: str, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    load(folder)
    (folder / "model.safetensors").unlink()
    with refused(CheckpointError, name, "Convert them to safetensors"):
        load(folder)
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(CheckpointError, name):
        load(folder)
    assert not sprung.exists()
    pickle.loads((folder / name).read_bytes())
    assert sprung.exists()  # the trap works


def test_code_of_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (folder / "evil.py").write_text(f"open({str(sprung)!r}, 'w')\nclass Any: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    change_config(folder, auto_map=dict.fromkeys(classes, "evil.Any"))
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    slow = {"tokenizer_class": "Any", "auto_map": {"AutoTokenizer": ["evil.Any", "evil.Any"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(slow))
    model = load(folder)
    assert model.to_tokens("a").tolist() == [[0]]
    model(torch.tensor([[0, 1]]))
    assert not sprung.exists()


@pytest.mark.parametrize("kept", [0, 7, 5000, -1])
def test_truncated_safetensors_is_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with refused(CheckpointError, str(path), "truncated"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        ('{"weight_map": {"a": "../model.safetensors"}}', ["outside", "../model.safetensors"]),
        ('{"weight_map": {"a": "/etc/passwd"}}', ["outside", "/etc/passwd"]),
        ('{"weight_map": {"a": "sub/model.safetensors"}}', ["outside", "sub/model.safetensors"]),
        ('{"weight_map": {"a": ".."}}', ["'..'"]),
        ('{"weight_map": {"a": 3}}', ["outside", "3"]),
        ('{"weight_map": {"a": "model-2.safetensors"}}', ["lacks", "model-2.safetensors"]),
        ('{"weight_map": ["a"]}', ["not a safetensors index"]),
        ("[]", ["not a safetensors index"]),
        ("{}", ["not a safetensors index", "weight_map"]),
        ("{", ["not a safetensors index"]),
        (b"\xff\xfe{}", ["not a safetensors index"]),
    ],
)
def test_bad_index_is_refused(folder: Path, index: str | bytes, parts: list[str]) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "model.safetensors.index.json"
    path.write_bytes(index.encode() if isinstance(index, str) else index)
    with refused(CheckpointError, *parts):
        load(folder)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_config_that_is_no_object_is_refused(folder: Path, text: bytes, part: str) -> None:
    (folder / "config.json").write_bytes(text)
    with refused(CheckpointError, str(folder / "config.json"), part):
        load(folder)


def test_all_missing_keys_are_named(folder: Path) -> None:
    change_config(folder, hidden_size=..., vocab_size=...)
    with refused(ConfigError, "['hidden_size', 'vocab_size']"):
        load(folder)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("huginn", {"n_embd": "64"}),
        ("huginn", {"n_embd": -64}),
        ("huginn", {"init_values": None}),
        ("huginn", {"norm_eps": "1e-6"}),
        ("huginn", {"n_layers_in_prelude": "2"}),
        ("huginn", {"mean_recurrence": None}),
        ("retrofit_llama", {"rope_theta": None}),
        ("retrofit_llama", {"rope_scaling": {"rope_type": "llama3"}}),
        ("retrofit_olmo", {"initial_state_mode": ["random"]}),
        ("ouro", {"architectures": 3}),
        ("ouro", {"early_exit_threshold": "high"}),
        ("ouro", {"num_key_value_heads": -2}),
    ],
)
def test_config_value_of_the_wrong_kind_is_refused(
    case: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    made = shutil.copytree(GOLDEN / case, tmp_path / "model")
    change_config(made, **changes)
    with pytest.raises(TLLoopedError):
        load(made)(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(("key", "part"), [("d_model", "['d_model']"), ("wings", "['wings']")])
def test_native_config_with_missing_or_unknown_fields_is_refused(
    plain: LoopedTransformer, tmp_path: Path, key: str, part: str
) -> None:
    plain.save_pretrained(tmp_path)
    change_config(tmp_path, **{key: ... if key == "d_model" else 2})
    with refused(ConfigError, part):
        load(tmp_path)


def test_native_config_of_another_version_is_refused(
    plain: LoopedTransformer, tmp_path: Path
) -> None:
    plain.save_pretrained(tmp_path)
    change_config(tmp_path, format_version=2)
    with refused(ConfigError, "format_version 2", "not 1"):
        load(tmp_path)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with refused(CheckpointError, str(folder), "no safetensors"):
        load(folder)
    (folder / "config.json").unlink()
    with refused(CheckpointError, str(folder), "no config.json"):
        load(folder)
    (folder / "file").write_text("")
    with refused(CheckpointError, "is not a folder", "config.json"):
        load(folder / "file")


@pytest.mark.parametrize("name", ["hugin", "a/b/c", "/no/such/folder", "./nothing", "~/nothing"])
def test_unknown_name_lists_the_aliases(name: str) -> None:
    with refused(CheckpointError, repr(name), "demo", *all_aliases()):
        load(name)


@pytest.mark.parametrize("dtype", ["int8", "banana", torch.int64])
def test_dtype_must_be_a_float(dtype: Any) -> None:
    with refused(ConfigError, repr(dtype), "bfloat16"):
        load(GOLDEN / "ouro", dtype=dtype)


# -- what is no weight ------------------------------------------------------------------------

NORM = {"ouro": "model.norm.weight"} | dict.fromkeys(
    ("huginn", "retrofit_llama", "retrofit_tinyllama", "retrofit_olmo"), "transformer.ln_f.weight"
)
CODES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def with_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", NORM)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_codes_in_place_of_weights_are_refused(case: str, device: str, tmp_path: Path) -> None:
    made = shutil.copytree(GOLDEN / case, tmp_path / "model")
    name = NORM[case]
    for dtype, called in CODES.items():
        with_tensor(made, name, lambda weight, dtype=dtype: torch.ones_like(weight).to(dtype))
        with refused(CheckpointError, f"dtype: {name} is {called}", "dequantised"):
            LoopedTransformer.from_pretrained(made, device=device)


def test_a_table_that_is_not_needed_may_be_of_any_type(tmp_path: Path) -> None:
    made = shutil.copytree(GOLDEN / "huginn", tmp_path / "model")
    logits = load(made)(torch.tensor([[1, 2]]), initial_state="zeros")
    with_tensor(made, "freqs_cis", lambda table: table.to(torch.int8))
    assert torch.equal(load(made)(torch.tensor([[1, 2]]), initial_state="zeros"), logits)


def test_packed_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    del tensors[f"{layer}.weight"]
    tensors |= {
        f"{layer}.qweight": torch.zeros(8, 64, dtype=torch.int32),
        f"{layer}.scales": torch.ones(1, 64),
    }
    save_file(tensors, folder / "model.safetensors")
    with refused(
        CheckpointError,
        f"missing: {layer}.weight [64, 64]",
        f"unexpected: {layer}.qweight [8, 64]",
        f"unexpected: {layer}.scales [1, 64]",
    ):
        load(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_a_quantisation_in_the_config_is_refused(method: str, folder: Path, tmp_path: Path) -> None:
    said = {"quantization_config": {"quant_method": method, "bits": 4}}
    change_config(folder, **said)
    with refused(ConfigError, "quantization_config", method, "dequantise"):
        load(folder)
    source = tmp_path / "source"
    feedforward("llama").save_pretrained(source)
    change_config(source, **said)
    with refused(ConfigError, "quantization_config", method, "dequantise"):
        retrofit(source, core=[3], device="cpu")


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_quantisation_in_the_config_is_harmless(nothing: Any, folder: Path) -> None:
    change_config(folder, quantization_config=nothing, compression_config=nothing)
    assert load(folder).cfg.architecture == "ouro"


def test_a_feedforward_folder_of_codes_is_refused(tmp_path: Path) -> None:
    feedforward("llama").save_pretrained(tmp_path)
    with_tensor(tmp_path, "model.norm.weight", lambda w: torch.ones_like(w).to(torch.int8))
    with refused(CheckpointError, "dtype: model.norm.weight is I8"):
        retrofit(tmp_path, core=[3], device="cpu")


def test_a_feedforward_model_of_codes_is_refused() -> None:
    source = feedforward("llama")
    codes = torch.ones(48, dtype=torch.int8)
    source.model.norm.weight = torch.nn.Parameter(codes, requires_grad=False)
    with refused(ConfigError, "model.norm.weight is torch.int8", "dequantise"):
        retrofit(source, core=[3], device="cpu")


# -- weights that are no numbers --------------------------------------------------------------


def broken(value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight.view(-1)[5] = weight.view(-1)[9] = value
        return weight

    return change


@pytest.mark.parametrize("case", NORM)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(case: str, value: float, tmp_path: Path) -> None:
    made = shutil.copytree(GOLDEN / case, tmp_path / "model")
    with_tensor(made, NORM[case], broken(value))
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        with refused(CheckpointError, NORM[case], "2 of its 64", "[5]"):
            load(made, dtype=dtype)
    with refused(CheckpointError, "model.norm.weight"):
        source = feedforward("llama")
        source.model.norm.weight.data[5] = value
        retrofit(source, core=[3], device="cpu")


def test_weights_that_a_dtype_cannot_hold_are_refused(folder: Path) -> None:
    with_tensor(folder, "model.norm.weight", broken(-1e5))
    with refused(CheckpointError, "model.norm.weight holds 1e+05", "torch.float16", "bfloat16"):
        load(folder, dtype="float16")
    assert load(folder, dtype="bfloat16").ln_final.w.min() < -9e4


# -- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "changes", "part"),
    [
        ("huginn", {"n_embd": 2**20}, "embedding of 97 * 1048576"),
        ("huginn", {"vocab_size": 2**20, "padded_vocab_size": 2**20}, "embedding of"),
        ("retrofit_llama", {"intermediate_size": 2**22}, "layers of at least"),
        ("retrofit_olmo", {"n_heads": 2**20, "num_key_value_heads": 2**20}, "layers of at least"),
        ("ouro", {"head_dim": 2**22}, "layers of at least"),
        ("ouro", {"num_hidden_layers": 8_000}, "8000 layers of at least"),
        ("ouro", {"hidden_size": 2**20, "vocab_size": 2**20}, "embedding of"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_far_beyond_the_files_are_refused_before_they_are_allocated(
    case: str, changes: dict[str, Any], part: str, device: str, tmp_path: Path
) -> None:
    made = shutil.copytree(GOLDEN / case, tmp_path / "model")
    change_config(made, **changes)
    with refused(CheckpointError, part, "the files hold"):
        LoopedTransformer.from_pretrained(made, device=device)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("huginn", {"n_embd": 2**40}),
        ("retrofit_llama", {"intermediate_size": 2**62}),
        ("retrofit_olmo", {"n_heads": 2**40, "num_key_value_heads": 2**40}),
        ("ouro", {"num_hidden_layers": 100_000}),
    ],
)
def test_sizes_beyond_every_limit_are_refused(
    case: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    made = shutil.copytree(GOLDEN / case, tmp_path / "model")
    change_config(made, **changes)
    with refused(ConfigError):
        LoopedTransformer.from_pretrained(made, device="cpu")


def test_wrong_tensors_are_refused_on_the_meta_device_too(folder: Path) -> None:
    change_config(folder, intermediate_size=95)
    with refused(CheckpointError, "is [96, 64], expected [95, 64]"):
        LoopedTransformer.from_pretrained(folder, device="meta")


# -- tokenizers -------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    words = {f"w{i}": i for i in range(96)} | {"hole": 97}
    larger = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    )
    assert len(larger) == 97  # the model has as many rows, for the ids 0 to 96
    model = load(folder)
    for give in (model.set_tokenizer, lambda tokenizer: setattr(model, "tokenizer", tokenizer)):
        with refused(TokenizerError, "'hole' (97)", "vocabulary 97"):
            give(larger)
        assert model.tokenizer is None
    with refused(TokenizerError, "'hole' (97)"):
        LoopedTransformer.from_config(model.cfg, larger)
    larger.save_pretrained(folder)
    with refused(TokenizerError, "'hole' (97)"):
        load(folder)
