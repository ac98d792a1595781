"""The authors' files of a checkpoint, and the packages of the environment that runs them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from tl_looped.adapters import Reference, all_aliases
from tl_looped.checkpoints import Checkpoint, HubOptions, download
from tl_looped.errors import CheckpointError, InputError
from tl_looped.files import is_file
from tl_looped.verification.reference_process import versions_in


def modules_of(checkpoint: Checkpoint, reference: Reference) -> list[str]:
    """Files of the classes that ``auto_map`` names and that are opened.

    Raises:
        CheckpointError: none is named, or one of another repository.
    """
    given = checkpoint.raw.get("auto_map")
    by_class = given if isinstance(given, dict) else {}
    opened = (by_class.get(name) for name in ("AutoConfig", reference.auto_class))
    classes = [name for name in opened if isinstance(name, str)]
    if not classes:
        raise CheckpointError(
            f"{checkpoint.name}: config.json has no auto_map for {reference.auto_class}, so it "
            "names no code of its authors"
        )
    elsewhere = [name for name in classes if "--" in name]
    if elsewhere:
        raise CheckpointError(
            f"{checkpoint.name}: config.json takes its code from other repositories ({elsewhere}). "
            "Copy it into a folder with the checkpoint, and take the part before -- out of auto_map"
        )
    return sorted({name.rpartition(".")[0].replace(".", "/") + ".py" for name in classes})


def _hub_id(checkpoint: Checkpoint) -> str | None:
    """Of a checkpoint that was downloaded: where from."""
    is_snapshot = checkpoint.folder.parent.name == "snapshots"
    if not is_snapshot or Path(checkpoint.name).resolve() == checkpoint.folder.resolve():
        return None
    alias = all_aliases().get(checkpoint.name)
    return alias.hub_id if alias else checkpoint.name


def would_run(checkpoint: Checkpoint, modules: list[str]) -> str:
    """What the user is asked to trust."""
    hub_id = _hub_id(checkpoint)
    if hub_id is not None:
        where = f"of {hub_id} at the commit {checkpoint.folder.name}, and what they import"
        return f"the files {', '.join(modules)} {where}"
    there = ", ".join(_python_files(checkpoint.folder)) or "none yet"
    return (
        f"code of {checkpoint.folder}: {', '.join(modules)} and what they import (its Python "
        f"files: {there})"
    )


def _python_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))


def code_files(
    checkpoint: Checkpoint, reference: Reference, hub: HubOptions | None
) -> dict[str, str]:
    """The authors' files and the SHA-256 of each; from the hub at the commit of the weights.

    This package's own client fetches them, so that the process that runs them needs no network and
    no token, be the model gated or not.
    """
    hub_id = _hub_id(checkpoint)
    if hub_id is not None:
        download(hub_id, checkpoint.folder.name, hub, patterns=["*.py"])
    missing = [
        name for name in modules_of(checkpoint, reference) if not is_file(checkpoint.folder / name)
    ]
    if missing:
        raise CheckpointError(
            f"{checkpoint.name}: config.json names {', '.join(missing)}, and "
            f"{checkpoint.folder} lacks it: copy the authors' file there"
        )
    return {
        name: hashlib.sha256((checkpoint.folder / name).read_bytes()).hexdigest()
        for name in _python_files(checkpoint.folder)
    }


def versions_of(python: Path, reference: Reference) -> dict[str, str | None]:
    """Versions of what a reference needs, in another environment.

    Raises:
        InputError: the interpreter does not run.
    """
    return versions_in(python, tuple(package.name for package in reference.packages))


def check_versions(reference: Reference, found: Mapping[str, str | None], python: Path) -> None:
    """Refuse a package that is missing or of another major version.

    Raises:
        InputError: there is one.
    """
    for package in reference.packages:
        there = found.get(package.name)
        if there is None or there.split(".")[0] != package.tested.split(".")[0]:
            has = "no " + package.name if there is None else f"{package.name} {there}"
            raise InputError(
                f"--reference-python {python} has {has}; the authors' code was tested with "
                f"{package.tested}, and another major version is refused. An environment for it: "
                f"{reference.environment}"
            )


def public_version(version: str | None) -> str | None:
    """Without the mark of the build: 2.13.0 of 2.13.0+cpu."""
    return None if version is None else version.partition("+")[0]


def named(versions: Mapping[str, str | None]) -> str:
    """Versions in a sentence."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
