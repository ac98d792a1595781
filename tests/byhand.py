"""A looped run written out step by step, so that a test can change any of its steps by hand.

The layers are those of the functional forward that the benchmarks compare with: plain functions on
the model's weights, without hooks and without anything of the package but its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from benchmarks.functional import FunctionalForward, Layer, _rotate
from torch import Tensor

from tl_looped import Injection, LoopedTransformer

Step = Callable[[int, Tensor, Tensor], Tensor]


class ByHand(FunctionalForward):
    """One prompt batch of a model; ``run`` goes through it with the steps that a test gives."""

    def __init__(self, model: LoopedTransformer, tokens: Tensor) -> None:
        super().__init__(model)
        self.tokens = tokens
        self.core = self.stages["core"]
        self.angles = self._angles(tokens.shape[1])

    def run(
        self, state: Tensor | None, step: Step | None = None, n_recurrences: int | None = None
    ) -> Tensor:
        """Logits; ``step(r, state, e)`` gives the state after recurrence r."""
        x = F.embedding(self.tokens, self.weights["embed.W_E"])
        for layer in self.stages["prelude"]:
            x = self.block(x, layer)
        e = x
        x = e if state is None else state.expand(e.shape)
        for r in range(self.cfg.n_recurrences if n_recurrences is None else n_recurrences):
            x = (step or self.recurrence)(r, x, e)
        return self.read_out(x)

    def recurrence(
        self, r: int, x: Tensor, e: Tensor, layers: Sequence[Layer] | None = None
    ) -> Tensor:
        """One ordinary recurrence, or one of other layers."""
        x = self.inject(x, e)
        for layer in self.core if layers is None else layers:
            x = self.block(x, layer)
        return self.end(x)

    def inject(self, x: Tensor, e: Tensor) -> Tensor:
        if self.cfg.injection is Injection.NONE:
            return x
        return F.linear(torch.cat((x, e), -1), self.weights["injection.weight"])

    def end(self, x: Tensor) -> Tensor:
        return self._norm(x, self.weights["final_norm.w"]) if self.cfg.loop_norm else x

    def block(self, x: Tensor, layer: Layer) -> Tensor:
        return self._block(x, layer, *self.angles)

    def read_out(self, x: Tensor) -> Tensor:
        for layer in self.stages["coda"]:
            x = self.block(x, layer)
        if not self.cfg.loop_norm:
            x = self._norm(x, self.weights["final_norm.w"])
        return F.linear(x, self.weights["unembed.weight"])

    # Pre-norm blocks in pieces, for what happens inside one.

    def pieces(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        """Attention pattern ``[batch, head, query, key]`` and values ``[batch, key, head, d]``."""
        cfg = self.cfg
        assert layer.before_attn is not None
        h = self._norm(x, layer.before_attn)
        sizes = (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)
        q, k, v = F.linear(h, layer.qkv).unflatten(-1, (-1, cfg.d_head)).split(sizes, 2)
        q, k = _rotate(q, *self.angles), _rotate(k, *self.angles)
        k, v = (t.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, 2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / cfg.d_head**0.5
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        return scores.masked_fill(future, -torch.inf).softmax(-1), v

    def after_attention(self, x: Tensor, layer: Layer, z: Tensor) -> Tensor:
        """The stream behind attention whose heads gave ``z`` ``[batch, query, head, d]``."""
        return x + F.linear(z.flatten(-2), layer.out)

    def neurons(self, x: Tensor, layer: Layer) -> Tensor:
        assert layer.before_mlp is not None
        gate, up = F.linear(self._norm(x, layer.before_mlp), layer.gate_up).chunk(2, -1)
        return F.silu(gate) * up

    def after_mlp(self, x: Tensor, layer: Layer, neurons: Tensor) -> Tensor:
        return x + F.linear(neurons, layer.down)
