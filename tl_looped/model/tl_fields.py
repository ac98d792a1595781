"""TransformerLens's fields of a configuration that say how a looped model is, and cannot be chosen.

HookedTransformer and TransformerBridge read dozens of fields that switch parts of other families on
(local attention, soft caps, experts). Code that is made for them asks for these fields. Here they
have the value that is right for a looped model, fixed or computed from the configuration's own
fields; setting another value is refused, as the forward pass would not honour it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tl_looped._compat import TransformerLensConfig

_HF_NAMES = {
    "huginn": "RavenForCausalLM",
    "retrofit-llama": "RavenForCausalLM",
    "retrofit-olmo": "RavenForCausalLM",
    "ouro": "OuroForCausalLM",
}
"""By family, the class that its checkpoints name."""

OF_TOKENIZER = (
    "tokenizer_name",
    "tokenizer_prepends_bos",
    "tokenizer_appends_eos",
    "default_padding_side",
)
"""What TransformerLens notes of a tokenizer in a configuration; see ``OwnedFields``."""


class TransformerLensFields(TransformerLensConfig):
    """Fields of HookedTransformerConfig 3.5 and TransformerBridgeConfig 4.3 that cannot be chosen.

    None of them is saved: a saved configuration is what it was.
    """

    if TYPE_CHECKING:
        # Of LoopedConfig, from which the rest follows.
        architecture: str
        norm_layout: Any
        rotary_style: Any
        rope_scaling: dict[str, Any] | None
        qk_norm_per_head: bool
        tie_embeddings: bool

        @property
        def rope_type(self) -> str | None: ...  # noqa: D102

    # Attention: causal, over all earlier tokens.
    attention_dir = "causal"
    use_local_attn = False
    window_size: int | None = None
    attn_types: list[str] | None = None
    use_attn_scale = True
    scale_attn_by_inverse_layer_idx = False
    attn_scores_soft_cap = -1.0
    attn_implementation: str | None = None
    per_layer_head_dim: list[int] | None = None
    per_layer_num_key_value_heads: list[int] | None = None
    qk_norm_after_rope = False
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None
    split_attention_weights = False

    # Positions: one rotary base for all layers.
    rotary_base_local: float | None = None
    rotary_scaling_factor = 1.0
    use_yarn_rope = False
    yarn_factor = 1.0
    yarn_attention_factor = 1.0
    yarn_beta_fast = 32.0
    yarn_beta_slow = 1.0
    yarn_original_max_position_embeddings = 4096

    # The stream, the MLP and the logits.
    parallel_attn_mlp = False
    post_embedding_ln = False
    scale_embedding: bool | None = None
    norm_topk_prob = False
    rmsnorm_uses_offset = False
    output_logits_soft_cap = -1.0
    use_hook_tokens = False

    # Where it comes from: weights of one model, as they are.
    from_checkpoint = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    load_in_4bit = False
    trust_remote_code = False
    decoder_start_token_id: int | None = None
    is_audio_model = False
    is_visual_model = False
    is_stateful = False
    is_multimodal = False
    vision_hidden_size: int | None = None
    vision_num_layers: int | None = None
    vision_num_heads: int | None = None
    mm_tokens_per_image: int | None = None

    # Whether weights were drawn at random, in TransformerLens. A note, which may be set.
    init_weights = True

    @property
    def attn_scale(self) -> float:
        """What scores are divided by: the square root of ``d_head``."""
        return math.sqrt(self.d_head)

    @property
    def head_dim(self) -> int:
        """``d_head``."""
        return self.d_head

    @property
    def d_vocab_out(self) -> int:
        """``d_vocab``: inputs and outputs have the same vocabulary."""
        return self.d_vocab

    @property
    def rotary_dim(self) -> int:
        """``d_head``: all dimensions of a head rotate."""
        return self.d_head

    @property
    def rotary_adjacent_pairs(self) -> bool:
        """Whether dimensions ``(2i, 2i + 1)`` rotate together (``rotary_style``)."""
        return bool(self.rotary_style == "interleaved")

    @property
    def rotary_interleaved_cos_sin(self) -> bool:
        """``rotary_adjacent_pairs``, as TransformerBridge calls it."""
        return self.rotary_adjacent_pairs

    @property
    def use_NTK_by_parts_rope(self) -> bool:
        """Whether ``rope_scaling`` is Llama 3's."""
        return self.rope_type == "llama3"

    @property
    def NTK_by_parts_factor(self) -> float:
        """``factor`` of ``rope_scaling``; TransformerLens's default without one."""
        return float(self._scaling("factor", 8.0))

    @property
    def NTK_by_parts_low_freq_factor(self) -> float:
        """``low_freq_factor`` of ``rope_scaling``; TransformerLens's default without one."""
        return float(self._scaling("low_freq_factor", 1.0))

    @property
    def NTK_by_parts_high_freq_factor(self) -> float:
        """``high_freq_factor`` of ``rope_scaling``; TransformerLens's default without one."""
        return float(self._scaling("high_freq_factor", 4.0))

    @property
    def NTK_original_ctx_len(self) -> int:
        """Its ``original_max_position_embeddings``; TransformerLens's default without one."""
        return int(self._scaling("original_max_position_embeddings", 8192.0))

    @property
    def use_normalization_before_and_after(self) -> bool:
        """Whether sublayers have a norm before and one behind (``norm_layout`` ``"sandwich"``)."""
        return bool(self.norm_layout == "sandwich")

    @property
    def use_qk_norm(self) -> bool:
        """``qk_norm_per_head``: queries and keys of each head pass an RMSNorm."""
        return self.qk_norm_per_head

    @property
    def tie_word_embeddings(self) -> bool:
        """``tie_embeddings``."""
        return self.tie_embeddings

    @property
    def original_architecture(self) -> str | None:
        """The class that checkpoints of the family name; None for one without such checkpoints."""
        return _HF_NAMES.get(self.architecture)

    @property
    def n_params(self) -> int:
        """TransformerLens's number of hidden weights, by its formula, over the effective layers.

        Weights of the loop count once per recurrence, each key-value head once per query head, and
        embeddings, biases and gains not at all. For the numbers that the model stores:
        ``sum(p.numel() for p in model.parameters())``.
        """
        assert self.d_mlp is not None
        attention = 4 * self.d_model * self.d_head * self.n_heads
        return self.n_layers * (attention + 3 * self.d_model * self.d_mlp)

    def _scaling(self, key: str, otherwise: float) -> float | int:
        return otherwise if self.rope_scaling is None else self.rope_scaling[key]

    def is_layer_norm_activation(self) -> bool:
        """As in TransformerLens: whether the MLP's activation normalises. It does not."""
        return self.act_fn.endswith("_ln")


