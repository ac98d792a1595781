"""Training on ``transformers.Trainer``: what it does, and what is made exact around it.

The Trainer runs the loop, autocast, clipping, the optimiser, checkpoints and several devices
(``accelerate launch``). Resuming is exact because nothing that a step needs has a hidden state:
rows, initial states and recurrences are functions of a seed and the step, the dataset is the whole
run's rows in order (so that resuming skips an index and draws nothing again), and optimiser and
schedule are the Trainer's own checkpoint. Checkpoints hold the weights as safetensors; the
optimiser's and the generators' state are PyTorch files that the Trainer reads with
``weights_only=True``, so no pickle of them is run. See ``tl_looped.training.saved`` for what makes
a checkpoint count.

Limits: no gradient accumulation. The same bits need the same machine, number of threads and
devices, and PyTorch: two devices differ from one in the last digit.
"""

from __future__ import annotations

import csv
import io
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
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tl_looped.errors import ConfigError, DataError, DivergedError
from tl_looped.files import write_text
from tl_looped.training.losses import ExitWeighted, training_loss
from tl_looped.training.optimizers import make_optimizer
from tl_looped.training.recurrences import state_seed
from tl_looped.training.saved import claim, newest_checkpoint, seal
from tl_looped.training.spec import TrainSpec
from tl_looped.transformer import LoopedTransformer

LOG_FIELDS = (
    "step",
    "tokens",
    "epoch",
    "train_loss",
    "held_out_loss",
    "learning_rate",
    "tokens_per_second",
    "seconds",
)
KEPT_CHECKPOINTS = 2
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


class Objective(nn.Module):
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
        with self.model.recurrences(self.recurrences.at(spec.seed, step)):
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
    """Counts steps, stops a diverging run, evaluates, logs and seals checkpoints."""

    def __init__(
        self,
        objective: Objective,
        data: RowsInOrder,
        held_out: Int[Tensor, "held_out_row length"],
        out: Path,
        report: Callable[[dict[str, Any]], None],
        tick: Callable[[Tick], None],
        snapshots: int | None,
    ) -> None:
        self.objective, self.data, self.held_out, self.out = objective, data, held_out, out
        self.report, self.tick, self.snapshots = report, tick, snapshots
        self.log: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.first = 0
        self.seconds_before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the log where the checkpoint stands."""
        self.first = state.global_step
        before = read_log(self.out / "log.csv") if self.first else []
        self.log = [e for e in before if e["step"] <= self.first]
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

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is complete."""
        PartialState().wait_for_everyone()  # each process writes its generators' state
        if state.is_world_process_zero:
            seal(self.out / "checkpoints" / f"checkpoint-{state.global_step}")

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
                model.save_pretrained(self.out / "best")
            write_log(self.out / "log.csv", self.log)
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
        self.objective.model.save_pretrained(partial)
        os.replace(partial, folder)

    def _speed(self, step: int) -> float:
        done = (step - self.first) * self.objective.spec.batch_size * self.data.rows.shape[1]
        return done / max(1e-9, time.perf_counter() - self.started)

    def _diverged(self, step: int, what: str) -> DivergedError:
        newest = newest_checkpoint(self.out / "checkpoints")
        kept = "There is no checkpoint yet" if newest is None else f"The last good one is {newest}"
        return DivergedError(
            f"training diverged at step {step}: {what}. {kept}, and {self.out / 'best'} holds the "
            "best model so far. Lower learning_rate, raise warmup or lower clip, in another folder."
        )


class _Trainer(Trainer):
    """The Trainer with our optimiser, schedule and safetensors."""

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any

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


def train(
    model: LoopedTransformer,
    rows: Int[Tensor, "row length"],
    held_out: Int[Tensor, "held_out_row length"],
    spec: TrainSpec,
    out: Path,
    report: Callable[[dict[str, Any]], None] = lambda entry: None,
    tick: Callable[[Tick], None] = lambda tick: None,
    snapshots: int | None = None,
) -> list[dict[str, Any]]:
    """Train, or go on where the folder's newest checkpoint stands; the weights are the same.

    ``out`` gets ``run.json`` (spec, model, digest of the rows), ``log.csv``, ``checkpoints/`` (the
    two newest), ``best`` (by held-out loss, at the model's own recurrences) and ``final``. With
    ``snapshots`` it also gets ``snapshots/step-000000``, ..., each a model that ``from_pretrained``
    loads: what a run looked like on its way. They change nothing in the run and are no part of its
    spec.

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

    Returns:
        The log: one entry an evaluation, with the fields of ``LOG_FIELDS``.

    Raises:
        ConfigError: the spec does not fit the model, the folder holds another run, or
            ``snapshots`` is below 1.
        CheckpointError: the newest checkpoint is damaged; nothing is overwritten.
        DataError: no rows, or an unreadable log.
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
        raise DataError(f"rows of {rows.shape[1]} tokens exceed the context of {model.cfg.n_ctx}")
    out.mkdir(parents=True, exist_ok=True)
    claim(out, spec, model.cfg, rows, held_out)
    checkpoint = newest_checkpoint(out / "checkpoints")
    objective = Objective(model, spec)
    seed = spec.seed if spec.data_seed is None else spec.data_seed
    data = RowsInOrder(rows, spec.steps * spec.batch_size, seed)
    watch = _Watch(objective, data, held_out, out, report, tick, snapshots)
    with _kept_generators():
        trainer = _make_trainer(objective, data, watch, out)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        objective.note_training()  # of a run that goes on at its end no step does
        if trainer.is_world_process_zero():
            model.save_pretrained(out / "final")
    model.eval()
    return watch.log


def _make_trainer(objective: Objective, data: RowsInOrder, watch: _Watch, out: Path) -> Trainer:
    spec = objective.spec
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if spec.batch_size % world:
        raise DataError(f"batch_size={spec.batch_size} must be a multiple of {world} devices")
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size // world,
        max_grad_norm=spec.clip,
        bf16=spec.bf16,
        use_cpu=objective.model.W_E.device.type == "cpu",
        seed=spec.seed,
        train_sampling_strategy="sequential",
        # A gate that the loss does not read is the only parameter a step can leave out.
        ddp_find_unused_parameters=objective.model.cfg.exit_gate
        and not isinstance(spec.loss, ExitWeighted),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        save_total_limit=KEPT_CHECKPOINTS,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )

    trainer = _Trainer(objective, watch, args=arguments, train_dataset=data)
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a ``log.csv``; none if there is no file.

    Raises:
        DataError: if a line is not an entry.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [
                {k: int(row[k]) if k in ("step", "tokens") else float(row[k]) for k in LOG_FIELDS}
                for row in csv.DictReader(file)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read as a log ({error!r}): restore or remove it"
            ) from error


def write_log(path: Path, log: list[dict[str, Any]]) -> None:
    """Write the log; see :func:`tl_looped.files.write_bytes`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, LOG_FIELDS)
    writer.writeheader()
    writer.writerows(log)
    write_text(text.getvalue(), path)
