"""Retrofits of a folder: its tensors stay in their files, and nothing else differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import rounding_bound
from feedforwards import KINDS, feedforward, random_tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding

from tl_looped import CheckpointError, ConfigError, LoopedTransformer, retrofit
from tl_looped.adapters.stored import read_headers, tensor_files
from tl_looped.retrofitting.feedforward import open_feedforward
from tl_looped.retrofitting.layers import plan_layers
from tl_looped.retrofitting.probe import probe

CHILD = Path(__file__).with_name("memory_of_retrofit.py")
LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc is Linux's")
STAGES: dict[str, Any] = {"prelude": [0, 1], "core": [3, 4], "coda": [6], "device": "cpu"}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def folder_of(model: Any, tmp_path: Path, **options: Any) -> Path:
    folder = tmp_path / "source"
    model.save_pretrained(folder, **options)
    return folder


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_bits(one: LoopedTransformer, other: LoopedTransformer) -> None:
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    ours, theirs = one.cfg.to_json(), other.cfg.to_json()
    names = {"model_name", "source_layers"}
    assert {k: v for k, v in ours.items() if k not in names} == {
        k: v for k, v in theirs.items() if k not in names
    }


@pytest.mark.parametrize("mode", ["retrofit", "virtual-loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_loaded_model(kind: str, mode: str, tmp_path: Path) -> None:
    folder = folder_of(feedforward(kind), tmp_path)
    same_bits(retrofit(folder, **STAGES, mode=mode), retrofit(whole(folder), **STAGES, mode=mode))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_rounded_as_transformers_rounds_it(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = folder_of(feedforward("llama-tied").to(stored), tmp_path)
    found = retrofit(folder, **STAGES, dtype=dtype)
    assert {p.dtype for p in found.parameters()} == {dtype}
    same_bits(found, retrofit(whole(folder, dtype), **STAGES, dtype=dtype))


def test_shards_are_read(tmp_path: Path) -> None:
    folder = folder_of(feedforward("qwen3"), tmp_path, max_shard_size="20KB")
    assert len(tensor_files(folder)) > 3
    same_bits(retrofit(folder, **STAGES), retrofit(whole(folder), **STAGES))


@pytest.mark.parametrize("kind", ["llama-tied", "olmo2", "mistral", "qwen2", "qwen3"])
def test_the_source_is_run_from_its_file_by_its_own_layers(kind: str, tmp_path: Path) -> None:
    model = feedforward(kind)
    folder = folder_of(model, tmp_path)
    source = open_feedforward(folder, torch.float32)
    assert source.stored is not None
    assert set(source.stored) == {name for name, _ in model.named_parameters()}
    looped = retrofit(folder, **STAGES)
    plan = plan_layers(7, *(STAGES[name] for name in ("prelude", "core", "coda")))
    found = probe(looped, source, plan)
    expected = probe(looped, open_feedforward(whole(folder), torch.float32), plan)
    with torch.no_grad():
        tokens = random_tokens(12)
        rounded = looped(tokens, n_recurrences=1)
        bound = rounding_bound(looped.double()(tokens, n_recurrences=1), rounded)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=bound, rtol=0.0)
    # Nothing of it stayed.
    assert all(p.is_meta for p in source.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in source.model.modules())


def test_a_source_that_computes_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(feedforward("llama"), tmp_path)
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.05 * forward(self, x))
    with pytest.raises(ConfigError, match="does not compute what source does"):
        retrofit(folder, **STAGES)


def test_a_source_that_rotates_otherwise_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(LlamaRotaryEmbedding):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.inv_freq[-1] *= 1.01

    folder = folder_of(feedforward("llama"), tmp_path)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRotaryEmbedding", Other)
    with pytest.raises(ConfigError, match="rotates queries and keys by frequencies"):
        retrofit(folder, **STAGES)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_unembedding_that_is_stored_twice(same: bool, tmp_path: Path) -> None:
    model = feedforward("llama-tied")
    folder = folder_of(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert HEAD not in tensors
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][5, 7] += 0 if same else 1e-6
    rewrite(folder, tensors)
    if same:
        same_bits(retrofit(folder, **STAGES), retrofit(model, **STAGES))
        return
    with pytest.raises(CheckpointError, match=r"unexpected: lm_head\.weight(.|\n)*differs"):
        retrofit(folder, **STAGES)


def test_a_tied_unembedding_is_compared_in_the_models_dtype(tmp_path: Path) -> None:
    """As transformers does: stored in fp32 and in bf16, the two are equal in bf16 alone."""
    folder = folder_of(feedforward("llama-tied"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].bfloat16()
    rewrite(folder, tensors)
    looped = retrofit(folder, **STAGES, dtype="bfloat16")
    same_bits(looped, retrofit(whole(folder, torch.bfloat16), **STAGES, dtype="bfloat16"))
    with pytest.raises(CheckpointError, match=r"unexpected: lm_head\.weight"):
        retrofit(folder, **STAGES)


def test_a_file_that_the_config_names_is_the_one_that_is_read(tmp_path: Path) -> None:
    folder = folder_of(feedforward("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    others = {name: 1.5 * tensor for name, tensor in tensors.items()}
    save_file(others, folder / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    named = config | {"transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(named))
    same_bits(retrofit(folder, **STAGES), retrofit(whole(folder), **STAGES))


def test_names_that_transformers_translates_are_left_to_it(tmp_path: Path) -> None:
    model = feedforward("llama-tied")
    folder = folder_of(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    # The other of two tied tensors, and a model that was saved without its head.
    for rename in (
        lambda name: HEAD if name == EMBEDDING else name,
        lambda name: name.removeprefix("model."),
    ):
        rewrite(folder, {rename(name): tensor for name, tensor in tensors.items()})
        assert open_feedforward(folder, torch.float32).stored is None
        same_bits(retrofit(folder, **STAGES), retrofit(model, **STAGES))
    bare: nn.Module = LlamaModel.from_pretrained(folder)
    bare.save_pretrained(tmp_path / "bare")
    same_bits(retrofit(tmp_path / "bare", **STAGES), retrofit(model, **STAGES))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "float32", r"layers\.3\.mlp\.up_proj\.weight is not finite"),
        (1e6, "float16", r"layers\.3\.mlp\.up_proj\.weight holds 1e\+06, which is too large"),
    ],
)
def test_a_weight_that_is_no_number_is_named(
    value: float, dtype: str, message: str, tmp_path: Path
) -> None:
    folder = folder_of(feedforward("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = value
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError, match=message):
        retrofit(folder, **STAGES, dtype=dtype)


def test_shapes_alone_read_no_values(tmp_path: Path) -> None:
    folder = folder_of(feedforward("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {name: tensor * torch.nan for name, tensor in tensors.items()})
    looped = retrofit(folder, **(STAGES | {"device": "meta"}))
    assert all(p.is_meta for p in looped.parameters())
    assert looped.W_E.shape == (61, 48)


def test_model_is_its_own_when_its_folder_changes(tmp_path: Path) -> None:
    folder = folder_of(feedforward("llama"), tmp_path)
    looped = retrofit(folder, **STAGES)
    before = {name: p.clone() for name, p in looped.named_parameters()}
    path = folder / "model.safetensors"
    # In place, so that a mapping of the file would show it.
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(path.stat().st_size // 4))
    assert all(torch.equal(p, before[name]) for name, p in looped.named_parameters())


@LINUX
def test_no_file_stays_open(tmp_path: Path) -> None:
    folder = folder_of(feedforward("llama-tied"), tmp_path)
    looped = retrofit(folder, **STAGES)
    assert looped is not None
    assert str(folder) not in Path("/proc/self/maps").read_text()


# -- memory -----------------------------------------------------------------------------------


@LINUX
@pytest.mark.full
@pytest.mark.once
@pytest.mark.parametrize("mode", ["retrofit", "virtual-loop"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_one_model_is_in_memory_and_not_two(stored: str, mode: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    model = feedforward("llama-tied", **wide, num_hidden_layers=12, vocab_size=8000)
    folder = folder_of(model.to(getattr(torch, stored)), tmp_path)
    del model
    command = [sys.executable, str(CHILD), str(folder), mode]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found = json.loads(done.stdout)
    headers = read_headers(tensor_files(folder))
    file = sum(header.n_bytes for header in headers.values())
    largest = max(header.n_bytes for header in headers.values())
    assert found["model"] > 120e6
    # Of the file, a sixteenth is mapped before it is opened anew, and the tensor that goes over
    # that. The rest is room for what running a layer and the allocator take.
    allowed = file / 16 + largest + found["model"] / 10
    assert found["model"] <= found["peak"] <= found["model"] + allowed
    # The bound tells the two ways apart: before, all of the file was there as well.
    assert allowed < 0.8 * file if stored == "float32" else allowed < file
