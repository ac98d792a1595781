"""Real processes: one that is killed, and two that share the prompts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import xarray as xr

from tl_looped.experiments.runner import run_experiment
from tl_looped.experiments.spec import Experiment, PromptSet

pytestmark = [pytest.mark.once, pytest.mark.full]

RECURRENCES = 4
PROMPTS = [f"Tom has {n} pens and {'2 more ' * (n % 4)}boxes." for n in range(16)]
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(torch.get_num_threads()),  # the same sums as in this process
    "ACCELERATE_DISABLE_RICH": "1",
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def command(prompts: Path, out: Path) -> list[str]:
    return [
        "-m", "tl_looped", "analyze", "demo", "--prompts", str(prompts), "--figures", "",
        "--recurrences", str(RECURRENCES), "--extras", "pairwise", "--out", str(out),
        "--device", "cpu", "--batch-size", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    return run(prompts, tmp_path_factory.mktemp("whole"))


def run(prompts: Path, out: Path) -> xr.Dataset:
    spec = Experiment(
        "demo",
        prompts=PromptSet("file", file=str(prompts)),
        recurrences=RECURRENCES,
        extras=("pairwise",),
    )
    return run_experiment(spec, out, device="cpu", batch_size=2).load()


def test_a_killed_run_goes_on_to_the_same_bits(prompts, uninterrupted, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, *command(prompts, tmp_path)],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while len(list(tmp_path.glob("*/parts/*.npz"))) < 2:
            assert process.poll() is None, "the process ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    assert not (folder / "results.nc").exists()
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("parts/*.npz")}
    assert 2 <= len(before) < 8
    resumed = run(prompts, tmp_path)
    assert resumed.identical(uninterrupted)
    assert not (folder / "parts").exists()


def test_two_processes_give_what_one_gives(prompts, uninterrupted, tmp_path: Path) -> None:
    # --cpu would start a single process: several are what --multi_gpu means, on CPUs too.
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    finished = subprocess.run(
        [sys.executable, *launch, *command(prompts, tmp_path)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Results are in") == 1
    assert "process 1 of 2" in finished.stdout
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" not in finished.stdout  # not all by the first one
    (path,) = tmp_path.glob("*/results.nc")
    assert xr.load_dataset(path, engine="h5netcdf").identical(uninterrupted)
