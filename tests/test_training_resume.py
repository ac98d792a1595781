"""A run that is killed, damaged or mistaken for another."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_config

from tl_looped import (
    CheckpointError,
    ConfigError,
    DataError,
    InitialState,
    Injection,
    LoopedTransformer,
)
from tl_looped.training.losses import ExitWeighted
from tl_looped.training.recurrences import PoissonLogNormal
from tl_looped.training.spec import TrainSpec
from tl_looped.training.trainer import DivergedError, train

ROWS = torch.randint(0, 50, (21, 12), generator=torch.Generator().manual_seed(1))
HELD_OUT = ROWS[:3].flip(1)
SPEC = TrainSpec(
    steps=12,
    batch_size=2,
    warmup=3,
    evaluate_every=4,
    bf16=False,
    seed=5,
    recurrences=PoissonLogNormal(2.0, 0.5),
    backprop_last=2,
)


def model() -> LoopedTransformer:
    """With everything that is drawn: a random initial state and sampled recurrences."""
    values = {
        "injection": Injection.LINEAR,
        "initial_state": InitialState.RANDOM,
        "initial_state_std": 0.5,
        "n_recurrences": 2,
        "n_core": 1,
        "n_prelude": 1,
    }
    return LoopedTransformer.from_config(random_config(**values))


def weights(out: Path) -> bytes:
    return (out / "final" / "model.safetensors").read_bytes()


def without_times(out: Path) -> list[str]:
    return [line.rsplit(",", 2)[0] for line in (out / "log.csv").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    train(model(), ROWS, HELD_OUT, SPEC, out)
    return out


class Stop(Exception):
    pass


def stopped_at(step: int, out: Path, spec: TrainSpec = SPEC) -> None:
    def stop(tick) -> None:
        if tick.step == step:
            raise Stop

    with pytest.raises(Stop):
        train(model(), ROWS, HELD_OUT, spec, out, tick=stop)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_training_resume import HELD_OUT, ROWS, SPEC, model
from tl_looped.training.trainer import train

def tick(t):
    if t.step == 6:
        print("ready", flush=True)
        time.sleep(60)

train(model(), ROWS, HELD_OUT, SPEC, Path({out!r}), tick=tick)
"""


def test_a_killed_process_resumes_to_the_same_weights_and_log(whole: Path, tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]
    steps = []
    train(model(), ROWS, HELD_OUT, SPEC, tmp_path, tick=lambda t: steps.append(t.step))
    assert steps == list(range(5, 13))
    assert weights(tmp_path) == weights(whole)
    assert without_times(tmp_path) == without_times(whole)
