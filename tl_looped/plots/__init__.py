"""Figures: functions from results to matplotlib figures, returned and never shown.

``tl_looped.paper.figures.draw`` makes every figure of the paper; what it is made of is here.
"""

from tl_looped.plots.colours import layer_colours, recurrence_colours
from tl_looped.plots.groupings import over_depth, over_realised_depth, over_recurrences
from tl_looped.plots.heat_maps import layer_matrix, probability_map
from tl_looped.plots.loss import loss_curve
from tl_looped.plots.panels import Line, Panel, draw_panels, numbers_of
from tl_looped.plots.paths import pca_path, token_paths
from tl_looped.plots.recipes import DrawnFigure, DrawOptions
from tl_looped.plots.summaries import left_out, summary, summary_of

__all__ = [
    "DrawOptions",
    "DrawnFigure",
    "Line",
    "Panel",
    "draw_panels",
    "layer_colours",
    "layer_matrix",
    "left_out",
    "loss_curve",
    "numbers_of",
    "over_depth",
    "over_realised_depth",
    "over_recurrences",
    "pca_path",
    "probability_map",
    "recurrence_colours",
    "summary",
    "summary_of",
    "token_paths",
]
