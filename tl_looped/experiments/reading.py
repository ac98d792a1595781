"""Reading a run's results back, and refusing what is not one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import xarray as xr

from tl_looped.checks import checked
from tl_looped.errors import DataError
from tl_looped.experiments.store import RESULTS, read_run
from tl_looped.metrics.labels import geometry_of, trained_recurrences
from tl_looped.words import called, told_apart


@dataclass(frozen=True)
class Missing:
    """A number that cannot be given, and why.

    Args:
        reason: In words.
        applies: Whether it could be had of another run of the model; what does not apply has no
            meaning for what was found.
    """

    reason: str
    applies: bool = True


@checked
def load(folder: str | Path) -> xr.Dataset:
    """Results of a run, by depth.

    Args:
        folder: Of the run, with ``results.nc``.

    Raises:
        DataError: as :func:`read_results`.
    """
    return read_results(Path(folder) / RESULTS)


def read_results(path: Path) -> xr.Dataset:
    """A run's results, in memory, if they say what they are.

    Raises:
        DataError: if the file is missing, damaged, of another format or of another run than its
            folder, or does not say what it is.
    """
    data = read_run(path)
    try:
        loop = geometry_of(data)
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} does not say the run's shape: attribute {error}") from error
    if "prompt" not in data.dims or data.sizes.get("effective_layer") != loop.n_layers:
        raise DataError(
            f"{path} must be by depth, with prompt and effective_layer ({loop.n_layers} of a run "
            f"of shape {loop}), got {dict(data.sizes)}"
        )
    return data


def is_feedforward(data: xr.Dataset) -> bool:
    """Whether a result is of a core without prelude and coda that ran once, as it was trained.

    So is that of a model that was not trained as a loop, or does not say.
    """
    loop = geometry_of(data)
    return loop.p == loop.c == 0 and loop.R == (trained_recurrences(data) or 1) == 1


def display_names(runs: Mapping[str, xr.Dataset]) -> dict[str, str]:
    """What the model of each run is called, by the run's name.

    A hub id or short name, or the last part of a folder. Where two models of other weights would
    have one name, the folder that each lies in is added if those differ, the beginning of the
    weights' hash if not; never a path.
    """
    names = [called(str(data.attrs.get("model", "")) or "unnamed model") for data in runs.values()]
    weights = [str(data.attrs.get("model_identity", "")) for data in runs.values()]
    folders = [PurePath(str(specification(d).get("model", ""))).parent.name for d in runs.values()]
    ends = []
    for name, own, folder in zip(names, weights, folders, strict=True):
        there = {(w, f) for n, w, f in zip(names, weights, folders, strict=True) if n == name}
        apart = len({w for w, _ in there}) == len({f for _, f in there}) == len(there)
        end = f"in {folder}" if apart and all(f for _, f in there) else f"weights {own[:8]}"
        ends.append(end if len({w for w, _ in there}) > 1 and (own or folder) else "")
    return dict(zip(runs, told_apart(names, ends), strict=True))


def specification(data: xr.Dataset) -> dict[str, Any]:
    """The specification that a result carries as JSON; empty if it carries none.

    Raises:
        DataError: if it is no JSON object.
    """
    text = data.attrs.get("spec", "{}")
    try:
        found = json.loads(text)
    except (TypeError, ValueError) as error:
        raise DataError(f"the attribute spec is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"the attribute spec must be a JSON object, got {type(found).__name__}")
    return found


def bos_apart(a: xr.Dataset, b: xr.Dataset) -> str:
    """A sentence if one of two results was read with BOS and the other without; else empty.

    Results that do not say are taken to be alike.
    """
    said = [data.attrs.get("prepend_bos") for data in (a, b)]
    if None in said or bool(said[0]) == bool(said[1]):
        return ""
    how = ["with" if x else "without" for x in said]
    return (
        f"the first was read {how[0]} BOS, the second {how[1]}: positions are shifted, and the "
        "first token, which often is an attention sink, is another one, so that their numbers do "
        "not compare; --bos or --no-bos for both makes them alike"
    )


def same_prompts(a: xr.Dataset, b: xr.Dataset) -> bool:
    """Whether two results are of the same texts, none left out in one of them alone."""
    mine, theirs = a.attrs.get("prompts_digest"), b.attrs.get("prompts_digest")
    if mine is None or mine != theirs or "source_row" not in a or "source_row" not in b:
        return False
    return bool(a["source_row"].values.tolist() == b["source_row"].values.tolist())
