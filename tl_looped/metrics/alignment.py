"""Do two models hold alike states? The cosine with a base model's layers, and linear CKA.

The cosine is for retrofits, which share their base model's basis; linear centred kernel alignment
for models of unrelated widths.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.metrics.inputs import token_mask, token_mean


@checked
def base_layer_cosine(
    states: Float[Tensor, "*layers pos d_model"],
    base: Float[Tensor, "*base_layers base_pos base_d_model"],
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "*broadcast_layers"]:
    """Cosine of a retrofitted model's states with those of the base model's layers.

    ``mean over tokens of x_t . y_t / (|x_t| |y_t|)`` in fp64. Only a model that was made from the
    other shares its basis; for others see :func:`linear_cka`. Broadcasts: ``[recurrence, core, pos,
    d]`` against ``[core, pos, d]`` of the layers that the block was made from. Pass the limits
    ``x*_l``, the states of the last recurrence, for the score at the fixed point.

    Tokens where either state is zero are left out, NaN if none is left. A state that is not finite
    gives NaN.

    Args:
        states: States of the looped model.
        base: States of the base model, of the same prompts and layers.
        attention_mask: ``[..., pos]``, real tokens, as in the other metrics.

    Raises:
        InputError: if the shapes do not fit.
    """
    try:
        shape = torch.broadcast_shapes(states.shape, base.shape)
    except RuntimeError:
        shape = torch.Size()
    if states.shape[-2:] != base.shape[-2:] or not shape:
        raise InputError(
            f"base must be [..., pos, d_model] with the prompts of states, {tuple(states.shape)}, "
            f"got {tuple(base.shape)}"
        )
    x, y = (_unit(z.double()).expand(shape) for z in (states, base))
    real = token_mask(x, attention_mask)
    zero = (x == 0).all(-1) | (y == 0).all(-1)
    return token_mean((x * y).sum(-1), real, left_out=zero)


@checked
def linear_cka(
    x: Float[Tensor, "*x_batch token d_x"], y: Float[Tensor, "*y_batch y_token d_y"]
) -> Float[Tensor, "*batch"]:
    """Linear centred kernel alignment of two representations of the same tokens, 0 to 1.

    ``|Xc^T Yc|_F^2 / (|Xc^T Xc|_F |Yc^T Yc|_F)`` with columns centred over the tokens, in fp64
    (Kornblith et al. 2019; the biased HSIC estimate, which is near 1 for any two representations
    with far more dimensions than tokens). Invariant to rotations, shifts and one scale each; the
    widths may differ. Batch dimensions broadcast: ``x[:, None]`` against ``y[None]`` gives every
    pair of layers. Concatenate the real tokens of all prompts.

    NaN for a representation that is the same for all tokens, a single token included, and for one
    that is not finite.

    Raises:
        InputError: if the numbers of tokens differ or there is none.
    """
    if x.shape[-2] != y.shape[-2] or x.shape[-2] == 0:
        raise InputError(
            "x and y must be [..., token, d] of the same tokens, at least one, got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = _centred(x), _centred(y)
    # Gram matrices over the tokens or over the features, whichever are smaller: equal norms.
    if x.shape[-2] <= min(x.shape[-1], y.shape[-1]):
        kx, ky = x @ x.mT, y @ y.mT
        return (kx * ky).sum((-2, -1)) / (_frobenius(kx) * _frobenius(ky))
    cross = _frobenius(x.mT @ y)
    return cross.square() / (_frobenius(x.mT @ x) * _frobenius(y.mT @ y))


def _unit(x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
    """Unit vectors; zero vectors stay zero. By the largest entry first, against underflow."""
    largest = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm == 0, 1.0, norm)


def _centred(x: Float[Tensor, "*batch token d"]) -> Float[Tensor, "*batch token d"]:
    """Columns of mean zero on the scale of one; NaN where all tokens are the same."""
    x = x.double()
    x = x - x[..., :1, :]  # exact for equal tokens, whose mean is not
    x = x / x.abs().amax((-2, -1), keepdim=True)
    return x - x.mean(-2, keepdim=True)


def _frobenius(x: Float[Tensor, "*batch a b"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.matrix_norm(x)
