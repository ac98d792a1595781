"""Feedforward families that a looped model can be made of, and what their configs must say.

A family is a row of :data:`FAMILIES`: where its norms stand, which switches it turns on and which
fields may have one value only. What a field does to the forward pass is known for every field that
is listed here; any other field of transformers' class that differs from its default is refused, not
ignored. Fields that transformers' class does not have, it ignores, and so is it here. Two more nets
are under this one: the tensors must be exactly those that are expected, and the finished
model is run against its source (``tl_looped.retrofitting.probe``).

Mistral's sliding window changes nothing for as many tokens as it is wide, and the looped model has
none; so the context is cut to the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tl_looped.adapters import Source
from tl_looped.adapters.base import as_float
from tl_looped.adapters.raven import PUBLISHED_STD
from tl_looped.adapters.rope import read_rope
from tl_looped.errors import ConfigError
from tl_looped.model.config import InitialState, Injection, LoopedConfig, NormLayout
from tl_looped.retrofitting.layers import LayerPlan

_PRE = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
_POST = {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"}

# Fields that are read here, or that change nothing: labels, generation, initialisation, training.
_UNDERSTOOD = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings", "hidden_act",
    "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types",
    "max_window_layers", "model_type", "transformers_version", "initializer_range", "use_cache",
    "attention_dropout", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id",
    "architectures", "dtype", "torch_dtype", "id2label", "label2id", "problem_type",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "_name_or_path", "auto_map",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One feedforward family.

    Args:
        model_class: Its class in transformers.
        retrofit: Architecture of its retrofits; the name of an adapter if one reads their format.
        layout: Where its norms stand.
        norms: Our norm -> its norm.
        switches: Further fields of :class:`LoopedConfig`.
        fixed: Fields that may have one value only.
    """

    model_class: str
    retrofit: str
    layout: NormLayout
    norms: Mapping[str, str]
    switches: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "retrofit-llama", NormLayout.PRE, _PRE),
    "olmo2": Family("Olmo2ForCausalLM", "retrofit-olmo", NormLayout.POST, _POST, {"qk_norm": True}),
    # Its block is Llama's, and so is the format of its retrofits.
    "mistral": Family("MistralForCausalLM", "retrofit-llama", NormLayout.PRE, _PRE),
    # No published format has biases, or norms on single heads: these are saved in tl_looped's own.
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "retrofit-qwen2",
        NormLayout.PRE,
        _PRE,
        {"qk_bias": True, "v_bias": True},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "retrofit-qwen3",
        NormLayout.PRE,
        _PRE,
        {"qk_norm": True, "qk_norm_per_head": True},
    ),
}
"""By ``model_type``."""

_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def family_of(model_type: Any, name: str) -> Family:
    """The family of a ``model_type``.

    Raises:
        ConfigError: it is a looped model already, or none that fits.
    """
    if model_type in ("huginn_raven", "ouro", "tl_looped"):
        raise ConfigError(
            f"{name} (model_type {model_type!r}) is a looped model already; "
            "LoopedTransformer.from_pretrained loads it"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{name} has model_type {model_type!r}; a looped model can be made of "
            f"{list(FAMILIES)}. Other families differ in their norms, biases, positions or MLPs"
        )
    return FAMILIES[model_type]


def looped_config(
    config: Any, plan: LayerPlan, name: str, injection: bool, n_recurrences: int
) -> LoopedConfig:
    """The looped model's configuration, on the meta device.

    Args:
        config: The feedforward model's, as transformers holds it.
        plan: Which layer goes where.
        name: Of the feedforward model, for the record.
        injection: With an adapter; otherwise the state goes round as it is.
        n_recurrences: Of the loop.

    Raises:
        ConfigError: a field asks for something that a looped model does not have.
    """
    family = family_of(config.model_type, name)
    refuse_what_does_not_fit(config, family, name)
    n_heads = config.num_attention_heads
    theta, scaling = _rotary(config, name)
    loop: dict[str, Any] = {"architecture": "virtual-loop"}
    if injection:
        loop = {
            "architecture": family.retrofit,
            "injection": Injection.LINEAR,
            "initial_state": InitialState.RANDOM,
            "initial_state_std": PUBLISHED_STD,
        }
    return LoopedConfig(
        d_model=config.hidden_size,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        n_heads=n_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=_context(config),
        n_prelude=len(plan.prelude),
        n_core=len(plan.core),
        n_coda=len(plan.coda),
        n_recurrences=n_recurrences,
        eps=config.rms_norm_eps,
        norm_layout=family.layout,
        rotary_base=theta,
        rope_scaling=scaling,
        # The published retrofits are untied, and their loops are trained so.
        tie_embeddings=not injection and bool(config.tie_word_embeddings),
        model_name=name,
        device="meta",
        source_layers={"model": name} | {s: list(layers) for s, layers in plan.stages().items()},
        **loop,
        **family.switches,
    )


