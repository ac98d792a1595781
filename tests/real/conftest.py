"""The pretrained model of ``make real``, and looped models made of it.

The weights are the Q4_1 quantisation of SmolLM2-135M-Instruct, dequantised to fp32: 30 layers,
d_model 576, 9 heads (3 of keys and values), 49,152 tokens, tied.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from real.smollm2 import model_folder
from tl_looped import LoopedTransformer, retrofit

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    gc.collect()  # models refer to themselves, and each takes half a gigabyte or more


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The model as an ordinary folder of transformers."""
    folder = model_folder()
    if not (folder / "config.json").is_file():
        pytest.fail(f"{folder} is not there; python tests/real/smollm2.py makes it, as `make real`")
    return folder


@pytest.fixture(scope="session")
def tokenizer(real_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_folder)


@pytest.fixture(scope="session")
def hf(real_folder: Path) -> LlamaForCausalLM:
    """transformers' model in fp32, with explicit attention so that it gives its patterns."""
    model = LlamaForCausalLM.from_pretrained(
        real_folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="session")
def virtual(real_folder: Path) -> Callable[..., LoopedTransformer]:
    """``virtual(core, **options)``: the core layers in a loop, without training.

    The newest one is kept, half a gigabyte: ask for other numbers of recurrences by ``view_at``,
    and change no weights.
    """

    @lru_cache(maxsize=1)
    def made(core: range, options: tuple[tuple[str, Any], ...]) -> LoopedTransformer:
        keywords = {"n_recurrences": 1, "device": "cpu"} | dict(options)
        return retrofit(str(real_folder), core=core, mode="virtual-loop", **keywords)

    def ask(core: range = range(12, 18), **options: Any) -> LoopedTransformer:
        return made(core, tuple(sorted(options.items())))

    return ask
