"""What the environment asks of PyTorch's kernels is so: a lane that tests nothing else is none."""

from __future__ import annotations

import os

import torch


def test_the_kernels_are_those_that_the_environment_asks_for() -> None:
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    if capability is not None:
        assert torch.backends.cpu.get_cpu_capability() == capability.upper()
    assert torch.backends.mkldnn.enabled == (os.environ.get("TL_LOOPED_MKLDNN") != "off")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        assert torch.get_num_threads() == int(threads)
