"""Training on ``transformers.Trainer``: what it does, and what is made exact around it.

The Trainer runs the loop, autocast, clipping, the optimiser, checkpoints and several devices
(``accelerate launch``). Resuming is exact because nothing that a step needs has a hidden state:
rows, initial states and recurrences are functions of a seed and the step, the dataset is the whole
run's rows in order (so that resuming skips an index and draws nothing again), and optimiser and
schedule are the Trainer's own checkpoint. Checkpoints hold the weights as safetensors; the
optimiser's and the generators' state are PyTorch files that the Trainer reads with
``weights_only=True``, so no pickle of them is run (a test holds it to that). See
``tl_looped.training.saved`` for what makes a checkpoint count.

Limits: no gradient accumulation. The same bits need the same machine, number of threads and
devices, and PyTorch: two devices differ from one in the last digit.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer import Trainer

from tl_looped.checks import checked, whole
from tl_looped.errors import CheckpointError, ConfigError, DataError
from tl_looped.files import make_folder
from tl_looped.progress import NOTICES, Progress
from tl_looped.training.log import Entry
from tl_looped.training.losses import ExitWeighted
from tl_looped.training.objective import Objective, RowsInOrder
from tl_looped.training.optimizers import make_optimizer
from tl_looped.training.record import claim, make_record
from tl_looped.training.recorder import Recorder
from tl_looped.training.saved import loading, newest_checkpoint, saving, sealed_checkpoints
from tl_looped.training.spec import TrainSpec
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.vocabulary import check_ids


class _Trainer(Trainer):
    """The Trainer with our optimiser, schedule, safetensors and errors.

    It does not rotate checkpoints: it would go by the times that the disk gives them, and where the
    clock went back it removes the one that was just written.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    objective: Objective
    recorder: Recorder

    def __init__(self, objective: Objective, recorder: Recorder, **kwargs: Any) -> None:
        self.objective, self.recorder = objective, recorder
        super().__init__(model=objective, callbacks=[recorder], **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        # The mean over devices, so that all of them decide alike whether the run diverges.
        mean = self.accelerator.reduce(loss.clone(), reduction="mean")
        self.recorder.on_loss(float(mean), self.state.global_step)
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.objective.model, self.objective.spec)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            assert self.optimizer is not None
            spec = self.objective.spec
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda step: spec.rate(step) / spec.learning_rate
            )
        return self.lr_scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        assert output_dir is not None
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            weights = {k: v.contiguous() for k, v in self.objective.state_dict().items()}
            save_file(weights, os.path.join(output_dir, "model.safetensors"))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with saving(folder):
            super()._save_checkpoint(*args, **kwargs)
            PartialState().wait_for_everyone()  # each process writes its generators' state
            if self.is_world_process_zero():
                self.recorder.complete(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The Trainer would go on with random weights in the place of the missing ones.
        if load_result.missing_keys or load_result.unexpected_keys:
            raise CheckpointError(
                f"{self.recorder.checkpoint} holds the weights of another model: missing "
                f"{load_result.missing_keys}, unexpected {load_result.unexpected_keys}"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(str(checkpoint)):
            super()._load_rng_state(checkpoint)


@checked
def train(
    model: LoopedTransformer,
    rows: Int[Tensor, "row length"],
    held_out: Int[Tensor, "held_out_row length"],
    spec: TrainSpec,
    out: str | Path,
    progress: Progress = NOTICES,
    snapshots: int | None = None,
    fresh: bool = False,
) -> list[Entry]:
    """Train, or go on where the folder's newest checkpoint stands; the weights are the same.

    ``out`` gets ``run.json`` (spec, model, digests of the rows and the first weights), ``log.csv``,
    ``checkpoints/`` (the two newest; a damaged one is set aside), ``best`` (by held-out loss, at
    the model's own recurrences) and ``final``. With ``snapshots`` it also gets
    ``snapshots/step-000000``, ..., each a model that ``from_pretrained`` loads: what a run looked
    like on its way. They change nothing in the run and are not part of its spec.

    Args:
        model: Changed in place; holds the last step's weights at the end, in evaluation mode.
        rows: Training rows, one context each, without padding.
        held_out: Rows for the held-out loss.
        spec: Hyperparameters.
        out: Folder of the run.
        progress: Told of every step (``tick``), every entry of the log (``report``), and what was
            damaged and is set aside (``say``).
        snapshots: Keep the weights of every so many evaluations, those before the first step and
            those of the last one; none if None. A run that goes on keeps those that are there;
            steps that it made without this argument have none.
        fresh: Whether the model was just loaded, so that other weights mean another run. Else a
            model that an interrupted call has trained may be given again.

    Returns:
        The log: one entry per evaluation, with the fields of ``LOG_FIELDS``.

    Raises:
        ConfigError: the spec does not fit the model, the folder holds another run, a model or a
            tokenizer, or ``snapshots`` is below 1.
        CheckpointError: all checkpoints are damaged; nothing is overwritten.
        DataError: no rows, an unreadable log, or a disk that is full or cannot be written to; the
            same call goes on from the newest checkpoint then.
        DivergedError: the loss diverged; the last good checkpoint stays.
    """
    spec.check(model.cfg)
    if snapshots is not None:
        whole(snapshots, "snapshots", 1, error=ConfigError)
    for name, value in (("rows", rows), ("held_out", held_out)):
        if len(value) == 0 or value.shape[1] < 2:
            raise DataError(
                f"{name} must be [row, length] with at least one row of at least two tokens, got "
                f"shape {tuple(value.shape)}"
            )
        check_ids(value.long(), model.cfg.d_vocab)
    if rows.shape[1] > model.cfg.n_ctx:
        raise DataError(
            f"rows of {rows.shape[1]} tokens exceed the context of {model.cfg.n_ctx}: give rows "
            "(context=, --context) of no more tokens than that"
        )
    with _kept_generators():
        return _train(model, rows, held_out, spec, Path(out), progress, snapshots, fresh)


def _train(
    model: LoopedTransformer,
    rows: Tensor,
    held_out: Tensor,
    spec: TrainSpec,
    out: Path,
    progress: Progress,
    snapshots: int | None,
    fresh: bool,
) -> list[Entry]:
    record = make_record(spec, model, model.cfg, rows, held_out)
    # The first process moves what is damaged; the others find the folder in order.
    with PartialState(cpu=model.W_E.device.type == "cpu").main_process_first():
        make_folder(out)
        begins = not sealed_checkpoints(out / "checkpoints")
        run = claim(out, record, begins, fresh, progress.say)
        checkpoint = newest_checkpoint(make_folder(out / "checkpoints"), run, progress.say)
    seed = spec.seed if spec.data_seed is None else spec.data_seed
    data = RowsInOrder(rows, spec.steps * spec.batch_size, seed)
    objective = Objective(model, spec)
    recorder = Recorder(objective, data, held_out, out, run, checkpoint, progress, snapshots)
    trainer = _make_trainer(recorder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    objective.note_training()  # of a run that goes on at its end no step does
    if trainer.is_world_process_zero():
        with saving(out / "final"):
            model.save_pretrained(out / "final")
    model.eval()
    return recorder.log


def _make_trainer(recorder: Recorder) -> Trainer:
    objective = recorder.objective
    spec = objective.spec
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if spec.batch_size % world:
        raise DataError(f"batch_size={spec.batch_size} must be a multiple of {world} devices")
    arguments = TrainingArguments(
        output_dir=str(recorder.out / "checkpoints"),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size // world,
        max_grad_norm=spec.clip,
        bf16=spec.bf16,
        use_cpu=objective.model.W_E.device.type == "cpu",
        seed=spec.seed,
        train_sampling_strategy="sequential",
        # A gate that the loss does not read is the only parameter a step can leave out; that of
        # the only recurrence is not read.
        ddp_find_unused_parameters=objective.model.cfg.exit_gate
        and not (isinstance(spec.loss, ExitWeighted) and objective.sampler.least > 1),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )

    trainer = _Trainer(objective, recorder, args=arguments, train_dataset=recorder.data)
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _kept_generators() -> Iterator[None]:
    """The caller's global generators, which the Trainer seeds, as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
