"""The checkpoint under examination: found, its revision pinned, its files hashed.

A looped checkpoint has an adapter. A feedforward one of a family that can be retrofitted is
examined as its virtual loop: all layers are the core, at one recurrence, which is the feedforward
model itself. :class:`VirtualLoop` says for it what an adapter says of a looped one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging

from tl_looped.adapters import Adapter, Source
from tl_looped.adapters.stored import Header, read_headers, tensor_files
from tl_looped.checkpoints import Checkpoint, HubOptions, download, open_checkpoint, read_config
from tl_looped.errors import CheckpointError, ConfigError, UnknownArchitectureError
from tl_looped.files import is_folder
from tl_looped.model.config import LoopedConfig
from tl_looped.retrofitting.families import FAMILIES, family_of, feedforward_sources, looped_config
from tl_looped.retrofitting.layers import LayerPlan

HASHED_WHOLE = 8 * 2**30
"""Bytes up to which a file of weights is hashed whole; of larger ones header and size are."""
_BLOCK = 2**24


@dataclass(frozen=True)
class Opened:
    """A checkpoint and where it is from.

    Args:
        checkpoint: Its files and its adapter.
        commit: Hash of the hub's commit; None for a folder.
    """

    checkpoint: Checkpoint
    commit: str | None

    @property
    def is_feedforward(self) -> bool:
        """Whether it is examined as its virtual loop."""
        return isinstance(self.checkpoint.adapter, VirtualLoop)

    @property
    def called(self) -> str:
        """What the user called it; of a folder the last part of its path."""
        name = self.checkpoint.name
        return Path(name).resolve().name if is_folder(name) else name


class VirtualLoop(Adapter):
    """A feedforward checkpoint as the loop of all its layers, run once; not registered."""

    name = "virtual-loop"

    def matches(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """Never by itself: a feedforward model is no looped one."""
        return False

    def config(self, config: Mapping[str, Any]) -> LoopedConfig:
        """As ``tl_looped.retrofit`` has it, by transformers' own configuration."""
        theirs = _theirs(config)
        return looped_config(theirs, _plan(theirs.num_hidden_layers), "feedforward", False, 1)

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """As ``tl_looped.retrofit`` reads them."""
        norms = next(f for f in FAMILIES.values() if f.layout is cfg.norm_layout)
        return feedforward_sources(cfg, norms, _plan(cfg.n_core), cfg.tie_embeddings)

    def ignored(self, cfg: LoopedConfig) -> frozenset[str]:
        """Rotary tables of old versions, which transformers leaves out too."""
        layers = range(cfg.n_core)
        return frozenset(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in layers)

    def duplicates(self, cfg: LoopedConfig) -> dict[str, str]:
        """A stored copy of a tied unembedding."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if cfg.tie_embeddings else {}


def _theirs(config: Mapping[str, Any]) -> Any:
    """Transformers' configuration of a ``config.json``."""
    given = dict(config)
    family_of(given.get("model_type"), "the checkpoint")
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # it remarks on values that are only tried
    try:
        return AutoConfig.for_model(given.pop("model_type"), **given)
    except Exception as error:  # whatever transformers raises about a value
        raise ConfigError(f"transformers cannot read config.json: {error}") from error
    finally:
        logging.set_verbosity(shown)


def _plan(n_layers: int) -> LayerPlan:
    """All layers in the loop."""
    return LayerPlan((), tuple(range(n_layers)), (), n_layers)


def open_subject(name: str | Path, revision: str | None, hub: HubOptions | None) -> Opened:
    """Find what is to be examined.

    Raises:
        CheckpointError, UnknownArchitectureError: as :func:`open_checkpoint`, but for feedforward
            models that can be retrofitted.
    """
    try:
        checkpoint = open_checkpoint(name, revision, hub)
    except UnknownArchitectureError:
        folder = Path(name) if is_folder(name) else download(str(name), revision, hub)
        raw = read_config(folder)
        if raw.get("model_type") not in list(FAMILIES):
            raise
        headers = read_headers(tensor_files(folder))
        layers = raw.get("num_hidden_layers")
        if type(layers) is int and layers > len(headers):  # a list of them is made
            raise CheckpointError(
                f"{name}: config.json asks for {layers} layers, and the files hold {len(headers)} "
                "tensors in all; the config is not that of these tensors"
            ) from None
        checkpoint = Checkpoint(folder, str(name), raw, headers, VirtualLoop())
    if isinstance(checkpoint.adapter, VirtualLoop):
        checkpoint = replace(checkpoint, headers=_by_head(checkpoint))
    is_snapshot = checkpoint.folder.parent.name == "snapshots" and not is_folder(str(name))
    return Opened(checkpoint, checkpoint.folder.name if is_snapshot else None)


def _by_head(checkpoint: Checkpoint) -> dict[str, Header]:
    """The headers with biases of queries, keys and values by head, as a looped model has them."""
    d_head = checkpoint.config().d_head
    return {
        name: replace(header, shape=(header.shape[0] // d_head, d_head))
        if name.endswith("_proj.bias") and len(header.shape) == 1 and header.shape[0] % d_head == 0
        else header
        for name, header in checkpoint.headers.items()
    }


def hashes(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """SHA-256 of the files that make the model: equal for two certificates of the same files.

    Of a file of weights beyond :data:`HASHED_WHOLE` bytes, the header (names, types, shapes,
    places) and the size are hashed.

    Returns:
        ``bytes``, ``sha256`` and ``hashed`` (what of it) by the file's name.
    """
    folder = checkpoint.folder
    weights = {header.path.name for header in checkpoint.headers.values()}
    others = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    names = [*(name for name in others if (folder / name).is_file()), *sorted(weights)]
    return {name: _hash(folder / name) for name in names}


def _hash(path: Path) -> dict[str, Any]:
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            while block := file.read(_BLOCK):
                digest.update(block)
        else:
            length = file.read(8)  # of the header, as safetensors begins
            digest.update(length + file.read(min(int.from_bytes(length, "little"), 2**28)))
            digest.update(str(size).encode())
    hashed = "the whole file" if size <= HASHED_WHOLE else "its header and its size"
    return {"bytes": size, "sha256": digest.hexdigest(), "hashed": hashed}
