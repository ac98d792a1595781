"""From a corpus, and a shape or a model, to a trained model: what ``tl-looped train`` does."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from accelerate import PartialState
from torch import Tensor

from tl_looped.checks import checked, whole
from tl_looped.errors import TokenizerError
from tl_looped.files import make_folder
from tl_looped.progress import NOTICES, Progress
from tl_looped.training.corpus import (
    pack,
    read_texts,
    read_trained_tokenizer,
    shared_tokenizer,
    split,
)
from tl_looped.training.evaluation import (
    EVALUATED,
    EVALUATED_ROWS,
    loss_by_recurrences,
    write_table,
)
from tl_looped.training.log import Entry
from tl_looped.training.losses import ExitWeighted
from tl_looped.training.record import check_vacant
from tl_looped.training.spec import CONTEXT, Shape, TrainSpec
from tl_looped.training.trainer import train
from tl_looped.transformer import LoopedTransformer


@checked
def train_on_texts(
    source: str,
    out: str | Path,
    shape: Shape,
    spec: TrainSpec,
    held_out: int = 100,
    tokenizer: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = NOTICES,
    snapshots: int | None = None,
) -> tuple[list[Entry], pd.DataFrame]:
    """Train a new model of a shape on a corpus; called again, an interrupted run goes on.

    Besides the files of :func:`tl_looped.training.trainer.train`, ``out`` gets ``tokenizer/`` and
    ``evaluation.csv``, the final model's held-out loss at 1 to 32 recurrences.

    Args:
        source: See :func:`tl_looped.training.corpus.read_texts`.
        out: Folder of the run.
        shape: Shape of the model; ``spec.seed`` draws its weights. An exit gate is added for
            ``ExitWeighted``.
        spec: Hyperparameters.
        held_out: Documents that are set aside.
        tokenizer: Folder of a tokenizer with BOS and EOS; trained on the corpus if None.
        device: Where to train.
        progress, snapshots: As in ``train``.

    Returns:
        The log and the evaluation.

    Raises:
        ConfigError: ``out`` holds another run, a model or a tokenizer.
        CheckpointError: ``tokenizer`` holds none.
    """
    out = Path(out)
    check_vacant(out)
    # One process reads and trains the tokenizer, the others find it.
    with PartialState(cpu=device == "cpu").main_process_first():
        training, aside = _corpus(source, held_out, spec)
        found = (
            shared_tokenizer(training, shape.vocabulary, make_folder(out) / "tokenizer")
            if tokenizer is None
            else read_trained_tokenizer(Path(tokenizer))
        )
    rows, held_out_rows = (pack(texts, found, shape.context) for texts in (training, aside))
    gate = isinstance(spec.loss, ExitWeighted)
    cfg = shape.config(len(found), spec.seed, gate, device)
    model = LoopedTransformer.from_config(cfg, found)
    log = train(model, rows, held_out_rows, spec, out, progress, snapshots)
    return log, _evaluated(model, held_out_rows, out)


@checked
def train_model_on_texts(
    model: LoopedTransformer,
    source: str,
    out: str | Path,
    spec: TrainSpec,
    context: int | None = None,
    held_out: int = 100,
    progress: Progress = NOTICES,
    snapshots: int | None = None,
    fresh: bool = False,
) -> tuple[list[Entry], pd.DataFrame]:
    """Go on training a model with its own tokenizer: heal a retrofit, fine-tune a looped model.

    Each document begins with BOS if the model's texts do (``cfg.default_prepend_bos``), and ends
    with EOS. ``out`` gets what :func:`train_on_texts` writes but for ``tokenizer/``; ``best`` and
    ``final`` hold the model's tokenizer.

    Args:
        model: Changed in place.
        source: See :func:`tl_looped.training.corpus.read_texts`.
        out: Folder of the run, not the one that the model was read from.
        spec: Hyperparameters. A trained model wants a lower learning rate than a new one.
        context: Tokens per row; the model's context or 256, whichever is less, if None.
        held_out: Documents that are set aside.
        progress, snapshots, fresh: As in ``train``.

    Returns:
        The log and the evaluation.

    Raises:
        ConfigError: ``out`` holds another run, a model or a tokenizer.
        TokenizerError: the model has no tokenizer, or one without EOS.
    """
    out = Path(out)
    check_vacant(out)
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.eos_token_id is None:
        lacks = "no tokenizer" if tokenizer is None else "a tokenizer without EOS"
        raise TokenizerError(
            f"the model has {lacks}, so it cannot be trained on texts: pack rows of token ids "
            "yourself and call tl_looped.training.trainer.train"
        )
    training, aside = _corpus(source, held_out, spec)
    length = min(CONTEXT, model.cfg.n_ctx) if context is None else whole(context, "context", 2)
    bos = bool(model.cfg.default_prepend_bos) and tokenizer.bos_token_id is not None
    rows, held_out_rows = (pack(texts, tokenizer, length, bos) for texts in (training, aside))
    log = train(model, rows, held_out_rows, spec, out, progress, snapshots, fresh)
    return log, _evaluated(model, held_out_rows, out)


def _corpus(source: str, held_out: int, spec: TrainSpec) -> tuple[list[str], list[str]]:
    seed = spec.seed if spec.data_seed is None else spec.data_seed
    return split(read_texts(source), held_out, seed)


def _evaluated(model: LoopedTransformer, held_out: Tensor, out: Path) -> pd.DataFrame:
    table = loss_by_recurrences(model, held_out[:EVALUATED_ROWS], EVALUATED)
    if PartialState().is_main_process:
        write_table(table, out / "evaluation.csv")
    return table
