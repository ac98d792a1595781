"""Peak memory of streaming the metrics of a long prompt, in a process alone.

Usage: ``python memory_of_streaming.py FOLDER TOKENS``. Prints, in bytes: how far the peak rose
above the model at rest while a prompt ran, and while its metrics were streamed; the activations of
one recurrence, and of the whole run.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tl_looped import LoopedTransformer, retrofit
from tl_looped.metrics import stream

# A loop of pretrained layers with few around it: the time is the loop's.
LAYERS: dict[str, Any] = {"prelude": range(2), "core": range(12, 16), "coda": range(28, 30)}
RECURRENCES = 4
METRICS = ("signature", "successive", "fixed_point")


def status(field: str) -> int:
    """A line of /proc/self/status in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak_of(run: Callable[[], Any]) -> int:
    """Most resident bytes during a call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return status("VmHWM")


def with_patterns(model: LoopedTransformer, tokens: torch.Tensor) -> None:
    """A run that computes every pattern: something looks at each, and does nothing."""

    def look(x: torch.Tensor, hook: Any) -> None:
        pass

    with model.readers([(lambda name: name.endswith("hook_pattern"), look)]):
        model(tokens)


def streamed(model: LoopedTransformer, tokens: torch.Tensor) -> None:
    data = stream(model, tokens, METRICS)
    assert data.sizes["recurrence"] == RECURRENCES
    # The last recurrence has no later one, and the first no earlier one, to be compared with.
    whole = data.isel(recurrence=slice(1, -1))
    for name in ("sink_rate", "entropy_bits", "successive_rel", "fixed_point_rel"):
        assert np.isfinite(whole[name]).all(), name


def main() -> None:
    folder, n_tokens = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    options: dict[str, Any] = {"mode": "virtual-loop", "device": "cpu"}
    model = retrofit(folder, **LAYERS, n_recurrences=RECURRENCES, **options)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (1, n_tokens), generator=generator)
    with torch.inference_mode():
        streamed(model, tokens[:, :8])  # what is made once
        at_rest = status("VmRSS")
        peaks = [peak_of(partial(run, model, tokens)) for run in (with_patterns, streamed)]
    sizes = [
        model.estimate_cache_bytes(None, 1, n_tokens, n_recurrences=n) for n in (1, 2, RECURRENCES)
    ]
    print(*(peak - at_rest for peak in peaks), sizes[1] - sizes[0], sizes[2])


if __name__ == "__main__":
    main()
