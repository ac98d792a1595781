"""Figures: functions from results to matplotlib figures, returned and never shown."""

from tl_looped.plots.loop import by_recurrence, layer_heat_map, loss_curve

__all__ = ["by_recurrence", "layer_heat_map", "loss_curve"]
