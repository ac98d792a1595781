"""What a grid of patches costs beside its forward passes, ours and TransformerLens's own."""

from __future__ import annotations

from typing import Any

import pytest
from bench_speed import Size
from conftest import Recorder
from torch import Tensor
from transformer_lens import patching

from tl_looped import LoopedTransformer
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


@pytest.mark.parametrize("grown", [4, 128], ids="after R = {}".format)
def bench_transformerlens_sweep(
    grown: int, benchmark: Any, record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patching, "tqdm", list)
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    model.set_recurrences(grown)  # the hook points of these recurrences stay
    model.set_recurrences(4)
    clean, corrupted = (model.to_tokens(f"Tom has {n} boxes.") for n in (3, 5))
    _, cache = model.run_with_cache(clean)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 0] - logits[0, -1, 1]

    n = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, metric).numel()
    assert n == 80

    def forwards() -> None:
        for _ in range(n):
            metric(model(corrupted))

    record.ratio(
        benchmark,
        f"TransformerLens's sweep of {n} heads / its forwards, demo, after R = {grown}",
        1.1,
        lambda: patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, metric),
        forwards,
        15,
    )
