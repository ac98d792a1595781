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

import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback

from tl_looped._compat import Module
from tl_looped.errors import CheckpointError, ConfigError, DataError, DivergedError
from tl_looped.files import make_folder
from tl_looped.training.log import LOG, LOG_FIELDS, Entry, read_log, resumed_log, write_log
from tl_looped.training.losses import ExitWeighted, training_loss
from tl_looped.training.optimizers import make_optimizer
from tl_looped.training.record import claim, make_record
from tl_looped.training.recurrences import state_seed
from tl_looped.training.saved import (
    Say,
    loading,
    newest_checkpoint,
    rotate,
    saving,
    seal,
    sealed_checkpoints,
    warn,
)
from tl_looped.training.spec import TrainSpec
from tl_looped.transformer import LoopedTransformer

__all__ = ["LOG_FIELDS", "RowsInOrder", "Tick", "held_out_loss", "read_log", "train"]

SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Tick:
    """What a step reports to a progress bar.

    Args:
        step: Steps done.
        loss: Training loss of the step, in nats a token.
        tokens_per_second: Training tokens a second since the start or the resumption.
        recurrences: Recurrences of the step.
    """

    step: int
    loss: float
    tokens_per_second: float
    recurrences: int


class RowsInOrder(Dataset[dict[str, Tensor]]):
    """The rows of a whole run, one after the other: epochs of seeded permutations, joined.

    Args:
        rows: All rows.
        n: How many the run reads.
        seed: Seed of the permutations.
    """

    def __init__(self, rows: Int[Tensor, "row length"], n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        epochs = [torch.randperm(len(rows), generator=generator) for _ in range(-(-n // len(rows)))]
        self.rows, self.order = rows, torch.cat(epochs)[:n]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.rows[self.order[index]]}


class Objective(Module):
    """A model and its loss as the module that the Trainer calls (and wraps, on many devices)."""

    def __init__(self, model: LoopedTransformer, spec: TrainSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec
        self.recurrences = spec.recurrences_of(model.cfg)
        self.step = 0

    def note_training(self) -> None:
        """From the first step on the model is one that was trained as a loop, and says so."""
        self.model.cfg.trained_recurrences = self.recurrences.stated

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> dict[str, Float[Tensor, ""]]:
        """The loss of the current step."""
        spec, step = self.spec, self.step
        now = self.recurrences.at(spec.seed, step)
        with self.model.turn, self.model.recurrences(now):
            seed = state_seed(spec.seed, step)
            loss = training_loss(self.model, tokens, spec.loss, seed, spec.backprop_last)
        return {"loss": loss}


@torch.no_grad()
def held_out_loss(
    model: LoopedTransformer, rows: Int[Tensor, "row length"], batch_size: int, bf16: bool = False
) -> float:
    """Mean next-token loss in nats over all rows, with the model's own state seed."""
    device = model.W_E.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        losses = [
            float(model(batch, return_type="loss")) * len(batch) for batch in rows.split(batch_size)
        ]
    return sum(losses) / len(rows)


class _Watch(TrainerCallback):
    """Counts steps, stops a diverging run, evaluates, logs and seals checkpoints.

    Args:
        objective: The model and its loss.
        data: The run's rows.
        held_out: Rows of the held-out loss.
        out: Folder of the run.
        run: Its identity.
        checkpoint: Where it goes on.
        report, tick, snapshots, say: As in :func:`train`.
    """

    def __init__(
        self,
        objective: Objective,
        data: RowsInOrder,
        held_out: Int[Tensor, "held_out_row length"],
        out: Path,
        run: str,
        checkpoint: Path | None,
        report: Callable[[Entry], None],
        tick: Callable[[Tick], None],
        snapshots: int | None,
        say: Say,
    ) -> None:
        self.objective, self.data, self.held_out, self.out = objective, data, held_out, out
        self.run, self.checkpoint = run, checkpoint
        self.report, self.tick, self.snapshots, self.say = report, tick, snapshots, say
        self.log: list[Entry] = []
        self.losses: list[float] = []
        self.first = 0
        self.seconds_before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the log where the checkpoint stands."""
        self.first = state.global_step
        if self.checkpoint is not None:
            writes = state.is_world_process_zero
            self.log = resumed_log(self.out, self.checkpoint, self.first, writes, self.say)
        self.seconds_before = self.log[-1]["seconds"] if self.log else 0.0
        self.started = time.perf_counter()
        if self.first == 0 and state.is_world_process_zero:
            self._keep_snapshot(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the objective its step."""
        self.objective.step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No step with a gradient that is no number: the weights stay what they were."""
        # Clipping has divided every gradient by the norm, so one bad entry shows in all of them.
        for name, parameter in self.objective.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise self._diverged(state.global_step, f"the gradient of {name} is not finite")

    def on_loss(self, loss: float, step: int) -> None:
        """The loss of a step, before its gradient is used."""
        if not math.isfinite(loss):
            raise self._diverged(step, f"the training loss is {loss}")
        self.losses.append(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report; evaluate and ask for a checkpoint when it is time."""
        spec, step = self.objective.spec, state.global_step
        self.objective.note_training()
        recurrences = self.objective.recurrences.at(spec.seed, step - 1)
        self.tick(Tick(step, self.losses[-1], self._speed(step), recurrences))
        if step % spec.evaluate_every and step != spec.steps:
            return
        mean = sum(self.losses) / len(self.losses)
        self.losses = []
        best = min((e["train_loss"] for e in self.log), default=math.inf)
        if mean > best + spec.diverged_by:
            raise self._diverged(
                step, f"the mean training loss rose from {best:.3f} to {mean:.3f} nats"
            )
        self._evaluate(step, mean, state.is_world_process_zero)
        if state.is_world_process_zero:
            # Before the checkpoint: a run that ends in between evaluates and keeps this step again.
            self._keep_snapshot(step)
        control.should_save = True

    def complete(self, checkpoint: Path) -> None:
        """Put the log into a checkpoint, seal it, and let go of the oldest one."""
        write_log(checkpoint / LOG, self.log)
        seal(checkpoint, self.run)
        rotate(checkpoint.parent)

    def _evaluate(self, step: int, train_loss: float, writes: bool) -> None:
        spec, model = self.objective.spec, self.objective.model
        model.eval()
        tokens = step * spec.batch_size * self.data.rows.shape[1]
        entry = {
            "step": step,
            "tokens": tokens,
            "epoch": round(step * spec.batch_size / len(self.data.rows), 3),
            "train_loss": round(train_loss, 5),
            "held_out_loss": round(held_out_loss(model, self.held_out, 16, spec.bf16), 5),
            "learning_rate": spec.rate(step - 1),
            "tokens_per_second": round(self._speed(step), 1),
            "seconds": round(self.seconds_before + time.perf_counter() - self.started, 1),
        }
        model.train()
        best = min((e["held_out_loss"] for e in self.log), default=math.inf)
        self.log.append(entry)
        if writes:
            if entry["held_out_loss"] < best:
                with saving(self.out / "best"):
                    model.save_pretrained(self.out / "best")
            write_log(self.out / LOG, self.log)
            self.report(entry)

    def _keep_snapshot(self, step: int) -> None:
        """The weights in a folder of their own, if it is time; whole or not there."""
        spec = self.objective.spec
        if self.snapshots is None:
            return
        if step % (self.snapshots * spec.evaluate_every) and step != spec.steps:
            return
        folder = self.out / SNAPSHOTS / snapshot_name(step)
        partial = folder.with_name(f".{folder.name}.partial")
        for left_over in (partial, folder):
            shutil.rmtree(left_over, ignore_errors=True)
        with saving(partial):
            self.objective.model.save_pretrained(partial)
            os.replace(partial, folder)

    def _speed(self, step: int) -> float:
        done = (step - self.first) * self.objective.spec.batch_size * self.data.rows.shape[1]
        return done / max(1e-9, time.perf_counter() - self.started)

    def _diverged(self, step: int, what: str) -> DivergedError:
        sealed = sealed_checkpoints(self.out / "checkpoints")
        kept = f"The last good one is {sealed[-1]}" if sealed else "There is no checkpoint yet"
        best = self.out / "best"
        kept += f", and {best} holds the best model so far" * best.is_dir()
        return DivergedError(
            f"training diverged at step {step}: {what}. {kept}. Lower learning_rate, raise warmup "
            "or lower clip, in another folder."
        )


class _Trainer(Trainer):
    """The Trainer with our optimiser, schedule, safetensors and errors.

    It does not rotate checkpoints: it would go by the times that the disk gives them, and where the
    clock went back it removes the one that was just written.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    objective: Objective
    watch: _Watch

    def __init__(self, objective: Objective, watch: _Watch, **kwargs: Any) -> None:
        self.objective, self.watch = objective, watch
        super().__init__(model=objective, callbacks=[watch], **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        # The mean over devices, so that all of them decide alike whether the run diverges.
        mean = self.accelerator.reduce(loss.clone(), reduction="mean")
        self.watch.on_loss(float(mean), self.state.global_step)
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
                self.watch.complete(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The Trainer would go on with random weights in the place of the missing ones.
        if load_result.missing_keys or load_result.unexpected_keys:
            raise CheckpointError(
                f"{self.watch.checkpoint} holds the weights of another model: missing "
                f"{load_result.missing_keys}, unexpected {load_result.unexpected_keys}"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(str(checkpoint)):
            super()._load_rng_state(checkpoint)


def train(
    model: LoopedTransformer,
    rows: Int[Tensor, "row length"],
    held_out: Int[Tensor, "held_out_row length"],
    spec: TrainSpec,
    out: Path,
    report: Callable[[Entry], None] = lambda entry: None,
    tick: Callable[[Tick], None] = lambda tick: None,
    snapshots: int | None = None,
    say: Say = warn,
    fresh: bool = False,
) -> list[Entry]:
    """Train, or go on where the folder's newest checkpoint stands; the weights are the same.

    ``out`` gets ``run.json`` (spec, model, digests of the rows and the first weights), ``log.csv``,
    ``checkpoints/`` (the two newest; a damaged one is set aside), ``best`` (by held-out loss, at
    the model's own recurrences) and ``final``. With ``snapshots`` it also gets
    ``snapshots/step-000000``, ..., each a model that ``from_pretrained`` loads: what a run looked
    like on its way. They change nothing in the run and are no part of its spec.

    Args:
        model: Changed in place; holds the last step's weights at the end, in evaluation mode.
        rows: Training rows, one context each, without padding.
        held_out: Rows for the held-out loss.
        spec: Hyperparameters.
        out: Folder of the run.
        report: Called with every entry of the log.
        tick: Called after every step.
        snapshots: Keep the weights of every so many evaluations, those before the first step and
            those of the last one; none if None. A run that goes on keeps those that are there;
            steps that it made without this argument have none.
        say: Told what was damaged and is set aside, and what is lost; a warning if left out.
        fresh: Whether the model was just loaded, so that other weights mean another run. Else a
            model that an interrupted call has trained may be given again.

    Returns:
        The log: one entry an evaluation, with the fields of ``LOG_FIELDS``.

    Raises:
        ConfigError: the spec does not fit the model, the folder holds another run, a model or a
            tokenizer, or ``snapshots`` is below 1.
        CheckpointError: all checkpoints are damaged; nothing is overwritten.
        DataError: no rows, an unreadable log, or a disk that is full or cannot be written to; the
            same call goes on from the newest checkpoint then.
        DivergedError: the loss diverged; the last good checkpoint stays.
    """
    spec.check(model.cfg)
    if snapshots is not None and (type(snapshots) is not int or snapshots < 1):
        raise ConfigError(
            f"snapshots must be an integer of at least 1, or None for none, got {snapshots!r}"
        )
    for name, value in (("rows", rows), ("held_out", held_out)):
        if value.ndim != 2 or len(value) == 0 or value.shape[1] < 2:
            raise DataError(
                f"{name} must be [row, length] with at least one row of at least two tokens, got "
                f"shape {tuple(value.shape)}"
            )
    if rows.shape[1] > model.cfg.n_ctx:
        raise DataError(
            f"rows of {rows.shape[1]} tokens exceed the context of {model.cfg.n_ctx}: give rows "
            "(context=, --context) of no more tokens than that"
        )
    with _kept_generators():
        return _train(model, rows, held_out, spec, out, report, tick, snapshots, say, fresh)


def _train(
    model: LoopedTransformer,
    rows: Tensor,
    held_out: Tensor,
    spec: TrainSpec,
    out: Path,
    report: Callable[[Entry], None],
    tick: Callable[[Tick], None],
    snapshots: int | None,
    say: Say,
    fresh: bool,
) -> list[Entry]:
    record = make_record(spec, model, model.cfg, rows, held_out)
    # The first process moves what is damaged; the others find the folder in order.
    with PartialState(cpu=model.W_E.device.type == "cpu").main_process_first():
        make_folder(out)
        begins = not sealed_checkpoints(out / "checkpoints")
        run = claim(out, record, begins, fresh, say)
        checkpoint = newest_checkpoint(make_folder(out / "checkpoints"), run, say)
    seed = spec.seed if spec.data_seed is None else spec.data_seed
    data = RowsInOrder(rows, spec.steps * spec.batch_size, seed)
    objective = Objective(model, spec)
    watch = _Watch(objective, data, held_out, out, run, checkpoint, report, tick, snapshots, say)
    trainer = _make_trainer(watch)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    objective.note_training()  # of a run that goes on at its end no step does
    if trainer.is_world_process_zero():
        with saving(out / "final"):
            model.save_pretrained(out / "final")
    model.eval()
    return watch.log


def _make_trainer(watch: _Watch) -> Trainer:
    objective = watch.objective
    spec = objective.spec
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if spec.batch_size % world:
        raise DataError(f"batch_size={spec.batch_size} must be a multiple of {world} devices")
    arguments = TrainingArguments(
        output_dir=str(watch.out / "checkpoints"),
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
        and not (isinstance(spec.loss, ExitWeighted) and objective.recurrences.least > 1),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )

    trainer = _Trainer(objective, watch, args=arguments, train_dataset=watch.data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def snapshot_name(step: int) -> str:
    """The folder of a snapshot, ``step-000100``."""
    return f"step-{step:06d}"


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
