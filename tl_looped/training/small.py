"""The names under which the demo and its bundle use the trainer."""

from __future__ import annotations

from tl_looped.training.spec import TrainSpec
from tl_looped.training.trainer import LOG_FIELDS, held_out_loss
from tl_looped.training.trainer import train as train_small

__all__ = ["LOG_FIELDS", "TrainSpec", "held_out_loss", "train_small"]
