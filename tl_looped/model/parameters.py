"""Names of all parameters that a configuration implies, in one place for adapters and tests."""

from __future__ import annotations

import torch

from tl_looped.model.cells import cell_class
from tl_looped.model.config import LoopedConfig


def parameter_names(cfg: LoopedConfig) -> list[str]:
    """``named_parameters`` of a LoopedTransformer of this configuration, as names only."""
    names = ["embed.W_E"]
    block = ["attn.qkv", "attn.out"]
    block += ["attn.q_bias", "attn.k_bias"] if cfg.qk_bias else []
    block += ["attn.v_bias"] if cfg.v_bias else []
    block += ["attn.q_norm.w", "attn.k_norm.w"] if cfg.qk_norm else []
    block += ["mlp.gate_up", "mlp.down"]
    block += [f"{norm}.w" for norm in cfg.norm_layout.norm_names]
    for stage, n in (
        ("prelude", cfg.n_prelude),
        ("core", cfg.n_core_weights),
        ("coda", cfg.n_coda),
    ):
        names += [f"{stage}.{i}.{name}" for i in range(n) for name in block]
    with torch.device("meta"):
        own = cell_class(cfg).make_modules(cfg)
    names += [f"{name}.{p}" for name, module in own.items() for p, _ in module.named_parameters()]
    names += ["final_norm.w"]
    names += [] if cfg.tie_embeddings else ["unembed.weight"]
    return names
