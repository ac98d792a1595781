"""Metrics of the residual stream along the recurrences.

States are ``[recurrence, layer, ..., pos, d_model]``, as ``cache.stack_recurrences("resid_post")``
gives them; see ``tl_looped.metrics.inputs`` for masks. Norms and cosines are over ``d_model``, one
a token, summed in fp64, then averaged over the prompt's tokens. A token whose state is zero has
neither a relative distance nor a cosine: it is left out, and a prompt of such tokens gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_looped.checks import checked, one_of
from tl_looped.errors import InputError
from tl_looped.metrics.attention_patterns import attention_distance
from tl_looped.metrics.inputs import (
    BLOCK_BYTES,
    at_least_fp32,
    counted_tokens,
    same_shape,
    token_mask,
    token_mean,
)

StateForm = Literal["abs", "rel", "cosine", "direction"]
Form = Literal["abs", "rel", "cosine", "direction", "attention"]
Magnitude = Literal["mean", "max", "first", "rms"]

States = Float[Tensor, "recurrence layer *batch pos d_model"]
PerRecurrence = Float[Tensor, "recurrence layer *batch"]


def norms(x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos"]:
    """Euclidean norms over ``d_model``, in fp64."""
    return torch.linalg.vector_norm(at_least_fp32(x), dim=-1, dtype=torch.float64)


@dataclass(frozen=True)
class Sized:
    """States with what every comparison of them needs.

    Args:
        x: ``[..., pos, d_model]`` in fp32 or fp64.
        size: Norms ``[..., pos]``.
        real: Which tokens are real; None means all.
        counted: Which of them means are of; None means all.
    """

    x: Float[Tensor, "*batch pos d_model"]
    size: Float[Tensor, "*batch pos"]
    real: Bool[Tensor, "*mask pos"] | None
    counted: Bool[Tensor, "*counted pos"] | None

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None, skip_first: int = 0) -> Sized:
        """Check and prepare states."""
        real, counted = token_mask(x, mask), counted_tokens(x, mask, skip_first)
        wide = at_least_fp32(x)
        return cls(wide, norms(wide), real, counted)

    @cached_property
    def unit(self) -> Float[Tensor, "*batch pos d_model"]:
        """States of norm one; NaN where a state is zero."""
        # Divided before they are multiplied, so that products neither overflow nor vanish. In fp64
        # where fp32 does not hold the norm itself.
        held = (self.size == 0) | ((self.size > 1e-30) & (self.size < 1e30))
        x = self.x if bool(held.all()) else self.x.double()
        return x / self.size[..., None].to(x.dtype)


@checked
def state_distance(
    x: Float[Tensor, "*batch pos d_model"],
    reference: Float[Tensor, "*batch pos d_model"],
    form: StateForm | str = "abs",
    attention_mask: Tensor | None = None,
    skip_first: int = 0,
) -> Float[Tensor, "*batch"]:
    """How far states are from reference states, averaged over tokens.

    Args:
        x: States.
        reference: What they are compared with.
        form: ``abs``, ``||x - ref||``; ``rel``, each token's distance over its ``||ref||``;
            ``cosine``, the similarity (1 means no angle); ``direction``, the distance of the unit
            vectors, ``sqrt(2 - 2 cos)``, which keeps the digits that a cosine near 1 loses.
        attention_mask: ``[..., pos]``, zero at padding.
        skip_first: Real tokens at the beginning that are left out of the mean.
    """
    one_of(form, "form", get_args(StateForm))
    ours, theirs = (Sized.of(states, attention_mask, skip_first) for states in (x, reference))
    return distances(ours, theirs, (form,))[form]


def distances(
    x: Sized, reference: Sized, forms: Iterable[str] = get_args(StateForm)
) -> dict[str, Float[Tensor, "*batch"]]:
    """:func:`state_distance` in several forms at once, by form."""
    same_shape("reference", x.x, reference.x)
    found: dict[str, Tensor] = {}
    forms = set(forms)
    zero = reference.size == 0
    if forms & {"abs", "rel"}:
        step = norms(x.x - reference.x)
        if "abs" in forms:
            found["abs"] = token_mean(step, x.counted)
        if "rel" in forms:
            found["rel"] = token_mean(step / reference.size, x.counted, zero)
    if "cosine" in forms:
        cosine = token_cosine(x, reference)
        found["cosine"] = token_mean(cosine, x.counted, zero | (x.size == 0))
    if "direction" in forms:
        turn = norms(x.unit - reference.unit)
        found["direction"] = token_mean(turn, x.counted, zero | (x.size == 0))
    return found


def token_cosine(x: Sized, reference: Sized) -> Float[Tensor, "*batch pos"]:
    """Cosine of each token's two states; NaN where one is zero."""
    return (x.unit * reference.unit).sum(-1, dtype=torch.float64).clamp(-1.0, 1.0)


