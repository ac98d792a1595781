"""Training looped models: small ones from scratch, and others on.

::

    shape, spec = Shape(prelude=1, core=2, coda=1), TrainSpec(steps=1000)
    log, table = train_on_texts("corpus.txt", "out", shape, spec)
"""

from typing import TYPE_CHECKING, Any

from tl_looped.training.losses import EveryRecurrence, ExitWeighted, LastState
from tl_looped.training.recurrences import Constant, PoissonLogNormal
from tl_looped.training.spec import Shape, TrainSpec

if TYPE_CHECKING:
    from tl_looped.training.texts import train_model_on_texts, train_on_texts
    from tl_looped.training.trainer import train

__all__ = [
    "Constant",
    "EveryRecurrence",
    "ExitWeighted",
    "LastState",
    "PoissonLogNormal",
    "Shape",
    "TrainSpec",
    "train",
    "train_model_on_texts",
    "train_on_texts",
]


def __getattr__(name: str) -> Any:
    # Imported when they are used: they load transformers' Trainer.
    if name == "train":
        from tl_looped.training.trainer import train

        return train
    if name in ("train_on_texts", "train_model_on_texts"):
        from tl_looped.training import texts

        return getattr(texts, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
