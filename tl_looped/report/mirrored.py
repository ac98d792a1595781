"""The mirroring score of a run against a feedforward result, with its interval over prompts.

Decisions, ours:

- A *feedforward* result is one of a core without prelude and coda that ran once.
- The score of a metric is Pearson's r between the mean curves over prompts (heads averaged first)
  of ``[prelude, block_r, coda]`` and of the feedforward model, both read off at 101 depths as in
  :func:`tl_looped.metrics.mirroring.mirroring_score`, then averaged over the recurrences.
- Its interval is a percentile bootstrap over prompts: it says how the score depends on the prompts,
  and nothing about other checkpoints. Two curves that both rise correlate whatever they mean.
- Where both results are of the same prompts, none left out in one of them alone, a resample draws
  the same prompts for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from tl_looped.experiments.reading import (
    Missing,
    bos_apart,
    is_feedforward,
    same_prompts,
    specification,
)
from tl_looped.metrics.bootstrap import Resampling
from tl_looped.metrics.catalogue import SIGNATURE
from tl_looped.metrics.depth_curves import parts_of, prompt_curves
from tl_looped.metrics.mirroring import MirroringInterval, mirroring_interval
from tl_looped.words import called

# The first that a result holds stands in the summary: ColSum is what the paper's Figure 8 compares.
MIRRORED = ("colsum_concentration", *(name for name in SIGNATURE if name != "colsum_concentration"))


@dataclass(frozen=True)
class MirroringTable:
    """Scores of one run against one feedforward run.

    Args:
        against: Name of the feedforward run.
        model: Its model.
        scores: By metric, the summary's first.
        without: Metrics without a score, and why.
        apart: What must be known to read the scores; empty if nothing.
    """

    against: str
    model: str
    scores: dict[str, MirroringInterval]
    without: dict[str, Missing]
    apart: str = ""


def mirroring_of(
    name: str, runs: Mapping[str, xr.Dataset], resampling: Resampling
) -> MirroringTable | Missing:
    """The scores of a run against the feedforward result among the others.

    That is the run which the attribute or specification of this one names as ``feedforward``, by
    its model or its own name; else the only feedforward run of another model. Where several fit,
    one on the same prompts is taken.
    """
    data = runs[name]
    against = _feedforward_of(name, runs)
    if isinstance(against, Missing):
        return against
    other = runs[against]
    paired = same_prompts(data, other)
    scores: dict[str, MirroringInterval] = {}
    without: dict[str, Missing] = {}
    for metric in MIRRORED:
        if metric not in data or metric not in other:
            which = name if metric not in data else against
            without[metric] = Missing(f"the results of {which} hold no {metric}")
            continue
        score = _score(metric, data, other, paired, resampling)
        if isinstance(score, Missing):
            without[metric] = score
        else:
            scores[metric] = score
    if not scores:
        return Missing("; ".join(dict.fromkeys(missing.reason for missing in without.values())))
    model = called(str(other.attrs.get("model", "")) or against)
    return MirroringTable(against, model, scores, without, bos_apart(data, other))


def _feedforward_of(name: str, runs: Mapping[str, xr.Dataset]) -> str | Missing:
    data = runs[name]
    model = data.attrs.get("model")
    others = {run: d for run, d in runs.items() if is_feedforward(d) and run != name}
    named = data.attrs.get("feedforward") or specification(data).get("feedforward")
    if isinstance(named, str) and named:
        # A folder is named by its path, and its model by the last part of that.
        names = {named, Path(named).name}
        others = {r: d for r, d in others.items() if names & {r, *_names(d)}}
        if not others:
            return Missing(f"the feedforward result {named!r} is not among the runs")
    else:
        others = {run: d for run, d in others.items() if d.attrs.get("model") != model}
    same = {run: d for run, d in others.items() if same_prompts(data, d)}
    found = list(same or others)
    if not found:
        return Missing("no feedforward result among the runs")
    if len(found) > 1:
        return Missing(
            f"{len(found)} feedforward results ({', '.join(found)}): say which with "
            'feedforward = "..." in the specification, or tl-looped report --feedforward'
        )
    return found[0]


def _names(data: xr.Dataset) -> set[str]:
    """What the model of a result is called; in results of earlier versions by a path."""
    model = str(data.attrs.get("model", ""))
    return {model, called(model)}


def _score(
    metric: str, data: xr.Dataset, other: xr.Dataset, paired: bool, resampling: Resampling
) -> MirroringInterval | Missing:
    prelude, core, coda = parts_of(data, prompt_curves(data, metric))
    feedforward = prompt_curves(other, metric)
    if 0 in (len(core), core.shape[-1], feedforward.shape[-1]):
        return Missing("there is no prompt or no recurrence")
    found = mirroring_interval(
        core, feedforward, prelude=prelude, coda=coda, paired=paired, resampling=resampling
    )
    if 0 in found.n_prompts:
        return Missing("every prompt has a value that is not finite")
    if math.isnan(found.score):
        return Missing(f"a curve of {metric} is constant over depth: no correlation")
    return found