@checked
def successive_difference(
    states: States,
    form: Form | str = "abs",
    attention_mask: Tensor | None = None,
    skip_first: int = 0,
) -> PerRecurrence:
    """Step from the previous recurrence, same layer (Figs 3, 24, 25).

    Args:
        states: States, or patterns ``[recurrence, layer, ..., head, query, key]`` for
            ``form="attention"``.
        form: ``abs``, mean over tokens of ``||x_r - x_(r-1)||``; ``rel``, each token's step over
            its ``||x_r||``; ``cosine`` of ``x_r`` and ``x_(r-1)``; ``direction``, distance of their
            unit vectors; ``attention``, Frobenius distance of the patterns, for each head.
        attention_mask: ``[..., pos]``, zero at padding.
        skip_first: Real tokens at the beginning that are left out of the mean; of states alone.

    Returns:
        ``[recurrence, layer, ...]``, NaN at the first recurrence, which has no previous one.
    """
    one_of(form, "form", get_args(Form))
    if form == "attention":
        _whole_patterns(skip_first)
        step = attention_distance(states[:-1], states[1:], attention_mask)
    else:
        step = state_distance(states[:-1], states[1:], form, attention_mask, skip_first)
    return torch.cat((step.new_full((1, *step.shape[1:]), math.nan), step))


@checked
def fixed_point_distance(
    states: States,
    form: Form | str = "abs",
    attention_mask: Tensor | None = None,
    reference: Float[Tensor, "*layers pos_ d_model_"] | None = None,
    skip_first: int = 0,
) -> PerRecurrence:
    """Distance to the approximate fixed point of the same layer (Figs 4, 22, 23).

    The paper's fixed point is the state of the last recurrence. The distance to it tends to zero
    for any map, a drift included, so read it together with :func:`successive_difference`, or give
    the state after twice as many recurrences as ``reference``.

    Args:
        states: States, or patterns for ``form="attention"``.
        form: As in :func:`successive_difference`, relative to the norm of the reference.
        attention_mask: ``[..., pos]``, zero at padding.
        reference: The fixed points ``[layer, ..., pos, d_model]``, of the shape of one recurrence;
            the last recurrence's states if None.
        skip_first: As in :func:`successive_difference`.
    """
    one_of(form, "form", get_args(Form))
    if reference is not None:
        same_shape("reference", states[-1], reference)
    last = (states[-1] if reference is None else reference).unsqueeze(0).expand_as(states)
    if form == "attention":
        _whole_patterns(skip_first)
        return attention_distance(states, last, attention_mask)
    return state_distance(states, last, form, attention_mask, skip_first)


def _whole_patterns(skip_first: int) -> None:
    if skip_first:
        raise InputError(
            f"skip_first={skip_first} is for states: patterns are compared whole, rows of a part "
            "would not sum to 1"
        )


@checked
def lowest_cosine_to_fixed_points(
    states: States,
    attention_mask: Tensor | None = None,
    reference: Float[Tensor, "*layers pos_ d_model_"] | None = None,
) -> Float[Tensor, " recurrence *batch"]:
    """Lowest cosine between the first layer's state and any layer's fixed point (Fig. 6, right).

    A limit of 1 means a degenerate fixed point that all layers share. Cosines are averaged over
    tokens before the lowest is taken.

    Args:
        states: States.
        attention_mask: ``[..., pos]``, zero at padding.
        reference: The fixed points ``[layer, ..., pos, d_model]``, of the shape of one recurrence;
            the last recurrence's states if None.
    """
    last = states[-1] if reference is None else reference
    same_shape("reference", states[-1], last)
    first = states[:, 0]
    cosines = [
        state_distance(first, point.expand_as(first), "cosine", attention_mask) for point in last
    ]
    return lowest(torch.stack(cosines))


def lowest(cosines_to_layers: Float[Tensor, " layer *batch"]) -> Float[Tensor, "*batch"]:
    """The lowest over layers; NaN if a layer has none."""
    return cosines_to_layers.amin(0)


@checked
def pairwise_residual_cosine(
    states: Float[Tensor, "layer *batch pos d_model"], attention_mask: Tensor | None = None
) -> Float[Tensor, "layer layer"]:
    """Cosine of the states of every two layers: mean over tokens, then prompts (Figs 19, 20).

    Args:
        states: All layers to compare, stacked: ``cache.stack_activation("resid_post")``.
        attention_mask: ``[..., pos]``, zero at padding.

    Returns:
        A symmetric matrix. NaN where a layer's states are zero at every token of every prompt;
        prompts for which that holds are left out.
    """
    real = token_mask(states, attention_mask)
    if real is None or real.ndim < states.ndim - 1:
        return cosines_of_layers(states.unbind(), [real] * len(states))
    return cosines_of_layers(states.unbind(), real.unbind())  # a mask for every layer


