"""The oracle of TransformerLens 3.x: one Llama as HookedTransformer and as two looped models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from closeness import SAMPLES
from test_against_transformers import LLAMA3_ROPE, SHAPE, SIZES, write_retrofit
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights

from tl_looped import LoopedConfig, LoopedTransformer

# Both in fp64, but TransformerLens 3 has its rotary frequencies from fp32: the one rounding there.
ROUNDED = SAMPLES * torch.finfo(torch.float32).eps
CLOSE = {"atol": ROUNDED, "rtol": ROUNDED}
LAYERS = sum(SHAPE)
# (rotary kind, key-value heads): grouped heads, one key-value head a query head, Llama 3's scaling.
KINDS = {"grouped": ("llama", 2), "full": ("llama", 4), "llama3-rope": ("llama3-rope", 2)}
# A loop without injection, and a retrofit whose adapter [0 | I] passes the prelude's output on.
LOOPS = ("native", "retrofit")
CASES = [(kind, loop) for kind in KINDS for loop in LOOPS]


@dataclass(frozen=True)
class Pair:
    """The same weights twice."""

    hooked: HookedTransformer
    looped: LoopedTransformer


def hooked_config(kind: str) -> HookedTransformerConfig:
    rope, kv_heads = KINDS[kind]
    values: dict[str, Any] = {
        "n_layers": LAYERS,
        "d_model": SIZES["hidden_size"],
        "n_heads": SIZES["num_attention_heads"],
        "d_head": SIZES["hidden_size"] // SIZES["num_attention_heads"],
        "n_key_value_heads": kv_heads if kv_heads < SIZES["num_attention_heads"] else None,
        "d_mlp": SIZES["intermediate_size"],
        "d_vocab": SIZES["vocab_size"],
        "n_ctx": SIZES["max_position_embeddings"],
        "eps": 1e-5,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "final_rms": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": SIZES["hidden_size"] // SIZES["num_attention_heads"],
        "rotary_adjacent_pairs": False,
        "rotary_base": 10000,
        "device": "cpu",
        "dtype": torch.float64,
    }
    if rope == "llama3-rope":
        values |= {
            "rotary_base": int(LLAMA3_ROPE["rope_theta"]),
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": LLAMA3_ROPE["factor"],
            "NTK_by_parts_low_freq_factor": LLAMA3_ROPE["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": LLAMA3_ROPE["high_freq_factor"],
            "NTK_original_ctx_len": LLAMA3_ROPE["original_max_position_embeddings"],
        }
    return HookedTransformerConfig(**values)


def without_injection(retrofit: LoopedTransformer) -> LoopedTransformer:
    """The retrofit's weights in a loop that starts from the prelude's output itself."""
    theirs = retrofit.cfg
    same = ("d_model", "d_head", "n_heads", "n_key_value_heads", "d_mlp", "d_vocab", "n_ctx", "eps")
    same += ("n_prelude", "n_core", "n_coda", "rotary_base", "rope_scaling", "default_prepend_bos")
    kept = {name: getattr(theirs, name) for name in same}
    cfg = LoopedConfig(device="cpu", dtype=torch.float64, **kept)
    native = LoopedTransformer.from_config(cfg)
    state = {name: w for name, w in retrofit.state_dict().items() if name != "injection.weight"}
    native.load_state_dict(state)
    return native


def make_pair(kind: str, loop: str, folder: Path) -> Pair:
    """One Llama, loaded by TransformerLens's own conversion and by ours; no weight is folded."""
    rope, kv_heads = KINDS[kind]
    source = write_retrofit(rope, folder, kv_heads)
    cfg = hooked_config(kind)
    hooked = HookedTransformer(cfg)
    hooked.load_and_process_state_dict(
        convert_llama_weights(source, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    looped = LoopedTransformer.from_pretrained(folder, device="cpu", dtype=torch.float64)
    assert looped.loop.R == 1
    return Pair(hooked.eval(), without_injection(looped) if loop == "native" else looped)


def some_tokens(rows: int = 2, positions: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (rows, positions), generator=generator)


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 4]).mean()
