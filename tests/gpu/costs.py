"""What runs cost on a device: memory and time, as ratios that hold for any machine's numbers."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from run import Report
from transformers import LlamaConfig, LlamaForCausalLM

from tl_looped import LoopedConfig, LoopedTransformer, retrofit
from tl_looped.metrics import stream

METRICS = ("signature", "successive", "fixed_point")


@dataclass(frozen=True)
class Size:
    """A model of eight core layers, and its prompt."""

    d_model: int
    pos: int
    n_recurrences: int
    rounds: int

    def model(self, device: torch.device) -> LoopedTransformer:
        cfg = LoopedConfig(
            d_model=self.d_model,
            d_head=64,
            n_heads=self.d_model // 64,
            d_mlp=self.d_model * 11 // 4,
            n_ctx=2048,
            d_vocab=1000,
            n_core=8,
            n_recurrences=self.n_recurrences,
            init_mode="fan_in",
            device=str(device),
            default_prepend_bos=False,
        )
        return LoopedTransformer.from_config(cfg).eval()

    def tokens(self) -> torch.Tensor:
        return torch.randint(1000, (1, self.pos), generator=torch.Generator().manual_seed(0))


# The larger one has a full cache of some 4 GiB.
SIZES = {"small": Size(128, 128, 16, 3), "full": Size(1024, 256, 16, 15)}


def added_memory(device: torch.device, run: Callable[[], Any]) -> int:
    """Most bytes that a call had beyond those before it.

    Allocated ones on CUDA, resident ones of the process elsewhere, which Linux alone tells.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # What was freed and kept for later would be taken for what was there before.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@torch.no_grad()
def memory_of_runs(report: Report) -> None:
    """Peaks of a forward pass, of a full cache and of streaming the metrics instead."""
    device, size = report.device, SIZES[report.size]
    if device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        print(f"left out: peaks of memory on {device} are told by Linux alone")
        return
    model, tokens = size.model(device), size.tokens()
    sizes = [model.estimate_cache_bytes(None, 1, size.pos, n_recurrences=n) for n in (1, 2)]
    one = sizes[1] - sizes[0]
    estimate = model.estimate_cache_bytes(None, 1, size.pos)
    _, cache = model.run_with_cache(tokens)
    stored = sum(tensor.nbytes for tensor in cache.values())
    report.exact("size of a full cache, off its estimate", abs(stored - estimate), 0, "bytes")
    del cache
    stream(model, tokens, METRICS, n_recurrences=2)  # what is made once is made before
    forward = added_memory(device, lambda: model(tokens))
    full = added_memory(device, lambda: model.run_with_cache(tokens))
    streamed = added_memory(device, lambda: stream(model, tokens, METRICS))
    mib = 2**20
    shape = f"8 x {size.n_recurrences}, d_model {size.d_model}, T={size.pos}"
    report.cost(
        f"forward / activations of one recurrence, {shape}", forward / one, 2.0,
        f"{forward / mib:.1f} MiB",
    )  # fmt: skip
    report.cost(
        f"full cache / its estimate, {shape}", full / estimate, 1.2, f"{full / mib:.1f} MiB"
    )
    report.cost(
        f"streaming / activations of one recurrence, {shape}", streamed / one, 4.0,
        f"{streamed / mib:.1f} MiB",
    )  # fmt: skip


def ratio(
    device: torch.device, subject: Callable[[], Any], baseline: Callable[[], Any], rounds: int
) -> tuple[float, str]:
    """Median over pairs of neighbouring rounds, and both medians in words."""

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds(subject), seconds(baseline)
    pairs = [(seconds(baseline), seconds(subject)) for _ in range(rounds)]
    base, mine = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
    return statistics.median(b / a for a, b in pairs), f"{mine:.4g} / {base:.4g} ms"


@torch.no_grad()
def hooks_cost(report: Report) -> None:
    """One hook, some activations and all of them, over a run that nobody watches."""
    device, size = report.device, SIZES[report.size]
    model, tokens = size.model(device), size.tokens().to(device)

    def forward() -> Any:
        return model(tokens)

    hooks = [(("resid_post", (3, 1)), lambda tensor, hook: None)]
    for what, bound, subject in (
        ("one forward hook", 1.05, lambda: model.run_with_hooks(tokens, fwd_hooks=hooks)),
        (
            "run_with_cache(residual)",
            1.15,
            lambda: model.run_with_cache(
                tokens, names_filter=lambda name: name.endswith("hook_resid_post")
            ),
        ),
        ("run_with_cache()", 2.2, lambda: model.run_with_cache(tokens)),
    ):
        value, detail = ratio(device, subject, forward, size.rounds)
        report.cost(f"{what} / forward", value, bound, detail)
    _beside_transformers(report, size)


def _beside_transformers(report: Report, size: Size) -> None:
    """A model of transformers and the loop of all its layers, once."""
    config = LlamaConfig(
        hidden_size=size.d_model,
        intermediate_size=size.d_model * 11 // 4,
        num_hidden_layers=12,
        num_attention_heads=size.d_model // 64,
        vocab_size=1000,
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval().to(report.device)
    looped = retrofit(
        theirs, core=range(12), mode="virtual-loop", n_recurrences=1, device=report.device
    )
    tokens = size.tokens().to(report.device)
    value, detail = ratio(
        report.device,
        lambda: looped(tokens),
        lambda: theirs(tokens, use_cache=False).logits,
        size.rounds,
    )
    report.cost("forward / transformers", value, 1.05, detail)
