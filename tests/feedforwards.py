"""Small random feedforward models of transformers, and what is left of one without some layers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

N_LAYERS = 7
VOCAB = 61
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA, OLMO = (LlamaConfig, LlamaForCausalLM), (Olmo2Config, Olmo2ForCausalLM)
MISTRAL = (MistralConfig, MistralForCausalLM)
QWEN2, QWEN3 = (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LLAMA, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-grouped-scaled-rope": (LLAMA, {"rope_parameters": LLAMA3_ROPE}),
    "llama-tied": (LLAMA, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "olmo2": (OLMO, {"num_key_value_heads": 4}),
    "olmo2-grouped": (OLMO, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "mistral": (MISTRAL, {"sliding_window": None}),
    "qwen2": (QWEN2, {"tie_word_embeddings": True}),
    "qwen3": (QWEN3, {"head_dim": 16}),
    "mistral-wide-heads": (MISTRAL, {"sliding_window": 100, "head_dim": 16}),
}


def feedforward(kind: str, **changes: Any) -> Any:
    """A model with weights and gains that are far from trivial."""
    (config, model_class), own = KINDS[kind]
    torch.manual_seed(1)
    model = model_class(config(**(SIZES | own | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if gain else noise * 0.15)
    return model.eval()


def with_layers(model: Any, layers: list[int]) -> Any:
    """A copy of a model whose layers are these of its own, in this order, maybe repeated."""
    other = deepcopy(model)
    other.model.layers = nn.ModuleList(deepcopy(model.model.layers[i]) for i in layers)
    other.config.num_hidden_layers = len(layers)
    if getattr(other.config, "layer_types", None) is not None:
        other.config.layer_types = ["full_attention"] * len(layers)
    return other


def random_tokens(n: int = 60) -> torch.Tensor:
    return torch.randint(VOCAB, (2, n), generator=torch.Generator().manual_seed(3))


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens, use_cache=False).logits
    return found
