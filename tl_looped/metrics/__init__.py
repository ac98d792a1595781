"""Metrics on tensors: attention patterns and states along the recurrences."""

from tl_looped.metrics.attention import colsum_concentration, pairwise_attention_distance
from tl_looped.metrics.states import fixed_point_distance, successive_difference

__all__ = [
    "colsum_concentration",
    "fixed_point_distance",
    "pairwise_attention_distance",
    "successive_difference",
]
