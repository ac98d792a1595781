"""Everything that was measured of the small models, as four tables and a record.

The tables stand for the results files: the statistics and the figures of
:mod:`tl_looped.paper.section51.statistics` are made of them alone, so that they can be
made again from the data that the package ships.

- ``curves``: ``configuration, seed`` and the columns of every run's ``log.csv``.
- ``evaluation``: the same with ``evaluation.csv``, the held-out loss by recurrences.
- ``stages``: signature metrics at the trained recurrences, a row per effective layer: means over
  heads, then over the prompts with a value. fp64.
- ``steps``: what verdicts are decided on, at more recurrences; the same means, fp32.
- ``prompts``: verdict, rate, half-life of every prompt, model and number of recurrences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from safetensors import safe_open

from tl_looped.errors import InputError
from tl_looped.experiments.joining import versions
from tl_looped.metrics.convergence import Verdict
from tl_looped.metrics.depth_curves import mean_curve
from tl_looped.paper.section51.models import CONTROL, Measured
from tl_looped.words import count

PLACES = ("effective_layer", "label", "stage", "in_recurrence", "layer_in_stage")
OF_MODEL = ("configuration", "seed")

_OF_PROMPT = ("source_row", "n_tokens", "settled_at", "rate", "half_life", "period", "bound")


@dataclass(frozen=True)
class SmallModels:
    """What was measured; see the module.

    Args:
        curves, evaluation, stages, steps, prompts: Tables.
        about: The record: shapes, training, prompts, versions, what is missing. No paths.
    """

    curves: pd.DataFrame
    evaluation: pd.DataFrame
    stages: pd.DataFrame
    steps: pd.DataFrame
    prompts: pd.DataFrame
    about: dict[str, Any]

    @property
    def configurations(self) -> list[str]:
        """Looped models and the control, in the order of training."""
        return list(self.about["models"])

    @property
    def looped(self) -> list[str]:
        """The configurations without the control."""
        return [name for name in self.configurations if name != CONTROL]

    def seeds(self, configuration: str) -> list[int]:
        """Seeds that were measured of a configuration."""
        return [int(seed) for seed in self.about["models"].get(configuration, {}).get("seeds", [])]

    def dataset(self, configuration: str, seed: int, recurrences: int | None = None) -> xr.Dataset:
        """Means over prompts of one model, as a result by depth that figures can be drawn of.

        Args:
            configuration, seed: Of the model.
            recurrences: Of the run; the trained ones if None.

        Returns:
            Every metric over ``effective_layer``, without heads and prompts.

        Raises:
            InputError: if there is no such run.
        """
        about = self.about["models"].get(configuration, {})
        trained = about.get("recurrences")
        n = trained if recurrences is None else recurrences
        table = self.stages if n == trained else self.steps
        here = (table["configuration"] == configuration) & (table["seed"] == seed)
        part = table[here & (table["recurrences"] == n)].dropna(axis="columns", how="all")
        if part.empty:
            raise InputError(
                f"there is no run of {configuration!r}, seed {seed}, {count(n, 'recurrence')}; "
                f"configurations are {self.configurations}, seeds {self.seeds(configuration)}"
            )
        keys = {*OF_MODEL, "recurrences", *PLACES}
        coords = {name: ("effective_layer", part[name].to_numpy()) for name in PLACES}
        values = {
            name: ("effective_layer", part[name].to_numpy().astype(np.float64))
            for name in part.columns
            if name not in keys
        }
        p, k, c = about["shape"]
        attributes = {
            "model": configuration,
            "n_prelude": p,
            "n_core": k,
            "n_coda": c,
            "n_recurrences": n,
            "trained_recurrences": trained,
            "seed_of_weights": seed,
            "dtype": "float32",
        }
        return xr.Dataset(values, coords, attributes)

    def runs(self, configuration: str, recurrences: int | None = None) -> list[xr.Dataset]:
        """:meth:`dataset` of every seed."""
        return [self.dataset(configuration, s, recurrences) for s in self.seeds(configuration)]


def tables_of(models: Sequence[Measured], missing: Mapping[str, str]) -> SmallModels:
    """Tables of all models that were measured.

    Args:
        models: At least one.
        missing: Models that were not, with the reason.

    Raises:
        InputError: if there is none, or models did not run the same prompts.
    """
    if not models:
        raise InputError("models: there is none")
    texts = {(m.stages.attrs["prompts_digest"], m.stages.attrs["prompts_run"]) for m in models}
    if len(texts) > 1:
        raise InputError("models: all must have run the same prompts, for paired contrasts")
    steps = [_layers(m, n, np.float32) for m in models for n in _loops(m)]
    return SmallModels(
        curves=pd.concat([_named(m, m.trained.log) for m in models], ignore_index=True),
        evaluation=pd.concat([_named(m, m.trained.evaluation) for m in models], ignore_index=True),
        stages=pd.concat(
            [_layers(m, m.trained.recurrences, np.float64) for m in models], ignore_index=True
        ),
        steps=_joined(steps, [*OF_MODEL, "recurrences", *PLACES]),
        prompts=_joined(
            [_prompts(m, n) for m in models for n in _loops(m)],
            [*OF_MODEL, "recurrences", "prompt", *_OF_PROMPT, "verdict", "confirmed"],
        ),
        about=_about(models, missing),
    )


def _loops(model: Measured) -> list[int]:
    return [n for n in model.results if n != model.trained.recurrences]


def _joined(tables: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _named(model: Measured, table: pd.DataFrame) -> pd.DataFrame:
    table = table.copy()
    table.insert(0, "configuration", model.trained.configuration)
    table.insert(1, "seed", model.trained.seed)
    return table


def _layers(model: Measured, n: int, dtype: type[np.floating[Any]]) -> pd.DataFrame:
    data = model.results[n]
    table = pd.DataFrame({name: data[name].to_numpy() for name in PLACES})
    for name, values in data.data_vars.items():
        if {"effective_layer", "prompt"} <= set(values.dims):
            table[str(name)] = mean_curve(data, str(name)).astype(dtype)
    table.insert(0, "recurrences", n)
    return _named(model, table)


def _prompts(model: Measured, n: int) -> pd.DataFrame:
    data = model.results[n]
    table = pd.DataFrame({"recurrences": n, "prompt": data["prompt"].to_numpy()})
    for name in _OF_PROMPT:
        table[name] = data[name].to_numpy()
    table["verdict"] = [Verdict(int(v)).name for v in data["verdict"].to_numpy()]
    table["confirmed"] = bool(data.attrs["confirmed"])
    return _named(model, table)


def _about(models: Sequence[Measured], missing: Mapping[str, str]) -> dict[str, Any]:
    first = models[0].stages.attrs
    out: dict[str, Any] = {"models": {}, "missing": dict(missing)}
    for model in models:
        trained = model.trained
        one = out["models"].setdefault(
            trained.configuration,
            {
                "shape": list(trained.shape),
                "recurrences": trained.recurrences,
                "injection": trained.record["model"]["injection"],
                "norm_layout": trained.record["model"]["norm_layout"],
                "parameters": _parameters(trained.folder / "final"),
                "seeds": [],
                "runs": {},
                "weights": {},
            },
        )
        one["seeds"].append(trained.seed)
        one["runs"][str(trained.seed)] = {
            str(n): str(data.attrs["hash"]) for n, data in model.results.items()
        }
        one["weights"][str(trained.seed)] = str(model.stages.attrs["model_identity"])
    record = models[0].trained.record
    out["training"] = {k: v for k, v in record["spec"].items() if k != "seed"}
    same = ("d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab", "tie_embeddings")
    out["architecture"] = {name: record["model"][name] for name in same}
    out["rows"] = {name: record[name] for name in ("rows", "held_out")}
    out["prompts"] = {
        "set": str(first["prompt_set"]),
        "digest": str(first["prompts_digest"]),
        "run": int(first["prompts_run"]),
        "tokens": int(models[0].stages["n_tokens"].sum()),
        "too_long": int(first["prompts_too_long"]),
    }
    out["versions"] = {name: str(first[name]) for name in versions()}
    return out


def _parameters(folder: Any) -> int:
    """Numbers in the weights file; tied embeddings stand there once."""
    with safe_open(folder / "model.safetensors", "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return int(sum(int(np.prod(shape)) for shape in shapes))
