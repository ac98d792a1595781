"""Prediction and suppression neurons: whose output raises, or lowers, a few tokens' logits.

A neuron writes its output direction ``w`` into the residual stream. Its scores are the cosines
``s_v = cos(w, U_v)`` with the unembedding columns. A few tokens far above the rest (kurtosis > 10,
skew > 0) make it a prediction neuron, a few far below (kurtosis > 10, skew < 0) a suppression
neuron. Models Figures 32 and 33 of arXiv 2604.11791, after Gurnee et al. 2024.

Decisions. Moments are the population's, about the mean, in fp64, and the kurtosis is ``E z^4`` (3
for a Gaussian, nothing subtracted). The final norm's gain is part of the unembedding. A gain on the
MLP's output (OLMo-2, Ouro) is part of ``w``. Huginn's norm acts on the sum of stream and MLP
output, where no factor of ``w`` alone stands for it: ``w`` is raw there, and the result says so.

Limits: what later layers do to a write is left out, which for the core of a looped model includes
all later recurrences, and an activation may be negative (SiLU-gated MLPs), which swaps the classes
for that token. A weight of a looped model is counted once, whatever the number of recurrences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_looped.checks import checked, described, whole
from tl_looped.errors import InputError
from tl_looped.metrics.inputs import at_least_fp32
from tl_looped.model.config import NormLayout
from tl_looped.transformer import LoopedTransformer

KURTOSIS_THRESHOLD = 10.0
"""Smallest kurtosis, exclusive, of a prediction or suppression neuron."""

_CHUNK_BYTES = 2**27  # scores of one chunk of neurons in fp64
# Cosines of fp32 vectors are off by about 1e-7: a spread below this is rounding.
_LEAST_SPREAD = 1e-6
# TransformerLens's HookedTransformer calls the norm behind their MLP ln2.
_LN2_BEHIND_MLP = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


@dataclass(frozen=True)
class NeuronClasses:
    """Which neurons of one MLP predict or suppress tokens.

    Attributes:
        prediction: Fraction of all neurons with kurtosis above the threshold and skew > 0.
        suppression: Fraction of all neurons with kurtosis above the threshold and skew < 0.
        kurtosis: ``E z^4`` of each neuron's scores; NaN where all scores are the same.
        skew: ``E z^3`` of each neuron's scores; NaN where all scores are the same.
        n_tokens: Unembedding columns that were scored: those that are not zero.
        threshold: Of the kurtosis, exclusive.
    """

    prediction: float
    suppression: float
    kurtosis: Float[Tensor, " neuron"]
    skew: Float[Tensor, " neuron"]
    n_tokens: int
    threshold: float


@checked
def prediction_suppression_fraction(
    w_out: Float[Tensor, "neuron d_model"],
    unembed: Float[Tensor, "_ vocab"],
    *,
    threshold: float = KURTOSIS_THRESHOLD,
    chunk_bytes: int = _CHUNK_BYTES,
) -> NeuronClasses:
    """Classes of an MLP's neurons by kurtosis and skew of their cosines with the unembedding.

    ``s_v = cos(w, U_v)``; kurtosis ``E z^4`` and skew ``E z^3`` of ``z = (s - E s) / SD s`` over
    the columns, in two passes. Columns of zeros have no direction and are left out. A neuron of
    zeros, or one with the same cosine (to 1e-6) with every column, has NaN moments and is in
    neither class, but counts among the neurons.

    Args:
        w_out: Output directions, ``[neuron, d_model]``, with the gain of a norm on the MLP's output
            if there is one.
        unembed: Unembedding columns, ``[d_model, vocab]``, of the real vocabulary (no padding
            columns), with the final norm's gain: ``ln_final.w[:, None] * W_U``.
        threshold: The kurtosis above which a neuron counts.
        chunk_bytes: Bound on the fp64 scores held at a time; about four times as much is used.

    Raises:
        InputError: if the sizes differ, a weight is not finite, or no column is left.
    """
    if w_out.ndim != 2 or w_out.shape[0] == 0 or w_out.shape[1] != unembed.shape[0]:
        raise InputError(
            f"w_out must be [neuron, d_model={unembed.shape[0]}] for an unembedding of shape "
            f"{tuple(unembed.shape)}, got {tuple(w_out.shape)}"
        )
    return _classes(w_out, _columns(unembed), threshold, chunk_bytes)


@checked
def prediction_suppression(
    model: nn.Module,
    *,
    n_vocab: int | None = None,
    threshold: float = KURTOSIS_THRESHOLD,
    chunk_bytes: int = _CHUNK_BYTES,
) -> xr.Dataset:
    """Prediction and suppression neurons of every layer of a model, each layer once.

    Of a looped model the order is prelude, core, coda, p + k + c layers. The final norm's gain is
    folded into the unembedding, in compatibility mode or not, and that of a norm behind the MLP
    into the output directions; ``attrs["direction"]`` says what was done. See
    :func:`prediction_suppression_fraction` for the formula.

    A feedforward model for comparison is a ``HookedTransformer``, a ``TransformerBridge``, or
    anything with ``W_U [d_model, d_vocab]`` and ``blocks[i].mlp.W_out [d_mlp, d_model]``; norms are
    found by TransformerLens's names. A model whose weights were processed already (ones for gains)
    gives the same, but for ``center_unembed``, which moves the columns and with them the cosines.
    LayerNorm's centring is not folded in: load such a model with ``center_writing_weights=True``.

    Args:
        model: The model. Its weights are read, nothing is run.
        n_vocab: Columns of the unembedding that belong to tokens. By default the length of the
            model's tokenizer where that is smaller than the unembedding, otherwise all.
        threshold, chunk_bytes: See :func:`prediction_suppression_fraction`.

    Returns:
        ``prediction`` and ``suppression`` over ``layer``, ``kurtosis`` and ``skew`` over ``layer``
        and ``neuron``, coordinates ``stage`` (``"feedforward"`` in such a model) and
        ``layer_in_stage``.

    Raises:
        InputError: if ``n_vocab`` is out of range, a weight is not finite, or a feedforward model
            has mixtures of experts or gains stored as an offset from one.
    """
    parts = _looped(model) if isinstance(model, LoopedTransformer) else _feedforward(model)
    d_vocab = parts.W_U.shape[1]
    used = _vocabulary(n_vocab, getattr(model, "tokenizer", None), d_vocab)
    columns = _columns(_unembedding(parts.W_U, parts.ln_final, used))
    found = [_classes(_direction(*one), columns, threshold, chunk_bytes) for one in parts.outputs]
    return _labelled(found, parts.places).assign_attrs(
        **parts.attributes, d_vocab=d_vocab, n_vocab=used
    )


class _Parts(NamedTuple):
    """What is read of a model: output matrices with the norms behind them, places, and the end."""

    outputs: list[tuple[Tensor, Any]]
    places: list[tuple[str, int]]
    W_U: Float[Tensor, "d_model d_vocab"]
    ln_final: Any
    attributes: dict[str, str]


def _looped(model: LoopedTransformer) -> _Parts:
    cfg, blocks = model.cfg, model.unique_blocks()
    directions = {
        NormLayout.PRE: "raw",
        NormLayout.POST: "times the gain of ln2_post",
        NormLayout.SANDWICH: "times the gain of ln2_post",
        NormLayout.RESIDUAL: "raw: ln_out acts on the sum and cannot be folded",
    }
    return _Parts(
        [(block.mlp.W_out, getattr(block, "ln2_post", None)) for block in blocks],
        [(block.location.stage, block.location.layer) for block in blocks],
        # As they are stored: a bf16 gain is folded into bf16 columns in fp32, not in bf16.
        model.unembed.matrix.T,
        model.final_norm,
        {
            "model": cfg.model_name,
            "norm_layout": cfg.norm_layout.value,
            "direction": directions[cfg.norm_layout],
        },
    )


def _feedforward(model: Any) -> _Parts:
    cfg = getattr(model, "cfg", None)
    if not hasattr(model, "blocks") or not hasattr(model, "W_U"):
        raise InputError(f"model must be of tl_looped or TransformerLens, got {described(model)}")
    if getattr(cfg, "rmsnorm_uses_offset", False):
        raise InputError(
            "model stores its norms' gains as an offset from one (Gemma): fold 1 + w yourself and "
            "call prediction_suppression_fraction"
        )
    post = "ln2" if getattr(cfg, "original_architecture", None) in _LN2_BEHIND_MLP else "ln2_post"
    if any(hasattr(block, "ln2_post") for block in model.blocks):
        post = "ln2_post"
    outputs = [(block.mlp.W_out, getattr(block, post, None)) for block in model.blocks]
    has_gain = any(_gain(norm) is not None for _, norm in outputs)
    return _Parts(
        outputs,
        [("feedforward", i) for i in range(len(outputs))],
        model.W_U,
        getattr(model, "ln_final", None),
        {
            "model": str(getattr(cfg, "model_name", "feedforward")),
            "normalization": str(getattr(cfg, "normalization_type", "unknown")),
            "direction": f"times the gain of {post}" if has_gain else "raw",
        },
    )


# -- columns, directions, moments ---------------------------------------------------------------


def _columns(unembed: Float[Tensor, "d_model vocab"]) -> Float[Tensor, "d_model used"]:
    """Unit columns, in fp32 or better; those of zeros left out."""
    columns = at_least_fp32(unembed.detach())
    # By the largest entry first: squares of small weights underflow.
    largest = torch.maximum(columns.amax(0), -columns.amin(0))
    if not bool(largest.isfinite().all()):
        raise InputError("unembed must be finite")
    kept: Bool[Tensor, " vocab"] = largest > 0
    if not bool(kept.any()):
        raise InputError(f"unembed has no column that is not zero, of {columns.shape[1]}")
    if not bool(kept.all()):
        columns, largest = columns[:, kept], largest[kept]
    columns = columns / largest
    return columns.div_(columns.norm(dim=0))


def _classes(
    w_out: Float[Tensor, "neuron d_model"],
    columns: Float[Tensor, "d_model used"],
    threshold: float,
    chunk_bytes: int,
) -> NeuronClasses:
    n_tokens = columns.shape[1]
    whole(chunk_bytes, "chunk_bytes", 1)
    neurons = max(1, chunk_bytes // (8 * n_tokens))
    moments = [_moments(chunk.detach(), columns) for chunk in w_out.split(neurons)]
    skew, kurtosis = torch.cat([m[0] for m in moments]), torch.cat([m[1] for m in moments])
    counts = kurtosis > threshold
    return NeuronClasses(
        prediction=float((counts & (skew > 0)).double().mean()),
        suppression=float((counts & (skew < 0)).double().mean()),
        kurtosis=kurtosis,
        skew=skew,
        n_tokens=n_tokens,
        threshold=float(threshold),
    )


def _moments(
    w: Float[Tensor, "chunk d_model"], columns: Float[Tensor, "d_model used"]
) -> tuple[Float[Tensor, " chunk"], Float[Tensor, " chunk"]]:
    """Skew and kurtosis of the cosines; NaN where they do not spread."""
    w = at_least_fp32(w).to(columns)
    if not bool(w.isfinite().all()):
        raise InputError("w_out must be finite")
    w = w / w.abs().amax(-1, keepdim=True)  # 0 / 0, NaN, for a neuron of zeros
    scores = ((w / w.norm(dim=-1, keepdim=True)) @ columns).double()
    scores -= scores.mean(-1, keepdim=True)
    power = scores * scores
    variance = power.mean(-1)
    variance = torch.where(variance > _LEAST_SPREAD**2, variance, torch.nan)
    skew = (power * scores).mean(-1) / variance**1.5
    kurtosis = power.mul_(power).mean(-1) / variance**2
    return skew, kurtosis


# -- models -------------------------------------------------------------------------------------


def _gain(norm: Any) -> Float[Tensor, " d_model"] | None:
    """The gain of a norm under TransformerLens's name or PyTorch's; None if it has none."""
    for name in ("w", "weight"):
        gain = getattr(norm, name, None)
        if isinstance(gain, Tensor):
            return at_least_fp32(gain.detach())
    return None


def _unembedding(
    W_U: Float[Tensor, "d_model d_vocab"], ln_final: Any, n_vocab: int
) -> Float[Tensor, "d_model n_vocab"]:
    unembed, gain = at_least_fp32(W_U.detach()[:, :n_vocab]), _gain(ln_final)
    return unembed if gain is None else gain[:, None].to(unembed) * unembed


def _direction(w_out: Tensor, post_norm: Any) -> Float[Tensor, "neuron d_model"]:
    if w_out.ndim != 2:
        raise InputError(
            f"W_out must be [d_mlp, d_model], got shape {tuple(w_out.shape)}: a mixture of "
            "experts? Call prediction_suppression_fraction for each expert"
        )
    gain = _gain(post_norm)
    w = at_least_fp32(w_out.detach())
    return w if gain is None else w * gain.to(w)


def _vocabulary(n_vocab: int | None, tokenizer: Any, d_vocab: int) -> int:
    if n_vocab is None:
        return min(len(tokenizer), d_vocab) if hasattr(tokenizer, "__len__") else d_vocab
    return whole(n_vocab, "n_vocab", 1, d_vocab, fix="columns of the unembedding")


def _labelled(found: list[NeuronClasses], places: list[tuple[str, int]]) -> xr.Dataset:
    def per_neuron(name: str) -> tuple[tuple[str, str], np.ndarray]:
        return ("layer", "neuron"), np.stack([getattr(f, name).cpu().numpy() for f in found])

    return xr.Dataset(
        {
            "prediction": ("layer", [f.prediction for f in found]),
            "suppression": ("layer", [f.suppression for f in found]),
            "kurtosis": per_neuron("kurtosis"),
            "skew": per_neuron("skew"),
        },
        coords={
            "layer": np.arange(len(found)),
            "stage": ("layer", [stage for stage, _ in places]),
            "layer_in_stage": ("layer", [layer for _, layer in places]),
        },
        attrs={
            "threshold": found[0].threshold,
            "n_tokens": found[0].n_tokens,
            "kurtosis": "population, E z^4, nothing subtracted",
        },
    )
