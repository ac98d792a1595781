"""Checkpoints that are refused: damaged, hostile, incomplete, unknown."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from refusals import refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tl_looped import (
    CheckpointError,
    ConfigError,
    LoopedTransformer,
    TLLoopedError,
    UnknownArchitectureError,
)
from tl_looped.adapters import all_aliases


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
