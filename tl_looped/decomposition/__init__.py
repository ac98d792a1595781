"""Exact decomposition of the residual stream of a looped model into what was written to it."""

from tl_looped.decomposition.methods import DecomposingCache

__all__ = ["DecomposingCache"]
