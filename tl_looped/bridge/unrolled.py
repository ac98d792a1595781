"""A looped model at a fixed number of recurrences, as a plain stack of layers.

The stack has ``p + k R + c`` layers, which hold no weights: they read those of the looped model,
whose parameters this module registers once each. What a looped model's program does between two
layers is the ``boundary`` of the layer that follows, so that a layer's input and output are what
``hook_resid_pre`` and ``hook_resid_post`` of the looped model give. A model that does nothing there
has no boundaries.

Attention has no forward pass here: TransformerLens's attention component computes it from the
projections. The module runs inside a bridge only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_looped._compat import Module
from tl_looped.bridge.tied import TiedEmbedding, TiedLinear, TiedNorm, TiedUnembedding
from tl_looped.errors import InputError
from tl_looped.model.attention_weights import AttentionWeights
from tl_looped.model.block import BlockWeights
from tl_looped.model.cells import why_not_additive
from tl_looped.model.config import LoopedConfig
from tl_looped.model.context import LoopRun, RunContext
from tl_looped.model.geometry import LoopGeometry
from tl_looped.model.masks import real_tokens
from tl_looped.model.mlp import MLPWeights
from tl_looped.model.program import Do, Op
from tl_looped.model.running import Parts, execute


class UnrolledAttention(Module):
    """The projections of an attention layer, under the names of the Llama family."""

    def __init__(self, cfg: LoopedConfig, weights: AttentionWeights, layer_idx: int) -> None:
        super().__init__()
        d, n_q, n_kv = cfg.d_head, cfg.n_heads, cfg.n_kv_heads
        q_bias, k_bias = ("q_bias", "k_bias") if cfg.qk_bias else (None, None)
        self.q_proj = TiedLinear(weights, "qkv", 0, n_q * d, q_bias)
        self.k_proj = TiedLinear(weights, "qkv", n_q * d, (n_q + n_kv) * d, k_bias)
        v_bias = "v_bias" if cfg.v_bias else None
        self.v_proj = TiedLinear(weights, "qkv", (n_q + n_kv) * d, None, v_bias)
        self.o_proj = TiedLinear(weights, "out")
        if cfg.qk_norm:
            self.q_norm = TiedNorm(weights.q_norm)
            self.k_norm = TiedNorm(weights.k_norm)
        # Read by TransformerLens's attention.
        self.head_dim, self.num_key_value_groups = d, n_q // n_kv
        self.scaling = 1.0 / math.sqrt(d)
        self.layer_idx = layer_idx


class UnrolledMLP(Module):
    """A gated SiLU MLP, under the names of the Llama family."""

    def __init__(self, weights: MLPWeights) -> None:
        super().__init__()
        self.gate_proj = TiedLinear(weights, "gate_up", 0, weights.d_mlp)
        self.up_proj = TiedLinear(weights, "gate_up", weights.d_mlp)
        self.down_proj = TiedLinear(weights, "down")

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """MLP output."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Boundary(Module):
    """What happens to the stream between two layers.

    Args:
        ops: The steps of the program between them.
        parts: What they run on.
    """

    def __init__(self, ops: Sequence[Op], parts: Parts) -> None:
        super().__init__()
        self.ops, self.parts = ops, parts

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], run: LoopRun
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the next layer receives, from what the layer before it wrote."""
        return execute(self.ops, x, run, self.parts)


class UnrolledLayer(Module):
    """One effective layer; a norm that the layout lacks is the identity.

    ``resid_mid`` does nothing. TransformerLens puts its hook there: its usual place for
    ``hook_resid_mid``, the input of ``ln2``, would leave the residual stream itself unedited.
    """

    ln1: nn.Module
    ln1_post: nn.Module
    ln_mid: nn.Module
    ln2: nn.Module
    ln2_post: nn.Module
    ln_out: nn.Module

    def __init__(
        self, i: int, cfg: LoopedConfig, weights: BlockWeights, boundary: Boundary | None
    ) -> None:
        super().__init__()
        if boundary is not None:
            self.boundary = boundary
        self.attn = UnrolledAttention(cfg, weights.attn, i)
        self.mlp = UnrolledMLP(weights.mlp)
        self.resid_mid = nn.Identity()
        for name in ("ln1", "ln1_post", "ln_mid", "ln2", "ln2_post", "ln_out"):
            present = name in cfg.norm_layout.norm_names
            self.add_module(name, TiedNorm(getattr(weights, name)) if present else nn.Identity())

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream after this layer."""
        attn_out, _ = self.attn(
            self.ln1(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
        )
        x = self.resid_mid(self.ln_mid(hidden_states + self.ln1_post(attn_out)))
        out: Tensor = self.ln_out(x + self.ln2_post(self.mlp(self.ln2(x))))
        return out


class UnrolledModel(Module):
    """A looped model's weights, run as ``p + k R + c`` layers.

    Args:
        model: The looped model, whose parameters become this module's.
        loop: Its geometry, with the number of recurrences to unroll.
        state_seed: Seed of a random initial state.

    Attributes:
        looped_cfg: The looped model's configuration.
        weights: Its modules that hold parameters, by name.
    """

    weights: Any
    layers: Any  # UnrolledLayers, until a bridge puts its blocks around them

    def __init__(self, model: Any, loop: LoopGeometry, state_seed: int) -> None:
        super().__init__()
        self.looped_cfg: LoopedConfig = model.cfg
        self.loop, self.state_seed = loop, state_seed
        self.program, self.cell = model.program_at(loop.R), model.cell
        sites = [model.cell.site(r) for r in range(loop.R)]
        self._parts: Parts = replace(model.silent_parts, sites=sites)
        self.weights = nn.ModuleDict(
            {
                name: child
                for name, child in model.named_children()
                if name == "unembed" or next(child.parameters(), None) is not None
            }
        )
        self.tok_embed = TiedEmbedding(self.weights["embed"])
        self.layers = nn.ModuleList(self._layer(i) for i in range(loop.n_layers))
        self.norm = TiedNorm(model.final_norm)
        self.lm_head = TiedUnembedding(self.weights["unembed"])
        self.train(model.training)

    @property
    def has_boundaries(self) -> bool:
        """Whether anything happens between two layers."""
        return self.cell.why_rescaled(self.looped_cfg) is not None

    @property
    def is_seeded(self) -> bool:
        """Whether the output depends on ``state_seed``."""
        return self.cell.starts_anew(state_given=False)

    def why_not_additive(self) -> str | None:
        """Why the residual stream is not the plain sum of all writes, or None if it is."""
        return why_not_additive(self.looped_cfg)

    def _layer(self, i: int) -> UnrolledLayer:
        place = self.loop.locate(i)
        boundary = Boundary(self._before(i), self._parts) if self.has_boundaries else None
        stage, number = self.looped_cfg.weights_of(place)
        weights = self.weights[stage][number]
        return UnrolledLayer(i, self.looped_cfg, weights, boundary)

    def _before(self, i: int) -> list[Op]:
        """The steps before layer ``i``; the final norm and the gate are no part of the stack."""
        return [op for op in self.program.before(i) if op.do is not Do.GATE and not op.joined]

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        prelude_output: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits.

        Args:
            input_ids: Tokens.
            attention_mask: ``[batch, pos]``, zero at padding, on either side.
            inputs_embeds: The stream that layer 0 receives, in place of tokens.
            prelude_output: What is injected, if the bridge's ``start_at_layer`` skips the prelude.

        Raises:
            InputError: a mask of another shape, too long a sequence, or an injection without
                anything to inject.
        """
        x = self.tok_embed(input_ids) if inputs_embeds is None else inputs_embeds
        self._check_injected(prelude_output)
        mask = self._check_mask(attention_mask, x)
        context = RunContext.build(self.looped_cfg, x.shape[1], mask, x.device, x.dtype)
        angles = context.rotation.cos[:, :, 0], context.rotation.unsigned_sin[:, :, 0]
        allowed = None if context.allowed is None else _additive(context.allowed, x.dtype)
        run = LoopRun(context, self.program, None, self.state_seed, prelude_output)
        for layer in self.layers:
            if self.has_boundaries:
                x = layer.boundary(x, run)
            x = layer(x, position_embeddings=angles, attention_mask=allowed)
        x = execute(self._before(self.loop.n_layers), x, run, self._parts)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

    def _check_mask(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        if mask is not None and mask.shape != x.shape[:2]:
            raise InputError(
                f"attention_mask must have shape [batch, pos] = {tuple(x.shape[:2])}, "
                f"got {tuple(mask.shape)}"
            )
        mask = None if mask is None else real_tokens(mask).to(x.device)
        length = x.shape[1] if mask is None else int(mask.sum(-1).max())
        if length > self.looped_cfg.n_ctx:
            raise InputError(
                f"a sequence of {length} tokens is longer than the context of "
                f"{self.looped_cfg.n_ctx}"
            )
        return mask

    def _check_injected(self, prelude_output: Tensor | None) -> None:
        """Refuse a start inside the loop that would inject the output of a run never made.

        For ``start_at_layer=i`` TransformerLens runs the layers before i on a stand-in and then
        puts the caller's stream in its place. It leaves the number on the blocks.
        """
        loop, start = self.loop, getattr(self.layers[0], "_start_at_layer_idx", None)
        behind = -1 if start is None or start < loop.p else start
        if prelude_output is not None and behind < 0:
            raise InputError(
                "prelude_output is for a start_at_layer behind the prelude; this run computes its "
                "own. To change what is injected, hook the prelude's last hook_resid_post."
            )
        injects = self.cell.reads_e(first=False, state_given=False)
        last_start = loop.p + loop.k * (loop.R - 1)
        if injects and prelude_output is None and 0 <= behind < last_start:
            raise InputError(
                f"start_at_layer={behind} lies in the loop, and later recurrences inject the "
                "prelude's output: pass it as prelude_output= (hook_resid_post of the last "
                "prelude layer)"
            )


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What TransformerLens's attention adds to scores: a number that stays finite where it goes.

    Of True and False it makes the dtype's lowest number, and computes the softmax in fp32. There
    fp64's lowest number is -inf, as is in fp16 the sum of its own with a score, and a query of
    padding that sees nothing would be NaN, and with it every key that others weight by zero.
    """
    floor = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    floor = floor / 2 if dtype == torch.float16 else floor
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, floor)
