"""The published models at their real sizes, on the meta device: parameter counts and names."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from conftest import CASES, GOLDEN
from safetensors import safe_open

from tl_looped import (
    HuginnAdapter,
    LoopedTransformer,
    OuroAdapter,
    RetrofitLlamaAdapter,
    RetrofitOlmoAdapter,
)
from tl_looped.adapters import Adapter
from tl_looped.model.parameters import parameter_names

pytestmark = pytest.mark.every_family

Shapes = dict[str, tuple[int, ...]]


def raven_sizes(
    shape: tuple[int, int, int], recurrences: int, d: int, heads: int, kv: int, mlp: int, vocab: int
) -> dict[str, Any]:
    p, k, c = shape
    return {
        "n_layers_in_prelude": p,
        "n_layers_in_recurrent_block": k,
        "n_layers_in_coda": c,
        "n_embd": d,
        "n_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": d // heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "padded_vocab_size": vocab,
        "mean_recurrence": recurrences,
    }


def ouro_sizes(layers: int) -> dict[str, Any]:
    return {
        "hidden_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "intermediate_size": 5632,
        "vocab_size": 49152,
    }


# model: adapter, golden config to start from, real sizes, parameters, effective layers
MODELS: dict[str, tuple[Adapter, str, dict[str, Any], int, int]] = {
    "huginn-0125": (
        HuginnAdapter(),
        "huginn",
        raven_sizes((2, 4, 2), 32, 5280, 55, 55, 17920, 65536),
        3_564_976_800,
        132,
    ),
    "Ouro-1.4B": (OuroAdapter(), "ouro", ouro_sizes(24), 1_434_652_673, 96),
    "Ouro-2.6B": (OuroAdapter(), "ouro", ouro_sizes(48), 2_667_974_657, 192),
    "Recurrent-Llama-3.2-r4": (
        RetrofitLlamaAdapter(),
        "retrofit_llama",
        raven_sizes((4, 6, 4), 4, 2048, 32, 8, 8192, 128256),
        1_385_228_288,
        32,
    ),
    "Recurrent-TinyLlama-3T-r4": (
        RetrofitLlamaAdapter(),
        "retrofit_tinyllama",
        raven_sizes((4, 8, 4), 4, 2048, 32, 4, 5632, 32000),
        844_171_264,
        40,
    ),
    "Recurrent-OLMo-2-0425-r4": (
        RetrofitOlmoAdapter(),
        "retrofit_olmo",
        raven_sizes((4, 6, 4), 4, 2048, 16, 16, 8192, 100352),
        1_359_071_232,
        32,
    ),
}


def real_config(model: str) -> dict[str, Any]:
    _, case, sizes, _, _ = MODELS[model]
    raw: dict[str, Any] = json.loads((GOLDEN / case / "config.json").read_text())
    return raw | sizes


@cache
def on_meta(model: str) -> LoopedTransformer:
    cfg = MODELS[model][0].config(real_config(model))
    cfg.device = "meta"
    return LoopedTransformer(cfg)


def family(case: str) -> str:
    return {"huginn": "huginn", "ouro": "ouro", "retrofit_olmo": "olmo"}.get(case, "llama")


def checkpoint_shapes(case: str, raw: dict[str, Any]) -> Shapes:
    """Tensors of a checkpoint, rotary table aside, from its config alone."""
    if case == "ouro":
        return ouro_shapes(raw)
    kind = family(case)
    d, mlp, vocab = raw["n_embd"], raw["intermediate_size"], raw["vocab_size"]
    heads, kv, d_head = raw["n_heads"], raw["num_key_value_heads"], raw["head_dim"]
    out: Shapes = {
        "transformer.wte.weight": (vocab, d),
        "transformer.adapter.weight": (d, 2 * d),
        "transformer.ln_f.weight": (d,),
    }
    if kind != "huginn":
        out["lm_head.weight"] = (vocab, d)
    for segment, key in (("prelude",) * 2, ("core_block", "recurrent_block"), ("coda",) * 2):
        for i in range(raw[f"n_layers_in_{key}"]):
            block: Shapes = {
                "attn.Wqkv.weight": ((heads + 2 * kv) * d_head, d),
                "attn.proj.weight": (d, d),
                "mlp.fc.weight": (2 * mlp, d),
                "mlp.proj.weight": (d, mlp),
                "norm_1.weight": (d,),
                "norm_2.weight": (d,),
            }
            if kind == "huginn":
                block |= {"norm_3.weight": (d,), "norm_4.weight": (d,)}
                block["attn.qk_bias"] = (2, 1, heads, d_head)
            if kind == "olmo":
                block["attn.q_norm.weight"] = (heads * d_head,)
                block["attn.k_norm.weight"] = (kv * d_head,)
            out |= {f"transformer.{segment}.{i}.{name}": shape for name, shape in block.items()}
    return out


def ouro_shapes(raw: dict[str, Any]) -> Shapes:
    d, mlp, vocab = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    q = raw["num_attention_heads"] * raw["head_dim"]
    kv = raw["num_key_value_heads"] * raw["head_dim"]
    out: Shapes = {
        "model.embed_tokens.weight": (vocab, d),
        "model.norm.weight": (d,),
        "model.early_exit_gate.weight": (1, d),
        "model.early_exit_gate.bias": (1,),
        "lm_head.weight": (vocab, d),
    }
    for i in range(raw["num_hidden_layers"]):
        block: Shapes = {
            "self_attn.q_proj.weight": (q, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q),
            "mlp.gate_proj.weight": (mlp, d),
            "mlp.up_proj.weight": (mlp, d),
            "mlp.down_proj.weight": (d, mlp),
            "input_layernorm.weight": (d,),
            "input_layernorm_2.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "post_attention_layernorm_2.weight": (d,),
        }
        out |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return out


def closed_form(model: str) -> int:
    """Number of parameters, written out by hand for each family."""
    _, case, raw, _, _ = MODELS[model]
    if case == "ouro":
        d, mlp, layers = raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"]
        block = 4 * d * d + 3 * d * mlp + 4 * d
        return layers * block + 2 * raw["vocab_size"] * d + d + (d + 1)
    d, mlp, vocab = raw["n_embd"], raw["intermediate_size"], raw["vocab_size"]
    layers = sum(raw[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda"))
    kv_width = raw["num_key_value_heads"] * raw["head_dim"]
    vectors = {"huginn": 4 + 2, "llama": 2, "olmo": 2 + 2}[family(case)]
    block = 2 * d * d + 2 * d * kv_width + 3 * d * mlp + vectors * d
    embeddings = (1 if case == "huginn" else 2) * vocab * d
    return layers * block + embeddings + 2 * d * d + d


@pytest.mark.parametrize("model", MODELS)
def test_parameter_count_is_the_published_one(model: str) -> None:
    _, _, _, n_parameters, n_layers = MODELS[model]
    built = on_meta(model)
    assert all(p.is_meta for p in built.parameters())
    assert sum(p.numel() for p in built.parameters()) == closed_form(model) == n_parameters
    assert len(built.blocks) == built.cfg.n_layers == n_layers


@pytest.mark.parametrize("model", MODELS)
def test_parameter_names_are_those_of_the_config(model: str) -> None:
    built = on_meta(model)
    names = [name for name, _ in built.named_parameters()]
    assert len(names) == len(set(names))
    assert set(names) == set(parameter_names(built.cfg)) == set(built.state_dict())


def test_llama_count_is_the_sum_of_its_parts() -> None:
    parts = 14 * 60_821_504 + 525_336_576 + 8_388_608 + 2_048
    assert closed_form("Recurrent-Llama-3.2-r4") == parts == 1_385_228_288


@pytest.mark.parametrize("case", CASES)
def test_expected_tensors_are_those_of_the_reference_file(case: str) -> None:
    raw = json.loads((GOLDEN / case / "config.json").read_text())
    with safe_open(GOLDEN / case / "model.safetensors", framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    table = {"freqs_cis": (1, 64, 1, 8, 2)} if case == "huginn" else {}
    assert stored == checkpoint_shapes(case, raw) | table


@pytest.mark.parametrize("model", MODELS)
def test_adapter_expects_exactly_the_tensors_of_the_format(model: str) -> None:
    adapter, case, _, _, _ = MODELS[model]
    shapes = checkpoint_shapes(case, real_config(model))
    built = on_meta(model)
    sources = adapter.sources(built.cfg)
    assert {name for source in sources.values() for name in source.names} == set(shapes)
    assert adapter.ignored(built.cfg) == ({"freqs_cis"} if case == "huginn" else set())
    for name, parameter in built.named_parameters():
        source = sources[name]
        parts = [torch.empty(shapes[n], device="meta")[source.index] for n in source.names]
        assert torch.cat(parts).numel() == parameter.numel()
        assert source.rows in (None, tuple(len(part) for part in parts))


@pytest.mark.parametrize("model", MODELS)
def test_sources_use_every_stored_number_once(model: str) -> None:
    adapter, case, _, n_parameters, _ = MODELS[model]
    shapes = checkpoint_shapes(case, real_config(model))
    uses = [
        (name, source.index)
        for source in adapter.sources(on_meta(model).cfg).values()
        for name in source.names
    ]
    assert len(uses) == len(set(uses))
    taken = sum(torch.empty(shapes[name], device="meta")[index].numel() for name, index in uses)
    assert taken == n_parameters == sum(torch.Size(shape).numel() for shape in shapes.values())