_COMPUTED_FROM: dict[str, str] = {
    "attn_scale": "d_head",
    "head_dim": "d_head",
    "rotary_dim": "d_head",
    "d_vocab_out": "d_vocab",
    "rotary_adjacent_pairs": "rotary_style",
    "rotary_interleaved_cos_sin": "rotary_style",
    "use_NTK_by_parts_rope": "rope_scaling",
    "NTK_by_parts_factor": "rope_scaling",
    "NTK_by_parts_low_freq_factor": "rope_scaling",
    "NTK_by_parts_high_freq_factor": "rope_scaling",
    "NTK_original_ctx_len": "rope_scaling",
    "use_normalization_before_and_after": "norm_layout",
    "use_qk_norm": "qk_norm_per_head",
    "tie_word_embeddings": "tie_embeddings",
    "original_architecture": "architecture",
    "n_params": "the sizes and n_recurrences",
}
_COMPUTED_FROM |= dict.fromkeys(OF_TOKENIZER, "the model's tokenizer (model.set_tokenizer)")

OWN_FIXED: dict[str, Any] = {
    "attn_only": False,
    "num_experts": None,
    "experts_per_token": None,
    "layer_norm_folding": False,
    "positional_embedding_type": "rotary",
    "uses_rms_norm": True,
    "final_rms": True,
}
"""Those that are fields of the configuration itself, too, and of every saved one."""

FIXED = frozenset(
    name
    for name, value in vars(TransformerLensFields).items()
    if not (name.startswith("_") or callable(value) or name == "init_weights")
) | set(OF_TOKENIZER)
"""Names of all that cannot be chosen, but for ``OWN_FIXED``."""


def why_fixed(name: str, only: Any) -> str:
    """Why a field has no other value than this one."""
    source = _COMPUTED_FROM.get(name)
    if source is not None:
        return f"it follows from {source}, which makes it {only!r}"
    if name == "use_hook_tokens":
        return f"it is {only!r}, there is no hook_tokens: edit tokens and run the model on them"
    return f"it is {only!r} in every looped model, and no run would honour another value"
