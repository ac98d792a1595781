"""Where the model of an experiment is, without reading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from tl_looped.checkpoints import BUNDLED, open_checkpoint
from tl_looped.errors import CheckpointError, TLLoopedError
from tl_looped.experiments.identity import folder_identity, module_identity
from tl_looped.experiments.spec import Experiment
from tl_looped.model.geometry import LoopGeometry
from tl_looped.transformer import LoopedTransformer


@dataclass(frozen=True)
class Source:
    """A model that has been found, not loaded.

    Args:
        identity: See ``tl_looped.experiments.identity``.
        recurrences: What it runs if the experiment does not say.
        folder: Of its files; None if it is in memory.
    """

    identity: str
    recurrences: int
    folder: Path | None


def find_model(spec: Experiment, model: LoopedTransformer | None = None) -> Source:
    """Look a model up without reading its weights.

    Raises:
        CheckpointError: if there is none.
    """
    if model is not None:
        return Source(module_identity(model, model.cfg), model.loop.R, None)
    if spec.kind == "feedforward":
        folder = _feedforward_folder(spec)
        return Source(folder_identity(folder), 1, folder)
    found = open_checkpoint(spec.model, spec.revision)
    recurrences = found.n_recurrences or found.config().n_recurrences
    return Source(folder_identity(found.folder), recurrences, found.folder)


def _feedforward_folder(spec: Experiment) -> Path:
    if spec.model in BUNDLED or Path(spec.model).is_dir():
        folder = BUNDLED.get(spec.model, Path(spec.model))
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{spec.model} has no config.json")
        if loop := _shape_of_loop(folder):
            raise CheckpointError(
                f"{spec.model} is a looped checkpoint {loop}, also if it runs once, and not one "
                "for TransformerBridge: leave out --feedforward"
            )
        return folder
    try:
        return Path(
            snapshot_download(
                spec.model,
                revision=spec.revision,
                allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.txt"],
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # the hub's own, the network's, the name's
        raise CheckpointError(
            f"the feedforward model {spec.model!r} is no folder and cannot be had from the hub "
            f"(revision {spec.revision or 'main'}): {type(error).__name__}: {error}"
        ) from error


def _shape_of_loop(folder: Path) -> str:
    """Shape of the loop if an adapter takes the folder; empty if none does."""
    try:
        cfg = open_checkpoint(str(folder)).config()
    except TLLoopedError:
        return ""
    return str(LoopGeometry(cfg.n_prelude, cfg.n_core, cfg.n_coda, cfg.n_recurrences))
