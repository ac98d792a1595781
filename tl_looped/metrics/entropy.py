"""Matrix-based entropy of the residual stream.

Of a state matrix X, ``[pos, d_model]``, with singular values s_i: ``p_i = s_i^2 / sum s^2`` and
``H = -sum_i p_i ln p_i``. X is neither centred nor are its rows normalised, but in the form
``"skean"``. Spectra come from the smaller Gram matrix in fp64.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.checks import checked, one_of
from tl_looped.metrics.inputs import at_least_fp32, counted_tokens, lengths

EntropyForm = Literal["nats", "bits", "norm_max", "skean"]


@checked
def matrix_entropy(
    x: Float[Tensor, "*batch pos d_model"],
    form: EntropyForm | str = "bits",
    attention_mask: Tensor | None = None,
    skip_first: int = 0,
) -> Float[Tensor, "*batch"]:
    """Entropy of the squared singular values: 0 for rank one, ``ln T`` for orthogonal equal rows.

    The paper (Section 3) does not say which form it plots; ``bits`` and ``norm_max`` both fit.

    Args:
        x: States.
        form: ``nats``; ``bits``; ``norm_max``, ``H / min(ln T, ln D)`` in [0, 1]; ``skean``, in
            nats after removing the mean over tokens and giving each row norm 1 (Skean et al.).
        attention_mask: ``[..., pos]``, zero at padding.
        skip_first: Real tokens at the beginning that are left out, as if they were not there.

    Returns:
        One value a prompt. NaN where all states are zero (with ``skean``: are equal) and for
        non-finite states; ``norm_max`` also for a single token or dimension.
    """
    one_of(form, "form", get_args(EntropyForm))
    real = counted_tokens(x, attention_mask, skip_first)
    wide = at_least_fp32(x).double()
    if real is not None:
        wide = wide.masked_fill(~real[..., None], 0.0)
    n = lengths(wide, wide.shape[-2], real)
    if form == "skean":
        before = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).amax(-2, keepdim=True)
        wide = wide - wide.sum(-2, keepdim=True) / n.double()[..., None, None]
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        # A row that equals the mean has no direction; what is left of it is rounding.
        wide = (wide / size).masked_fill(size <= 1e-12 * before, 0.0)
        if real is not None:
            wide = wide.masked_fill(~real[..., None], 0.0)
    return entropy_in_form(_entropy(wide), "nats" if form == "skean" else form, n, x.shape[-1])


def entropy_in_form(
    nats: Float[Tensor, "*batch"], form: EntropyForm | str, n_tokens: Tensor, d_model: int
) -> Float[Tensor, "*batch"]:
    """A :func:`matrix_entropy` in nats in another form, all but ``skean``.

    Args:
        nats: Entropies.
        form: ``nats``, ``bits`` or ``norm_max``.
        n_tokens: Real tokens, broadcastable.
        d_model: Width of the states.
    """
    if form == "nats":
        return nats
    if form == "bits":
        return nats / math.log(2)
    most = n_tokens.clamp(max=d_model).double().log()
    return (nats / most).masked_fill(most == 0, math.nan)


def _entropy(x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch"]:
    """In nats, of matrices in fp64."""
    gram = _gram(x)
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if bool(((total > 1e-200) & (total < 1e200)).all()):
        return _of_gram(gram)
    # Scaled so that squares neither overflow nor vanish; LAPACK refuses NaN.
    largest = x.abs().amax((-2, -1), keepdim=True)
    undefined = ~largest.isfinite() | (largest == 0)
    entropy = _of_gram(_gram((x / largest).masked_fill(undefined, 0.0)))
    return entropy.masked_fill(undefined[..., 0, 0], math.nan)


def _gram(x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch n n"]:
    """Products of all rows, or of all columns if there are fewer."""
    return x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x


def _of_gram(gram: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    energy = torch.linalg.eigvalsh(gram).clamp(min=0.0)
    share = energy / energy.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)
