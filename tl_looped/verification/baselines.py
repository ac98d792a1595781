"""What losses and accuracies are held against: models that know nothing, and small-sample tests."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

_STRENGTH = 2.0
"""How many observations the shorter context counts as, in place of none."""
_Z95 = 1.959963984540054


def adaptive_bits_per_byte(texts: Iterable[str], order: int = 2) -> float:
    """Bits per byte of an adaptive model of bytes that knows nothing in advance.

    Each byte is predicted from the ``order`` bytes before it by the counts so far, mixed with the
    prediction of one byte less, down to a uniform one. It stands for what is to be had of spelling
    alone: a language model whose loss is not below it has not learned from its training, or is not
    the model that was trained.

    Args:
        texts: Read one after the other, counts kept.
        order: Longest context, in bytes.
    """
    counts: list[defaultdict[bytes, Counter[int]]] = [
        defaultdict(Counter) for _ in range(order + 1)
    ]
    bits, n = 0.0, 0
    for text in texts:
        data = text.encode()
        for i, byte in enumerate(data):
            p = 1 / 256
            for length in range(min(order, i) + 1):
                seen = counts[length][data[i - length : i]]
                p = (seen[byte] + _STRENGTH * p) / (seen.total() + _STRENGTH)
                seen[byte] += 1
            bits, n = bits - math.log2(p), n + 1
    return bits / n if n else 8.0


def wilson(successes: int, n: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, at 95 % unless ``z`` says otherwise.

    Args:
        successes: How many of them.
        n: How many there were, at least one.
        z: Quantile of the normal distribution.
    """
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    below, above = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    # Exact at the ends, where rounding would leave the proportion outside.
    return below if successes else 0.0, above if successes < n else 1.0


def sign_test(differences: Sequence[float]) -> float:
    """Probability of at least so many positive differences if both signs were equally likely.

    Zeros are left out, as is usual; 1 if nothing else is there.
    """
    positive = sum(d > 0 for d in differences)
    n = positive + sum(d < 0 for d in differences)
    return sum(math.comb(n, k) for k in range(positive, n + 1)) / 2**n if n else 1.0


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is infinite."""
    n = len(values)
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
