"""Bundled texts as a model reads them, and its losses on them, text by text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.transformer import LoopedTransformer
from tl_looped.verification.texts import bundled_texts

LOGITS = 2**28
"""Bytes of logits in one forward pass, about."""
_OTHER = "text"


@dataclass(frozen=True)
class Passage:
    """A text, as far as the model's context reaches.

    Args:
        register: Its kind, such as ``"story"``.
        text: What the tokens say, without BOS.
        ids: Its tokens, without BOS.
        first: What the first token says, which nothing predicts where there is no BOS.
    """

    register: str
    text: str
    ids: tuple[int, ...]
    first: str


@dataclass(frozen=True)
class Measured:
    """Losses of a text.

    Args:
        losses: Nats of every predicted token.
        entropy: Mean entropy of the predictions, in nats: the loss that the model expects itself.
    """

    losses: Float[Tensor, " token"]
    entropy: float

    @property
    def loss(self) -> float:
        """Mean, in nats per token."""
        return float(self.losses.mean())


def read_passages(model: LoopedTransformer, texts: Iterable[str]) -> tuple[Passage, ...]:
    """Texts as tokens, cut to the model's context; those of fewer than two tokens are left out."""
    registers = {one.text: one.register for one in bundled_texts()}
    passages = []
    for text in texts:
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        kept = ids[: model.cfg.n_ctx - 1]
        if len(kept) < 2:
            continue
        whole = text if kept == ids else str(model.to_string(kept))
        first = str(model.to_string(kept[:1]))
        passages.append(Passage(registers.get(text, _OTHER), whole, tuple(kept), first))
    return tuple(passages)


def rows_of(
    model: LoopedTransformer, passages: Iterable[Passage], bos: bool | None = None
) -> list[list[int]]:
    """Tokens as the model is set to read them, or with or without BOS."""
    if bos is None:
        bos = bool(model.cfg.default_prepend_bos)
    start = [int(model.tokenizer.bos_token_id)] if bos else []
    return [[*start, *passage.ids] for passage in passages]


def measure(
    model: LoopedTransformer,
    rows: Sequence[Sequence[int]],
    n_recurrences: int | None = None,
) -> list[Measured]:
    """Losses of sequences of tokens, in fp32 or better, in their order.

    Args:
        model: The model.
        rows: Tokens, two or more each; rows of like length share a forward pass.
        n_recurrences: Recurrences; the model's own number if None.
    """
    found: dict[int, Measured] = {}
    with torch.no_grad():
        for batch in _batches(rows, model.cfg.d_vocab):
            tokens, mask = padded([rows[i] for i in batch], model.W_E.device)
            logits = model(tokens, attention_mask=mask, n_recurrences=n_recurrences)
            for i, of_row in zip(batch, logits, strict=True):
                found[i] = _of_row(of_row[: len(rows[i]) - 1], rows[i][1:])
    return [found[i] for i in range(len(rows))]


def padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Tokens ``[batch, pos]`` and their mask, padded on the right."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    return tokens.to(device), mask.to(device)


def _batches(rows: Sequence[Sequence[int]], d_vocab: int) -> Iterable[list[int]]:
    most = max(1, LOGITS // (4 * d_vocab))
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[i]) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _of_row(logits: Tensor, targets: Sequence[int]) -> Measured:
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    log_p = logits.log_softmax(-1)
    losses = -log_p.gather(-1, torch.tensor(targets, device=log_p.device)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return Measured(losses.cpu(), float(entropy))


@dataclass(frozen=True)
class Level:
    """Losses of texts of one register.

    Args:
        loss: Nats per token.
        entropy: Nats per token that the model expects.
        bits_per_byte: Independent of the tokenizer.
    """

    loss: float
    entropy: float
    bits_per_byte: float


def levels(
    passages: Sequence[Passage], measured: Sequence[Measured], bos: bool
) -> dict[str, Level]:
    """Losses by register, each a mean over its tokens."""
    found = {}
    for register in dict.fromkeys(passage.register for passage in passages):
        here = [i for i, passage in enumerate(passages) if passage.register == register]
        n = sum(len(measured[i].losses) for i in here)
        nats = sum(float(measured[i].losses.sum()) for i in here)
        expected = sum(measured[i].entropy * len(measured[i].losses) for i in here)
        texts = (passages[i].text.removeprefix("" if bos else passages[i].first) for i in here)
        n_bytes = sum(len(text.encode()) for text in texts)
        bits = nats / math.log(2) / n_bytes
        found[register] = Level(nats / n, expected / n, bits)
    return found
