"""What a forward pass returns, and its losses: of the tokens themselves, or of given labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped._compat import lm_cross_entropy_loss
from tl_looped.checks import described
from tl_looped.errors import InputError
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.model.masks import real_tokens
from tl_looped.transformer.reading import integers

RETURN_TYPES = ("logits", "loss", "both", "logits_and_cache", None)
_IGNORED = -100


class Output(NamedTuple):
    """Logits and loss, as TransformerLens's ``return_type="both"`` has them.

    Args:
        logits: ``[batch, pos, d_vocab]``.
        loss: The mean, or of every next token ``[batch, pos - 1]``.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Float[Tensor, "..."]


def result(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"] | None,
    mask: Bool[Tensor, "batch pos"] | None,
    labels: Int[Tensor, "batch pos"] | None,
    return_type: str | None,
    per_token: bool,
    cache: LoopedKeyValueCache | None,
) -> Tensor | Output | tuple[Tensor, LoopedKeyValueCache | None] | None:
    """What ``return_type`` says."""
    if return_type in (None, "logits"):
        return logits if return_type else None
    if return_type == "logits_and_cache":
        return logits, cache
    if labels is not None:
        loss = labels_loss(logits, labels, mask, per_token)
    elif tokens is None:
        raise InputError("a loss needs tokens: pass tokens= with a residual input")
    else:
        loss = next_token_loss(logits, tokens, mask, per_token)
    return loss if return_type == "loss" else Output(logits, loss)


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Tensor | None,
    per_token: bool,
) -> Float[Tensor, "..."]:
    """TransformerLens's own, in fp32 or better; see :meth:`LoopedTransformer.loss_fn`."""
    if attention_mask is not None:
        attention_mask = real_tokens(attention_mask)
        if attention_mask.shape != tokens.shape:
            raise InputError(
                f"attention_mask must have the shape of tokens, {tuple(tokens.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
    return lm_cross_entropy_loss(_wide(logits), tokens.to(logits.device), attention_mask, per_token)


def check_labels(labels: Tensor, batch: int, length: int, d_vocab: int) -> Int[Tensor, "batch pos"]:
    """Labels of tokens, ``[batch, pos]``: ids, or -100 where none counts.

    Raises:
        InputError: for another shape, or other numbers.
    """
    labels = integers(labels)
    if labels.dtype != torch.int64 or tuple(labels.shape) != (batch, length):
        raise InputError(
            f"labels must be integers of shape {(batch, length)} like the tokens, got "
            f"{described(labels)}"
        )
    wrong = labels[(labels != _IGNORED) & ((labels < 0) | (labels >= d_vocab))]
    if wrong.numel():
        raise InputError(
            f"labels must be 0..{d_vocab - 1}, or {_IGNORED} where none counts, got {int(wrong[0])}"
        )
    return labels


def labels_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    labels: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    per_token: bool,
) -> Float[Tensor, "..."]:
    """Cross entropy of labels, as TransformerLens 4 has it.

    The label at a position is what the position before it should predict, so labels are the tokens
    themselves and not shifted ones. Those of -100, and those at and right after padding, count
    nothing: per token they are zero.
    """
    targets = labels[:, 1:].to(logits.device)
    losses = F.cross_entropy(
        _wide(logits)[:, :-1].flatten(0, 1),
        targets.flatten(),
        reduction="none",
        ignore_index=_IGNORED,
    ).view_as(targets)
    counts = targets != _IGNORED
    if mask is not None:
        real = mask.to(logits.device)
        counts = counts & real[:, :-1] & real[:, 1:]
    losses = losses.masked_fill(~counts, 0.0)
    return losses if per_token else losses.sum() / counts.sum()


def _wide(logits: Tensor) -> Tensor:
    """In bf16 a loss of 2 to 4 nats would be a multiple of 1/64."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
