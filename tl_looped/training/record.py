"""``run.json``: what a folder's run is, so that it is never continued with another one.

It holds the spec, the model's configuration, digests of the rows and of the weights that the run
began with. The run's identity, which its checkpoints bear, is a digest of all that is not at its
default, so that a field that a later version adds does not make another run of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_looped.errors import CheckpointError, ConfigError, DataError
from tl_looped.model.config import TRAINED, LoopedConfig
from tl_looped.progress import warn
from tl_looped.training.saved import (
    MANIFEST,
    Say,
    digest,
    move_aside,
    sealed_checkpoints,
    write_json,
)
from tl_looped.training.spec import TrainSpec

RUN = "run.json"
_OF_A_RUN = ("log.csv", "best", "final", "checkpoints", "snapshots")
_OF_A_MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

Record = dict[str, Any]


def make_record(
    spec: TrainSpec, model: nn.Module, cfg: LoopedConfig, rows: Tensor, held_out: Tensor
) -> Record:
    """The record of a run that begins with a model as it is now."""
    record = {
        "spec": spec.to_json(),
        "model": {k: v for k, v in cfg.to_json().items() if k != TRAINED},
        "rows": rows_digest(rows),
        "held_out": rows_digest(held_out),
        "weights": weights_digest(model),
    }
    read_back: Record = json.loads(json.dumps(record))
    return read_back


def identity(record: Record) -> str:
    """A digest of the run that a record is of."""
    defaults = {"spec": TrainSpec(steps=1).to_json(), "model": _model_defaults()}
    parts = {
        name: {k: v for k, v in value.items() if k == "steps" or v != defaults[name].get(k)}
        if name in defaults
        else value
        for name, value in record.items()
    }
    return digest(parts)


def check_vacant(out: Path) -> None:
    """Refuse a folder that holds a model, a tokenizer or a run that no record tells of.

    Raises:
        ConfigError: naming what is there.
        DataError: the name is not one of a folder, or the folder cannot be read.
    """
    try:
        str(out).encode("utf-8")  # as the libraries need it that save weights and tokenizers
        if (out / RUN).is_file() or not out.is_dir():
            return
        names = sorted(path.name for path in out.iterdir())
    except (OSError, ValueError) as error:
        raise DataError(f"{str(out)!r} cannot be the folder of a run: {error}") from error
    run = [name for name in names if name in _OF_A_RUN]
    if run:
        raise ConfigError(
            f"{out} holds {', '.join(run)} and no {RUN}, so it is not a run that can go on: "
            "use another folder"
        )
    model = [n for n in names if n in _OF_A_MODEL or n.endswith(_WEIGHTS)]
    if model:
        raise ConfigError(
            f"{out} holds a model or a tokenizer ({', '.join(model)}), and a run would be mixed "
            "with it: use another folder. To train that model, start from it: tl-looped train "
            "--from FOLDER, or train_model_on_texts"
        )


def claim(out: Path, record: Record, begins: bool, fresh: bool, say: Say = warn) -> str:
    """Record the run in its folder, or check that the folder is this run's.

    Args:
        out: The run's folder.
        record: What is to be run, see :func:`make_record`.
        begins: Whether the run will begin with the model's own weights, not with a checkpoint's.
        fresh: Whether the model was just loaded, so that other weights are another run.
        say: Function that is told what was set aside.

    Returns:
        The run's identity.

    Raises:
        ConfigError: the folder holds a run of another spec, model or data, or something else.
        CheckpointError: its record cannot be read, and no checkpoint says that it is this run's.
    """
    path = out / RUN
    if not path.is_file():
        check_vacant(out)
        _write(record, path)
        return identity(record)
    try:
        before = _read(path)
        changed = _differences(before, record)
        known = before.get("weights")
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        _replace_record(path, record, error, say)
        return identity(record)
    other_weights = known not in (None, record["weights"])
    if other_weights and fresh:
        changed.append("weights that it begins with")
    if changed:
        raise ConfigError(
            f"{out} holds another run, which differs in {', '.join(changed)}: continue it with its "
            "own settings, or use another folder"
        )
    if other_weights and begins:
        say(
            f"{out}: the model's weights are not those that the run began with, and there is no "
            "checkpoint of it: it begins again, with those that were given"
        )
        _write(record, path)
        known = record["weights"]
    return identity({k: v for k, v in record.items() if k != "weights"} | _known(known))


def _write(record: Record, path: Path) -> None:
    write_json(record | {"sha256": digest(record)}, path)


def _read(path: Path) -> Any:
    """The record in a file; one of an earlier version has no sum of its own.

    Raises:
        ValueError: it has changed since it was written.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if "sha256" in record and record.pop("sha256") != digest(record):
        raise ValueError("it has changed since it was written")
    return record


def _known(weights: str | None) -> Record:
    # A record of an earlier version does not say what the run began with.
    return {} if weights is None else {"weights": weights}


def _replace_record(path: Path, record: Record, error: Exception, say: Say) -> None:
    """Set a damaged record aside where a checkpoint says that the folder is this run's.

    Raises:
        CheckpointError: no checkpoint says so.
    """
    checkpoints = sealed_checkpoints(path.parent / "checkpoints")
    if not any(_run_of(checkpoint) == identity(record) for checkpoint in checkpoints):
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}): restore it, or use another "
            "folder"
        ) from error
    aside = move_aside(path)
    say(
        f"{path} cannot be read ({type(error).__name__}). It is now {aside.name}, and is written "
        "anew: the checkpoints are of this run. Nothing is lost"
    )
    _write(record, path)


def _run_of(checkpoint: Path) -> str | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        run: str = manifest["run"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return run


def rows_digest(rows: Tensor) -> str:
    """SHA-256 of the rows' shape and values."""
    values = rows.contiguous().to(torch.int64)
    return hashlib.sha256(str(tuple(rows.shape)).encode() + values.numpy().tobytes()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of every parameter's name, type, shape and bytes."""
    result = hashlib.sha256()
    for name, parameter in model.named_parameters():
        result.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        values = parameter.detach().cpu().contiguous().reshape(-1)
        result.update(values.view(torch.uint8).numpy().data)
    return result.hexdigest()


def _model_defaults() -> Record:
    return {field.name: field.default for field in fields(LoopedConfig)}


def _differences(before: Record, record: Record) -> list[str]:
    """Names of what differs, with both values where they are short.

    A record of an earlier version lacks the fields that the model has got since; it was trained as
    their defaults say.
    """
    out = []
    for part, defaults in (("spec", {}), ("model", _model_defaults())):
        for key in sorted({*before[part], *record[part]} if part in before else record[part]):
            old = before.get(part, {}).get(key, defaults.get(key))
            new = record[part].get(key)
            if old != new:
                out.append(f"{part}.{key} ({old!r} there, {new!r} here)")
    return out + [part for part in ("rows", "held_out") if before.get(part) != record[part]]
