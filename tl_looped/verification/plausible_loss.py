"""Whether the loss on English text is that of a trained model, and how it goes on with the loop."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from tl_looped.model.config import Injection
from tl_looped.transformer import LoopedTransformer
from tl_looped.verification.baselines import adaptive_bits_per_byte, mean_and_error
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.passages import Level, Measured, Passage, levels, measure, rows_of
from tl_looped.verification.texts import texts_digest
from tl_looped.words import count

LOSS, CURVE = "loss on English text", "loss by recurrences"

SHUFFLED = 0.5
"""Nats per token by which a text must be easier than its own tokens in another order. Right models
here: 2.7 to 6.5; exchanges that destroy a model: -0.3 to 1.0."""
SURPRISED = 0.5
"""Nats per token by which the loss may exceed what the model expects. Right models: -0.6 to 0.1;
exchanges that destroy a model: 0.5 to 5.4."""
FLAT = 0.95
"""Share of ln(vocabulary) from which on the mean entropy is that of no prediction at all."""
BETTER = 0.1
"""Nats per token by which one recurrence may be better than the trained number."""
DRIFT = 0.5
"""Nats per token of a rise that is called a drift."""
_SEVERAL = 3
_ERRORS = 3
"""Standard errors over texts, of a difference."""
_FOUND_BY_NEITHER = (
    "Small exchanges (two norms, layers that do little) and settings such as eps move the loss "
    "less than one right model differs from another: only the reference check sees those."
)
_IF_WRONG = (
    "The loss would be near or above ln(vocabulary), hardly lower than for the same tokens in "
    "shuffled order, or far above the entropy that the model itself expects (confident and "
    "wrong). " + _FOUND_BY_NEITHER
)
_CURVE_IF_WRONG = (
    "The loss would be lower at one recurrence than at the trained number, or leave the order of "
    "its size within twice the trained number: a loop whose injection, state or norms are wrong "
    "gets worse with every recurrence."
)


def best_register(of: dict[str, Level], passages: Sequence[Passage]) -> str:
    """The register in which a byte costs fewest bits, of those with several texts."""
    texts = Counter(passage.register for passage in passages)
    several = [register for register in of if texts[register] >= _SEVERAL]
    return min(several or of, key=lambda register: of[register].bits_per_byte)


def is_untrained(model: LoopedTransformer, of: dict[str, Level]) -> str | None:
    """Why a model looks untrained, or None.

    That a prediction is flat says so, and that every norm's gain is exactly one: no training
    leaves them there. A model that is confident and wrong is not taken for an untrained one. One
    that was cut or looped without training is untrained as a whole, whatever its layers know.
    """
    not_healed = _not_healed(model)
    if not_healed is not None:
        return not_healed
    uniform, entropy = math.log(model.cfg.d_vocab), min(one.entropy for one in of.values())
    if entropy >= FLAT * uniform:
        return (
            f"its predictions are flat (entropy {entropy:.2f} nats, and ln(vocabulary) is "
            f"{uniform:.2f})"
        )
    gains = [p for name, p in model.named_parameters() if p.ndim == 1 and name.endswith(".w")]
    if gains and all(bool((gain == 1).all()) for gain in gains):
        return "all gains of its norms are exactly one, as before training"
    return None


def _not_healed(model: LoopedTransformer) -> str | None:
    """What was done to a feedforward model that it was not trained for since, or None."""
    cfg, made_of = model.cfg, model.cfg.source_layers
    if not made_of or cfg.trained_recurrences is not None:
        return None
    layers = [i for stage in ("prelude", "core", "coda") for i in made_of.get(stage) or ()]
    dropped = len(set(range(max(layers, default=-1) + 1)) - set(layers))
    compared = "whether it is what it was made of, the reference check says (--source)"
    if dropped:
        out = count(dropped, "layer")
        return f"{out} of its source were left out, and it was not trained since; {compared}"
    if cfg.injection is Injection.NONE and cfg.n_recurrences > 1:
        return f"its layers were put into a loop, and it was not trained since; {compared}"
    return None


def loss_on_text(
    model: LoopedTransformer,
    passages: Sequence[Passage],
    measured: Sequence[Measured],
    seed: int = 0,
) -> Finding:
    """The level of the loss against what a model without knowledge, or without order, would have.

    Args:
        model: The model.
        passages: What was measured.
        measured: The losses at the model's own number of recurrences.
        seed: Of the shuffled order.
    """
    bos = bool(model.cfg.default_prepend_bos)
    of = levels(passages, measured, bos)
    best, uniform = best_register(of, passages), math.log(model.cfg.d_vocab)
    level = of[best]
    here = [passage for passage in passages if passage.register == best]
    shuffled = levels(here, measure(model, shuffled_rows(model, here, seed)), bos)[best].loss
    spelling = adaptive_bits_per_byte(passage.text for passage in here)
    numbers: dict[str, Any] = {
        "recurrences": model.cfg.n_recurrences,
        "tokens": sum(len(one.losses) for one in measured),
        "texts_sha256": texts_digest(),
        "by_register": {name: asdict(one) for name, one in of.items()},
        "best_register": best,
        "ln_vocabulary": uniform,
        "shuffled_loss": shuffled,
        "adaptive_order_2_bits_per_byte": spelling,
    }
    each = ", ".join(f"{name} {one.loss:.2f} ({one.bits_per_byte:.2f})" for name, one in of.items())
    found = (
        f"Nats per token (bits per byte) at {count(model.cfg.n_recurrences, 'recurrence')}: "
        f"{each}. Of those with several texts {best} is best: {level.loss:.2f} nats, where the "
        f"model expects {level.entropy:.2f}, its tokens in shuffled order have {shuffled:.2f}, and "
        f"ln(vocabulary) is {uniform:.2f}; "
        f"{level.bits_per_byte:.2f} bits per byte, where an adaptive model of order 2 has "
        f"{spelling:.2f}."
    )
    untrained = is_untrained(model, of)
    if untrained is not None:
        numbers["untrained"] = untrained
        return Finding(
            LOSS,
            Outcome.NOT_APPLICABLE,
            f"The model looks untrained: {untrained}. {found}",
            "An untrained model and one whose last norm or unembedding is lost look alike here.",
            numbers,
        )
    wrong = {
        "not below ln(vocabulary)": not level.loss < uniform,
        f"not {SHUFFLED} nats below the shuffled order": not shuffled - level.loss > SHUFFLED,
        f"more than {SURPRISED} nats above what the model expects": not (
            level.loss - level.entropy < SURPRISED
        ),
        "not below the adaptive model of order 2": not level.bits_per_byte < spelling,
    }
    numbers["suspicious_because"] = [what for what, is_so in wrong.items() if is_so]
    if numbers["suspicious_because"]:
        found += f" The loss at {best} is {', '.join(numbers['suspicious_because'])}."
    outcome = Outcome.SUSPICIOUS if numbers["suspicious_because"] else Outcome.PLAUSIBLE
    return Finding(LOSS, outcome, found, _IF_WRONG, numbers)


def shuffled_rows(
    model: LoopedTransformer, passages: Sequence[Passage], seed: int
) -> list[list[int]]:
    """The texts' tokens in another order, BOS left in its place."""
    rows = rows_of(model, passages)
    start, draw = int(bool(model.cfg.default_prepend_bos)), random.Random(seed)
    return [[*row[:start], *draw.sample(row[start:], len(row) - start)] for row in rows]