def cosines_of_layers(
    layers: Sequence[Tensor], real: Sequence[Tensor | None]
) -> Float[Tensor, "layer layer"]:
    """As :func:`pairwise_residual_cosine`, of layers that need not be copied into one tensor.

    Works through a few tokens at a time: beside the states it takes some matrices of ``layer x
    layer`` and ``BLOCK_BYTES``.

    Args:
        layers: ``[*batch, pos, d_model]`` each.
        real: Of each layer, see ``tl_looped.metrics.inputs.token_mask``.
    """
    shape, device, n_layers = layers[0].shape, layers[0].device, len(layers)
    flat = [layer.reshape(-1, *shape[-2:]) for layer in layers]
    masks = [None if m is None else m.expand(shape[:-1]).reshape(-1, shape[-2]) for m in real]
    step = max(1, BLOCK_BYTES // (8 * n_layers * shape[-1]))
    total = torch.zeros(n_layers, n_layers, dtype=torch.float64, device=device)
    count = torch.zeros_like(total)
    for prompt in range(len(flat[0])):
        cosines, n_tokens = torch.zeros_like(total), torch.zeros_like(total)
        broken = torch.zeros(n_layers, dtype=torch.bool, device=device)
        for start in range(0, shape[-2], step):
            tokens = slice(start, start + step)
            block = total.new_empty(n_layers, len(flat[0][prompt, tokens]), shape[-1])
            for i, layer in enumerate(flat):
                block[i] = layer[prompt, tokens]
                if (mask := masks[i]) is not None:
                    block[i].masked_fill_(~mask[prompt, tokens, None], 0.0)
            broken |= ~block.flatten(1).isfinite().all(-1)
            size = torch.linalg.vector_norm(block, dim=-1, keepdim=True)
            # The product of rows of unit vectors is a sum of cosines; padding has size zero.
            unit = block.div_(size).masked_fill_(size == 0, 0.0).flatten(1)
            cosines += unit @ unit.T
            has = (size[..., 0] != 0).double()
            n_tokens += has @ has.T
        cosine = cosines.div_(n_tokens).clamp_(-1.0, 1.0)
        # A prompt is left out where no token has a cosine; a state that is not finite shows.
        defined = ~cosine.isnan() | broken[:, None] | broken[None]
        total += torch.where(defined, cosine, 0.0)
        count += defined
    return total / count


@checked
def cyclicity_index(
    similarity: Float[Tensor, "*batch layer layer"], n_core: int
) -> Float[Tensor, "*batch"]:
    """Mean similarity of the same layer across recurrences minus that of different layers.

    The paper shows the matrices; this number is ours. Near 0 if layers cannot be told apart (or if
    all states agree); positive if a layer resembles itself at other recurrences more than it
    resembles other layers, of any recurrence.

    Args:
        similarity: ``[layer, layer]`` over the core alone, recurrence by recurrence.
        n_core: Core layers, k.

    Returns:
        NaN with one recurrence, or with one core layer.
    """
    n = similarity.shape[-1]
    if n_core < 1 or n % n_core:
        raise InputError(
            f"similarity must be over recurrences of n_core={n_core} layers, got {n} layers: "
            "leave prelude and coda out"
        )
    layer = torch.arange(n, device=similarity.device) % n_core
    same = layer[:, None] == layer[None]
    itself = torch.eye(n, dtype=torch.bool, device=similarity.device)
    wide = similarity.double()
    return _mean_where(wide, same & ~itself) - _mean_where(wide, ~same)


def _mean_where(x: Tensor, where: Tensor) -> Tensor:
    return x.masked_fill(~where, 0.0).sum((-2, -1)) / where.sum()


@checked
def residual_magnitude(
    states: Float[Tensor, "*batch pos d_model"],
    statistic: Magnitude | str = "mean",
    attention_mask: Tensor | None = None,
    skip_first: int = 0,
) -> Float[Tensor, "*batch"]:
    """Size of the residual stream (Fig. 9).

    Args:
        states: States.
        statistic: ``mean`` or ``max`` over tokens of ``||x||``; ``first``, that of the first real
            token, where massive activations stand; ``rms``, the mean over ``sqrt(d_model)``.
        attention_mask: ``[..., pos]``, zero at padding.
        skip_first: Real tokens at the beginning that are left out of all but ``first``.
    """
    one_of(statistic, "statistic", get_args(Magnitude))
    return magnitudes(Sized.of(states, attention_mask, skip_first))[statistic]


def magnitudes(states: Sized) -> dict[str, Float[Tensor, "*batch"]]:
    """:func:`residual_magnitude` in all its forms, by form."""
    size, real, counted = states.size, states.real, states.counted
    mean = token_mean(size, counted)
    if real is None:
        first = size[..., 0]
    else:
        is_first = real & (real.cumsum(-1) == 1)
        first = size.masked_fill(~is_first, 0.0).sum(-1)
    shown = size if counted is None else size.masked_fill(~counted, -math.inf)
    largest = shown.amax(-1)
    rms = mean / math.sqrt(states.x.shape[-1])
    return {"mean": mean, "max": largest, "first": first, "rms": rms}
