"""The small models of Section 5.1 of the paper (arXiv 2604.11791), at the scale of a CPU.

The paper trains (2, {4, 8, 12} x 4, 2) models of 512 dimensions on 3.7 billion tokens with a
constant four loops and the cross entropy of the final state; pre-norm; the base has no injection.
Figures 54 to 62 show the base, the base with injection, and the base without prelude and coda.

Here: 128 dimensions, four heads of 32, context 256, a byte-level BPE of 1,024 tokens and
1.6 million tokens of GSM8K. What the paper leaves open: N(0, 0.02²) weights; the variant with
injection starts from the prelude's output, as the base does, so that the two differ in the adapter
alone; tied embeddings; AdamW. The control is twelve different layers run once, written as a loop
of one recurrence. The order of rows is the same in every run; the seed draws the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_looped.errors import ConfigError
from tl_looped.model.config import Injection, LoopedConfig
from tl_looped.progress import NOTICES, Progress
from tl_looped.training.corpus import pack, read_problems, shared_tokenizer, split
from tl_looped.training.evaluation import (
    EVALUATED,
    EVALUATED_ROWS,
    loss_by_recurrences,
    write_table,
)
from tl_looped.training.record import claim, make_record
from tl_looped.training.spec import TrainSpec
from tl_looped.training.trainer import train
from tl_looped.transformer import LoopedTransformer

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "base4": {"n_core": 4},
    "base8": {"n_core": 8},
    "injection": {"n_core": 4, "injection": Injection.LINEAR},
    "no-prelude-coda": {"n_core": 4, "n_prelude": 0, "n_coda": 0},
    "feedforward": {"n_core": 12, "n_prelude": 0, "n_coda": 0, "n_recurrences": 1},
}
SEEDS = (0, 1, 2)
_VOCABULARY = 1024
_CONTEXT = 256
_HELD_OUT_PROBLEMS = 373
HELD_OUT_ROWS = 64
DATA_SEED = 0
SECTION51_SPEC = TrainSpec(
    steps=1600,
    batch_size=4,
    learning_rate=2e-3,
    warmup=100,
    evaluate_every=100,
    data_seed=DATA_SEED,
)


def section51_config(name: str, d_vocab: int, seed: int) -> LoopedConfig:
    """One of the configurations.

    Args:
        name: A key of ``CONFIGURATIONS``.
        d_vocab: Size of the tokenizer.
        seed: Seed of the weights.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in CONFIGURATIONS:
        raise ConfigError(f"name must be one of {sorted(CONFIGURATIONS)}, got {name!r}")
    values: dict[str, Any] = {
        "architecture": "tl_looped",
        "model_name": f"section51-{name}",
        "d_model": 128,
        "d_head": 32,
        "n_heads": 4,
        "d_mlp": 344,
        "n_ctx": _CONTEXT,
        "d_vocab": d_vocab,
        "n_prelude": 2,
        "n_coda": 2,
        "n_recurrences": 4,
        "tie_embeddings": True,
        "init_mode": "normal",
        "initializer_range": 0.02,
        "default_prepend_bos": True,
        "seed": seed,
        "device": "cpu",
    }
    return LoopedConfig(**(values | CONFIGURATIONS[name]))


def prepare_rows(
    data: Path, out: Path
) -> tuple[PreTrainedTokenizerFast, Int[Tensor, "row length"], Int[Tensor, "aside length"]]:
    """Tokenizer (trained once, then read from ``out``), training rows and held-out rows."""
    training, held_out = split(read_problems(data), _HELD_OUT_PROBLEMS, DATA_SEED)
    tokenizer = shared_tokenizer(training, _VOCABULARY, out / "tokenizer")
    rows, held_out_rows = (pack(texts, tokenizer, _CONTEXT) for texts in (training, held_out))
    return tokenizer, rows, held_out_rows


def run_section51(
    data: Path,
    out: Path,
    names: Sequence[str] = tuple(CONFIGURATIONS),
    seeds: Sequence[int] = SEEDS,
    spec: TrainSpec = SECTION51_SPEC,
    progress: Callable[[str], Progress] = lambda run: NOTICES,
) -> list[Path]:
    """Train all configurations for one seed, then for the next; finished runs are passed over.

    An interrupted call goes on where it stood. Each ``out/<name>-seed<seed>`` is a folder of
    :func:`tl_looped.training.trainer.train` with ``evaluation.csv``, the held-out loss of the
    final model at 1 to 32 recurrences (at 1 for the feedforward control), written last.

    Args:
        data: GSM8K's training split as jsonl.
        out: Folder of all runs.
        names: Keys of ``CONFIGURATIONS``.
        seeds: Seeds of the weights.
        spec: Hyperparameters; its seed is replaced.
        progress: Called with each run's name; gives what is told of it, as in ``train``.

    Returns:
        The folders.

    Raises:
        ConfigError: a folder holds a run of other settings, finished or not.
    """
    configs = {(n, s): section51_config(n, _VOCABULARY, s) for s in seeds for n in names}
    tokenizer, rows, held_out = prepare_rows(data, out)
    folders = []
    for (name, seed), config in configs.items():
        run = f"{name}-seed{seed}"
        folders.append(out / run)
        config.d_vocab = len(tokenizer)
        model = LoopedTransformer.from_config(config, tokenizer)
        own, aside = replace(spec, seed=seed), held_out[:HELD_OUT_ROWS]
        if (out / run / "evaluation.csv").is_file():
            # Passed over, unless it is of other settings than these.
            record = make_record(own, model, model.cfg, rows, aside)
            claim(out / run, record, begins=False, fresh=False, say=progress(run).say)
            continue
        train(model, rows, aside, own, out / run, progress(run))
        numbers = (1,) if name == "feedforward" else EVALUATED
        table = loss_by_recurrences(model, held_out[:EVALUATED_ROWS], numbers)
        write_table(table, out / run / "evaluation.csv")
    return folders
