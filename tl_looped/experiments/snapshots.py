"""The spectral view of runs: a training run through its snapshots, or a folder of results.

Over training: every snapshot that ``train(..., snapshots=N)`` kept is a model, and an experiment
with the extras ``convergence`` and ``spectrum`` as any other, so that it is resumed and never run
twice. Their results are joined along ``step``.

The number of recurrences is not the trained one by default: a rate of convergence is a fit over
many steps, and the trained number may be four.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_looped.errors import DataError
from tl_looped.experiments import store
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.metrics import CONVERGENCE
from tl_looped.metrics.spectrum import SPECTRUM
from tl_looped.plots.captions import caption_of
from tl_looped.plots.recipes import DrawnFigure
from tl_looped.plots.spectral_radius import radius_against_rate, radius_over_training
from tl_looped.plots.summaries import name_of, shape_of
from tl_looped.training.log import read_log
from tl_looped.training.recorder import SNAPSHOTS
from tl_looped.words import count

SNAPSHOT_RECURRENCES = 64
_STEP = re.compile(r"step-(\d+)")
_DRAWN = ("rate", "verdict", "settled_at", *SPECTRUM)


def find_snapshots(run: Path) -> dict[int, Path]:
    """Folders of a training run's snapshots by their step, in order.

    Args:
        run: Folder of the run, ``--out`` of ``tl-looped train``.

    Raises:
        DataError: if there is none.
    """
    folder = run / SNAPSHOTS
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _STEP.fullmatch(path.name)) and (path / "config.json").is_file()
    }
    if not found:
        raise DataError(
            f"{run} has no snapshot in {SNAPSHOTS}/: train with --snapshots 1, which keeps the "
            "weights of every evaluation from then on (a finished run has none to add: train "
            "into a new folder)"
        )
    return dict(sorted(found.items()))


def snapshot_experiments(
    run: Path,
    prompts: PromptSet,
    recurrences: int = SNAPSHOT_RECURRENCES,
    state_seed: int = 0,
    dtype: str = "float32",
    prepend_bos: bool | None = None,
) -> dict[int, Experiment]:
    """The experiment of every snapshot, by its step.

    Args:
        run: As in :func:`find_snapshots`.
        prompts: The same for all.
        recurrences, state_seed, dtype, prepend_bos: See :class:`Experiment`.
    """
    return {
        step: Experiment(
            str(folder),
            prompts=prompts,
            recurrences=recurrences,
            metrics=CONVERGENCE,
            extras=("convergence", "spectrum"),
            state_seed=state_seed,
            dtype=dtype,
            prepend_bos=prepend_bos,
        )
        for step, folder in find_snapshots(run).items()
    }


def over_training(results: Mapping[int, xr.Dataset], log: list[dict[str, Any]]) -> xr.Dataset:
    """Results of snapshots joined along ``step``.

    Args:
        results: By step, with the extras convergence and spectrum, of the same prompts.
        log: Of the training run (:func:`tl_looped.training.log.read_log`).

    Returns:
        ``rate``, ``verdict``, ``spectral_radius``, … over ``step`` and ``prompt``, and
        ``held_out_loss`` over ``step``, NaN where none was measured (before the first step).

    Raises:
        DataError: if the snapshots' prompts or numbers of recurrences differ.
    """
    steps = sorted(results)
    first = results[steps[0]]
    for step in steps:
        for name in ("prompts_digest", "n_recurrences"):
            if results[step].attrs.get(name) != first.attrs.get(name):
                raise DataError(
                    f"results of step {step} and {steps[0]} differ in {name}: run all snapshots "
                    "with the same prompts and recurrences"
                )
    parts = [results[step][list(_DRAWN)].reset_coords(drop=True) for step in steps]
    data = xr.concat(parts, "step", combine_attrs="override").assign_coords(step=steps)
    losses = {entry["step"]: entry["held_out_loss"] for entry in log}
    data["held_out_loss"] = ("step", [losses.get(step, np.nan) for step in steps])
    data["held_out_loss"].attrs = {"long_name": "held-out loss", "units": "nats per token"}
    return data


def draw_training(run: Path, results: Mapping[int, xr.Dataset]) -> list[DrawnFigure]:
    """Both figures of a training run: over its steps, and rate over radius.

    Args:
        run: Its folder, for the log and the name.
        results: By step.
    """
    data = over_training(results, read_log(run / "log.csv"))
    first = next(iter(results.values()))
    # Without the model's name, which is that of one snapshot.
    shape = f"{len(results)} snapshots of the training run {run.resolve().name}, {shape_of(first)}"
    about = f"{shape}. {caption_of(first, about='models').removesuffix('.')}"
    groups = {f"step {step}": results[step] for step in sorted(results)}
    return [
        radius_over_training(data, about),
        radius_against_rate(groups, about, ordered=True, unit="points (a prompt at a step)"),
    ]


def draw_results(folder: Path) -> tuple[DrawnFigure, list[str]]:
    """Rate over radius of every run in a folder that has both.

    Args:
        folder: A run, or a folder of runs.

    Returns:
        The figure, and the names of the runs that have no spectrum and were left out.

    Raises:
        DataError: if there is no run, or none has a spectrum.
    """
    every = {
        path.name: store.read_dataset(path / store.RESULTS) for path in store.find_runs(folder)
    }
    groups = {
        name: data for name, data in every.items() if {"rate", "spectral_radius"} <= set(data)
    }
    if not groups:
        raise DataError(
            f"{folder}: none of {count(len(every), 'run')} has a rate and a spectral radius: "
            "tl-looped analyze MODEL --recurrences 128 --extras convergence,spectrum"
        )
    about = _about(next(iter(groups.values()))) if len(groups) == 1 else count(len(groups), "run")
    named = dict(zip(_names(groups), groups.values(), strict=True))
    return radius_against_rate(named, about), [name for name in every if name not in groups]


def _about(data: xr.Dataset) -> str:
    """Model, prompts, recurrences and start as captions say them, without the last full stop."""
    return caption_of(data).removesuffix(".")


def _names(runs: Mapping[str, xr.Dataset]) -> list[str]:
    """Short names of runs that tell them apart: model, then recurrences too, or the folder's."""
    models = [name_of(data) for data in runs.values()]
    longer = [
        f"{name}, {count(int(data.attrs['n_recurrences']), 'recurrence')}"
        for name, data in zip(models, runs.values(), strict=True)
    ]
    for names in (models, longer):
        if max(Counter(names).values()) == 1:
            return names
    return list(runs)
