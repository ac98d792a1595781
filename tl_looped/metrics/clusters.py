"""Stages of inference as clusters of layers, found in a feedforward model, looked for in a loop.

Every layer is a point of a few features (sink rate, mixing score, ColSum concentration, residual
entropy, log norm). k-means on a feedforward model's layers gives its stages; the layers of a looped
model are assigned to the nearest of them. Beyond arXiv 2604.11791, which reads stages off plots by
eye.

Decisions, all ours. Features are z-scored with the feedforward model's mean and standard deviation
(divisor n), so that the looped model has no say in what a stage is. Clusters are numbered by the
mean depth of their feedforward layers: stage 0 is the earliest. Each recurrence is read as the
virtual feedforward model ``[prelude, block_r, coda]``.

Limits. k-means always finds K stages, in noise too, and no stage need be contiguous in depth. A
looped layer that resembles none of them still gets the nearest: ``distance`` says how far it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from tl_looped.checks import checked, whole
from tl_looped.errors import InputError
from tl_looped.metrics.arrays import as_float64, check_finite
from tl_looped.metrics.depth_curves import mean_curve, parts_of

_CONSTANT = 1e-12  # a spread below this share of a feature's largest value is rounding


FEATURES = (
    "sink_rate",
    "mixing_per_row",
    "colsum_concentration",
    "entropy_norm_max",
    "residual_mean",
)
"""Features of a result's layers; the last one, the norm, by its logarithm."""


@checked
@dataclass(frozen=True)
class DepthClusters:
    """Stages of a feedforward model and of the recurrences of a looped one.

    Attributes:
        feedforward: Stage of each feedforward layer; 0 is the earliest.
        prelude: Stage of each prelude layer.
        core: Stage of each core layer at each recurrence.
        coda: Stage of each coda layer.
        distance: Of each core layer to its stage's centre, in feedforward standard deviations.
        rand_feedforward: Adjusted Rand index of each virtual feedforward model against the
            feedforward layers at the nearest relative depth.
        agreement_feedforward: Share of its layers in the very same stage as those.
        rand_recurrences: Adjusted Rand index of the core between every two recurrences.
        agreement_recurrences: Share of core layers in the very same stage at both.
        transitions: Changes of stage from one core layer to the next within each recurrence.
        wraps: Whether the stage changes from a recurrence's last core layer to the next
            recurrence's first.
        feedforward_boundaries: Where the feedforward stage changes, in % of depth.
        boundaries: The same in each virtual feedforward model.
        centres: Of the stages, z-scored.
        feature_mean, feature_sd: What features were z-scored with.
        n_init: Starts of k-means.
        seed: Of k-means.
    """

    feedforward: Int[np.ndarray, " layer"]
    prelude: Int[np.ndarray, " prelude"]
    core: Int[np.ndarray, "recurrence core"]
    coda: Int[np.ndarray, " coda"]
    distance: Float[np.ndarray, "recurrence core"]
    rand_feedforward: Float[np.ndarray, " recurrence"]
    agreement_feedforward: Float[np.ndarray, " recurrence"]
    rand_recurrences: Float[np.ndarray, "recurrence recurrence"]
    agreement_recurrences: Float[np.ndarray, "recurrence recurrence"]
    transitions: Int[np.ndarray, " recurrence"]
    wraps: Bool[np.ndarray, " wrap"]
    feedforward_boundaries: tuple[float, ...]
    boundaries: tuple[tuple[float, ...], ...]
    centres: Float[np.ndarray, "stage feature"]
    feature_mean: Float[np.ndarray, " feature"]
    feature_sd: Float[np.ndarray, " feature"]
    n_init: int
    seed: int


