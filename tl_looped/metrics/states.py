"""Metrics of the residual stream along the recurrences.

States are ``[recurrence, layer, ..., pos, d_model]``, as ``cache.stack_recurrences("resid_post")``
gives them, unpadded. Norms are Euclidean over ``d_model``, in fp64, then averaged over positions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Form = Literal["abs", "rel"]


def successive_difference(
    states: Float[Tensor, "recurrence layer *batch pos d_model"], form: Form = "abs"
) -> Float[Tensor, "recurrence layer *batch"]:
    """Step from the previous recurrence, same layer: mean over tokens of ``||x_r - x_(r-1)||``.

    ``form="rel"`` divides each token's step by ``||x_r||``. NaN at the first recurrence, which has
    no previous one.
    """
    states = states.double()
    steps = (states[1:] - states[:-1]).norm(dim=-1)
    if form == "rel":
        steps = steps / states[1:].norm(dim=-1)
    mean = steps.mean(-1)
    return torch.cat((torch.full_like(states[:1, ..., 0, 0], math.nan), mean))


def fixed_point_distance(
    states: Float[Tensor, "recurrence layer *batch pos d_model"], form: Form = "abs"
) -> Float[Tensor, "recurrence layer *batch"]:
    """Distance to the state of the last recurrence at the same layer, mean over tokens.

    ``form="rel"`` divides each token's distance by the norm of the last state. It tends to zero for
    any map, a drift included, so read it together with :func:`successive_difference`.
    """
    states = states.double()
    last = states[-1:]
    distance = (states - last).norm(dim=-1)
    if form == "rel":
        distance = distance / last.norm(dim=-1)
    return distance.mean(-1)
