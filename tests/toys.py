"""Toy attentions and toy loops with closed forms, for every metric that takes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def identity(n: int) -> Tensor:
    """Every token attends to itself."""
    return torch.eye(n, dtype=torch.float64)


def sink(n: int) -> Tensor:
    """Every token attends to the first."""
    return identity(n)[0].expand(n, n)


def uniform_causal(n: int) -> Tensor:
    """Every token attends evenly to itself and all before it."""
    return torch.ones(n, n, dtype=torch.float64).tril() / torch.arange(1, n + 1)[:, None]


def previous_token(n: int) -> Tensor:
    """Every token attends to the one before it, the first to itself."""
    return identity(n)[[0, *range(n - 1)]]


def half_half(n: int) -> Tensor:
    """Half identity, half sink."""
    return (identity(n) + sink(n)) / 2


ATTENTIONS: dict[str, Callable[[int], Tensor]] = {
    "identity": identity,
    "sink": sink,
    "uniform causal": uniform_causal,
    "previous token": previous_token,
    "half identity, half sink": half_half,
}


def iterate(step: Callable[[Tensor], Tensor], start: Tensor, n: int) -> Tensor:
    """``[recurrence, layer=1, pos, d]`` of a one-layer loop; recurrence 0 is the start."""
    states = [start]
    for _ in range(n - 1):
        states.append(step(states[-1]))
    return torch.stack(states)[:, None]


def start_state(pos: int = 3, d: int = 4) -> Tensor:
    return torch.randn(pos, d, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def affine(n: int, rate: float = 0.8) -> Tensor:
    """``x <- rate x + 1``."""
    return iterate(lambda x: rate * x + 1.0, start_state(), n)


def cyclic_affine(n: int) -> Tensor:
    """Two layers, x1 = x2 / 2 + 1, x2 = x1 / 2 + 2: fixed points 8/3 and 10/3, rate 1/4 a loop.

    ``[recurrence, layer=2, pos=1, d=1]``.
    """
    x, rows = torch.zeros(1, 1, dtype=torch.float64), []
    for _ in range(n):
        first = x / 2 + 1
        x = first / 2 + 2
        rows.append(torch.stack([first, x]))
    return torch.stack(rows)


def rotation(n: int, period: float = 8.0, radius: float = 0.5) -> Tensor:
    """A circle in the first two dimensions plus a unit vector in the third; ``pos`` is 1."""
    angle = 2 * math.pi / period * torch.arange(n, dtype=torch.float64)
    circle = radius * torch.stack([angle.cos(), angle.sin()], -1)
    states = torch.cat((circle, torch.ones(n, 1), torch.zeros(n, 1)), -1)
    return states[:, None, None].double()


def drift(n: int, speed: float = 0.05) -> Tensor:
    """A unit vector plus ``r * speed`` along another one; ``pos`` is 1."""
    r = torch.arange(n, dtype=torch.float64)
    return torch.stack([torch.ones_like(r), speed * r, 0 * r, 0 * r], -1)[:, None, None]


def negative_affine(n: int, rate: float = -0.9) -> Tensor:
    """``x <- rate x``: a transient that changes its sign at every step."""
    return iterate(lambda x: rate * x, start_state(), n)


def still(n: int) -> Tensor:
    """``x <- x``."""
    return iterate(lambda x: x, start_state(), n)


def grower(n: int) -> Tensor:
    """``x <- x + u``: the norm grows for ever, the direction converges to that of u."""
    u = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    return iterate(lambda x: x + u, start_state(), n)


# Every loop at a number of recurrences, as [recurrence, layer, pos, d].
LOOPS: dict[str, Callable[[int], Tensor]] = {
    "affine contraction": affine,
    "two-layer cyclic affine": cyclic_affine,
    "rotation plus a constant": rotation,
    "drift": drift,
    "negative lambda": negative_affine,
    "identity": still,
    "projective grower": grower,
}
