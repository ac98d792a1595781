"""Peak memory of one ``retrofit``, in a process alone; Linux only.

Usage: ``python memory_of_retrofit.py FOLDER MODE``. Prints as JSON, in bytes: the most that was
resident beyond what was there before, and the parameters of the model that was made.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tl_looped import retrofit


def status(field: str) -> int:
    """A line of the process's own status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def warm_up(mode: str) -> None:
    """A model of nothing: what is imported and made once is made before."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        retrofit(folder, core=[1], mode=mode, device="cpu")


def main() -> None:
    folder, mode = sys.argv[1:]
    torch.set_num_threads(1)
    warm_up(mode)
    n_layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = status("VmRSS"), time.perf_counter()
    model = retrofit(folder, core=range(n_layers // 3, 2 * n_layers // 3), mode=mode, device="cpu")
    seconds = time.perf_counter() - start
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"peak": status("VmHWM") - before, "model": size, "seconds": seconds}))


if __name__ == "__main__":
    main()
