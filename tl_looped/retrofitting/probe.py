"""The finished model against its source, at one recurrence.

A config field or a patch that nobody thought of would otherwise make a looped model that runs and
is wrong. A few random tokens go through the feedforward model, its dropped layers left out, and
through the looped one; and the rotary frequencies, which so short a text hardly tells apart, are
compared by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_looped.errors import ConfigError
from tl_looped.model.rotary import inverse_frequencies
from tl_looped.retrofitting.feedforward import Feedforward
from tl_looped.retrofitting.layers import LayerPlan
from tl_looped.transformer import LoopedTransformer

N_TOKENS = 12
_SEED = 0
# Relative to the size of the logits. A forgotten norm, bias or scale gives 0.05 and far more.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
HALF_TOLERANCE = 0.1


def probe(
    looped: LoopedTransformer, source: Feedforward, plan: LayerPlan
) -> Float[Tensor, "batch pos d_vocab"]:
    """What the source makes of the probe's tokens without its dropped layers.

    Args:
        looped: Made of ``source``, maybe without values yet.
        source: Is left as it was.
        plan: Which of its layers are used.

    Returns:
        Logits, fp64 on the CPU.
    """
    return _dropped_logits(source, plan, _tokens(looped))


def check_against_source(
    looped: LoopedTransformer,
    source: Feedforward,
    expected: Float[Tensor, "batch pos d_vocab"],
) -> None:
    """Compare the two models' logits and rotary frequencies.

    Args:
        looped: Made of ``source``; it runs at one recurrence.
        source: For its frequencies.
        expected: Its logits, see :func:`probe`.

    Raises:
        ConfigError: they differ, or the feedforward model's logits are no numbers.
    """
    _check_frequencies(looped, source)
    if not expected.isfinite().all():
        raise ConfigError(f"the feedforward model {source.name} gives logits that are not finite")
    tokens = _tokens(looped)
    with torch.no_grad():
        found = looped(tokens, n_recurrences=1, attention_mask=torch.ones_like(tokens))
    difference = found.cpu().double() - expected
    relative = float(difference.norm() / expected.norm().clamp_min(1e-30))
    dtypes = {looped.cfg.dtype, source.model.dtype}
    tolerance = max(TOLERANCE.get(dtype, HALF_TOLERANCE) for dtype in dtypes)
    if not relative <= tolerance:
        raise ConfigError(
            f"the looped model does not compute what {source.name} does: at one recurrence its "
            f"logits differ by {relative:.2g} of their size (at most {tolerance:g}). Something in "
            "that model's config or code is not known to tl_looped; it was not converted"
        )


def _tokens(looped: LoopedTransformer) -> Int[Tensor, "batch pos"]:
    """The same random ones at each call."""
    length = min(N_TOKENS, looped.cfg.n_ctx)
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(looped.cfg.d_vocab, (1, length), generator=generator)


def _dropped_logits(
    source: Feedforward, plan: LayerPlan, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a feedforward model without its dropped layers, fp64 on the CPU."""
    model = source.model
    body = _twin(model.model)
    body._modules["layers"] = nn.ModuleList(model.model.layers[i] for i in plan.kept)
    twin = _twin(model)
    twin._modules["model"] = body
    with torch.no_grad(), source.runnable(), _in_evaluation(model):
        logits = twin(tokens.to(source.device), use_cache=False).logits
    return logits.cpu().double()


def _twin(module: Any) -> Any:
    """A module of the same submodules and parameters, in which one can be exchanged."""
    twin = copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout for a while; every module goes back to the mode that it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_frequencies(looped: LoopedTransformer, source: Feedforward) -> None:
    ours = inverse_frequencies(looped.cfg)
    for name, buffer in source.model.named_buffers():
        # A model in half precision has rounded its frequencies; an old one has no such buffer.
        if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
            continue
        rtol = 1e-5 if buffer.dtype in (torch.float32, torch.float64) else 1e-2
        theirs = buffer.detach().cpu().float()
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=rtol, atol=1e-7):
            raise ConfigError(
                f"{source.name} rotates queries and keys by frequencies that tl_looped does not "
                f"get from its config: rope_parameters={source.model.config.rope_parameters!r}"
            )
