"""LoopedTransformer, built up in steps: hooks, weights, tokens, loop, lenses, generation."""

from tl_looped.transformer.looped_transformer import LoopedTransformer

__all__ = ["LoopedTransformer"]
