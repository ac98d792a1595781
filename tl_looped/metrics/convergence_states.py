"""The series that :mod:`tl_looped.metrics.convergence` decides on, from the states of a loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.metrics.convergence import (
    ConvergenceSeries,
    fixed_point_residual,
)
from tl_looped.metrics.inputs import counted_tokens, token_mask, token_mean
from tl_looped.words import count

# Two runs of one prompt differ by rounding alone, if the batch is computed in another order.
_SAME_RUN = {torch.bfloat16: 0.1, torch.float16: 0.02}


@checked
def convergence_series(
    states: Float[Tensor, "recurrence layer *batch pos d_model"],
    states_2r: Float[Tensor, "recurrence2 layer *batch pos d_model"] | None = None,
    attention_mask: Tensor | None = None,
    skip_first: int = 0,
) -> ConvergenceSeries:
    """Summary series of a loop, one number a recurrence and prompt, in fp64.

    Every quantity is computed for each token, averaged over the real tokens for which it is
    defined (a zero state has no relative step), and then the largest over layers is taken: a loop
    converges when all of its layers do.

    Args:
        states: Of R recurrences, as ``cache.stack_recurrences("resid_post")`` gives them.
        states_2r: Of a run with 2R recurrences from the same start, for the residual
            (``S(x_R)`` is its next state) and the distance to ``x_2R``. Its first R recurrences
            are the states again.
        attention_mask: ``[*batch, pos]``, zero at padding.
        skip_first: Real tokens at the beginning that are left out of all means.

    Raises:
        InputError: wrong shapes; ``states_2r`` has other than 2R recurrences or belongs to
            another run.
    """
    if states.ndim < 4 or 0 in states.shape:
        raise InputError(
            "states must be [recurrence, layer, ..., pos, d_model] and not empty, got shape "
            f"{tuple(states.shape)}"
        )
    if states_2r is not None:
        _check_same_run(states, states_2r)
    real = counted_tokens(states[0], attention_mask, skip_first)

    def mean(values: Tensor) -> Tensor:
        """Mean over tokens where the value is defined, then the largest over layers."""
        return _largest(token_mean(values, real, left_out=values.isnan()))

    def series(quantity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        rows = [mean(quantity(b.double(), a.double())) for a, b in pairwise(states)]
        return torch.stack([torch.full_like(norm[0], math.nan), *rows])

    # A non-finite state must not be left out as a token without a direction, hence no mean here.
    norm = torch.stack([token_mean(x.double().norm(dim=-1), real).max(0).values for x in states])
    last = states[-1].double()
    return ConvergenceSeries(
        step=series(lambda new, old: (new - old).norm(dim=-1)),
        relative_step=series(lambda new, old: (new - old).norm(dim=-1) / new.norm(dim=-1)),
        direction_step=series(lambda new, old: (_unit(new) - _unit(old)).norm(dim=-1)),
        norm=norm,
        from_last=torch.stack([mean((x.double() - last).norm(dim=-1)) for x in states]),
        dtype=states.dtype,
        residual=None
        if states_2r is None
        else mean(fixed_point_residual(states_2r[len(states) - 1], states_2r[len(states)])),
        distance_2r=None if states_2r is None else mean(fixed_point_residual(last, states_2r[-1])),
        min_layer_cosine=min_layer_cosine(last, attention_mask if real is None else real),
    )


def min_layer_cosine(
    last: Float[Tensor, "layer *batch pos d_model"], mask: Tensor | None = None
) -> Float[Tensor, "*batch"]:
    """Lowest cosine, over layers, of a layer's last state with the first layer's.

    The mean over real tokens is taken for each layer, then the lowest. Near 1 means that all
    layers share one limit. NaN for a single layer, and for ``d_model = 1``, where there is no
    direction but the sign.
    """
    last = last.double()
    real = token_mask(last, mask)
    cosine = (_unit(last[1:]) * _unit(last[:1])).sum(-1)
    if last.shape[0] == 1 or last.shape[-1] == 1:
        return torch.full(last.shape[1:-2], math.nan, dtype=torch.float64, device=last.device)
    return -_largest(-token_mean(cosine, real, left_out=cosine.isnan()))


def _largest(per_layer: Float[Tensor, " layer *batch"]) -> Float[Tensor, "*batch"]:
    """Over the layers for which the value is defined; NaN if it is for none."""
    defined = ~per_layer.isnan()
    return per_layer.nan_to_num(-math.inf, math.inf).max(0).values.where(defined.any(0), math.nan)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _check_same_run(states: Tensor, longer: Tensor) -> None:
    n = states.shape[0]
    if longer.shape[1:] != states.shape[1:] or longer.shape[0] != 2 * n:
        raise InputError(
            f"states_2r must have twice the {count(n, 'recurrence')} of states and else its shape "
            f"{tuple(states.shape)}, got {tuple(longer.shape)}"
        )
    tolerance = _SAME_RUN.get(states.dtype, 1e-2)
    there, here = longer[n - 1].double(), states[-1].double()
    off = (there - here).norm() / here.norm()
    if bool(off > tolerance):
        raise InputError(
            f"states_2r belongs to another run: its state after {count(n, 'recurrence')} is off by "
            f"{float(off):.3g} of its norm. Give both the same prompt, state_seed or initial_state"
        )
