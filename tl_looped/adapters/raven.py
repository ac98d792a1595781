"""What Huginn and the retrofitted models share: the Raven checkpoint format.

All of them call themselves ``huginn_raven`` and carry the same stale class names, and their
``auto_map`` is not reliable, so the tensor names tell them apart: ``norm_3``, ``norm_4`` and
``attn.qk_bias`` mean Huginn, ``attn.q_norm`` means OLMo-2, neither means Llama.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tl_looped.adapters.base import Source, require, require_equal
from tl_looped.errors import ConfigError
from tl_looped.model.config import InitialState, Injection, LoopedConfig

_STAGES = {"prelude": "prelude", "core": "core_block", "coda": "coda"}
_STATE_MODES = {
    "random": InitialState.RANDOM,
    "embed-init": InitialState.PRELUDE,
    "skip-adapter": InitialState.PRELUDE_SKIP_ADAPTER,
}


def is_raven(config: Mapping[str, Any]) -> bool:
    """Whether a config is of the Raven format."""
    return config.get("model_type") == "huginn_raven" or "RavenForCausalLM" in (
        config.get("architectures") or []
    )


def has_tensor(tensor_names: Collection[str], suffix: str) -> bool:
    """Whether any tensor name ends with ``suffix``."""
    return any(name.endswith(suffix) for name in tensor_names)


def raven_config(config: Mapping[str, Any], **family: Any) -> LoopedConfig:
    """The part of the configuration that is read the same way in all Raven checkpoints.

    Args:
        config: The checkpoint's ``config.json``.
        **family: What the family decides.
    """
    d_model, n_heads, vocab, mlp = require(
        config, "n_embd", "n_heads", "vocab_size", "intermediate_size"
    )
    p, k, c, recurrences, eps = require(
        config,
        "n_layers_in_prelude",
        "n_layers_in_recurrent_block",
        "n_layers_in_coda",
        "mean_recurrence",
        "norm_eps",
    )
    (init_values,) = require(config, "init_values")
    require_equal(
        config, injection_type="linear", nonlin_name="SiLU", bias=False, test_time_noise=0,
        state_init="like-init", padded_vocab_size=vocab,
    )  # fmt: skip
    mode = config.get("initial_state_mode") or "random"
    if mode not in _STATE_MODES:
        raise ConfigError(f"initial_state_mode must be one of {list(_STATE_MODES)}, got {mode!r}")
    values: dict[str, Any] = {
        "d_model": d_model,
        "d_head": config.get("head_dim") or d_model // n_heads,
        "n_heads": n_heads,
        "n_key_value_heads": config.get("num_key_value_heads"),
        "d_mlp": mlp,
        "d_vocab": vocab,
        "n_prelude": p,
        "n_core": k,
        "n_coda": c,
        "n_recurrences": recurrences,
        "eps": eps,
        "injection": Injection.LINEAR,
        "initial_state": _STATE_MODES[mode],
        "initial_state_std": require(init_values, "std")[0],
        "tie_embeddings": bool(
            config.get("tie_embeddings", config.get("tie_word_embeddings", False))
        ),
    }
    return LoopedConfig(**(values | family))


def raven_sources(cfg: LoopedConfig, norms: Mapping[str, str]) -> dict[str, Source]:
    """Sources of a Raven checkpoint.

    Args:
        cfg: The model's configuration.
        norms: Our norm -> the checkpoint's, for the norms of one block.
    """
    out = {
        "embed.W_E": Source(("transformer.wte.weight",)),
        "injection.weight": Source(("transformer.adapter.weight",)),
        "final_norm.w": Source(("transformer.ln_f.weight",)),
    }
    if not cfg.tie_embeddings:
        out["unembed.weight"] = Source(("lm_head.weight",))
    sizes = {"prelude": cfg.n_prelude, "core": cfg.n_core, "coda": cfg.n_coda}
    for stage, size in sizes.items():
        for i in range(size):
            ours, theirs = f"{stage}.{i}", f"transformer.{_STAGES[stage]}.{i}"
            out[f"{ours}.attn.qkv"] = Source((f"{theirs}.attn.Wqkv.weight",))
            out[f"{ours}.attn.out"] = Source((f"{theirs}.attn.proj.weight",))
            out[f"{ours}.mlp.gate_up"] = Source((f"{theirs}.mlp.fc.weight",))
            out[f"{ours}.mlp.down"] = Source((f"{theirs}.mlp.proj.weight",))
            for our_norm, their_norm in norms.items():
                out[f"{ours}.{our_norm}.w"] = Source((f"{theirs}.{their_norm}.weight",))
            if cfg.qk_bias:
                bias = (f"{theirs}.attn.qk_bias",)
                out[f"{ours}.attn.q_bias"] = Source(bias, index=(0, 0))
                out[f"{ours}.attn.k_bias"] = Source(bias, index=(1, 0))
            if cfg.qk_norm:
                out[f"{ours}.attn.q_norm.w"] = Source((f"{theirs}.attn.q_norm.weight",))
                out[f"{ours}.attn.k_norm.w"] = Source((f"{theirs}.attn.k_norm.weight",))
    return out


def raven_duplicates(cfg: LoopedConfig) -> dict[str, str]:
    """A tied checkpoint may store its unembedding all the same."""
    return {"lm_head.weight": "transformer.wte.weight"} if cfg.tie_embeddings else {}