def feedforward_sources(
    cfg: LoopedConfig, family: Family, plan: LayerPlan, tied: bool
) -> dict[str, Source]:
    """For every parameter of the looped model but the adapter, its tensors in the feedforward one.

    Args:
        cfg: The looped model's configuration.
        family: Of the feedforward model.
        plan: Which layer goes where.
        tied: The feedforward model's unembedding is its embedding.
    """
    unembedding = "model.embed_tokens.weight" if tied else "lm_head.weight"
    out = {
        "embed.W_E": Source(("model.embed_tokens.weight",)),
        "final_norm.w": Source(("model.norm.weight",)),
    }
    if not cfg.tie_embeddings:
        out["unembed.weight"] = Source((unembedding,))
    q, kv, mlp = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head, cfg.d_mlp or 0
    for stage, layers in plan.stages().items():
        for i, layer in enumerate(layers):
            ours, theirs = f"{stage}.{i}", f"model.layers.{layer}"
            qkv = tuple(f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv")
            gate_up = tuple(f"{theirs}.mlp.{x}_proj.weight" for x in ("gate", "up"))
            out[f"{ours}.attn.qkv"] = Source(qkv, rows=(q, kv, kv))
            out[f"{ours}.attn.out"] = Source((f"{theirs}.self_attn.o_proj.weight",))
            out[f"{ours}.mlp.gate_up"] = Source(gate_up, rows=(mlp, mlp))
            out[f"{ours}.mlp.down"] = Source((f"{theirs}.mlp.down_proj.weight",))
            for our_norm, their_norm in family.norms.items():
                out[f"{ours}.{our_norm}.w"] = Source((f"{theirs}.{their_norm}.weight",))
            biases = "qk" * cfg.qk_bias + "v" * cfg.v_bias
            for x in biases:
                out[f"{ours}.attn.{x}_bias"] = Source((f"{theirs}.self_attn.{x}_proj.bias",))
            if cfg.qk_norm:
                for norm in ("q_norm", "k_norm"):
                    out[f"{ours}.attn.{norm}.w"] = Source((f"{theirs}.self_attn.{norm}.weight",))
    return out


def refuse_what_does_not_fit(config: Any, family: Family, name: str) -> None:
    """Raise for the first field that a looped model of this family cannot honour."""
    for key, wanted in (_FIXED | dict(family.fixed)).items():
        value = getattr(config, key, wanted)
        if value != wanted:
            raise ConfigError(
                f"{name} has {key}={value!r}; a looped model can be made with {key}={wanted!r} only"
            )
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if kinds or getattr(config, "use_sliding_window", False):
        raise ConfigError(
            f"{name} has layers of sliding or other attention (layer_types {sorted(kinds)}, "
            f"use_sliding_window {getattr(config, 'use_sliding_window', False)!r}); "
            "a looped model attends to everything before a token"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{name} is quantised (quantization_config); load it dequantised and pass the model"
        )
    defaults = type(config)().to_dict()
    for key, default in defaults.items():
        value = getattr(config, key, default)
        if key not in _UNDERSTOOD and value != default:
            raise ConfigError(
                f"{name} has {key}={value!r}, which this version of tl_looped does not know; "
                f"ignoring it could change the result. Its default is {default!r}"
            )


def _context(config: Any) -> int:
    """Longest sequence for which the looped model is the feedforward one."""
    window = getattr(config, "sliding_window", None)
    longest: int = config.max_position_embeddings
    return longest if window is None else min(longest, window)


def _rotary(config: Any, name: str) -> tuple[float, dict[str, Any] | None]:
    """Theta, and Llama 3's scaling or None."""
    try:
        theta, scaling = read_rope({"rope_parameters": config.rope_parameters})
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    if theta is None:
        raise ConfigError(f"{name} has no rope_theta: rope_parameters={config.rope_parameters!r}")
    return as_float(theta), scaling
