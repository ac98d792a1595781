"""What Huginn and the retrofitted models share: the Raven checkpoint format.

All of them call themselves ``huginn_raven`` and carry the same stale class names, and their
``auto_map`` is not reliable, so the tensor names tell them apart: ``norm_3``, ``norm_4`` and
``attn.qk_bias`` mean Huginn, ``attn.q_norm`` means OLMo-2, neither means Llama.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tl_looped.adapters.base import (
    Source,
    as_float,
    given,
    head_width,
    require,
    require_equal,
    trained_recurrences_of,
)
from tl_looped.adapters.reference import Package, Reference
from tl_looped.checks import one_of
from tl_looped.errors import ConfigError
from tl_looped.model.config import TRAINED, InitialState, Injection, LoopedConfig

_STAGES = {"prelude": "prelude", "core": "core_block", "coda": "coda"}
_STATE_MODES = {
    "random": InitialState.RANDOM,
    "embed-init": InitialState.PRELUDE,
    "skip-adapter": InitialState.PRELUDE_SKIP_ADAPTER,
}

HUGINN_TOKENS = {"bos": 65504, "eos": 65505, "pad": 65509}
RAVEN_REFERENCE = Reference(
    packages=(Package("transformers", "4.51.3"), Package("torch", "2.13.0")),
    activations={
        "prelude.{l}.hook_resid_post": "transformer.prelude.{l}",
        "recurrence.{r}.hook_injected": "transformer.adapter",
        "recurrence.{r}.blocks.{l}.hook_resid_post": "transformer.core_block.{l}",
        "coda.{l}.hook_resid_post": "transformer.coda.{l}",
    },
    rotary="rotary_emb.inv_freq",
    recurrences_argument="num_steps",
    state_argument="input_states",  # taken as it is, never rescaled
)
"""The retrofits' code. ``num_steps`` is an integer: a tensor without dimensions fails there."""


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
    require_equal(
        config, injection_type="linear", nonlin_name="SiLU", bias=False, test_time_noise=0,
        state_init="like-init", padded_vocab_size=vocab,
    )  # fmt: skip
    mode = given(config, "initial_state_mode", "random")
    mode = one_of(mode, "initial_state_mode", _STATE_MODES, ConfigError)
    trained = trained_recurrences_of(config, recurrences)
    if TRAINED not in config and trained is not None:
        trained = float(trained)  # the mean of what the authors drew for each step
    values: dict[str, Any] = {
        "d_model": d_model,
        "d_head": head_width(config, d_model, n_heads),
        "n_heads": n_heads,
        "n_key_value_heads": config.get("num_key_value_heads"),
        "d_mlp": mlp,
        "d_vocab": vocab,
        "n_prelude": p,
        "n_core": k,
        "n_coda": c,
        "n_recurrences": recurrences,
        "trained_recurrences": trained,
        "eps": as_float(eps),
        "injection": Injection.LINEAR,
        "initial_state": _STATE_MODES[mode],
        "initial_state_std": as_float(require(init_values(config), "std")[0]),
        "source_layers": config.get("source_layers"),
        "tie_embeddings": _tied(config),
    }
    return LoopedConfig(**(values | family))


def retrofit_generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without Huginn's special tokens, which published retrofits carry along.

    In the vocabulary of a retrofit they are pieces of words.
    """
    out = dict(config)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if out.get(key) in HUGINN_TOKENS.values():
            del out[key]
    return out


def init_values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Scales of the embedding and of the initial state."""
    (values,) = require(config, "init_values")
    if not isinstance(values, Mapping):
        raise ConfigError(f"init_values must be an object, got {values!r}")
    return values


def _tied(config: Mapping[str, Any]) -> Any:
    """Raven has a key of its own beside transformers'; the reference's class makes them equal."""
    own, general = config.get("tie_embeddings"), config.get("tie_word_embeddings")
    if own is not None and general is not None and own != general:
        raise ConfigError(
            f"config.json contradicts itself: tie_embeddings={own!r} and "
            f"tie_word_embeddings={general!r}; take the wrong one out"
        )
    return given({"own": general if own is None else own}, "own", False)


