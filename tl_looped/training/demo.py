"""How the bundled demo model was made.

Shape (2, 4 x 4, 2), linear injection, d_model 128, four heads, pre-norm RMSNorm, SwiGLU, RoPE, tied
embeddings, context 256, byte-level BPE of 2,048 tokens, trained on GSM8K's training problems at
four recurrences.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tl_looped.model.config import InitialState, Injection, LoopedConfig, NormLayout
from tl_looped.progress import NOTICES, Progress
from tl_looped.training.corpus import pack, read_problems, split, train_tokenizer
from tl_looped.training.spec import TrainSpec
from tl_looped.training.trainer import train
from tl_looped.transformer import LoopedTransformer

_VOCABULARY = 2048
DEMO_CONTEXT = 256
DEMO_HELD_OUT = 373
DEMO_SPEC = TrainSpec(steps=2200, learning_rate=3e-3)


def demo_config(d_vocab: int, seed: int) -> LoopedConfig:
    """Configuration of the demo model."""
    return LoopedConfig(
        architecture="tl_looped",
        model_name="demo",
        d_model=128,
        d_head=32,
        n_heads=4,
        d_mlp=344,
        n_ctx=DEMO_CONTEXT,
        d_vocab=d_vocab,
        n_prelude=2,
        n_core=4,
        n_coda=2,
        n_recurrences=4,
        norm_layout=NormLayout.PRE,
        injection=Injection.LINEAR,
        initial_state=InitialState.RANDOM,
        initial_state_std=math.sqrt(2 / 5),  # Huginn's state, after its embedding scale
        tie_embeddings=True,
        init_mode="normal",
        initializer_range=0.02,
        default_prepend_bos=True,
        seed=seed,
        device="cpu",
    )


def train_demo(
    data: Path,
    out: Path,
    spec: TrainSpec = DEMO_SPEC,
    progress: Progress = NOTICES,
) -> list[dict[str, Any]]:
    """Train the demo model on a jsonl file of problems.

    See :func:`tl_looped.training.trainer.train` for what it writes and returns.

    Raises:
        DataError: see :func:`read_problems`.
    """
    training, held_out = split(read_problems(data), DEMO_HELD_OUT, spec.seed)
    tokenizer = train_tokenizer(training, _VOCABULARY)
    model = LoopedTransformer.from_config(demo_config(len(tokenizer), spec.seed), tokenizer)
    rows, held_out_rows = (pack(texts, tokenizer, DEMO_CONTEXT) for texts in (training, held_out))
    return train(model, rows, held_out_rows, spec, out, progress)
