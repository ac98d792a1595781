"""Exchanges of weights that a wrong load may have made, to be tried out on a model in place.

A :class:`Part` is a tensor or some rows of one: the queries of a layer, a gate, a norm's gain. An
:class:`Exchange` swaps two of the same shape, transposes a square one, or does so in all layers.
Each is its own inverse, so that a model into which one was built by mistake is mended by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from tl_looped.model.config import Injection, LoopedConfig
from tl_looped.transformer import LoopedTransformer

_MATRICES = ("q", "k", "v", "out", "gate", "up", "down")
_TOGETHER = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
_WITHIN = (("q", "k"), ("k", "v"), ("gate", "up"))
_SQUARE = ("q", "k", "v", "out")


@dataclass(frozen=True)
class Part:
    """A parameter, or some rows or columns of it.

    Args:
        parameter: Its name.
        start, length: Which rows (or columns) of it.
        axis: 0 for rows.
    """

    parameter: str
    start: int
    length: int
    axis: int = 0

    def of(self, tensors: dict[str, Tensor]) -> Tensor:
        """The part, as a view."""
        return tensors[self.parameter].narrow(self.axis, self.start, self.length)


@dataclass(frozen=True)
class Exchange:
    """Pairs of parts to be swapped; a part paired with itself is transposed.

    Args:
        kind: What is exchanged: ``"out"``, ``"gate and up"``, ``"out transposed"``.
        where: In which layers.
        pairs: The parts.
    """

    kind: str
    where: str
    pairs: tuple[tuple[Part, Part], ...]

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.kind} of {self.where}"

    def slope(self, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> float:
        """Change of the loss at the start of the straight line to the exchanged weights."""
        total = 0.0
        for a, b in self.pairs:
            w_a, w_b = _wide(a.of(weights)), _wide(b.of(weights))
            g_a, g_b = _wide(a.of(gradients)), _wide(b.of(gradients))
            if a == b:
                total += float(((w_a.mT - w_a) * g_a).sum())
            else:
                total += float(((w_b - w_a) * (g_a - g_b)).sum())
        return total


@contextmanager
def made(model: LoopedTransformer, exchange: Exchange) -> Iterator[None]:
    """While the context lasts, the model has the exchanged weights."""
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    with torch.no_grad():
        _make(weights, exchange)
    try:
        yield
    finally:
        with torch.no_grad():
            _make(weights, exchange)  # its own inverse, bit for bit


def _make(weights: dict[str, Tensor], exchange: Exchange) -> None:
    for a, b in exchange.pairs:
        first = a.of(weights).clone()
        if a == b:
            a.of(weights).copy_(first.mT)
        else:
            a.of(weights).copy_(b.of(weights))
            b.of(weights).copy_(first)


def layers_of(model: LoopedTransformer) -> dict[str, dict[str, Part]]:
    """The parts of every set of layer weights, by ``"core.0"`` and ``"q"``."""
    cfg = model.cfg
    q, kv, mlp = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head, int(cfg.d_mlp or 0)
    cut = {
        "q": ("attn.qkv", 0, q),
        "k": ("attn.qkv", q, kv),
        "v": ("attn.qkv", q + kv, kv),
        "out": ("attn.out", 0, cfg.d_model),
        "gate": ("mlp.gate_up", 0, mlp),
        "up": ("mlp.gate_up", mlp, mlp),
        "down": ("mlp.down", 0, cfg.d_model),
    } | {norm: (f"{norm}.w", 0, cfg.d_model) for norm in cfg.norm_layout.norm_names}
    stages = ("prelude", cfg.n_prelude), ("core", cfg.n_core_weights), ("coda", cfg.n_coda)
    return {
        f"{stage}.{i}": {
            name: Part(f"{stage}.{i}.{parameter}", start, length)
            for name, (parameter, start, length) in cut.items()
        }
        for stage, n in stages
        for i in range(n)
    }


def between_layers(model: LoopedTransformer) -> list[Exchange]:
    """Every exchange of one kind of weights between two layers."""
    layers, norms = layers_of(model), model.cfg.norm_layout.norm_names
    kinds = {name: (name,) for name in (*_MATRICES, *norms)} | _TOGETHER
    return [
        Exchange(kind, f"{a} and {b}", tuple((layers[a][n], layers[b][n]) for n in names))
        for kind, names in kinds.items()
        for a, b in combinations(layers, 2)
    ]


def within_layers(model: LoopedTransformer) -> list[Exchange]:
    """Every exchange of two kinds within a layer, and every transposition of a square matrix."""
    layers = layers_of(model)
    return [
        Exchange(kind, name, (pair,))
        for name, parts in layers.items()
        for kind, pair in _inside(model.cfg, parts).items()
    ]


def everywhere(model: LoopedTransformer) -> list[Exchange]:
    """The same, in all layers at once, as a wrong table of names would have it.

    And the two halves of the adapter of a linear injection, ``[state; e]``.
    """
    layers = layers_of(model)
    kinds: dict[str, list[tuple[Part, Part]]] = {}
    for parts in layers.values():
        for kind, pair in _inside(model.cfg, parts).items():
            kinds.setdefault(kind, []).append(pair)
    found = [Exchange(kind, "every layer", tuple(pairs)) for kind, pairs in kinds.items()]
    if model.cfg.injection is Injection.LINEAR:
        d, adapter = model.cfg.d_model, "injection.weight"
        halves = Part(adapter, 0, d, axis=1), Part(adapter, d, d, axis=1)
        found.append(Exchange("state and prelude's output", "the injection", (halves,)))
    return found


def _inside(cfg: LoopedConfig, parts: dict[str, Part]) -> dict[str, tuple[Part, Part]]:
    norms = cfg.norm_layout.norm_names
    pairs = {
        f"{a} and {b}": (parts[a], parts[b])
        for a, b in (*_WITHIN, *combinations(norms, 2))
        if parts[a].length == parts[b].length
    }
    square = [name for name in _SQUARE if _is_square(cfg, parts[name])]
    return pairs | {f"{name} transposed": (parts[name], parts[name]) for name in square}


def _is_square(cfg: LoopedConfig, part: Part) -> bool:
    width = cfg.n_heads * cfg.d_head if part.parameter.endswith(".out") else cfg.d_model
    return part.length == width


def slopes_between(
    model: LoopedTransformer, weights: dict[str, Tensor], gradients: dict[str, Tensor]
) -> dict[Exchange, float]:
    """:meth:`Exchange.slope` of all of :func:`between_layers`, by one matrix product a kind."""
    layers, device = layers_of(model), model.W_E.device
    of: dict[str, Tensor] = {}
    for name in next(iter(layers.values())):
        w, g = (
            torch.stack(
                [_wide(one[name].of(these)).flatten().to(device) for one in layers.values()]
            )
            for these in (weights, gradients)
        )
        toward = g @ w.T  # [layer, layer], gradient of one along the weights of the other
        own = toward.diagonal()
        of[name] = toward + toward.T - own[:, None] - own[None, :]
    of |= {kind: sum((of[name] for name in names), 0 * own) for kind, names in _TOGETHER.items()}
    place = {name: i for i, name in enumerate(layers)}
    return {
        exchange: float(of[exchange.kind][tuple(place[x] for x in exchange.where.split(" and "))])
        for exchange in between_layers(model)
    }


def _wide(weights: Tensor) -> Tensor:
    """In fp32 or better; sums of many products in bf16 say nothing."""
    return weights if weights.dtype in (torch.float32, torch.float64) else weights.float()


def most_promising(slopes: dict[Exchange, float], per_kind: int) -> list[Exchange]:
    """Of every kind those with the steepest descent of the loss, if it descends at all."""
    kinds: dict[str, list[Exchange]] = {}
    for exchange in sorted(slopes, key=lambda one: slopes[one]):
        if slopes[exchange] < 0:
            kinds.setdefault(exchange.kind, []).append(exchange)
    return [exchange for found in kinds.values() for exchange in found[:per_kind]]
