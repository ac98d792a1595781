"""Looped models made of feedforward ones."""

from tl_looped.retrofitting.build import Mode, retrofit
from tl_looped.retrofitting.layers import LayerPlan, parse_layers

__all__ = ["LayerPlan", "Mode", "parse_layers", "retrofit"]
