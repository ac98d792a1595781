"""Metrics of looped models: on tensors, over an ActivationCache, and while the model runs.

Functions on tensors take any leading batch dimensions. :func:`over_cache` and
:func:`stream_metrics` apply them to a run and return labelled xarray datasets;
:func:`convergence_of_result` and :func:`limiting_of_result` read such a dataset.
"""

from tl_looped.metrics.attention import (
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
from tl_looped.metrics.cache_matrices import lens_over_cache, pairwise_over_cache
from tl_looped.metrics.clusters import StageClusters, cluster_table, stage_clusters
from tl_looped.metrics.convergence import (
    ConvergenceResult,
    ConvergenceSeries,
    Verdict,
    a_posteriori_bound,
    convergence_verdict,
    fixed_point_residual,
    half_life,
)
from tl_looped.metrics.convergence_states import convergence_series, verdict_of_states
from tl_looped.metrics.dynamics import (
    JacobianSpectrum,
    PathIndependence,
    loop_jacobian_spectrum,
    loop_starts,
    path_independence,
)
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
    limiting_behavior_of_states,
)
from tl_looped.metrics.lipschitz import (
    AttentionLipschitz,
    attention_lipschitz_bounds,
    attention_lipschitz_of_cache,
)
from tl_looped.metrics.mirroring import (
    MirroringInterval,
    MirroringScore,
    base_layer_cosine,
    linear_cka,
    mirroring_interval,
    mirroring_score,
    permuted_mirroring,
)
from tl_looped.metrics.neurons import (
    NeuronClasses,
    prediction_suppression_by_layer,
    prediction_suppression_feedforward,
    prediction_suppression_fraction,
)
from tl_looped.metrics.of_result import CONVERGENCE, convergence_of_result, limiting_of_result
from tl_looped.metrics.over_cache import over_cache
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
from tl_looped.metrics.spectra import matrix_entropy
from tl_looped.metrics.spectral import spectrum_of_states
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
from tl_looped.metrics.streaming import StreamOptions, join_batches, stream_batches, stream_metrics
from tl_looped.metrics.trajectories import PCATrajectory, pca_trajectory

__all__ = [
    "CONVERGENCE",
    "AttentionLipschitz",
    "BootstrapCI",
    "ConvergenceResult",
    "ConvergenceSeries",
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
    "StageClusters",
    "StepGeometry",
    "StreamOptions",
    "Verdict",
    "a_posteriori_bound",
    "angular_distance",
    "attention_distance",
    "attention_lipschitz_bounds",
    "attention_lipschitz_of_cache",
    "base_layer_cosine",
    "bootstrap_ci",
    "by_recurrence",
    "classify_limiting_behavior",
    "cluster_table",
    "colsum_concentration",
    "convergence_of_result",
    "convergence_series",
    "convergence_verdict",
    "cooccurrence",
    "cosine_similarity",
    "cyclicity_index",
    "distance_similarity",
    "exit_distribution",
    "fixed_point_distance",
    "fixed_point_residual",
    "half_life",
    "hierarchical_bootstrap_ci",
    "join_batches",
    "kl_between_recurrences",
    "kl_divergence",
    "label_percentages",
    "lens_over_cache",
    "lens_readout",
    "lens_trajectory",
    "limiting_behavior_of_states",
    "limiting_of_result",
    "linear_cka",
    "loop_jacobian_spectrum",
    "loop_starts",
    "lowest_cosine_to_fixed_points",
    "matrix_entropy",
    "mirroring_interval",
    "mirroring_score",
    "mixing_score",
    "over_cache",
    "paired_contrast",
    "pairwise_attention_distance",
    "pairwise_over_cache",
    "pairwise_residual_cosine",
    "path_independence",
    "pca_trajectory",
    "permuted_mirroring",
    "prediction_suppression_by_layer",
    "prediction_suppression_feedforward",
    "prediction_suppression_fraction",
    "residual_magnitude",
    "sign_flip_p",
    "sink_rate",
    "sink_score",
    "spectrum_of_states",
    "stage_clusters",
    "state_distance",
    "step_geometry",
    "stream_batches",
    "stream_metrics",
    "successive_difference",
    "t_interval",
    "verdict_of_states",
]
