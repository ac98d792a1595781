"""Whether any exchange of two tensors makes the loss lower: then they were exchanged before.

Training leaves a model where no such exchange helps. Which of the hundreds of exchanges are tried
is decided by one gradient: those along whose straight line the loss falls first. What is found has
to lower the loss of every kind of text that was tried, far beyond chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.cache_size import free_bytes
from tl_looped.verification.baselines import mean_and_error
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.exchanges import (
    Exchange,
    between_layers,
    everywhere,
    made,
    most_promising,
    slopes_between,
    within_layers,
)
from tl_looped.verification.passages import Passage, measure, padded, rows_of

WEIGHTS = "loss under exchanges of weights"

GAIN = 0.02
"""Nats per token by which an exchange must lower the loss."""
ERRORS = 4
"""Standard errors over texts by which it must do so."""
_MANY, _FEW = 10, 3
"""How many exchanges of a kind are tried, of small models and of larger ones."""
_SMALL = 20_000_000
"""Parameters of a small model, whose forward passes cost little."""
_IF_WRONG = (
    "Exchanging two tensors that the load had exchanged (of two layers; queries and keys, gate and "
    "up, two norms; a matrix and its transpose; the halves of the injection) would lower the loss. "
    "Exchanges that move the loss by less than the bound (most of norms' gains; layers that do "
    "little), several at once, and wrong values in the right place are not found: the reference "
    "check sees those."
)


class Gain(NamedTuple):
    """How much an exchange lowers the loss.

    Args:
        nats: Per token, a mean over texts.
        error: Its standard error; infinite for one text.
        texts: How many.
    """

    nats: float
    error: float
    texts: int


def loss_under_exchanges(model: LoopedTransformer, passages: Sequence[Passage]) -> Finding:
    """Try the exchanges that promise a lower loss.

    Args:
        model: Changed in place while one is tried, and bit for bit as before afterwards.
        passages: Texts that the model predicts well.
    """
    rows = rows_of(model, passages)
    before = [one.loss for one in measure(model, rows)]
    inside, tried = within_layers(model), everywhere(model)
    n_single = len(between_layers(model)) + len(inside)
    gradients = _gradients(model, rows)
    if gradients is not None:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        slopes = slopes_between(model, weights, gradients)
        slopes |= {one: one.slope(weights, gradients) for one in inside}
        n = _MANY if sum(p.numel() for p in weights.values()) <= _SMALL else _FEW
        tried += most_promising(slopes, n)
        del gradients
    gains = {}
    for exchange in tried:
        with made(model, exchange):
            gains[exchange] = _gain(model, rows, before)
    return _finding(gains, n_single, sum(before) / len(before), len(rows))


def _gain(model: LoopedTransformer, rows: Sequence[Sequence[int]], before: Sequence[float]) -> Gain:
    """How much lower the loss is than before; of the first text alone if it is not lower there."""
    for n in (1, len(rows)):
        after = [one.loss for one in measure(model, rows[:n])]
        gain, error = mean_and_error([b - a for b, a in zip(before, after, strict=False)])
        if gain <= 0:
            break
    return Gain(gain, error, n)


def _finding(gains: dict[Exchange, Gain], n_single: int, before: float, n_texts: int) -> Finding:
    better = [one for one, of in gains.items() if of.nats > GAIN and of.nats > ERRORS * of.error]
    better.sort(key=lambda exchange: -gains[exchange].nats)
    best = max(gains, key=lambda exchange: gains[exchange].nats)
    found = (
        f"{len(gains)} exchanges were tried on up to {n_texts} texts, the most promising of "
        f"{n_single} single ones by the gradient among them. The best, {best.name}, changes the "
        f"loss of {before:.3f} nats per token by {-gains[best].nats:+.3f}"
        + (f" ± {gains[best].error:.3f}" if gains[best].texts > 1 else " in the first text")
        + f"; undoing one that was made by mistake lowers it by more than {GAIN}, and by {ERRORS} "
        "standard errors over texts."
    )
    if better:
        names = "; ".join(f"{one.name} ({-gains[one].nats:+.3f})" for one in better[:3])
        found += f" The loss is lower with these exchanged: {names}."
    numbers = {
        "loss": before,
        "tried": {one.name: {"gain": of.nats, "texts": of.texts} for one, of in gains.items()},
        "better": [one.name for one in better],
    }
    outcome = Outcome.SUSPICIOUS if better else Outcome.PLAUSIBLE
    return Finding(WEIGHTS, outcome, found, _IF_WRONG, numbers)


def _gradients(model: LoopedTransformer, rows: Sequence[Sequence[int]]) -> dict[str, Tensor] | None:
    """Of the mean loss by every parameter of a layer; None where the memory does not hold them."""
    parameters = {
        name: p
        for name, p in model.named_parameters()
        if name.startswith(("prelude.", "core.", "coda."))
    }
    needed = 2 * sum(p.nbytes for p in parameters.values())
    device = model.W_E.device
    free = free_bytes(device)
    if free is not None and needed > free:
        return None
    needs = {name: p.requires_grad for name, p in parameters.items()}
    tokens, mask = padded(rows, device)
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            loss = model(tokens, attention_mask=mask, return_type="loss")
            found = torch.autograd.grad(loss, list(parameters.values()))
    finally:
        for name, p in parameters.items():
            p.requires_grad_(needs[name])
    return dict(zip(parameters, found, strict=True))
