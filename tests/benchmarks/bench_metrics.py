"""What streaming the metrics of 128 recurrences costs, in time and in memory."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from conftest import Recorder
from streamed import METRICS, WIDE, explicit_forward

from tl_looped import LoopedTransformer
from tl_looped.metrics import stream

SIZE = "(2, 4 x 128, 2), d_model 512, T=128"


@cache
def wide() -> LoopedTransformer:
    return WIDE.model(128)


def bench_streaming_in_one_run(benchmark: Any, record: Recorder) -> None:
    model, tokens = wide(), WIDE.tokens()
    record.ratio(
        benchmark,
        f"all metrics, states on disk / forward, {SIZE}",
        1.5,
        lambda: stream(model, tokens, METRICS, states="disk"),
        lambda: explicit_forward(model, tokens),
        3,
    )


def bench_streaming_in_two_runs(benchmark: Any, record: Recorder) -> None:
    model, tokens = wide(), WIDE.tokens()

    def twice() -> None:
        explicit_forward(model, tokens)
        explicit_forward(model, tokens)

    record.ratio(
        benchmark,
        f"all metrics, states recomputed / two forwards, {SIZE}",
        1.5,
        lambda: stream(model, tokens, METRICS),
        twice,
        3,
    )


@cache
def memory(recurrences: int, states: str) -> tuple[int, int]:
    """Bytes beyond the forward pass, and of one recurrence's activations."""
    script = Path(__file__).with_name("memory_of_streaming.py")
    command = [sys.executable, str(script), str(recurrences), states]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=script.parent)
    added, one = run.stdout.split()
    return int(added), int(one)


def _check_memory(record: Recorder, states: str) -> None:
    added, one = memory(128, states)
    record.add(
        f"memory beyond the forward / activations of one recurrence, {states}, {SIZE}",
        added / one,
        2.0,
        f"{added / 2**20:.1f} MiB / {one / 2**20:.1f} MiB",
    )
    few, many = memory(32, states)[0], memory(512, states)[0]
    record.add(
        f"growth of that from 32 to 512 recurrences, {states}",
        (many - few) / one,
        0.5,
        f"{few / 2**20:.1f} to {many / 2**20:.1f} MiB",
    )


def bench_memory_on_disk(record: Recorder) -> None:
    _check_memory(record, "disk")


def bench_memory_recomputed(record: Recorder) -> None:
    _check_memory(record, "recompute")
