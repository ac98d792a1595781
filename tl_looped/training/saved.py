"""Checkpoints of a run that can be trusted: complete, undamaged and of the same run.

``transformers.Trainer`` writes a checkpoint file by file into its final folder, and on resuming it
goes on with a fresh optimiser where ``optimizer.pt`` is absent. So a manifest of every file's
SHA-256 is written last: a checkpoint without one was interrupted and is thrown away, and one whose
files differ from it is an error. ``run.json`` holds the spec, the model and a digest of the rows,
so that a folder is never continued with another run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_looped.errors import CheckpointError, ConfigError
from tl_looped.files import write_text
from tl_looped.model.config import TRAINED, LoopedConfig
from tl_looped.training.spec import TrainSpec

MANIFEST = "manifest.json"
RUN = "run.json"


def write_json(value: Any, path: Path) -> None:
    """Write JSON; see :func:`tl_looped.files.write_bytes`."""
    write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", path)


def seal(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint that is complete."""
    files = {p.name: _sha256(p) for p in sorted(checkpoint.iterdir()) if p.name != MANIFEST}
    write_json(files, checkpoint / MANIFEST)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest sealed checkpoint, checked file by file; interrupted ones are removed.

    Raises:
        CheckpointError: if it is damaged. Nothing is removed then: the older one is still there.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    sealed = [p for p in found if (p / MANIFEST).is_file()]
    for interrupted in set(found) - set(sealed):
        shutil.rmtree(interrupted)
    if not sealed:
        return None
    problems = _problems(sealed[-1])
    if problems:
        older = f" to go on from {sealed[-2].name}" if len(sealed) > 1 else " to start again"
        raise CheckpointError(
            f"{sealed[-1]} is damaged: {'; '.join(problems)}. Restore it, or remove that folder"
            f"{older}."
        )
    return sealed[-1]


def claim(out: Path, spec: TrainSpec, cfg: LoopedConfig, rows: Tensor, held_out: Tensor) -> None:
    """Record the run in its folder, or check that the folder is this run's.

    Raises:
        ConfigError: if the folder holds a run of another spec, model or data.
        CheckpointError: if its record cannot be read.
    """
    run = {
        "spec": spec.to_json(),
        "model": {k: v for k, v in cfg.to_json().items() if k != TRAINED},
        "rows": rows_digest(rows),
        "held_out": rows_digest(held_out),
    }
    path = out / RUN
    if not path.is_file():
        if (out / "log.csv").exists():
            raise ConfigError(
                f"{out} holds a log.csv and no {RUN}, so it is no run that can be gone on with: "
                "use another folder"
            )
        write_json(run, path)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = _differences(before, json.loads(json.dumps(run)))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): restore it, or use another folder"
        ) from error
    if changed:
        raise ConfigError(
            f"{out} holds another run, which differs in {', '.join(changed)}: continue it with its "
            "own settings, or use another folder"
        )


def rows_digest(rows: Tensor) -> str:
    """SHA-256 of the rows' shape and values."""
    values = rows.contiguous().to(torch.int64)
    return hashlib.sha256(str(tuple(rows.shape)).encode() + values.numpy().tobytes()).hexdigest()


def _differences(before: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """Names of what differs, with both values where they are short.

    A record of an earlier version lacks the fields that the model has got since; it was trained as
    their defaults say.
    """
    out = []
    since = {field.name: field.default for field in fields(LoopedConfig)}
    for part, defaults in (("spec", {}), ("model", since)):
        for key in sorted({*before[part], *run[part]} if part in before else run[part]):
            old = before.get(part, {}).get(key, defaults.get(key))
            new = run[part].get(key)
            if old != new:
                out.append(f"{part}.{key} ({old!r} there, {new!r} here)")
    return out + [part for part in ("rows", "held_out") if before.get(part) != run[part]]


def _problems(checkpoint: Path) -> list[str]:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        problems = []
        for name, digest in manifest.items():
            file = checkpoint / name
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif _sha256(file) != digest:
                problems.append(f"{name} has changed since it was written")
    except (ValueError, AttributeError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    return problems


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
