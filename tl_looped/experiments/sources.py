"""Where the model of an experiment is, without reading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from tl_looped.checkpoints import BUNDLED, open_checkpoint, read_tokenizer
from tl_looped.errors import CheckpointError, TLLoopedError
from tl_looped.experiments.identity import folder_identity, module_identity
from tl_looped.experiments.spec import Experiment
from tl_looped.files import is_folder
from tl_looped.model.bos import adds_bos
from tl_looped.model.geometry import LoopGeometry
from tl_looped.transformer import LoopedTransformer


@dataclass(frozen=True)
class FoundModel:
    """A model that has been found, not loaded.

    Args:
        identity: See ``tl_looped.experiments.identity``.
        recurrences: What it runs if the experiment does not say.
        folder: Of its files; None if it is in memory.
        bos: Whether it reads text with BOS by default, and who says so, as in
            ``LoopedConfig.bos_from``; None without a tokenizer that can be asked.
        bos_before: What its family did before tokenizers were asked; None if nobody knows.
        chat_template: Of its tokenizer, where ``identity`` does not hold it.
        adds_bos: Whether its tokenizer adds BOS, where that of the loaded model cannot be asked.
    """

    identity: str
    recurrences: int
    folder: Path | None
    bos: tuple[bool, str] | None = None
    bos_before: bool | None = None
    chat_template: str = ""
    adds_bos: bool | None = None


_BOS_BEFORE = {"retrofit-llama": True, "retrofit-olmo": False, "ouro": False}


def find_model(spec: Experiment, model: LoopedTransformer | None = None) -> FoundModel:
    """Look a model up without reading its weights.

    Raises:
        CheckpointError: if there is none.
    """
    if model is not None:
        says = model.cfg.default_prepend_bos
        decided = None if says is None else (says, model.cfg.bos_from)
        template = str(getattr(model.tokenizer, "chat_template", None) or "")
        identity = module_identity(model, model.cfg)
        return FoundModel(identity, model.loop.R, None, decided, says, template)
    if spec.kind == "feedforward":
        folder = _feedforward_folder(spec)
        habit, template = _habit(read_tokenizer(folder)), _template_of(folder)
        adds = None if habit is None else habit[0]
        return FoundModel(folder_identity(folder), 1, folder, habit, None, template, adds)
    found = open_checkpoint(spec.model, spec.revision)
    cfg = found.config()
    recurrences = found.n_recurrences or cfg.n_recurrences
    said = cfg.default_prepend_bos
    bos = _habit(found.tokenizer()) if said is None else (said, cfg.bos_from)
    before = _BOS_BEFORE.get(cfg.architecture, True) if said is None else said
    folder = found.folder
    return FoundModel(
        folder_identity(folder), recurrences, folder, bos, before, _template_of(folder)
    )


def _template_of(folder: Path) -> str:
    """A chat template in a file of its own."""
    path = folder / "chat_template.jinja"
    return path.read_bytes().hex() if path.is_file() else ""


def _habit(tokenizer: Any) -> tuple[bool, str] | None:
    return None if tokenizer is None else (adds_bos(tokenizer), "tokenizer")


def _feedforward_folder(spec: Experiment) -> Path:
    if spec.model in BUNDLED or is_folder(spec.model):
        folder = BUNDLED.get(spec.model, Path(spec.model))
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{spec.model} has no config.json")
        if loop := _shape_of_loop(folder):
            raise CheckpointError(
                f"{spec.model} is a looped checkpoint {loop}, even if it runs once, and not one "
                "for TransformerBridge: leave out --feedforward"
            )
        return folder
    try:
        return Path(
            snapshot_download(
                spec.model,
                revision=spec.revision,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"],
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # the hub's own, the network's, the name's
        raise CheckpointError(
            f"the feedforward model {spec.model!r} is not a folder and cannot be had from the hub "
            f"(revision {spec.revision or 'main'}): {type(error).__name__}: {error}"
        ) from error


def _shape_of_loop(folder: Path) -> str:
    """Shape of the loop if an adapter takes the folder; empty if none does."""
    try:
        cfg = open_checkpoint(str(folder)).config()
    except TLLoopedError:
        return ""
    return str(LoopGeometry(cfg.n_prelude, cfg.n_core, cfg.n_coda, cfg.n_recurrences))
