"""What hooks, caches, recurrences, generation and the import cost."""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from conftest import Recorder
from functional import FunctionalForward
from torch import Tensor

from tl_looped import Injection, LoopedConfig, LoopedTransformer, NormLayout


@dataclass(frozen=True)
class Size:
    """A model of eight core layers, and the length of its prompt."""

    name: str
    d_model: int
    n_heads: int
    n_recurrences: int
    pos: int
    rounds: int
    forward_bound: float

    def model(self, **changes: Any) -> LoopedTransformer:
        values: dict[str, Any] = {
            "d_model": self.d_model,
            "d_head": self.d_model // self.n_heads,
            "n_heads": self.n_heads,
            "d_mlp": self.d_model * 11 // 4,
            "n_ctx": 512,
            "d_vocab": 1000,
            "n_core": 8,
            "n_recurrences": self.n_recurrences,
            "init_mode": "fan_in",
            "device": "cpu",
            "default_prepend_bos": False,
        }
        return LoopedTransformer.from_config(LoopedConfig(**(values | changes)))

    def tokens(self) -> Tensor:
        return torch.randint(0, 1000, (1, self.pos), generator=torch.Generator().manual_seed(0))


LARGE = Size("d_model 512, 8 x 16, T=128", 512, 8, 16, 128, 7, 1.05)
SMALL = Size("d_model 64, 8 x 128, T=16", 64, 4, 128, 16, 25, 1.15)
SIZES = pytest.mark.parametrize("size", [LARGE, SMALL], ids=lambda size: size.name)


@cache
def plain(size: Size) -> LoopedTransformer:
    """Pre-norm layers without injection: the fewest operations for each hook."""
    return size.model()


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama layers": {},
    "retrofit": {"injection": Injection.LINEAR, "n_prelude": 1, "n_coda": 1},
    "Ouro layers": {"norm_layout": NormLayout.SANDWICH, "loop_norm": True},
    "Huginn layers": {
        "norm_layout": NormLayout.RESIDUAL,
        "injection": Injection.LINEAR,
        "pre_coda_norm": True,
        "n_prelude": 1,
        "n_coda": 1,
    },
}


@pytest.mark.parametrize("family", list(FAMILIES))
def bench_the_yardstick_computes_the_same(family: str) -> None:
    size = Size("", 64, 4, 4, 16, 1, 1.0)
    model, tokens = size.model(**FAMILIES[family]), size.tokens()
    expected = model(tokens)
    torch.testing.assert_close(FunctionalForward(model)(tokens), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


@SIZES
def bench_forward_while_nobody_listens(size: Size, benchmark: Any, record: Recorder) -> None:
    model, tokens = plain(size), size.tokens()
    functional = FunctionalForward(model)
    record.ratio(
        benchmark,
        f"forward / the same without hooks, {size.name}",
        size.forward_bound,
        lambda: model(tokens),
        lambda: functional(tokens),
        size.rounds,
    )


@SIZES
def bench_one_forward_hook(size: Size, benchmark: Any, record: Recorder) -> None:
    model, tokens = plain(size), size.tokens()
    hooks = [(("resid_post", (3, 1)), lambda tensor, hook: None)]
    record.ratio(
        benchmark,
        f"one forward hook / forward, {size.name}",
        1.05,
        lambda: model.run_with_hooks(tokens, fwd_hooks=hooks),
        lambda: model(tokens),
        size.rounds,
    )


@SIZES
def bench_cache_of_resid_post(size: Size, benchmark: Any, record: Recorder) -> None:
    model, tokens = plain(size), size.tokens()
    record.ratio(
        benchmark,
        f"run_with_cache(resid_post) / forward, {size.name}",
        1.15,
        lambda: model.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_resid_post")
        ),
        lambda: model(tokens),
        size.rounds,
    )


@SIZES
def bench_cache_of_everything(size: Size, benchmark: Any, record: Recorder) -> None:
    model, tokens = plain(size), size.tokens()
    record.ratio(
        benchmark,
        f"run_with_cache() / forward, {size.name}",
        2.2,
        lambda: model.run_with_cache(tokens),
        lambda: model(tokens),
        size.rounds,
    )


def bench_names_filter_list_against_set(benchmark: Any, record: Recorder) -> None:
    model, tokens = plain(SMALL), SMALL.tokens()
    names = [name for name in model.hook_dict if name.endswith("hook_resid_post")][:1000]
    assert len(names) == 1000
    wanted = set(names)
    record.ratio(
        benchmark,
        "names_filter of 1,000 names, list / set",
        1.02,
        lambda: model.run_with_cache(tokens, names_filter=names),
        lambda: model.run_with_cache(tokens, names_filter=wanted),
        2 * SMALL.rounds,
    )


def bench_first_growth_to_128_recurrences(benchmark: Any, record: Recorder) -> None:
    def new() -> tuple[tuple[LoopedTransformer], dict[str, Any]]:
        return (SMALL.model(n_recurrences=1),), {}

    benchmark.pedantic(lambda model: model.set_recurrences(128), setup=new, rounds=5)
    seconds = benchmark.stats.stats.median
    record.add("set_recurrences(128), first time", seconds, 1.0, "8 core layers", unit=" s")


def bench_growth_to_128_recurrences_again(benchmark: Any, record: Recorder) -> None:
    model = plain(SMALL)
    benchmark.pedantic(
        lambda: model.set_recurrences(128), setup=lambda: model.set_recurrences(1), rounds=25
    )
    milliseconds = 1000 * benchmark.stats.stats.median
    record.add("set_recurrences(128), again", milliseconds, 20.0, "8 core layers", unit=" ms")


def bench_generation_with_a_cache(benchmark: Any, record: Recorder) -> None:
    size = Size("", 256, 8, 4, 128, 2, 1.0)
    model, tokens = size.model(), size.tokens()

    def generate(cached: bool) -> Tensor:
        return model.generate(
            tokens,
            max_new_tokens=128,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            use_past_kv_cache=cached,
        )

    record.ratio(
        benchmark,
        "128 new tokens after 128, uncached / cached, d_model 256, 8 x 4",
        5.0,
        lambda: generate(True),
        lambda: generate(False),
        size.rounds,
        at_least=True,
        inverse=True,
    )


def bench_import(benchmark: Any, record: Recorder) -> None:
    code = (
        "import time, transformer_lens; start = time.perf_counter(); "
        "import tl_looped; print(time.perf_counter() - start)"
    )
    added: list[float] = []

    def import_both() -> None:
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        added.append(float(run.stdout))

    benchmark.pedantic(import_both, rounds=5, warmup_rounds=1)
    seconds = statistics.median(added[1:])
    record.add("import tl_looped after transformer_lens", seconds, 0.5, "5 processes", unit=" s")
