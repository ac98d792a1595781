"""Metrics of looped models: on tensors, over an ActivationCache, and while the model runs.

Functions on tensors take any leading batch dimensions. :func:`over_cache` and
:func:`stream_metrics` apply them to a run and return labelled xarray datasets.
"""

from tl_looped.metrics.attention import (
    attention_distance,
    colsum_concentration,
    mixing_score,
    pairwise_attention_distance,
    sink_rate,
    sink_score,
)
from tl_looped.metrics.labels import by_recurrence
from tl_looped.metrics.over_cache import over_cache
from tl_looped.metrics.spectra import matrix_entropy
from tl_looped.metrics.states import (
    cyclicity_index,
    fixed_point_distance,
    lowest_cosine_to_fixed_points,
    pairwise_residual_cosine,
    residual_magnitude,
    state_distance,
    successive_difference,
)
from tl_looped.metrics.streaming import StreamOptions, stream_batches, stream_metrics

__all__ = [
    "StreamOptions",
    "attention_distance",
    "by_recurrence",
    "colsum_concentration",
    "cyclicity_index",
    "fixed_point_distance",
    "lowest_cosine_to_fixed_points",
    "matrix_entropy",
    "mixing_score",
    "over_cache",
    "pairwise_attention_distance",
    "pairwise_residual_cosine",
    "residual_magnitude",
    "sink_rate",
    "sink_score",
    "state_distance",
    "stream_batches",
    "stream_metrics",
    "successive_difference",
]
