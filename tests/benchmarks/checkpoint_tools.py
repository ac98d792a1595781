"""A full-size checkpoint of random weights, and what a fresh process needs to load one.

Run as a script in a process of its own, so that peaks of memory are those of the step alone:
``make FOLDER`` writes an Ouro-1.4B in bf16; ``ours FOLDER`` and ``safetensors FOLDER`` load it and
print seconds, peak memory and the file's size as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 5632,
    "vocab_size": 49152,
    "max_position_embeddings": 65536,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def make(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from tl_looped import LoopedTransformer, OuroAdapter

    adapter = OuroAdapter()
    cfg = adapter.config(CONFIG)
    cfg.device = "meta"
    sources = adapter.sources(cfg)
    tensors: dict[str, Any] = {}
    for name, parameter in LoopedTransformer(cfg).named_parameters():
        source = sources[name]
        rows = source.rows or (parameter.shape[0],)
        for key, n in zip(source.names, rows, strict=True):
            empty = torch.empty(n, *parameter.shape[1:], dtype=torch.bfloat16)
            tensors[key] = empty.normal_(0.0, 0.02)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def measure(how: str, folder: Path) -> dict[str, float]:
    """Seconds and peak of memory beyond what the imports took, of one way to load the file."""
    from safetensors.torch import load_file

    from tl_looped import LoopedTransformer

    before = _memory("VmRSS")
    start = time.perf_counter()
    if how == "ours":
        loaded: Any = LoopedTransformer.from_pretrained(folder, device="cpu", dtype="bfloat16")
    else:
        # A copy of each, since the library only maps the file: nothing is read before it is used.
        mapped = load_file(folder / "model.safetensors")
        loaded = {name: mapped.pop(name).clone() for name in list(mapped)}
    seconds = time.perf_counter() - start
    assert loaded
    return {
        "seconds": seconds,
        "peak": _memory("VmHWM") - before,
        "size": (folder / "model.safetensors").stat().st_size,
    }


def _memory(field: str) -> int:
    # Not getrusage: its peak is inherited from the process that started this one.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status lacks {field}: this benchmark needs Linux")


if __name__ == "__main__":
    step, target = sys.argv[1], Path(sys.argv[2])
    if step == "make":
        make(target)
    else:
        print(json.dumps(measure(step, target)))
