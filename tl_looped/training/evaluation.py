"""Held-out loss of a model, also at other numbers of recurrences than it was trained with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tl_looped.files import write_text
from tl_looped.transformer import LoopedTransformer

EVALUATED = range(1, 33)
"""Recurrences of the table beside a trained model."""
EVALUATED_ROWS = 16
"""Held-out rows that it is made from."""


@torch.no_grad()
def held_out_loss(
    model: LoopedTransformer, rows: Int[Tensor, "row length"], batch_size: int, bf16: bool = False
) -> float:
    """Mean next-token loss in nats over all rows, with the model's own state seed."""
    device = model.W_E.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        losses = [
            float(model(batch, return_type="loss")) * len(batch) for batch in rows.split(batch_size)
        ]
    return sum(losses) / len(rows)


@torch.no_grad()
def loss_by_recurrences(
    model: LoopedTransformer,
    rows: Int[Tensor, "row length"],
    recurrences: Iterable[int] = EVALUATED,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Mean next-token loss in nats for each number of recurrences, in the model's own dtype.

    Args:
        model: The model; its ``state_seed`` is the seed of a random initial state.
        rows: Held-out rows without padding.
        recurrences: Numbers of recurrences.
        batch_size: Rows a pass.

    Returns:
        Columns ``recurrences``, ``held_out_loss``, ``rows``, ``state_seed``.
    """
    records = []
    for n in recurrences:
        with model.turn, model.with_recurrences(n):
            loss = held_out_loss(model, rows, batch_size)
        records.append((n, loss, len(rows), model.state_seed))
    return pd.DataFrame(records, columns=["recurrences", "held_out_loss", "rows", "state_seed"])


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a CSV file; see :func:`tl_looped.files.write_bytes`."""
    write_text(table.to_csv(index=False), path)
