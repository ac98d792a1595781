"""What a grid of patches costs beside its forward passes."""

from __future__ import annotations

from typing import Any

import pytest
from bench_speed import Size
from conftest import Recorder
from torch import Tensor

from tl_looped.patching import patch_recurrences

GRID = Size("d_model 256, 8 x 4, T=32", 256, 4, 4, 32, 5, 1.05)


@pytest.mark.parametrize("rows", [1, 16], ids="{} rows a forward".format)
def bench_patching_grid(rows: int, benchmark: Any, record: Recorder) -> None:
    model, tokens, n = GRID.model(), GRID.tokens(), GRID.n_recurrences**2
    _, donor = model.run_with_cache(tokens)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 0].mean()

    def forwards() -> None:
        # One for each cell, and the corrupted run itself.
        for _ in range(n + 1):
            model(tokens)

    record.ratio(
        benchmark,
        f"grid of {n} patches / its forwards, {rows} rows a forward, {GRID.name}",
        1.3,
        lambda: patch_recurrences(
            model, tokens, donor, metric, "state_out", batch_size=rows, progress=False
        ),
        forwards,
        GRID.rounds,
    )
