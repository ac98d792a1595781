"""Metrics of attention patterns.

Patterns are ``[..., query, key]``, causal or not, with rows that sum to 1, unpadded. They are
computed in fp64 and kept per head: average over heads, then prompts, afterwards.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def colsum_concentration(pattern: Float[Tensor, "*batch query key"]) -> Float[Tensor, "*batch"]:
    """How unevenly attention falls on the keys: 0 if every key gets the same, 1 if one gets all.

    With the column sums ``c_j = sum_i A_ij`` and ``p = c / T``: ``1 + sum_j p_j ln p_j / ln T``.
    The paper (arXiv 2604.11791) prints ``c_j`` where its range [0, 1] needs ``c_j / T``. NaN for a
    single token.
    """
    length = pattern.shape[-1]
    share = pattern.double().sum(-2) / length
    if length == 1:
        return torch.full_like(share[..., 0], math.nan)
    return 1.0 - torch.special.entr(share).sum(-1) / math.log(length)


def pairwise_attention_distance(
    patterns: Float[Tensor, "layer *batch head query key"],
) -> Float[Tensor, "layer layer"]:
    """Frobenius distance between the patterns of every two layers, averaged over the rest.

    Same head to same head. From direct differences: a Gram matrix loses everything near
    convergence. Never above ``sqrt(2 T)``.
    """
    layers = patterns.double().flatten(-2).flatten(1, -2)  # layer, batch and head, entries
    distances = torch.cdist(
        layers.transpose(0, 1), layers.transpose(0, 1),
        compute_mode="donot_use_mm_for_euclid_dist",
    )  # fmt: skip
    return distances.mean(0)