@checked
def depth_clusters(
    feedforward: Float[np.ndarray, "layer feature"] | Float[Tensor, "layer feature"],
    core: Float[np.ndarray, "recurrence core _"] | Float[Tensor, "recurrence core _"],
    *,
    prelude: Float[np.ndarray, "prelude _"] | Float[Tensor, "prelude _"] | None = None,
    coda: Float[np.ndarray, "coda _"] | Float[Tensor, "coda _"] | None = None,
    n_clusters: int = 3,
    n_init: int = 20,
    seed: int = 0,
) -> DepthClusters:
    """Cluster a feedforward model's layers and assign those of a looped model (k-means).

    Depth. Layer i of n stands at ``i / (n - 1)`` of the depth (a single layer at 0). A layer of
    ``[prelude, block_r, coda]`` is matched with the feedforward layer at the nearest depth, the
    shallower of two equally near. A boundary stands half way between two layers of different
    stages, at ``100 (i + 1/2) / (n - 1)`` %.

    The adjusted Rand index compares how layers are grouped, not which stage each group is: 1 if the
    groups are the same, 0 on average for random ones. As in scikit-learn it is 1 if both sides put
    all layers into one stage, be it the same or not; the agreements tell the two apart. An exact
    cycle has index and agreement 1 between all recurrences.

    Args:
        feedforward: Features of the feedforward model's layers.
        core: Features of the core layers at each recurrence.
        prelude, coda: Features of the layers before and behind the loop.
        n_clusters: K of k-means.
        n_init: Starts of k-means, of which the best counts.
        seed: Of k-means, a non-negative integer below 2^32.

    Raises:
        InputError: if a feature is not finite or the same for all feedforward layers, if these have
            fewer than K different points, or if a size or number is out of range.
    """
    base, blocks, before, after = _checked(feedforward, core, prelude, coda)
    whole(n_clusters, "n_clusters", 1)
    whole(n_init, "n_init", 1, 10**4)
    whole(seed, "seed", 0, 2**32 - 1)
    different = len(np.unique(base, axis=0))
    if different < n_clusters:
        raise InputError(
            f"feedforward has {len(base)} layers, {different} of them different: not enough for "
            f"n_clusters={n_clusters}"
        )
    mean, sd = base.mean(0), base.std(0)
    flat = np.ptp(base, axis=0) <= _CONSTANT * np.abs(base).max(0)
    if flat.any():
        raise InputError(
            f"feedforward: feature {int(flat.argmax())} is the same for all layers and cannot be "
            "z-scored: leave it out of feedforward and of the looped model's features"
        )
    stages = _fit((base - mean) / sd, n_clusters, n_init, seed)
    ff = _assign((base - mean) / sd, stages)[0]
    labels, distance = _assign((blocks - mean) / sd, stages)
    first, last = (_assign((x - mean) / sd, stages)[0] for x in (before, after))
    virtual = _virtual(first, labels, last)
    matched = ff[_nearest_depth(len(virtual[0]), len(ff))]
    return DepthClusters(
        feedforward=ff,
        prelude=first,
        core=labels,
        coda=last,
        distance=distance,
        rand_feedforward=np.array([adjusted_rand_score(matched, v) for v in virtual]),
        agreement_feedforward=np.array([(matched == v).mean() for v in virtual]),
        rand_recurrences=_rand_between(labels),
        agreement_recurrences=(labels[:, None] == labels).mean(-1),
        transitions=(labels[:, 1:] != labels[:, :-1]).sum(-1),
        wraps=labels[:-1, -1] != labels[1:, 0],
        feedforward_boundaries=_boundaries(ff),
        boundaries=tuple(_boundaries(v) for v in virtual),
        centres=stages,
        feature_mean=mean,
        feature_sd=sd,
        n_init=n_init,
        seed=seed,
    )


