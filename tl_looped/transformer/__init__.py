"""LoopedTransformer in storeys (pool, weights, hooks, model), and the functions behind it."""

from tl_looped.transformer.looped_transformer import LoopedTransformer

__all__ = ["LoopedTransformer"]
