"""The small models of Section 5.1 of the paper (arXiv 2604.11791), measured.

:mod:`tl_looped.paper.section51.training` trains them. Here every finished training run becomes a
few experiments on its final model: at the trained recurrences for the signature metrics of Figures
10 and 54 to 62, and at more of them for verdicts and rates, each confirmed by a run of twice as
many.
What was run before is not run again. Models that are not trained are listed and passed over.

Decisions, ours. Prompts are padded to a batch, under a mask, so that the same ones serve all
models. The control is a core of twelve layers that runs once: it has a signature and no verdict.
Of the paper's nine figures, those of blocks of 12, and of 8 with injection or bare, have no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from tl_looped.errors import DataError
from tl_looped.experiments.runner import run_experiment
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.metrics.verdicts import CONVERGENCE
from tl_looped.paper.section51.training import CONFIGURATIONS, SEEDS
from tl_looped.progress import SILENT, Progress
from tl_looped.words import count

CONTROL = "feedforward"
FIGURES_OF = {54: "base4", 55: "base8", 57: "injection", 60: "no-prelude-coda"}
"""Figures of one model: the signature metrics, by the number in the paper."""

SIGNATURE_METRICS = ("signature", "magnitude", "mixing_per_row", "entropy_norm_max")
STEP_METRICS = (*CONVERGENCE, "fixed_point_rel")
VERDICT_RECURRENCES = (32, 128)

_LOOP = ("n_prelude", "n_core", "n_coda")


@dataclass(frozen=True)
class Trained:
    """A finished training run.

    Args:
        configuration: A key of :data:`tl_looped.paper.section51.training.CONFIGURATIONS`.
        seed: Of the weights.
        folder: Of the run.
        record: Its ``run.json``: ``spec``, ``model``, digests of the rows.
        log: Its ``log.csv``.
        evaluation: Its ``evaluation.csv``, the held-out loss by recurrences.
    """

    configuration: str
    seed: int
    folder: Path
    record: dict[str, Any]
    log: pd.DataFrame
    evaluation: pd.DataFrame

    @property
    def name(self) -> str:
        """``base4-seed0``."""
        return f"{self.configuration}-seed{self.seed}"

    @property
    def recurrences(self) -> int:
        """Of the training."""
        return int(self.record["model"]["n_recurrences"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers of prelude, core and coda."""
        p, k, c = (int(self.record["model"][name]) for name in _LOOP)
        return p, k, c


@dataclass(frozen=True)
class Measured:
    """A trained model and its results by depth, by recurrences of the run.

    Args:
        trained: Where the model is from.
        results: With the attribute ``model`` set to the configuration.
    """

    trained: Trained
    results: dict[int, xr.Dataset] = field(default_factory=dict)

    @property
    def stages(self) -> xr.Dataset:
        """The result at the trained recurrences."""
        return self.results[self.trained.recurrences]


def trained_runs(
    runs: Path, names: Sequence[str] = tuple(CONFIGURATIONS), seeds: Sequence[int] = SEEDS
) -> tuple[list[Trained], dict[str, str]]:
    """The finished training runs of a folder, and those that are missing, with the reason.

    Looked for are ``names`` with ``seeds``, and every other seed that is there. A run is finished
    when it has ``evaluation.csv``, which is written last.

    Raises:
        DataError: if the folder is none, holds no finished run, or a run's files cannot be read.
    """
    if not runs.is_dir():
        raise DataError(f"runs: {runs} is not a folder; give the one of tl-looped train-section51")
    found, missing = [], {}
    for name in names:
        there = {_seed_of(path) for path in runs.glob(f"{name}-seed*") if path.is_dir()}
        for seed in sorted({*seeds, *there} - {-1}):
            folder = runs / f"{name}-seed{seed}"
            if not folder.is_dir():
                missing[folder.name] = "not trained"
            elif not (folder / "evaluation.csv").is_file():
                missing[folder.name] = "training is not finished"
            else:
                found.append(_read(name, seed, folder))
    if not found:
        raise DataError(
            f"runs: {runs} holds no finished run (NAME-seedN with evaluation.csv, NAME one of "
            f"{', '.join(names)})"
        )
    return found, missing


def measure(
    trained: Trained,
    out: Path,
    prompts: PromptSet,
    recurrences: Sequence[int] = VERDICT_RECURRENCES,
    device: str | None = None,
    batch_size: int | str = "auto",
    progress: Callable[[str], Progress] = lambda what: SILENT,
) -> Measured:
    """Run the experiments of one model, or read what is there.

    Args:
        trained: The model.
        out: Gets ``NAME-seedN/``, a folder of runs.
        prompts: What is run.
        recurrences: Of the runs with a verdict; none for a control that runs once.
        device, batch_size: As in :func:`tl_looped.experiments.runner.run_experiment`.
        progress: Called with what is run next; gives what is told of it.
    """
    results = {}
    for spec in experiments(trained, prompts, recurrences):
        what = f"{trained.name}, {count(spec.recurrences or 0, 'recurrence')}"
        run = run_experiment(
            spec, out / trained.name, device=device, batch_size=batch_size, progress=progress(what)
        )
        data = run.load()
        # The checkpoint's folder is called "final", whatever the model.
        results[int(data.attrs["n_recurrences"])] = data.assign_attrs(model=trained.configuration)
    return Measured(trained, results)


def experiments(
    trained: Trained, prompts: PromptSet, recurrences: Sequence[int] = VERDICT_RECURRENCES
) -> list[Experiment]:
    """What is run of a model: its stages as trained, and its verdict at other recurrences."""
    model, own = str(trained.folder / "final"), trained.recurrences

    def one(n: int, metrics: tuple[str, ...], *extras: str) -> Experiment:
        return Experiment(
            model,
            prompts=prompts,
            recurrences=n,
            metrics=metrics,
            extras=extras,
            batching="padded",
        )

    loops = [n for n in recurrences if n != own] if trained.configuration != CONTROL else []
    return [one(own, SIGNATURE_METRICS), *(one(n, STEP_METRICS, "confirm") for n in loops)]


def _seed_of(folder: Path) -> int:
    text = folder.name.rpartition("-seed")[2]
    return int(text) if text.isascii() and text.isdecimal() and text == str(int(text)) else -1


def _read(name: str, seed: int, folder: Path) -> Trained:
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        log, evaluation = (pd.read_csv(folder / f"{n}.csv") for n in ("log", "evaluation"))
        found = Trained(name, seed, folder, record, log, evaluation)
        shape, own = found.shape, found.recurrences
        steps, last = int(record["spec"]["steps"]), int(log["step"].iloc[-1])
        rows = {*evaluation.columns}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"runs: {folder} cannot be read ({type(error).__name__}: {error})"
        ) from error
    if last != steps or not {"recurrences", "held_out_loss"} <= rows:
        raise DataError(f"runs: {folder} logged {last} of {steps} steps, or has no held-out loss")
    wanted = CONFIGURATIONS.get(name, {})
    defaults = {"n_prelude": 2, "n_coda": 2, "n_recurrences": own}
    expected = tuple(int((defaults | wanted)[key]) for key in (*_LOOP, "n_recurrences"))
    if (*shape, own) != expected:
        raise DataError(f"runs: {folder} is of shape {(*shape, own)}, and {name} is {expected}")
    return found
