"""What the lanes hold, and that a lane of other kernels runs on them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import CASES

ROOT = Path(__file__).parents[2]


def test_the_kernels_are_those_that_the_environment_asks_for() -> None:
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    if capability is not None:
        assert torch.backends.cpu.get_cpu_capability() == capability.upper()
    assert torch.backends.mkldnn.enabled == (os.environ.get("TL_LOOPED_MKLDNN") != "off")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        assert torch.get_num_threads() == int(threads)


def arguments_of(target: str) -> list[str]:
    """The arguments that a target of the Makefile gives to pytest."""
    recipe = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    [line] = [line for line in recipe.stdout.splitlines() if " -m pytest " in line]
    words = shlex.split(line)
    return words[words.index("pytest") + 1 :]


@pytest.mark.full
@pytest.mark.once
def test_the_quick_lane_compares_every_family_with_its_authors() -> None:
    tests = [sys.executable, "-m", "pytest", *arguments_of("test"), "-n", "0", "--collect-only"]
    file = "tests/adapters/test_golden_parity.py"
    listed = subprocess.run([*tests, file], cwd=ROOT, capture_output=True, text=True, check=True)
    families = defaultdict(set)
    for name, case in re.findall(rf"::(\w+)\[.*?({'|'.join(CASES)}).*\]", listed.stdout):
        families[name].add(case)
    assert {"test_every_activation", "test_logits_with_and_without_listeners"} <= set(families)
    assert families == {name: set(CASES) for name in families}


@pytest.mark.full
@pytest.mark.once
def test_the_pretrained_model_has_a_lane_of_its_own() -> None:
    def collected(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", *arguments, "-n", "0", "--collect-only"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [line for line in listed.stdout.splitlines() if "::" in line]

    real = collected(*arguments_of("real"))
    assert len(real) > 40
    assert all(test.startswith("tests/real/") for test in real)
    assert collected(*arguments_of("real"), "-m", "real") == real
    others = collected(*arguments_of("test-all"))
    assert len(others) > 1_000
    assert not set(others) & set(real)
    assert not any(test.startswith("tests/real/") for test in others)
