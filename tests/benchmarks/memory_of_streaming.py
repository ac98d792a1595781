"""Peak memory of a run, and of the same run while its metrics are streamed; in a process alone.

Usage: ``python memory_of_streaming.py RECURRENCES recompute|disk``. Prints, in bytes: how much the
peak rose from the plain run to the streamed one, and the activations of one recurrence.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xarray  # noqa: F401 - its import is part of no measurement
from streamed import METRICS, WIDE, explicit_forward

from tl_looped.metrics import stream


def peak_of(run: Callable[[], Any]) -> int:
    """Most resident bytes during a call; Linux only."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    recurrences, states = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    with torch.inference_mode():
        # Everything that is made once is made before, by a short run.
        small = WIDE.model(n_recurrences=2)
        stream(small, WIDE.tokens(), METRICS, states=states)
        model = WIDE.model(n_recurrences=recurrences)
        tokens = WIDE.tokens()
        forward = peak_of(lambda: explicit_forward(model, tokens))
        added = peak_of(lambda: stream(model, tokens, METRICS, states=states)) - forward
    sizes = [model.estimate_cache_bytes(None, 1, WIDE.pos, n_recurrences=n) for n in (1, 2)]
    print(added, sizes[1] - sizes[0])


if __name__ == "__main__":
    main()
