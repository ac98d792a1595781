"""Metrics of looped models: of tensors, of an ActivationCache, and while the model runs.

Names:

- A metric of tensors is a noun, ``sink_rate(pattern)``, ``step_geometry(states)``. It takes any
  leading batch dimensions and, where tokens count, ``attention_mask``.
- ``from_cache(cache)`` and ``stream(model, prompts)`` measure a whole run by the same metrics,
  named as text, into a labelled xarray dataset: ``by="recurrence"`` (recurrence, layer) or
  ``by="depth"`` (effective layer). What needs a whole run at once is ``pairwise_from_cache``,
  ``lenses_from_cache`` and ``attention_lipschitz_from_cache``.
- A verdict takes states or such a dataset: ``convergence_verdict``, ``limiting_behavior``.
- What is read off a model and not off a run takes the model: ``prediction_suppression(model)``,
  ``loop_spectrum(model, tokens)``.
- Groups of metrics: ``"signature"`` (the four by which the paper tells stages of inference apart),
  ``"magnitude"``, ``"successive"``, ``"fixed_point"``, ``"step"``, ``"token"``, ``"all"``;
  :data:`DEFAULT_METRICS` is what every door measures unless asked.
"""

from tl_looped.metrics.alignment import base_layer_cosine, linear_cka
from tl_looped.metrics.attention_patterns import (
    attention_distance,
    colsum_concentration,
    mixing_score,
    pairwise_attention_distance,
    sink_rate,
    sink_score,
)
from tl_looped.metrics.bootstrap import (
    BootstrapCI,
    HierarchicalCI,
    Interval,
    Resampling,
    bootstrap_ci,
    hierarchical_bootstrap_ci,
    paired_contrast,
    sign_flip_p,
    t_interval,
)
from tl_looped.metrics.cached import from_cache, lenses_from_cache, pairwise_from_cache
from tl_looped.metrics.catalogue import DEFAULT_METRICS
from tl_looped.metrics.clusters import DepthClusters, cluster_table, depth_clusters
from tl_looped.metrics.convergence import (
    ConvergenceResult,
    ConvergenceSeries,
    Verdict,
    a_posteriori_bound,
    fixed_point_residual,
    half_life,
)
from tl_looped.metrics.convergence_states import convergence_series
from tl_looped.metrics.dynamics import (
    JacobianSpectrum,
    PathIndependence,
    loop_jacobian_spectrum,
    loop_starts,
    path_independence,
)
from tl_looped.metrics.entropy import matrix_entropy
from tl_looped.metrics.heavy_tokens import HeavyToken, find_heavy_token
from tl_looped.metrics.labels import by_recurrence
from tl_looped.metrics.limiting import (
    LabelPercentages,
    LimitingBehavior,
    LimitingBehaviors,
    classify_limiting_behavior,
    cooccurrence,
    cosine_similarity,
    distance_similarity,
    label_percentages,
)
from tl_looped.metrics.lipschitz import (
    AttentionLipschitz,
    attention_lipschitz_bounds,
    attention_lipschitz_from_cache,
)
from tl_looped.metrics.mirroring import (
    MirroringInterval,
    MirroringScore,
    mirroring_interval,
    mirroring_score,
    permuted_mirroring,
)
from tl_looped.metrics.neurons import (
    NeuronClasses,
    prediction_suppression,
    prediction_suppression_fraction,
)
from tl_looped.metrics.readouts import (
    KLBetweenRecurrences,
    LensReadout,
    LensTrajectory,
    exit_distribution,
    kl_between_recurrences,
    kl_divergence,
    lens_readout,
    lens_trajectory,
)
from tl_looped.metrics.spectrum import loop_spectrum
from tl_looped.metrics.states import (
    cyclicity_index,
    fixed_point_distance,
    lowest_cosine_to_fixed_points,
    pairwise_residual_cosine,
    residual_magnitude,
    state_distance,
    successive_difference,
)
from tl_looped.metrics.steps import StepGeometry, angular_distance, step_geometry
from tl_looped.metrics.streaming import StreamOptions, join_batches, stream, stream_batches
from tl_looped.metrics.trajectories import PCATrajectory, pca_trajectory
from tl_looped.metrics.verdicts import CONVERGENCE, convergence_verdict, limiting_behavior

__all__ = [
    "CONVERGENCE",
    "DEFAULT_METRICS",
    "AttentionLipschitz",
    "BootstrapCI",
    "ConvergenceResult",
    "ConvergenceSeries",
    "DepthClusters",
    "HeavyToken",
    "HierarchicalCI",
    "Interval",
    "JacobianSpectrum",
    "KLBetweenRecurrences",
    "LabelPercentages",
    "LensReadout",
    "LensTrajectory",
    "LimitingBehavior",
    "LimitingBehaviors",
    "MirroringInterval",
    "MirroringScore",
    "NeuronClasses",
    "PCATrajectory",
    "PathIndependence",
    "Resampling",
    "StepGeometry",
    "StreamOptions",
    "Verdict",
    "a_posteriori_bound",
    "angular_distance",
    "attention_distance",
    "attention_lipschitz_bounds",
    "attention_lipschitz_from_cache",
    "base_layer_cosine",
    "bootstrap_ci",
    "by_recurrence",
    "classify_limiting_behavior",
    "cluster_table",
    "colsum_concentration",
    "convergence_series",
    "convergence_verdict",
    "cooccurrence",
    "cosine_similarity",
    "cyclicity_index",
    "depth_clusters",
    "distance_similarity",
    "exit_distribution",
    "find_heavy_token",
    "fixed_point_distance",
    "fixed_point_residual",
    "from_cache",
    "half_life",
    "hierarchical_bootstrap_ci",
    "join_batches",
    "kl_between_recurrences",
    "kl_divergence",
    "label_percentages",
    "lens_readout",
    "lens_trajectory",
    "lenses_from_cache",
    "limiting_behavior",
    "linear_cka",
    "loop_jacobian_spectrum",
    "loop_spectrum",
    "loop_starts",
    "lowest_cosine_to_fixed_points",
    "matrix_entropy",
    "mirroring_interval",
    "mirroring_score",
    "mixing_score",
    "paired_contrast",
    "pairwise_attention_distance",
    "pairwise_from_cache",
    "pairwise_residual_cosine",
    "path_independence",
    "pca_trajectory",
    "permuted_mirroring",
    "prediction_suppression",
    "prediction_suppression_fraction",
    "residual_magnitude",
    "sign_flip_p",
    "sink_rate",
    "sink_score",
    "state_distance",
    "step_geometry",
    "stream",
    "stream_batches",
    "successive_difference",
    "t_interval",
]
