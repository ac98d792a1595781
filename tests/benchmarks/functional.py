"""The forward pass without hooks: the yardstick that the hooked one is measured against.

Written from the mathematics on the model's own weights: plain functions, fused attention, weights
looked up and rotary angles computed once a call. Nothing of the package runs in it but
the configuration. Without padding, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tl_looped import Injection, LoopedConfig, LoopedTransformer, RotaryStyle


@dataclass
class Layer:
    """The weights of one layer; a norm that the layout lacks is None."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    before_attn: Tensor | None
    after_attn: Tensor | None
    on_mid_sum: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    on_out_sum: Tensor | None

    @classmethod
    def of(cls, weights: dict[str, Tensor], prefix: str) -> Layer:
        matrices = ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")
        norms = ("ln1", "ln1_post", "ln_mid", "ln2", "ln2_post", "ln_out")
        return cls(
            *(weights[f"{prefix}.{name}"] for name in matrices),
            *(weights.get(f"{prefix}.{name}.w") for name in norms),
        )


class FunctionalForward:
    """Logits of a model of pre, post, sandwich or residual norms, from tokens and a state."""

    def __init__(self, model: LoopedTransformer) -> None:
        cfg = model.cfg
        assert cfg.rotary_style is RotaryStyle.HALF
        assert not any((cfg.qk_bias, cfg.qk_norm, cfg.rope_scaling))
        assert cfg.embed_scale == 1.0
        self.cfg: LoopedConfig = cfg
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        stages = (("prelude", cfg.n_prelude), ("core", cfg.n_core), ("coda", cfg.n_coda))
        self.stages = {
            name: [Layer.of(self.weights, f"{name}.{i}") for i in range(n)] for name, n in stages
        }

    def __call__(self, tokens: Tensor, initial_state: Tensor | None = None) -> Tensor:
        cfg, weights = self.cfg, self.weights
        cos, sin = self._angles(tokens.shape[1])
        final = weights["final_norm.w"]
        x = F.embedding(tokens, weights["embed.W_E"])
        for layer in self.stages["prelude"]:
            x = self._block(x, layer, cos, sin)
        e = x
        x = e if initial_state is None else initial_state
        for _ in range(cfg.n_recurrences):
            if cfg.injection is Injection.LINEAR:
                x = F.linear(torch.cat((x, e), -1), weights["injection.weight"])
            for layer in self.stages["core"]:
                x = self._block(x, layer, cos, sin)
            if cfg.loop_norm:
                x = self._norm(x, final)
        if cfg.pre_coda_norm:
            x = self._norm(x, final)
        for layer in self.stages["coda"]:
            x = self._block(x, layer, cos, sin)
        if not cfg.loop_norm or cfg.n_coda:
            x = self._norm(x, final)
        unembed = weights["embed.W_E" if cfg.tie_embeddings else "unembed.weight"]
        return F.linear(x, unembed)

    def _angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, ``[pos, 1, d_head]``."""
        dtype = torch.float64 if self.cfg.dtype == torch.float64 else torch.float32
        half = torch.arange(0, self.cfg.d_head, 2, dtype=dtype) / self.cfg.d_head
        angles = torch.arange(length)[:, None] * self.cfg.rotary_base**-half
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos(), angles.sin()

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.cfg.eps).sqrt() * gain

    def _block(self, x: Tensor, layer: Layer, cos: Tensor, sin: Tensor) -> Tensor:
        h = x if layer.before_attn is None else self._norm(x, layer.before_attn)
        h = self._attention(h, layer, cos, sin)
        if layer.after_attn is not None:
            h = self._norm(h, layer.after_attn)
        x = x + h
        if layer.on_mid_sum is not None:
            x = self._norm(x, layer.on_mid_sum)
        h = x if layer.before_mlp is None else self._norm(x, layer.before_mlp)
        gate, up = F.linear(h, layer.gate_up).chunk(2, -1)
        h = F.linear(F.silu(gate) * up, layer.down)
        if layer.after_mlp is not None:
            h = self._norm(h, layer.after_mlp)
        x = x + h
        return x if layer.on_out_sum is None else self._norm(x, layer.on_out_sum)

    def _attention(self, x: Tensor, layer: Layer, cos: Tensor, sin: Tensor) -> Tensor:
        cfg = self.cfg
        heads = (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)
        q, k, v = F.linear(x, layer.qkv).unflatten(-1, (-1, cfg.d_head)).split(heads, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if cfg.n_kv_heads != cfg.n_heads:
            k, v = (t.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, 2) for t in (k, v))
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return F.linear(z.transpose(1, 2).flatten(-2), layer.out)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