def trained_number(model: LoopedTransformer) -> int:
    """The number of recurrences of the training, rounded; the model's own if it is not known."""
    return round(model.cfg.trained_recurrences or 0) or model.cfg.n_recurrences


def curve_numbers(model: LoopedTransformer, trained: int) -> list[int]:
    """The numbers of recurrences that are tried: 1, half, the trained one, between, and twice."""
    wanted = {1, trained // 2, trained, trained + max(1, trained // 2), 2 * trained}
    return sorted(n for n in wanted if n >= max(1, model.cfg.min_recurrences))


def loss_by_recurrences(
    model: LoopedTransformer,
    passages: Sequence[Passage],
    measured: Sequence[Measured],
    recurrences: Sequence[int] | None = None,
) -> Finding:
    """The loss from one recurrence to twice the trained number, on the register known best.

    Args:
        model: The model.
        passages: What was measured.
        measured: The losses at the model's own number of recurrences.
        recurrences: In place of a handful from 1 to twice the trained number.
    """
    of = levels(passages, measured, bool(model.cfg.default_prepend_bos))
    best, own = best_register(of, passages), model.cfg.n_recurrences
    trained = trained_number(model)
    here = [i for i, passage in enumerate(passages) if passage.register == best]
    rows = rows_of(model, [passages[i] for i in here])
    losses: dict[int, list[float]] = {}
    for n in sorted({trained, *(recurrences or curve_numbers(model, trained))}):
        one = [measured[i] for i in here] if n == own else measure(model, rows, n)
        losses[n] = [text.loss for text in one]
    means = {n: sum(each) / len(each) for n, each in losses.items()}
    numbers: dict[str, Any] = {
        "register": best,
        "trained": model.cfg.trained_recurrences,
        "loss": means,
    }
    listed = ", ".join(f"{loss:.2f} at {n}" for n, loss in means.items())
    found = f"Mean loss of the {best} texts, in nats per token, by recurrences: {listed}."
    untrained = is_untrained(model, of)
    if untrained is not None:
        return Finding(
            CURVE,
            Outcome.NOT_APPLICABLE,
            f"The model looks untrained: {untrained}. {found}",
            _CURVE_IF_WRONG,
            numbers,
        )
    if not model.cfg.trained_recurrences or not model.cfg.has_loop:
        return Finding(
            CURVE,
            Outcome.NOT_APPLICABLE,
            f"The model was not trained as a loop, so no number is the right one. {found} "
            f"{_drift(means, min(means))}",
            _CURVE_IF_WRONG,
            numbers,
        )
    reasons = _reasons(losses, trained, math.log(model.cfg.d_vocab))
    numbers["suspicious_because"] = reasons
    found += f" It was trained with {model.cfg.trained_recurrences:g}. {_drift(means, trained)}"
    if reasons:
        found += f" Suspicious: {'; '.join(reasons)}."
    outcome = Outcome.SUSPICIOUS if reasons else Outcome.PLAUSIBLE
    return Finding(CURVE, outcome, found, _CURVE_IF_WRONG, numbers)


def _reasons(losses: dict[int, list[float]], trained: int, uniform: float) -> list[str]:
    reasons, at = [], losses[trained]
    if 1 in losses and trained > 1:
        gain, error = mean_and_error([a - b for a, b in zip(at, losses[1], strict=True)])
        if gain > BETTER and gain > _ERRORS * error:
            reasons.append(f"one recurrence is {gain:.2f} nats better than {trained}")
    for n, each in losses.items():
        if trained < n <= 2 * trained and not sum(each) / len(each) < uniform:
            reasons.append(f"at {n} recurrences the loss is no better than ln(vocabulary)")
    return reasons


def _drift(means: dict[int, float], start: int) -> str:
    """What the loss does beyond a number of recurrences, in words."""
    last = max(means)
    if last <= start:
        return ""
    rise = means[last] - means[start]
    if not math.isfinite(rise):
        return f"At {last} recurrences it is not finite."
    if abs(rise) < 0.05:
        return (
            f"From {start} to {last} recurrences it is flat ({rise:+.3f}), as it is right for a "
            "loop with a fixed point, or one that takes no notice of its state."
        )
    kind = "more recurrences still help" if rise < 0 else "it gets worse, which is common"
    if rise > DRIFT:
        kind = "it drifts away, there is no fixed point that keeps the text"
    return f"From {start} to {last} recurrences it changes by {rise:+.2f}: {kind}."


def finite_losses(measured: Sequence[Measured]) -> bool:
    """Whether every loss is a number."""
    return all(bool(torch.isfinite(one.losses).all()) for one in measured)
