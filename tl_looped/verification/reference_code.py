"""The authors' files of a checkpoint, the packages that run them, and the modules they make."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_looped.adapters import Reference, all_aliases
from tl_looped.checkpoints import Checkpoint, HubOptions, download
from tl_looped.errors import CheckpointError, InputError
from tl_looped.files import is_file
from tl_looped.verification.reference_process import NotCompared, versions_in


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
    files = ", ".join(_python_files(checkpoint.folder))
    there = f"its Python files: {files}" if files else "the folder holds none"
    return f"code of {checkpoint.folder}: {', '.join(modules)} and what they import ({there})"


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
            f"{checkpoint.folder} lacks {' and '.join(missing)}, which config.json names: copy "
            f"{'them' if len(missing) > 1 else 'it'} from the authors' repository"
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


def refuse_absent(reference: Reference, request: Mapping[str, Any], absent: Any) -> None:
    """Refuse a declaration that names what the authors' model does not have.

    Args:
        reference: The declaration.
        request: What was asked for.
        absent: What the process says is not there, each with the nearest names that are.

    Raises:
        NotCompared: there is something.
    """
    found = absent if isinstance(absent, dict) else {}
    eps = [".".join(place) for place in request["eps"].values()]
    wrong: dict[str, str] = {}  # the first of each field
    for path in (*request["modules"], *eps, request["rotary"]):
        if path in found:
            field, kind = _declared(reference, path)
            near = [str(name) for name in found[path]] if isinstance(found[path], list) else []
            text = f"{field}: the authors' model has no {kind} {path}; it has "
            wrong.setdefault(field, text + (", ".join(near) or "none"))
    if wrong:
        raise NotCompared("; ".join(wrong.values()))


def _declared(reference: Reference, path: str) -> tuple[str, str]:
    """Field of the declaration that a path comes from, and what it should lead to."""
    for ours, theirs in reference.activations.items():
        if re.fullmatch(re.escape(theirs).replace(r"\{l\}", r"\d+"), path):
            return f"activations[{ours!r}]", "module"
    return ("rotary", "buffer") if path == reference.rotary else ("norm_eps", "attribute")


def public_version(version: str | None) -> str | None:
    """Without the mark of the build: 2.13.0 of 2.13.0+cpu."""
    return None if version is None else version.partition("+")[0]


def named(versions: Mapping[str, str | None]) -> str:
    """Versions in a sentence."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
