"""Peak memory and time of one ``retrofit``, in a process alone; Linux only.

Usage: ``python memory_of_retrofit.py FOLDER MODE``; the mode ``transformers`` loads the feedforward
model instead, with its tokenizer. Prints as JSON, in bytes: the most that was resident beyond what
was there before, and the parameters of the model that was made; and the seconds that it took.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tl_looped import retrofit


def status(field: str) -> int:
    """A line of the process's own status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def make(folder: str, mode: str) -> Any:
    """The model of a folder, with its values in memory."""
    if mode != "transformers":
        n_layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
        core = range(n_layers // 3, 2 * n_layers // 3)
        return retrofit(folder, core=core, mode=mode, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if (Path(folder) / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(folder)
    # transformers only maps what it does not have to cast: nothing is read before it is used.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def warm_up(mode: str) -> None:
    """A model of nothing: what is imported and made once is made before."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        make(folder, mode)


def main() -> None:
    folder, mode = sys.argv[1:]
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warm_up(mode)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = status("VmRSS"), time.perf_counter()
    model = make(folder, mode)
    seconds = time.perf_counter() - start
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"peak": status("VmHWM") - before, "model": size, "seconds": seconds}))


if __name__ == "__main__":
    main()