PUBLISHED: dict[str, Any] = {
    "activation_checkpoint_impl": "per-iteration",
    "architecture_class_name": "RecurrentGPT",
    "architectures": ["RavenForCausalLM"],
    "bias": False,
    "block_class_name": "SandwichBlock",
    "block_size": 4096,
    "effective_expected_depth": 132,
    "init_orthogonal": False,
    "init_strategy": "takase",
    "injection_type": "linear",
    "mean_backprop_depth": 8,
    "mlp_class_name": "GatedMLP",
    "model_type": "huginn_raven",
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "padding_multiple": 4096,
    "rope_base": 500000.0,
    "sampling_scheme": "poisson-lognormal-filling",
    "state_init": "like-init",
    "test_time_noise": 0,
    "test_time_noise_type": "fixed",
}
"""What all published retrofits say alike, also where it is stale and the reference ignores it."""
# Both inherited from Huginn's width, sqrt(2 / (5 * 5280)), and not computed from the model's own.
PUBLISHED_STD = 0.008703882797784892
_PUBLISHED_OUT_STD = 0.0005356869554443541


def raven_raw_config(cfg: LoopedConfig, module: str) -> dict[str, Any]:
    """The ``config.json`` of a retrofit, with every key that the published ones have.

    Args:
        cfg: The model's configuration.
        module: The reference's module of this family. It is named as in the published files, and
            not copied: whoever runs the model with the reference code puts that into the folder.
    """
    if cfg.n_heads * cfg.d_head != cfg.d_model:
        raise ConfigError(
            f"the format of {cfg.architecture!r} needs n_heads * d_head = d_model, got "
            f"{cfg.n_heads} * {cfg.d_head} and {cfg.d_model}; save_pretrained(folder) keeps "
            "everything, in tl_looped's own format"
        )
    modes = {mode: name for name, mode in _STATE_MODES.items()}
    init_values = {
        "embed_scale": cfg.embed_scale,
        "embedding": PUBLISHED_STD,
        "out_proj": _PUBLISHED_OUT_STD,
        "std": cfg.initial_state_std,
    }
    out = PUBLISHED | {
        "auto_map": {
            "AutoConfig": "raven_config_minimal.RavenConfig",
            "AutoModelForCausalLM": f"{module}.RavenForCausalLM",
        },
        "head_dim": cfg.d_head,
        "init_values": init_values,
        "initial_state_mode": modes[cfg.initial_state],
        "intermediate_size": cfg.d_mlp,
        "max_position_embeddings": cfg.n_ctx,
        "mean_recurrence": cfg.n_recurrences,
        "n_embd": cfg.d_model,
        "n_heads": cfg.n_heads,
        "n_layers": cfg.n_prelude + cfg.n_core + cfg.n_coda,
        "n_layers_in_coda": cfg.n_coda,
        "n_layers_in_prelude": cfg.n_prelude,
        "n_layers_in_recurrent_block": cfg.n_core,
        "norm_eps": cfg.eps,
        "num_key_value_heads": cfg.n_kv_heads,
        "padded_vocab_size": cfg.d_vocab,
        "qk_bias": cfg.qk_bias,
        "rope_theta": cfg.rotary_base,
        "tie_embeddings": cfg.tie_embeddings,
        "torch_dtype": str(cfg.dtype).removeprefix("torch."),
        "vocab_size": cfg.d_vocab,
    }
    if cfg.rope_scaling is not None:
        out["rope_scaling"] = cfg.rope_scaling
    if cfg.source_layers is not None:
        out["source_layers"] = cfg.source_layers  # not of the reference, which keeps unknown keys
    trained = cfg.trained_recurrences
    is_mean = isinstance(trained, float) and trained == cfg.n_recurrences
    if cfg.source_layers is not None or not is_mean:
        # The reference has one key for the number that runs and the mean of the training.
        out[TRAINED] = trained
    return dict(sorted(out.items()))


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
