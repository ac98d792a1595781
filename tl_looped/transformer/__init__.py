"""LoopedTransformer, in steps: pool, hooks, caching, weights, tokens, loop, lenses, generation."""

from tl_looped.transformer.looped_transformer import LoopedTransformer

__all__ = ["LoopedTransformer"]
