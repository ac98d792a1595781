"""What happens between the steps of a training: evaluations, the log, checkpoints, snapshots.

It also stops a run whose loss diverges, before a gradient that is not finite reaches the weights.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from tl_looped.errors import DivergedError
from tl_looped.progress import Progress, Tick
from tl_looped.training.evaluation import held_out_loss
from tl_looped.training.log import LOG, Entry, resumed_log, write_log
from tl_looped.training.objective import Objective, RowsInOrder
from tl_looped.training.saved import drop_older_checkpoints, saving, seal, sealed_checkpoints

SNAPSHOTS = "snapshots"


def snapshot_name(step: int) -> str:
    """The folder of a snapshot, ``step-000100``."""
    return f"step-{step:06d}"


class Recorder(TrainerCallback):
    """Counts steps, stops a diverging run, evaluates, logs and seals checkpoints.

    Args:
        objective: The model and its loss.
        data: The run's rows.
        held_out: Rows of the held-out loss.
        out: Folder of the run.
        run: Its identity.
        checkpoint: Checkpoint that it goes on from.
        progress, snapshots: As in :func:`tl_looped.training.trainer.train`.
    """

    def __init__(
        self,
        objective: Objective,
        data: RowsInOrder,
        held_out: Int[Tensor, "held_out_row length"],
        out: Path,
        run: str,
        checkpoint: Path | None,
        progress: Progress,
        snapshots: int | None,
    ) -> None:
        self.objective, self.data, self.held_out, self.out = objective, data, held_out, out
        self.run, self.checkpoint = run, checkpoint
        self.progress, self.snapshots = progress, snapshots
        self.log: list[Entry] = []
        self.losses: list[float] = []
        self.first = 0
        self.seconds_before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the log where the checkpoint stands."""
        self.first = state.global_step
        if self.checkpoint is not None:
            writes = state.is_world_process_zero
            self.log = resumed_log(self.out, self.checkpoint, self.first, writes, self.progress.say)
        self.seconds_before = self.log[-1]["seconds"] if self.log else 0.0
        self.started = time.perf_counter()
        if self.first == 0 and state.is_world_process_zero:
            self._keep_snapshot(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the objective its step."""
        self.objective.step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No step with a gradient that is not finite: the weights stay what they were."""
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
        recurrences = self.objective.sampler.at(spec.seed, step - 1)
        self.progress.tick(Tick(step, self.losses[-1], self._speed(step), recurrences))
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
        drop_older_checkpoints(checkpoint.parent)

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
            self.progress.report(entry)

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
