"""A retrofit whose adapter is [0 | I] at one recurrence is its feedforward source model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_logits
from conftest import GOLDEN
from feedforwards import LLAMA3_ROPE
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from tl_looped import LoopedTransformer

SHAPE = (2, 3, 1)  # prelude, core, coda
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": sum(SHAPE),
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def feedforward(kind: str, n_kv_heads: int = 2) -> Any:
    torch.manual_seed(1)
    if kind == "olmo":
        model: Any = Olmo2ForCausalLM(Olmo2Config(num_key_value_heads=4, **SIZES))
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0} if kind == "llama" else LLAMA3_ROPE
        model = LlamaForCausalLM(
            LlamaConfig(
                num_key_value_heads=n_kv_heads, rope_parameters=rope, rms_norm_eps=1e-5, **SIZES
            )
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * 0.15)
    return model.eval()


def retrofit_tensors(model: Any) -> dict[str, Tensor]:
    """The feedforward weights under the retrofit checkpoints' names, adapter [0 | I]."""
    state = model.state_dict()
    d = SIZES["hidden_size"]
    out = {
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
        "transformer.adapter.weight": torch.cat((torch.zeros(d, d), torch.eye(d)), 1),
    }
    stages = [
        (s, i)
        for s, n in zip(("prelude", "core_block", "coda"), SHAPE, strict=True)
        for i in range(n)
    ]
    first, second = "input_layernorm", "post_attention_layernorm"
    if "model.layers.0.self_attn.q_norm.weight" in state:
        first, second = "post_attention_layernorm", "post_feedforward_layernorm"
    for layer, (stage, i) in enumerate(stages):
        theirs, ours = f"model.layers.{layer}", f"transformer.{stage}.{i}"
        qkv = [state[f"{theirs}.self_attn.{x}_proj.weight"] for x in "qkv"]
        out[f"{ours}.attn.Wqkv.weight"] = torch.cat(qkv)
        out[f"{ours}.attn.proj.weight"] = state[f"{theirs}.self_attn.o_proj.weight"]
        fc = [state[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        out[f"{ours}.mlp.fc.weight"] = torch.cat(fc)
        out[f"{ours}.mlp.proj.weight"] = state[f"{theirs}.mlp.down_proj.weight"]
        out[f"{ours}.norm_1.weight"] = state[f"{theirs}.{first}.weight"]
        out[f"{ours}.norm_2.weight"] = state[f"{theirs}.{second}.weight"]
        for norm in ("q_norm", "k_norm"):
            if f"{theirs}.self_attn.{norm}.weight" in state:
                out[f"{ours}.attn.{norm}.weight"] = state[f"{theirs}.self_attn.{norm}.weight"]
    return {name: tensor.clone().contiguous() for name, tensor in out.items()}


def write_retrofit(kind: str, folder: Path, n_kv_heads: int = 2) -> Any:
    model = feedforward(kind, n_kv_heads)
    template = "retrofit_olmo" if kind == "olmo" else "retrofit_llama"
    config = json.loads((GOLDEN / template / "config.json").read_text())
    config |= {
        "n_embd": SIZES["hidden_size"],
        "head_dim": SIZES["hidden_size"] // SIZES["num_attention_heads"],
        "n_heads": SIZES["num_attention_heads"],
        "num_key_value_heads": model.config.num_key_value_heads,
        "intermediate_size": SIZES["intermediate_size"],
        "vocab_size": SIZES["vocab_size"],
        "padded_vocab_size": SIZES["vocab_size"],
        "max_position_embeddings": SIZES["max_position_embeddings"],
        "norm_eps": model.config.rms_norm_eps,
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "rope_scaling": LLAMA3_ROPE if kind == "llama3-rope" else None,
        "mean_recurrence": 1,
    }
    config |= dict(zip(("n_layers_in_prelude", "n_layers_in_recurrent_block"), SHAPE, strict=False))
    config["n_layers_in_coda"] = SHAPE[2]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(retrofit_tensors(model), folder / "model.safetensors")
    return model


@pytest.mark.parametrize("kind", ["llama", "llama3-rope", "olmo"])
def test_identity_adapter_at_one_recurrence_is_the_feedforward_model(
    kind: str, tmp_path: Path
) -> None:
    source = write_retrofit(kind, tmp_path)
    looped = LoopedTransformer.from_pretrained(tmp_path, device="cpu")
    tokens = torch.randint(0, SIZES["vocab_size"], (3, 100))
    expected = source(tokens).logits
    assert expected.std() > 0.5  # not trivially equal
    assert_logits(looped, tokens, expected)
    # The state has no say, and every later recurrence repeats the first.
    assert_logits(looped, tokens, expected, n_recurrences=3, state_seed=7)