@checked
def cluster_table(
    data: xr.Dataset, feedforward: xr.Dataset, n_clusters: int = 3, seed: int = 0
) -> pd.DataFrame:
    """:func:`depth_clusters` of two results by depth: a row per recurrence of the looped one.

    Layers are points of :data:`FEATURES`, each the mean over heads and prompts.

    Args:
        data: Result of the looped model.
        feedforward: Result of the feedforward model.
        n_clusters: K of k-means.
        seed: Of k-means.

    Returns:
        ``recurrence``; ``stages`` of ``[prelude, block_r, coda]`` and ``feedforward_stages`` as
        text; ``agreement`` and ``rand_index`` with the feedforward model,
        ``rand_index_recurrences``, the mean with the other recurrences; ``transitions``,
        ``distance`` and ``seed``.

    Raises:
        InputError: as :func:`depth_clusters`, or for a feature that a result lacks.
    """
    missing = [m for m in FEATURES if m not in data or m not in feedforward]
    if missing:
        raise InputError(f"{', '.join(missing)} were not computed for both")
    prelude, core, coda = parts_of(data, _features(data))
    try:
        found = depth_clusters(
            _features(feedforward),
            core,
            prelude=prelude,
            coda=coda,
            n_clusters=n_clusters,
            seed=seed,
        )
    except InputError as error:
        named = ", ".join(f"{i} is {name}" for i, name in enumerate(FEATURES))
        raise InputError(f"{error} (feature {named})") from error
    n = len(core)
    others = found.rand_recurrences[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    whole = (" ".join(map(str, row)) for row in _virtual(found.prelude, found.core, found.coda))
    return pd.DataFrame(
        {
            "recurrence": np.arange(n),
            "stages": list(whole),
            "feedforward_stages": " ".join(map(str, found.feedforward)),
            "agreement": found.agreement_feedforward,
            "rand_index": found.rand_feedforward,
            "rand_index_recurrences": others.mean(-1) if n > 1 else math.nan,
            "transitions": found.transitions,
            "distance": found.distance.mean(-1),
            "seed": seed,
        }
    )


def _features(data: xr.Dataset) -> Float[np.ndarray, "layer feature"]:
    columns = [mean_curve(data, name) for name in FEATURES]
    with np.errstate(divide="ignore"):  # of a zero norm; refused as not finite
        columns[-1] = np.log(columns[-1])
    return np.stack(columns, axis=-1)


def _virtual(first: np.ndarray, core: np.ndarray, last: np.ndarray) -> list[np.ndarray]:
    """``[prelude, block_r, coda]`` of every recurrence."""
    return [np.concatenate((first, row, last)) for row in core]


def _rand_between(labels: Int[np.ndarray, "row layer"]) -> Float[np.ndarray, "row row"]:
    """Adjusted Rand index of every two rows; hundreds of recurrences have few different ones."""
    rows, which = np.unique(labels, axis=0, return_inverse=True)
    between = np.array([[adjusted_rand_score(a, b) for b in rows] for a in rows])
    which = which.reshape(-1)  # some versions of numpy give it another shape
    return between[which[:, None], which]


def _checked(
    feedforward: object, core: object, prelude: object, coda: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The features as fp64; no layers where there is no prelude or coda."""
    base, blocks = as_float64(feedforward), as_float64(core)
    d = base.shape[-1]
    ends = [np.zeros((0, d)) if x is None else as_float64(x) for x in (prelude, coda)]
    found = {"feedforward": base, "core": blocks, "prelude": ends[0], "coda": ends[1]}
    for name, x in found.items():
        if x.shape[-1] != d:
            raise InputError(f"{name} must have the {d} features of feedforward, got {x.shape[-1]}")
        check_finite(name, x)
    if 0 in blocks.shape or d == 0:
        raise InputError(
            "core must be [recurrence, core, feature] with at least one of each, got shape "
            f"{blocks.shape}"
        )
    return base, blocks, ends[0], ends[1]


def _fit(
    z: Float[np.ndarray, "layer feature"], n_clusters: int, n_init: int, seed: int
) -> Float[np.ndarray, "stage feature"]:
    """Centres of k-means, by the mean depth of their layers."""
    found = KMeans(n_clusters, n_init=n_init, random_state=seed).fit(z)
    depths = [np.flatnonzero(found.labels_ == i).mean() for i in range(n_clusters)]
    return found.cluster_centers_[np.argsort(depths, kind="stable")]


def _assign(
    z: Float[np.ndarray, "*layers feature"], centres: Float[np.ndarray, "stage feature"]
) -> tuple[Int[np.ndarray, "*layers"], Float[np.ndarray, "*layers"]]:
    """Nearest centre and the distance to it; the earlier stage of two equally near."""
    distance = np.sqrt(np.square(z[..., None, :] - centres).sum(-1))
    return distance.argmin(-1), distance.min(-1)


def _nearest_depth(n: int, n_feedforward: int) -> Int[np.ndarray, " n"]:
    """Feedforward layer at the depth nearest to that of each of n layers; ties go up."""
    # In integers, i (m - 1) / (n - 1) rounded half down: no tie is lost to rounding.
    numerator = np.arange(n) * (n_feedforward - 1)
    below, rest = np.divmod(numerator, max(1, n - 1))
    return below + (2 * rest > max(1, n - 1))


def _boundaries(stages: Int[np.ndarray, " layer"]) -> tuple[float, ...]:
    places = np.flatnonzero(stages[1:] != stages[:-1])
    last = max(1, len(stages) - 1)
    return tuple(float(100 * (i + 0.5) / last) for i in places)
