"""Whether another setting of the configuration gives a lower loss: then this one is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tl_looped.model.config import LoopedConfig, RotaryStyle
from tl_looped.transformer import LoopedTransformer
from tl_looped.verification.baselines import mean_and_error
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.passages import Passage, measure, rows_of
from tl_looped.verification.plausible_weights import ERRORS, GAIN

SETTINGS = "loss under other settings"

_EPS = 100.0
_THETA = 10.0
_IF_WRONG = (
    "The loss would be lower at the setting that the model was trained with: another rotary theta, "
    "the other pairing of dimensions, an embedding scale of 1 or of the root of d_model, another "
    "eps, a norm of the loop or before the coda, no frequency scaling. Settings that hardly move "
    "the loss of short texts (eps 1e-5 or 1e-6, a theta that is close) are not found: the "
    "reference check sees those."
)


def other_settings(cfg: LoopedConfig) -> dict[str, dict[str, Any]]:
    """Settings that are often mistaken, by what they are called, each other than the present."""
    interleaved = cfg.rotary_style is RotaryStyle.INTERLEAVED
    style = RotaryStyle.HALF if interleaved else RotaryStyle.INTERLEAVED
    scale = math.sqrt(cfg.d_model) if cfg.embed_scale == 1 else 1.0
    found: dict[str, dict[str, Any]] = {
        f"rotary theta {cfg.rotary_base * _THETA:g}": {"rotary_base": cfg.rotary_base * _THETA},
        f"rotary pairs {style.value}": {"rotary_style": style},
        f"embedding scale {scale:.4g}": {"embed_scale": scale},
        f"eps {cfg.eps * _EPS:g}": {"eps": cfg.eps * _EPS},
        f"eps {cfg.eps / _EPS:g}": {"eps": cfg.eps / _EPS},
    }
    if cfg.rotary_base >= _THETA:
        less = cfg.rotary_base / _THETA
        found[f"rotary theta {less:g}"] = {"rotary_base": less}
    if cfg.rope_scaling is not None:
        found["no rotary scaling"] = {"rope_scaling": None}
    if cfg.n_coda and not cfg.loop_norm:
        without = "no " if cfg.pre_coda_norm else "a "
        found[f"{without}norm before the coda"] = {"pre_coda_norm": not cfg.pre_coda_norm}
    return found


def loss_under_settings(model: LoopedTransformer, passages: Sequence[Passage]) -> Finding:
    """The loss at settings that are often mistaken.

    Args:
        model: The model.
        passages: Texts that the model predicts well.
    """
    rows = rows_of(model, passages)
    before = [one.loss for one in measure(model, rows)]
    gains = {}
    for name, changes in other_settings(model.cfg).items():
        after = [one.loss for one in measure(with_settings(model, changes), rows)]
        gains[name] = mean_and_error([b - a for b, a in zip(before, after, strict=True)])
    better = [name for name, (gain, e) in gains.items() if gain > GAIN and gain > ERRORS * e]
    mean = sum(before) / len(before)
    each = ", ".join(f"{name} {-gain:+.3f} ± {error:.3f}" for name, (gain, error) in gains.items())
    found = (
        f"On {len(rows)} texts with a loss of {mean:.3f} nats per token, other settings change it "
        f"by: {each} (standard errors over texts). The right setting would lower it by more than "
        f"{GAIN} and by {ERRORS} standard errors."
    )
    if better:
        found += f" The loss is lower with {', '.join(better)}."
    numbers = {
        "loss": mean,
        "tried": {name: {"gain": gain, "error": error} for name, (gain, error) in gains.items()},
        "better": better,
    }
    outcome = Outcome.SUSPICIOUS if better else Outcome.PLAUSIBLE
    return Finding(SETTINGS, outcome, found, _IF_WRONG, numbers)


def with_settings(model: LoopedTransformer, changes: dict[str, Any]) -> LoopedTransformer:
    """A model of the same weights, not copied, with other settings."""
    with torch.device("meta"):
        other = LoopedTransformer(replace(model.cfg, **changes))
    weights = dict(model.named_parameters())
    for name, module in other.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[own] = weights[f"{name}.{own}" if name else own]
    other._note_devices()
    return other.eval()
