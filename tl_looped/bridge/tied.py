"""Layers that hold no parameter and read those of a looped model at every call.

A core layer of a looped model stands R times in its unrolled stack, each time with hook points of
its own, so each time as a module of its own. Its weights must be neither copied nor registered R
times. These modules therefore keep a reference to the owner of the weights outside PyTorch's
registry, and ``weight`` is a view made when it is read: it follows ``to()`` and an optimiser, and
its gradient reaches the owner's parameter.

``weight`` has no setter, so that TransformerLens cannot replace the weights of one recurrence.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_looped._compat import Linear, Module
from tl_looped.model.norms import NormWeights, rms_norm


class TiedLinear(Linear):
    """A linear map whose matrix is a block of rows of another module's parameter.

    An ``nn.Linear`` by type, because TransformerLens tells ``[out, in]`` from ``[in, out]`` by it.

    Args:
        owner: The module that holds the parameter.
        name: Its attribute there, ``[rows, in_features]``.
        start: First row.
        stop: End of the rows, exclusive; all if None.
        bias_name: Attribute of a bias ``[heads, d_head]``, or None.
    """

    _owner: nn.Module

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        start: int = 0,
        stop: int | None = None,
        bias_name: str | None = None,
    ) -> None:
        # Past nn.Linear.__init__, which would make parameters.
        nn.Module.__init__(self)
        object.__setattr__(self, "_owner", owner)
        self._name, self._rows, self._bias_name = name, slice(start, stop), bias_name
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Float[Tensor, "out_features in_features"]:  # type: ignore[override]
        """The rows, as a view."""
        matrix: Tensor = getattr(self._owner, self._name)
        return matrix[self._rows]

    @property
    def bias(self) -> Float[Tensor, " out_features"] | None:  # type: ignore[override]
        """The bias of all heads, flattened; None without one."""
        if self._bias_name is None:
            return None
        bias: Tensor = getattr(self._owner, self._bias_name)
        return bias.flatten()

    def forward(self, input: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """The product, plus the bias if there is one."""
        return F.linear(input, self.weight, self.bias)


class TiedNorm(Module):
    """An RMSNorm on borrowed weights."""

    _owner: NormWeights

    def __init__(self, owner: NormWeights) -> None:
        super().__init__()
        object.__setattr__(self, "_owner", owner)

    @property
    def weight(self) -> Float[Tensor, " d"]:
        """The gain."""
        return self._owner.w

    @property
    def eps(self) -> float:
        """Epsilon inside the square root."""
        return self._owner.eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The normalised input."""
        return rms_norm(x, self._owner)


class TiedEmbedding(Module):
    """The scaled token embedding of a looped model.

    Args:
        owner: Its embedding, with the matrix ``W_E``; calling it embeds and scales.
    """

    _owner: Any

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_owner", owner)

    @property
    def weight(self) -> Float[Tensor, "d_vocab d_model"]:
        """The matrix, before the embedding scale."""
        matrix: Tensor = self._owner.W_E
        return matrix

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Embedding of each token, times the embedding scale."""
        embedded: Tensor = self._owner(tokens)
        return embedded


class TiedUnembedding(Module):
    """The unembedding of a looped model, which may be its embedding.

    Args:
        owner: Its unembedding, with ``shown``.
    """

    _owner: Any

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_owner", owner)

    @property
    def weight(self) -> Float[Tensor, "d_vocab d_model"]:
        """``W_U`` transposed, centred if the model's is."""
        matrix: Tensor = self._owner.shown
        return matrix

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits."""
        return F.linear(x, self.weight)
