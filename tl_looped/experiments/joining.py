"""From the parts of a run to its results: one dataset with all that was asked for.

Variables of the metrics are by depth. Extras stand beside them, see the result file's contract in
:func:`joined`.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from tl_looped._version import __version__
from tl_looped.errors import DataError
from tl_looped.experiments.engines import PAIRWISE, Engine
from tl_looped.experiments.labelling import merged
from tl_looped.experiments.prompts import ChosenPrompts
from tl_looped.experiments.spec import Experiment
from tl_looped.metrics import (
    by_recurrence,
    join_batches,
    limiting_behavior,
)
from tl_looped.metrics.catalogue import select

_PAIRWISE_LABELS = (
    "Frobenius distance of attention patterns, mean over heads and prompts",
    "cosine of residual streams, mean over tokens and prompts",
)
_LIBRARIES = ("transformer-lens", "torch", "transformers", "numpy", "xarray")


def joined(
    spec: Experiment,
    engine: Engine,
    prompts: ChosenPrompts,
    parts: list[xr.Dataset],
    rows: list[Tensor],
    numbers: list[int],
    n_cut: int,
) -> xr.Dataset:
    """The results of a run.

    Args:
        spec: Resolved.
        engine: Its model.
        prompts: What was chosen.
        parts: By depth, a batch each; sums of the pairwise matrices beside them.
        rows: Tokens of every prompt that was run.
        numbers: Their numbers among ``prompts``.
        n_cut: How many were cut to the context.

    Returns:
        Metrics by depth (``effective_layer, head, prompt``) with the coordinate ``source_row``, the
        row of each prompt in its data set, and by extra:

        - pairwise: ``pairwise_attention_distance``, ``pairwise_residual_cosine``
          (``effective_layer, other_layer``), means over the prompts that have one
        - pca: ``pca`` (``recurrence, layer, component``), ``pca_explained``; of the last token of
          prompt 0
        - tokens: ``token_similarity`` (``recurrence, layer, token, prompt``), fp32, NaN at padding
        - limiting: ``limiting_label`` and its kin (``layer, token, prompt``)
        - patterns: ``pattern`` (``effective_layer, head, query, key``), ``pattern_token``
          (``query``), of prompt 0
        - convergence, confirm: ``verdict``, ``settled_at``, ``rate``, ``half_life``, …
          (``prompt``), which the parts hold already; the attribute ``confirmed`` tells which
        - spectrum: ``spectral_radius``, ``largest_singular_value``, … (``prompt``), NaN behind the
          first ``spectrum_most_prompts`` prompts; see ``tl_looped.metrics.spectrum``
        - neurons: ``prediction``, ``suppression`` (``unique_layer``)

    Raises:
        DataError: if the parts do not hold every prompt once.
    """
    means = _pairwise_means(parts) if "pairwise" in spec.extras else {}
    names = {name + end for name in PAIRWISE for end in ("_sum", "_count")}
    data = join_batches([part.drop_vars(names & set(part.data_vars)) for part in parts])
    if data["prompt"].values.tolist() != list(range(len(rows))):
        raise DataError(
            f"the parts hold {data.sizes['prompt']} prompts, not each of {len(rows)} once: delete "
            "the run's folder and run it again"
        )
    source_rows = [prompts.rows[number] for number in numbers]
    data = data.assign_coords(source_row=("prompt", source_rows))
    data = _with_extras(spec, engine, data, rows).assign(means)
    keep = set(select(spec.metrics))
    unasked = [n for n in data.data_vars if str(n) == "token_cosine" and str(n) not in keep]
    data = data.drop_vars(unasked)
    if "token" in data.coords and "token" not in data.dims:
        data = data.drop_vars("token")
    return data.assign_attrs(_attributes(spec, prompts, numbers, n_cut))


def _with_extras(
    spec: Experiment, engine: Engine, data: xr.Dataset, rows: list[Tensor]
) -> xr.Dataset:
    metrics = data  # the extras read the metrics alone, not each other
    if "limiting" in spec.extras:
        data = merged(data, limiting_behavior(metrics))
    if "tokens" in spec.extras:
        similarity = by_recurrence(metrics[["token_cosine"]])["token_cosine"]
        data = data.assign(token_similarity=similarity.astype(np.float32))
        data["token_similarity"].attrs = metrics["token_cosine"].attrs
    if "pca" in spec.extras:
        data = data.assign(engine.path(rows[0]))
    if "patterns" in spec.extras:
        data = data.assign(engine.patterns(rows[0]))
    if "neurons" in spec.extras:
        found = engine.neurons()
        settings = {f"neurons_{key}": value for key, value in found.attrs.items()}
        settings["kurtosis_threshold"] = found.attrs["threshold"]
        data = merged(data, found.assign_attrs(settings))
    return data


def _pairwise_means(parts: list[xr.Dataset]) -> dict[str, xr.DataArray]:
    found = {}
    for name, label in zip(PAIRWISE, _PAIRWISE_LABELS, strict=True):
        total, count = parts[0][name + "_sum"], parts[0][name + "_count"]
        for part in parts[1:]:
            total, count = total + part[name + "_sum"], count + part[name + "_count"]
        mean = (total / count).assign_coords(other_layer=total["effective_layer"].values)
        mean = mean.drop_vars([n for n in mean.coords if n not in mean.dims])
        found[name] = mean.assign_attrs(long_name=label, units="1")
    return found


def _attributes(
    spec: Experiment,
    prompts: ChosenPrompts,
    numbers: list[int],
    n_cut: int,
) -> dict[str, Any]:
    return {
        "spec": json.dumps(spec.to_dict(), sort_keys=True, ensure_ascii=False),
        "kind": spec.kind,
        "prompt_set": spec.prompts.label,
        "prompts_digest": prompts.digest,
        "prompts_available": prompts.available,
        "prompts_chosen": len(prompts.texts),
        "prompts_run": len(numbers),
        "prompts_too_long": len(prompts.texts) - len(numbers),
        "prompts_truncated": n_cut,
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that numbers depend on."""
    libraries = {name.replace("-", "_"): version(name) for name in _LIBRARIES}
    return {"tl_looped": __version__, "python": platform.python_version(), **libraries}
