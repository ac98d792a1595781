"""Loading a checkpoint of full size: Ouro-1.4B in bf16, random weights, 2.9 GB on disk."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Recorder

TOOLS = Path(__file__).with_name("checkpoint_tools.py")
ROUNDS = 5


def run(step: str, folder: Path) -> str:
    """One step in a process of its own, with one thread."""
    command = [sys.executable, str(TOOLS), step, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    ).stdout


@pytest.mark.slow
def bench_loading_a_full_size_checkpoint(benchmark: Any, record: Recorder, tmp_path: Path) -> None:
    run("make", tmp_path)
    try:
        theirs: list[dict[str, float]] = []
        ours: list[dict[str, float]] = []
        benchmark.pedantic(
            lambda: ours.append(json.loads(run("ours", tmp_path))),
            setup=lambda: theirs.append(json.loads(run("safetensors", tmp_path))),
            rounds=ROUNDS,
            warmup_rounds=1,
        )
    finally:
        (tmp_path / "model.safetensors").unlink()
    pairs = list(zip(ours, theirs, strict=True))[1:]
    memory = statistics.median(mine["peak"] / mine["size"] for mine, _ in pairs)
    seconds = statistics.median(mine["seconds"] / other["seconds"] for mine, other in pairs)
    shown = " / ".join(
        f"{statistics.median(side['seconds'] for side in sides):.3g}"
        for sides in zip(*pairs, strict=True)
    )
    record.add_all(
        (
            "loading random weights of Ouro-1.4B's size: peak memory / file",
            memory,
            1.25,
            "resident, beyond the imports",
        ),
        (
            "loading random weights of Ouro-1.4B's size: time / reading by safetensors",
            seconds,
            1.3,
            f"{shown} s",
        ),
    )
