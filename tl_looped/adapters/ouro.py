"""Ouro: (0, 24 x 4, 0) and (0, 48 x 4, 0), sandwich norms, final norm after every loop, exit gate.

Nothing is injected: the embedding is the state that recurrence 0 starts from. The shipped tokenizer
says bos = eos = pad = 0; 1, 2 and 0 are right. Another tokenizer keeps what it says.

Logits are always those of the last recurrence. The reference reads them elsewhere if the config has
``early_exit_step``, which is refused, or an ``early_exit_threshold`` below one, which becomes
``cfg.exit_threshold``, the default of ``model.exits(...)``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from tl_looped.adapters.base import (
    Adapter,
    HubAlias,
    Source,
    as_float,
    given,
    head_width,
    require,
    require_equal,
)
from tl_looped.adapters.reference import Package, Reference
from tl_looped.adapters.registry import register_adapter
from tl_looped.adapters.rope import read_rope
from tl_looped.errors import ConfigError
from tl_looped.model.config import LoopedConfig, NormLayout

_NORMS = {
    "ln1": "input_layernorm",
    "ln1_post": "input_layernorm_2",
    "ln2": "post_attention_layernorm",
    "ln2_post": "post_attention_layernorm_2",
}
_SHIPPED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The first three of the shipped tokenizer."""


@register_adapter
class OuroAdapter(Adapter):
    """ByteDance/Ouro-1.4B and Ouro-2.6B, and their -Thinking versions."""

    name = "ouro"
    aliases: ClassVar = {
        "ouro-1.4b": HubAlias("ByteDance/Ouro-1.4B"),
        "ouro-2.6b": HubAlias("ByteDance/Ouro-2.6B"),
        "ouro-1.4b-thinking": HubAlias("ByteDance/Ouro-1.4B-Thinking"),
        "ouro-2.6b-thinking": HubAlias("ByteDance/Ouro-2.6B-Thinking"),
    }
    special_token_ids: ClassVar = {"bos": 1, "eos": 2, "pad": 0}
    reference: ClassVar = Reference(
        packages=(Package("transformers", "4.55.4"), Package("torch", "2.13.0")),
        activations={
            "recurrence.{r}.blocks.{l}.hook_resid_post": "model.layers.{l}",
            "recurrence.{r}.hook_state_out": "model.norm",
        },
        rotary="model.rotary_emb.inv_freq",
        norm_eps="variance_epsilon",
        # The number is copied when the model is made. Without a step, a token whose exit
        # probability rounds to one leaves earlier.
        recurrences_config={"total_ut_steps": 0, "early_exit_step": -1},
        arguments={"use_cache": False},
    )

    def matches(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """By ``model_type`` or the architecture's name."""
        named = "OuroForCausalLM" in (config.get("architectures") or [])
        return config.get("model_type") == "ouro" or named

    def config(self, config: Mapping[str, Any]) -> LoopedConfig:
        """See the module's docstring."""
        d_model, layers, heads, mlp, vocab = require(
            config,
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
        )
        n_ctx, eps, steps = require(
            config, "max_position_embeddings", "rms_norm_eps", "total_ut_steps"
        )
        theta, scaling = read_rope(config)
        if theta is None:
            require(config, "rope_theta")
        require_equal(config, hidden_act="silu", use_sliding_window=False, attention_bias=False)
        _refuse_other_attention(config.get("layer_types"))
        _refuse_exit_step(config.get("early_exit_step"), steps)
        return LoopedConfig(
            architecture=self.name,
            d_model=d_model,
            d_head=head_width(config, d_model, heads),
            n_heads=heads,
            n_key_value_heads=config.get("num_key_value_heads"),
            d_mlp=mlp,
            d_vocab=vocab,
            n_ctx=n_ctx,
            n_core=layers,
            n_recurrences=steps,
            trained_recurrences=steps,
            norm_layout=NormLayout.SANDWICH,
            loop_norm=True,
            exit_gate=True,
            exit_threshold=as_float(given(config, "early_exit_threshold", 1.0)),
            rotary_base=as_float(theta),
            rope_scaling=scaling,
            eps=as_float(eps),
            tie_embeddings=given(config, "tie_word_embeddings", False),
        )

    def special_tokens(self, tokenizer: Any) -> dict[str, str]:
        """Those of the shipped tokenizer, where one with its tokens says 0 or nothing."""
        first = tuple(tokenizer.convert_ids_to_tokens(range(min(3, len(tokenizer)))))
        if first != _SHIPPED_TOKENS:
            return {}
        return {
            kind: _SHIPPED_TOKENS[token_id]
            for kind, token_id in self.special_token_ids.items()
            if getattr(tokenizer, f"{kind}_token_id") in (0, None)
        }

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Separate query, key and value, gate and up matrices are joined."""
        out = {
            "embed.W_E": Source(("model.embed_tokens.weight",)),
            "final_norm.w": Source(("model.norm.weight",)),
            "exit_gate.weight": Source(("model.early_exit_gate.weight",)),
            "exit_gate.bias": Source(("model.early_exit_gate.bias",)),
        }
        if not cfg.tie_embeddings:
            out["unembed.weight"] = Source(("lm_head.weight",))
        q, kv, mlp = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head, cfg.d_mlp or 0
        for i in range(cfg.n_core):
            ours, theirs = f"core.{i}", f"model.layers.{i}"
            qkv = tuple(f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv")
            gate_up = tuple(f"{theirs}.mlp.{name}_proj.weight" for name in ("gate", "up"))
            out[f"{ours}.attn.qkv"] = Source(qkv, rows=(q, kv, kv))
            out[f"{ours}.attn.out"] = Source((f"{theirs}.self_attn.o_proj.weight",))
            out[f"{ours}.mlp.gate_up"] = Source(gate_up, rows=(mlp, mlp))
            out[f"{ours}.mlp.down"] = Source((f"{theirs}.mlp.down_proj.weight",))
            for our_norm, their_norm in _NORMS.items():
                out[f"{ours}.{our_norm}.w"] = Source((f"{theirs}.{their_norm}.weight",))
        return out

    def duplicates(self, cfg: LoopedConfig) -> dict[str, str]:
        """A stored copy of a tied unembedding."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if cfg.tie_embeddings else {}


def _refuse_other_attention(layer_types: Any) -> None:
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise ConfigError(
            f"config.json has layer_types={layer_types!r}; only 'full_attention' is supported: "
            "every layer attends to everything before a token"
        )


def _refuse_exit_step(step: Any, n_recurrences: Any) -> None:
    """The reference ignores a step that it does not reach, and the last one is where we read."""
    if step is None:
        return
    if type(step) is not int:
        raise ConfigError(f"early_exit_step must be an integer or null, got {step!r}")
    if type(n_recurrences) is int and 0 <= step < n_recurrences - 1:
        raise ConfigError(
            f"config.json has early_exit_step={step}: the reference then reads its logits after "
            f"recurrence {step}, and here they are those of the last one. Set early_exit_step to "
            f"null and load with n_recurrences={step + 1}, which gives the same logits"
        )
