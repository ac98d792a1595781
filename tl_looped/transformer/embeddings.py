"""Embedding and unembedding.

A centred unembedding shows W_U without its mean over the vocabulary, and its logits have lost the
same constant at every token. That is TransformerLens's ``center_unembed``: a matter of what the
model gives, since the weights stay as they are stored. Probabilities are unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_looped.model.config import LoopedConfig
from tl_looped.model.devices import beside
from tl_looped.model.hook_points import LoopedHookPoint, QuickModule
from tl_looped.model.norms import NormWeights
from tl_looped.model.shown import ShowsWeights, assign, show
from tl_looped.model.weight_sources import (
    Constant,
    Names,
    Rows,
    Source,
    StoredWeights,
    no_bias,
)


class Embed(StoredWeights):
    """Token embedding, scaled."""

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model, dtype=cfg.dtype))
        self.scale = cfg.embed_scale

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Embedding of each token, times the embedding scale."""
        embedded = nn.functional.embedding(tokens, self.W_E)
        return embedded if self.scale == 1.0 else embedded * self.scale


class Unembed(ShowsWeights, QuickModule):
    """Map from the normalised stream to logits; shares the embedding's matrix if tied.

    Args:
        cfg: The model's configuration.
        embed: For its matrix.
        norm: The final norm's weights; its gain may count as part of W_U.
    """

    noted_as = ("hook_in", "hook_in", "hook_out")
    weight: nn.Parameter
    _embed: Embed
    _norm: NormWeights

    def __init__(self, cfg: LoopedConfig, embed: Embed, norm: NormWeights) -> None:
        super().__init__()
        self.cfg = cfg
        self.folded = self.centered = False
        object.__setattr__(self, "_embed", embed)
        object.__setattr__(self, "_norm", norm)
        self.hook_in = LoopedHookPoint()
        self.hook_out = LoopedHookPoint()
        if not cfg.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model, dtype=cfg.dtype))

    @property
    def matrix(self) -> Float[Tensor, "d_vocab d_model"]:
        """The matrix as it is stored, ``W_U`` transposed but for a folded gain."""
        return self._embed.W_E if self.cfg.tie_embeddings else self.weight

    @property
    def _gain(self) -> Float[Tensor, " d_model"]:
        return beside(self._norm.w, self.matrix)

    @property
    def shown(self) -> Float[Tensor, "d_vocab d_model"]:
        """The matrix; a copy without its mean over the vocabulary where it is centred."""
        return self.matrix - self._mean if self.centered else self.matrix

    @property
    def _mean(self) -> Float[Tensor, " d_model"]:
        return self.matrix.mean(0)

    def source(self, name: str) -> Source:
        """Where a weight of TransformerLens's name is stored."""
        if name == "b_U":
            zeros = self.matrix.new_zeros(self.cfg.d_vocab)
            no_names = Names("unembed.b_U", None, ())
            return Constant(zeros, lambda: no_names, no_bias("unembed.hook_out"))
        tied = self.cfg.tie_embeddings
        owner, own = (self._embed, "W_E") if tied else (self, "weight")
        shared = ("embed.W_E", "unembed.W_U") if tied else ("unembed.W_U",)
        names = Names("unembed.W_U", "embed.W_E" if tied else "unembed.weight", shared)
        gain = self._norm if self.folded else None
        return Rows(owner, own, lambda: names, torch.Tensor.t, gain=gain, centered=self.centered)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """TransformerLens's unembedding matrix, with a folded gain, and centred if that is on."""
        return show(self.source("W_U"))

    @W_U.setter
    def W_U(self, value: Any) -> None:
        assign(self.source("W_U"), value)

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Unembedding bias: zero."""
        return show(self.source("b_U"))

    @b_U.setter
    def b_U(self, value: Any) -> None:
        assign(self.source("b_U"), value)

    def directions(
        self, tokens: int | Int[Tensor, "*any"]
    ) -> Float[Tensor, "*any d_model"] | Float[Tensor, " d_model"]:
        """Columns of ``W_U``, as rows."""
        if isinstance(tokens, Tensor):
            tokens = beside(tokens, self.matrix)
        rows = self.matrix[tokens]
        if self.centered:
            rows = rows - self._mean
        return rows * self._gain if self.folded else rows

    def silent(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits of a stream that the final norm's gain has multiplied; no hook fires."""
        logits = nn.functional.linear(beside(x, self.matrix), self.matrix)
        # The mean logit is that of the mean row, and costs no pass over the matrix.
        return logits - logits.mean(-1, keepdim=True) if self.centered else logits

    def forward(
        self, x: Float[Tensor, "... d_model"], has_gain: bool = False
    ) -> Float[Tensor, "... d_vocab"]:
        """Logits of what ``ln_final`` gives: ``x @ W_U``.

        ``has_gain`` says that ``x`` has the final norm's gain in it already, even if that is
        folded: the state of a loop that ends in the final norm.
        """
        if self.folded and not has_gain:
            x = x * beside(self._norm.w, x)
        return self.hook_out(self.silent(self.hook_in(beside(x, self.matrix))))
