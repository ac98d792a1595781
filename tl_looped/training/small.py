"""A small training loop for small looped models on a CPU.

Cross entropy of the final state at a constant number of recurrences, AdamW with warm-up and cosine
decay. The random initial state gets a new seed at every step: with one fixed seed the model could
use the noise as a position code. The best model by held-out loss is kept; every draw comes from
``TrainSpec.seed``. Limits: no resume, one device.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_looped.transformer import LoopedTransformer

LOG_FIELDS = ("step", "tokens", "epoch", "train_loss", "held_out_loss", "learning_rate", "seconds")


@dataclass(frozen=True)
class TrainSpec:
    """Hyperparameters of a run.

    Args:
        steps: Optimiser steps.
        batch_size: Rows a step.
        learning_rate: Peak of the schedule.
        warmup: Steps of linear warm-up.
        final_fraction: Learning rate at the end, as a fraction of the peak.
        weight_decay: AdamW's, on matrices only.
        clip: Largest gradient norm.
        evaluate_every: Steps between held-out losses.
        bf16: Run matrix products in bfloat16 (autocast).
        seed: Seed of the order of rows and of the initial states.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup: int = 200
    final_fraction: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluate_every: int = 200
    bf16: bool = True
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then cosine decay."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        low = self.final_fraction
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def held_out_loss(
    model: LoopedTransformer, rows: Int[Tensor, "row length"], batch_size: int, bf16: bool = False
) -> float:
    """Mean next-token loss in nats over all rows, with the model's own state seed."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = [
            float(model(batch, return_type="loss")) * len(batch) for batch in rows.split(batch_size)
        ]
    return sum(losses) / len(rows)


def train_small(
    model: LoopedTransformer,
    rows: Int[Tensor, "row length"],
    held_out: Int[Tensor, "held_out_row length"],
    spec: TrainSpec,
    out: Path,
    report: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> list[dict[str, Any]]:
    """Train; write ``log.csv`` as it goes and the best model so far to ``out/best``.

    Args:
        model: Changed in place; holds the last step's weights at the end.
        rows: Training rows, one context each.
        held_out: Rows for the held-out loss.
        spec: Hyperparameters.
        out: Folder of the run.
        report: Called with every entry of the log.

    Returns:
        The log: one entry an evaluation, with the fields of ``LOG_FIELDS``.
    """
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(spec.seed)
    optimizer = _optimizer(model, spec)
    model.train()
    log: list[dict[str, Any]] = []
    best, running, started = math.inf, 0.0, time.perf_counter()
    order = torch.empty(0, dtype=torch.long)
    for step in range(spec.steps):
        while len(order) < spec.batch_size:
            order = torch.cat((order, torch.randperm(len(rows), generator=generator)))
        batch, order = rows[order[: spec.batch_size]], order[spec.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = spec.rate(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.bf16):
            # Seeds from 1 on: the default seed 0 is left for evaluation.
            loss = model(batch, return_type="loss", state_seed=1 + spec.seed * spec.steps + step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += float(loss.detach())
        if (step + 1) % spec.evaluate_every and step + 1 != spec.steps:
            continue
        n = (step % spec.evaluate_every) + 1
        entry = {
            "step": step + 1,
            "tokens": (step + 1) * batch.numel(),
            "epoch": round((step + 1) * spec.batch_size / len(rows), 3),
            "train_loss": round(running / n, 5),
            "held_out_loss": round(held_out_loss(model, held_out, 16, spec.bf16), 5),
            "learning_rate": spec.rate(step),
            "seconds": round(time.perf_counter() - started, 1),
        }
        running = 0.0
        log.append(entry)
        _write_log(out / "log.csv", log)
        if entry["held_out_loss"] < best:
            best = entry["held_out_loss"]
            model.save_pretrained(out / "best")
        report(entry)
    model.eval()
    return log


def _optimizer(model: LoopedTransformer, spec: TrainSpec) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95))


def _write_log(path: Path, log: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LOG_FIELDS)
        writer.writeheader()
        writer.writerows(log)
    partial.replace(path)
