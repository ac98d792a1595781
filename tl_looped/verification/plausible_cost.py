"""Speed and memory: whether a recurrence costs what its layers cost, and weights are held once."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import psutil
import torch
from torch import Tensor

from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.cache_size import readable
from tl_looped.verification.certificate import Finding, Outcome

SPEED, MEMORY = "cost by recurrences", "weights in memory"

_POSITIONS = 96
_NEW = 6
_TIMES = 3
LEAST, MOST = 0.3, 3.0
"""Bounds of the measured growth of the cost over that of the effective layers.

On a CPU the growth is that of the processor's time. Other programs that take their turns add to the
clock's time of a long run and not to that of a short one: on a busy machine a right model looked
ten times too slow. Each time is the best of several, taken in turn."""
HELD = 1.5
"""Bytes of tensors that the model holds over those of its parameters; a second copy makes 2."""
_SPEED_IF_WRONG = (
    "The time would not grow with the number of effective layers: constant if recurrences are not "
    "run, quadratic if each one repeats those before it."
)
_MEMORY_IF_WRONG = (
    "The model would hold tensors of twice its parameters' bytes or more: tied weights that were "
    "copied, or the checkpoint's own tensors kept beside the model's."
)


def cost_by_recurrences(
    model: LoopedTransformer, tokens: Tensor, numbers: Sequence[int]
) -> Finding:
    """Time a forward pass and a few cached steps at two or more numbers of recurrences.

    Args:
        model: The model.
        tokens: Tokens ``[batch, pos]``; the first row is run, repeated to some length.
        numbers: Numbers of recurrences.
    """
    length, n_new = min(_POSITIONS, model.cfg.n_ctx), min(_NEW, model.cfg.n_ctx)
    row = tokens[:1].repeat(1, -(-length // tokens.shape[1]))[:, :length]
    jobs: dict[tuple[str, int], Callable[[], Any]] = {}
    for n in numbers:
        jobs["forward", n] = partial(model, row, n_recurrences=n)
        jobs["generation", n] = partial(
            model.generate,
            row[:, :1],
            max_new_tokens=n_new,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            n_recurrences=n,
        )
    seconds, busy = _best_times(jobs, row.device)
    layers = {n: model.view_at(n).cfg.n_layers for n in numbers}
    few, many = min(numbers), max(numbers)
    grows = busy["forward", many] / busy["forward", few]
    expected = _expected(model, layers[many]) / _expected(model, layers[few])
    each = ", ".join(
        f"{n} ({layers[n]} layers): {length / seconds['forward', n]:.0f} forward, "
        f"{n_new / seconds['generation', n]:.0f} generated"
        for n in numbers
    )
    of_cpu = " of the processor" if row.device.type == "cpu" else ""
    found = (
        f"Tokens per second of one text of {length} tokens by recurrences: {each}. From {few} to "
        f"{many} recurrences a forward pass takes {grows:.2f} times as much time{of_cpu}, and the "
        f"weights that are multiplied grow {expected:.2f} times; plausible: {least(expected):.2f} "
        f"to {MOST * expected:.2f}."
    )
    found_numbers = {
        "positions": length,
        "tokens_per_second": {
            kind: {n: (length if kind == "forward" else n_new) / seconds[kind, n] for n in numbers}
            for kind in ("forward", "generation")
        },
        "layers": layers,
        "grows": grows,
        "expected": expected,
    }
    if few == many:
        return Finding(SPEED, Outcome.NOT_APPLICABLE, found, _SPEED_IF_WRONG, found_numbers)
    linear = least(expected) < grows < MOST * expected
    outcome = Outcome.PLAUSIBLE if linear else Outcome.SUSPICIOUS
    return Finding(SPEED, outcome, found, _SPEED_IF_WRONG, found_numbers)


def least(expected: float) -> float:
    """Growth from which on recurrences are run at all.

    What a run costs whatever its depth hides more of a large growth than of a small one in a small
    model: of 117 times the layers 38 times the time was seen.
    """
    return min(LEAST * expected, math.sqrt(expected))


def _expected(model: LoopedTransformer, n_layers: int) -> int:
    """Weights that a token is multiplied with: those of its layers, and the unembedding."""
    one = sum(p.numel() for name, p in model.named_parameters() if name.startswith("core.0."))
    return n_layers * one + int(model.cfg.d_vocab * model.cfg.d_model)


def _best_times(
    jobs: dict[tuple[str, int], Callable[[], Any]], device: torch.device
) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], float]]:
    """Seconds of each by the clock, and those that the device was busy with it.

    Both are the best of several rounds in which all take their turn.
    """
    best, busy = dict.fromkeys(jobs, float("inf")), dict.fromkeys(jobs, float("inf"))
    with torch.no_grad():
        for _ in range(_TIMES):
            for name, job in jobs.items():
                start, of_process = time.perf_counter(), time.process_time()
                job()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best[name] = min(best[name], time.perf_counter() - start)
                busy[name] = min(busy[name], time.process_time() - of_process)
    # The clock of a process is coarse on some systems, and says nothing of a GPU.
    return best, busy if device.type == "cpu" and all(busy.values()) else best


def weights_in_memory(model: LoopedTransformer) -> Finding:
    """Bytes of all tensors that the model holds, against those of its parameters.

    The process's resident memory is reported too, and not judged: it holds PyTorch, the tokenizer
    and whatever else runs in it.

    Args:
        model: The model.
    """
    parameters = _bytes(p.data for p in model.parameters())
    held = _bytes(_tensors_of(model))
    resident = psutil.Process(os.getpid()).memory_info().rss
    found = (
        f"The parameters take {_short(parameters)}, all tensors that the model holds "
        f"{_short(held)}, {held / max(1, parameters):.2f} times as much; up to {HELD} is "
        f"plausible. The process has {_short(resident)} in memory, libraries included."
    )
    numbers = {"parameters": parameters, "held": held, "resident": resident}
    outcome = Outcome.PLAUSIBLE if held <= HELD * parameters else Outcome.SUSPICIOUS
    return Finding(MEMORY, outcome, found, _MEMORY_IF_WRONG, numbers)


def _bytes(tensors: Any) -> int:
    """Of the storages behind tensors, each counted once."""
    storages = {}
    for tensor in tensors:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors_of(model: LoopedTransformer) -> list[Tensor]:
    """Every tensor that can be reached from the model, its code and its tokenizer left out."""
    skipped = (type, ModuleType, FunctionType, BuiltinFunctionType, str, int, float)
    seen: set[int] = {id(model.tokenizer)}
    found: list[Tensor] = []
    waiting: list[Any] = [model.__dict__]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, skipped):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        waiting.extend(gc.get_referents(thing))
    return found


def _short(n_bytes: int) -> str:
    """A size without the number of bytes, which :attr:`Finding.numbers` has."""
    return readable(n_bytes).split(" (")[0]
