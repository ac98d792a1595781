"""``make test-gpu`` itself, on the CPU and where there is no device."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).with_name("run.py")
pytestmark = [pytest.mark.full, pytest.mark.once]


def script(*options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=surroundings, timeout=600
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, object]]:
    file = tmp_path_factory.mktemp("gpu") / "found.json"
    done = script("--device", "cpu", "--size", "small", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text())


def test_everything_holds_on_the_cpu(whole: tuple[str, dict[str, object]]) -> None:
    printed, found = whole
    assert found["device"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__
    lines = found["lines"]
    exact = [line for line in lines if line["exact"]]
    assert all(line["ok"] for line in exact)
    assert all(math.isfinite(line["measured"]) for line in lines)
    for name in ("golden", "cpu", "state", "padding", "half", "generation", "streaming", "spread"):
        assert f"-- {name}\n" in printed
    # Every family has its lines, and costs are measured.
    names = [line["name"] for line in exact]
    for case in ("huginn", "retrofit_llama", "retrofit_tinyllama", "retrofit_olmo", "ouro"):
        assert sum(name.endswith(case) for name in names) >= 12
    assert sum(not line["exact"] for line in lines) == 7
    # What rounds is compared with more than nothing.
    rounded = [line for line in exact if line["detail"].startswith("rounding")]
    assert len(rounded) >= 20
    assert all(0 < line["bound"] < 0.01 for line in rounded)


def test_without_a_device_it_says_so_and_stops() -> None:
    done = script(CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("there is no CUDA device: nothing was checked; ")
    assert "make test-gpu DEVICE=cpu" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_check_that_fails_decides_and_the_others_go_on(tmp_path: Path) -> None:
    """One case is not there, of one a number is off, of one a number is none."""
    for case in sorted((SCRIPT.parents[1] / "golden").glob("*/config.json")):
        shutil.copytree(case.parent, tmp_path / case.parent.name)
    shutil.rmtree(tmp_path / "huginn")
    for case, change in (("ouro", 0.01), ("retrofit_olmo", math.nan)):
        path = tmp_path / case / "golden.safetensors"
        tensors = load_file(path)
        tensors["core.2.1"][1, 4, 7] += change
        save_file(tensors, path)
    file = tmp_path / "found.json"
    done = script(
        "--device", "cpu", "--only", "golden", "state", "--golden", tmp_path, "--json", file
    )
    assert done.returncode == 1, done.stderr
    lines = {line["name"]: line for line in json.loads(file.read_text())["lines"]}
    failed = {name for name, line in lines.items() if not line["ok"]}
    assert failed == {
        "golden_parity, huginn: broke off",
        "initial_state, huginn: broke off",
        "golden parity, ouro",
        "golden parity, retrofit_olmo",
    }
    assert lines["golden parity, ouro"]["measured"] > 5
    assert "core.2.1" in lines["golden parity, ouro"]["detail"]
    assert lines["golden parity, retrofit_olmo"]["measured"] is None
    assert lines["golden parity, retrofit_llama"]["measured"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "gpu"), "'gpu' is no device that torch knows"),
        (("--device", "cpu", "--only", "nothing"), "there are no checks ['nothing']"),
        (("--device", "cpu", "--size", "huge"), "invalid choice: 'huge'"),
        # Before ten minutes of checks, and not behind them.
        (("--device", "cpu", "--json", "no/such/found.json"), "no/such is no folder"),
    ],
)
def test_wrong_options_are_refused(options: tuple[str, ...], message: str) -> None:
    done = script(*options)
    assert done.returncode == 2
    assert message in done.stderr


def test_what_has_no_time_is_left_out(tmp_path: Path) -> None:
    done = script("--device", "cpu", "--seconds", "0", "--json", tmp_path / "found.json")
    assert done.returncode == 0
    assert "left out: golden" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["lines"] == []
