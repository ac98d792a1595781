"""A pretrained model against transformers: running it, watching it, generating, and loading it.

The model is that of ``make real``: SmolLM2-135M-Instruct in fp32, its Q4_1 quantisation dequantised
(30 layers, d_model 576, 49,152 tokens). As a virtual loop that runs once, it is the same 30 layers
here and there. ``make bench-real`` fetches it; TL_LOOPED_REAL_MODEL names another folder.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Recorder
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import logging

from tl_looped import LoopedTransformer, retrofit

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS))
from real.smollm2 import model_folder  # noqa: E402

CHILD = TESTS / "retrofitting" / "memory_of_retrofit.py"
CORE = range(12, 18)
NAME = "SmolLM2-135M (Q4_1, dequantised)"
LENGTHS = pytest.mark.parametrize("pos", [128, 512])


@pytest.fixture(autouse=True, scope="module")
def without_bars() -> None:
    logging.disable_progress_bar()


@cache
def looped() -> LoopedTransformer:
    folder = str(model_folder())
    return retrofit(folder, core=CORE, mode="virtual-loop", n_recurrences=1, device="cpu")


@cache
def theirs(attention: str) -> Any:
    """With its values in memory as ours are; transformers only maps them."""
    model = LlamaForCausalLM.from_pretrained(
        model_folder(), dtype=torch.float32, attn_implementation=attention
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def tokens(pos: int) -> Tensor:
    return torch.randint(49152, (1, pos), generator=torch.Generator().manual_seed(0))


@LENGTHS
def bench_forward(pos: int, benchmark: Any, record: Recorder) -> None:
    model, reference, ids = looped(), theirs("sdpa"), tokens(pos)
    expected, found = reference(ids, use_cache=False).logits, model(ids)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    record.ratio(
        benchmark,
        f"forward / transformers, {NAME}, T={pos}",
        1.05,
        lambda: model(ids),
        lambda: reference(ids, use_cache=False),
        21 if pos < 512 else 15,
    )


@LENGTHS
def bench_full_cache(pos: int, benchmark: Any, record: Recorder) -> None:
    model, reference, ids = looped(), theirs("eager"), tokens(pos)
    record.ratio(
        benchmark,
        f"run_with_cache() / transformers with states and patterns, {NAME}, T={pos}",
        1.3,
        lambda: model.run_with_cache(ids),
        lambda: reference(ids, use_cache=False, output_hidden_states=True, output_attentions=True),
        11 if pos < 512 else 7,
    )


def bench_cache_of_the_same(benchmark: Any, record: Recorder) -> None:
    model, reference, ids = looped(), theirs("eager"), tokens(128)

    def wanted(name: str) -> bool:
        return name.endswith(("hook_resid_pre", "hook_pattern"))

    record.ratio(
        benchmark,
        f"run_with_cache(states and patterns) / transformers with them, {NAME}, T=128",
        1.1,
        lambda: model.run_with_cache(ids, names_filter=wanted),
        lambda: reference(ids, use_cache=False, output_hidden_states=True, output_attentions=True),
        11,
    )


def bench_generation(benchmark: Any, record: Recorder) -> None:
    model, reference, ids = looped(), theirs("sdpa"), tokens(32)
    new = 48

    def ours() -> Any:
        return model.generate(
            ids, max_new_tokens=new, do_sample=False, stop_at_eos=False, verbose=False
        )

    def others() -> Any:
        return reference.generate(
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=2,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip

    record.ratio(
        benchmark,
        f"{new} new tokens, cached, / transformers, {NAME}, after 32",
        1.05,
        ours,
        others,
        7,
    )


# -- loading ----------------------------------------------------------------------------------

ROUNDS = 5


def load(how: str) -> dict[str, float]:
    """Seconds, peak of memory and bytes of the model, of a process of its own."""
    command = [sys.executable, str(CHILD), str(model_folder()), how]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("mode", ["virtual-loop", "retrofit"])
def bench_retrofit(mode: str, benchmark: Any, record: Recorder) -> None:
    ours: list[dict[str, float]] = []
    others: list[dict[str, float]] = []
    benchmark.pedantic(
        lambda: ours.append(load(mode)),
        setup=lambda: others.append(load("transformers")),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    pairs = list(zip(ours, others, strict=True))[1:]
    mine, base = (
        statistics.median(x["seconds"] for x in side) for side in zip(*pairs, strict=True)
    )
    memory = statistics.median(x["peak"] / x["model"] for x, _ in pairs)
    peaks = [
        statistics.median(x["peak"] for x in side) / 2**20 for side in zip(*pairs, strict=True)
    ]
    seconds = statistics.median(x["seconds"] / other["seconds"] for x, other in pairs)
    record.add_all(
        (
            f"retrofit({mode}): peak memory / the model made, {NAME}",
            memory,
            1.3,
            f"{peaks[0]:.0f} MiB beyond the imports, from_pretrained {peaks[1]:.0f}",
        ),
        (
            f"retrofit({mode}): time / from_pretrained with values and tokenizer, {NAME}",
            seconds,
            3.0,
            f"{mine:.3g} / {base:.3g} s, the check included",
        ),
    )
