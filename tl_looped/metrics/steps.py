"""Geometry of the steps that a state takes: along the recurrences, and from layer to layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.checks import checked, whole
from tl_looped.metrics.inputs import counted_tokens, token_mask, token_mean


@dataclass(frozen=True)
class StepGeometry:
    """Steps ``d_r = x_r - x_(r-1)`` of a state, means over real tokens, in fp64.

    Args:
        size: ``||d_r||``; NaN at the first recurrence.
        turning_cosine: Cosine of ``d_r`` with ``d_(r-1)``: 1 straight on, -1 back, 0 a right angle.
            NaN at the first two recurrences; a token with a zero step is left out, and the value
            is NaN where no token is left.
        acceleration: ``||d_r - d_(r-1)||``; NaN at the first two recurrences.
        relative_acceleration: The same over ``||x_r||``, which the public exit rule compares with
            its threshold; a zero state is left out.
    """

    size: Float[Tensor, " recurrence *batch"]
    turning_cosine: Float[Tensor, " recurrence *batch"]
    acceleration: Float[Tensor, " recurrence *batch"]
    relative_acceleration: Float[Tensor, " recurrence *batch"]


@checked
def step_geometry(
    states: Float[Tensor, "recurrence *batch pos d_model"],
    attention_mask: Tensor | None = None,
    skip_first: int = 0,
) -> StepGeometry:
    """Size, turning and acceleration of successive steps (the two scales of Pappone et al. 2025).

    A contraction by one positive factor goes straight (turning 1), a circle of period P turns by
    the cosine of ``2 pi / P`` at every step, a contraction by a negative factor gives -1.

    Args:
        states: Of one layer, or several with the layer in front of the batch.
        attention_mask: ``[*batch, pos]``, zero at padding.
        skip_first: Real tokens at the beginning that are left out of the means.

    Raises:
        InputError: wrong shapes.
    """
    whole(len(states), "len(states)", 1)
    real = counted_tokens(states[0], attention_mask, skip_first)
    undefined = torch.full(states.shape[1:-2], math.nan, dtype=torch.float64, device=states.device)
    rows = []
    step, before = None, None  # this step and the one before it
    for r in range(states.shape[0]):
        row = [undefined] * 4
        if r > 0:
            step = states[r].double() - states[r - 1].double()
            row[0] = token_mean(step.norm(dim=-1), real)
        if step is not None and before is not None:
            sizes = step.norm(dim=-1), before.norm(dim=-1)
            cosine = ((step / sizes[0][..., None]) * (before / sizes[1][..., None])).sum(-1)
            still = (sizes[0] == 0) | (sizes[1] == 0)
            change, size = (step - before).norm(dim=-1), states[r].double().norm(dim=-1)
            row[1] = token_mean(cosine, real, left_out=still)
            row[2] = token_mean(change, real)
            row[3] = token_mean(change / size, real, left_out=size == 0)
        before = step
        rows.append(torch.stack(row))
    return StepGeometry(*torch.stack(rows, 1).unbind(0))


@checked
def angular_distance(
    states: Float[Tensor, "layer *batch pos d_model"],
    lag: int = 1,
    attention_mask: Tensor | None = None,
) -> Float[Tensor, " pair *batch"]:
    """``arccos(cos(x_l, x_(l+lag))) / pi`` of layers that are ``lag`` apart, mean over real tokens.

    0 for the same direction, 1/2 at a right angle, 1 for opposite ones (Gromov et al. 2024, arXiv
    2403.17887, who read it at the last token alone: slice the states for that). The angle is
    computed from the unit vectors' difference and sum, since the arc cosine of a cosine near 1
    loses half the digits. The angle of each token comes first, then the mean. A token with a zero
    state is left out; NaN where no token is left.

    Args:
        states: Of all layers in their order, of a loop over several recurrences too.
        lag: Layers between the two, at least 1.
        attention_mask: ``[*batch, pos]``, zero at padding.

    Returns:
        One value for each ``l`` from 0 to ``layers - lag - 1``.

    Raises:
        InputError: wrong shapes, or a lag that no two layers have.
    """
    whole(lag, "lag", 1, max(states.shape[0] - 1, 1))
    real = token_mask(states[0], attention_mask) if states.shape[0] else None
    rows = [
        _angular(states[i], states[i + lag], real) for i in range(max(states.shape[0] - lag, 0))
    ]
    if not rows:
        return states.new_zeros((0, *states.shape[1:-2]), dtype=torch.float64)
    return torch.stack(rows)


def _angular(a: Tensor, b: Tensor, real: Tensor | None) -> Tensor:
    a, b = a.double(), b.double()
    sizes = a.norm(dim=-1), b.norm(dim=-1)
    a, b = a / sizes[0][..., None], b / sizes[1][..., None]
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    return token_mean(angle / math.pi, real, left_out=(sizes[0] == 0) | (sizes[1] == 0))
