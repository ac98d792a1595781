"""Principal components of a state's path through layers and recurrences.

Models Figures 5, 15 and 26-28 of arXiv 2604.11791: the final token's states at all layers and
recurrences are points in ``d_model`` dimensions, and the first principal components of that set
draw the path. scikit-learn's PCA, full SVD, in fp64.

Decisions: the points are centred and not scaled; the sign of each component, which PCA leaves
open, makes its largest loading positive. Limits: two components of a high-dimensional path can
look like a cycle whatever the rest does, so read the explained variance too; and a path that grows
(a drift) is mostly its longest stretch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor

from tl_looped.checks import checked, whole
from tl_looped.errors import InputError
from tl_looped.metrics.arrays import as_float64, check_finite


@dataclass(frozen=True)
class PCATrajectory:
    """A path in its principal components, fp64.

    Attributes:
        coordinates: ``[*points, component]``, in the unit of the states.
        explained_variance_ratio: ``[component]``, share of the variance of the points that the
            components were fitted on.
        components: ``[component, d_model]``, orthonormal rows, largest loading positive.
        mean: ``[d_model]``, where the coordinates are zero.
    """

    coordinates: Float[Tensor, "*points component"]
    explained_variance_ratio: Float[Tensor, " component"]
    components: Float[Tensor, "component d_model"]
    mean: Float[Tensor, " d_model"]


@checked
def pca_trajectory(
    states: Float[Tensor, "*points d_model"],
    n_components: int = 2,
    *,
    fit: Float[Tensor, "*fit_points _"] | None = None,
) -> PCATrajectory:
    """Coordinates of states in the principal components of these states, or of others.

    The paper's figures follow one token: of ``x = cache.stack_recurrences("resid_post")``,
    ``[recurrence, layer, batch, pos, d_model]``, pass ``x[:, :, b, -1]`` for the final token of
    prompt b (the final *real* one: mind padding on the right). Figure 15's public code fits on all
    tokens of the prompt: pass ``fit=x[:, :, b]`` as well. A full SVD of N points costs
    ``N d_model min(N, d_model)``, so that ``fit`` with many tokens takes a while.

    Where the points fitted on span fewer dimensions than ``n_components``, the directions beyond
    are undefined: their components are NaN and their ratio 0. Coordinates along them are 0 for the
    points fitted on and NaN with ``fit=``. Points that are all equal span none: every ratio is NaN
    then, for there is no variance to explain.

    Args:
        states: The path, at least ``n_components`` points.
        n_components: How many components.
        fit: Points, ``[*fit_points, d_model]``, to find the components and the mean from, instead
            of ``states``.

    Raises:
        InputError: if a state is not finite, or ``n_components`` is below 1 or above the number of
            points or dimensions.
    """
    points = _points("states", states)
    fitted = points if fit is None else _points("fit", fit)
    if fitted.shape[-1] != points.shape[-1]:
        raise InputError(
            f"fit must have the d_model of states, {points.shape[-1]}, got {fitted.shape[-1]}"
        )
    shape = "{} points of {} dimensions".format(*fitted.shape)
    where = "states" if fit is None else "fit"
    whole(n_components, "n_components", 1, min(fitted.shape), fix=f"{where} has {shape}")
    # Relative to one of them: differences of close points are exact, the mean of equal ones is not.
    origin = fitted[0]
    fitted, points = fitted - origin, points - origin
    ratio, components, mean = _principal(fitted, n_components)
    coordinates = (points - mean) @ components.T
    if fit is None:
        coordinates[:, np.isnan(components[:, 0])] = 0.0
    return PCATrajectory(
        torch.from_numpy(coordinates).reshape(*states.shape[:-1], n_components),
        torch.from_numpy(ratio),
        torch.from_numpy(components),
        torch.from_numpy(mean + origin),
    )


def _principal(
    points: Float[np.ndarray, "n d"], n_components: int
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, "c d"], Float[np.ndarray, " d"]]:
    """Explained ratio, components and mean, NaN beyond the points' rank."""
    largest = np.abs(points).max()
    if largest == 0:
        undefined = np.full((n_components, points.shape[1]), math.nan)
        return undefined[:, 0].copy(), undefined, points[0].copy()
    # On the scale of one, so that no square over- or underflows.
    pca = PCA(n_components, svd_solver="full").fit(points / largest)
    ratio, components = pca.explained_variance_ratio_.copy(), pca.components_.copy()
    top = np.abs(components).argmax(-1)
    components *= np.sign(components[np.arange(n_components), top])[:, None]
    values = pca.singular_values_
    beyond = values <= max(points.shape) * np.finfo(np.float64).eps * values[0]
    components[beyond], ratio[beyond] = math.nan, 0.0
    return ratio, components, pca.mean_ * largest


def _points(argument: str, states: Tensor) -> Float[np.ndarray, "n d"]:
    if states.ndim < 1 or states.numel() == 0:
        raise InputError(
            f"{argument} must be [..., d_model] with at least one point, got shape "
            f"{tuple(states.shape)}"
        )
    check_finite(argument, as_float64(states))
    return as_float64(states).reshape(-1, states.shape[-1])
