"""The few numbers that say what a run found: the report's summary table.

Everything is read from ``results.nc``; nothing is run. A number that a result does not hold is
:class:`Missing`, with the reason, and never a guess.

Decisions, ours where arXiv 2604.11791 gives none:

- Verdicts are counted over prompts. Rate and half-life are medians over the prompts that reach a
  fixed point and have one: of a drift, an orbit or a run that is not there yet, the fitted slope is
  not the rate of an approach. Results without verdicts are taken as they are.
- The cyclicity index is that of the mean similarity matrix over prompts, core layers alone.
- Mirroring scores: see :mod:`tl_looped.report.mirrored`. Stage clusters are of the same pair:
  :func:`tl_looped.experiments.compare.cluster_rows`, averaged over recurrences.
- A model with several runs has one row. Verdict, rate and half-life are those of one run, the one
  with the most recurrences that has verdicts, for what a loop does in the end shows in long runs
  alone. The other numbers are of the run with the most prompts among those that have them; then of
  the one with the most recurrences, and for the mirroring score of the one whose recurrences are
  nearest to the model's training. Another dtype or initial state, an ablation or other weights are
  another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float

from tl_looped.errors import DataError
from tl_looped.experiments.compare import N_CLUSTERS, cluster_rows
from tl_looped.experiments.reading import Missing, display_names, is_feedforward
from tl_looped.metrics.bootstrap import Resampling
from tl_looped.metrics.convergence import FIXED_POINTS, Verdict
from tl_looped.metrics.heavy_tokens import HeavyToken, find_heavy_token
from tl_looped.metrics.labels import IGNORES_STATE, geometry_of, trained_recurrences
from tl_looped.metrics.states import cyclicity_index
from tl_looped.model.geometry import LoopGeometry
from tl_looped.plots.captions import ablated_layers
from tl_looped.report.mirrored import MirroringTable, mirroring_of
from tl_looped.words import count


@dataclass(frozen=True)
class Verdicts:
    """Verdicts of a run.

    Args:
        counts: Prompts by verdict, the most frequent first.
        n: Prompts.
        settled_at: Median recurrence, 0-based, at which the prompts that settle do; NaN if none.
        n_settled: How many settle.
        confirmed: Whether a run of twice the recurrences confirmed them; see
            :mod:`tl_looped.metrics.convergence`. None if the results do not say.
    """

    counts: dict[Verdict, int]
    n: int
    settled_at: float
    n_settled: int
    confirmed: bool | None


@dataclass(frozen=True)
class Median:
    """A median over the prompts that have the number.

    Args:
        value: The median; may be infinite.
        low, high: Quartiles, outwards to the next value of the data.
        n: Prompts that have it.
        of: Prompts.
    """

    value: float
    low: float
    high: float
    n: int
    of: int


@dataclass(frozen=True)
class Clusters:
    """Stages of a run as clusters of the layers of a feedforward one.

    Args:
        agreement: Mean over recurrences of the share of layers in the feedforward model's stage at
            the same relative depth.
        low, high: Smallest and largest over recurrences.
        rand_index: Mean adjusted Rand index; 0 is what chance gives.
        n_clusters, seed: Of k-means.
    """

    agreement: float
    low: float
    high: float
    rand_index: float
    n_clusters: int
    seed: int


@dataclass(frozen=True)
class RunSummary:
    """What the table says about one run.

    Args:
        run: Name of the run.
        model: What it is called, see ``reading.display_names``.
        prompts: What the prompts are called.
        loop: Shape of the run.
        trained: Recurrences of the training; 0 if it was not trained as a loop, None if not known.
        identity: What tells models apart: name, weights, dtype, initial state, skipped tokens,
            ablated layers.
        ablated: Layers without the output of their MLP.
        start: The initial state, if it is not the model's own with seed 0.
        dtype: Of the weights.
        n_prompts: Prompts that were run.
        feedforward: Whether the model has no loop.
        ignores_state: Whether the adapter's part for the state is zero.
        heavy: Whether one token holds most of the norm, see ``metrics.find_heavy_token``.
        skip_first: Tokens at the beginning that metrics of states left out.
        verdicts, rate, half_life, cyclicity, mirroring, clusters: See the module.
        relative_rate: Of relative steps, in which every token counts alike.
    """

    run: str
    model: str
    prompts: str
    loop: LoopGeometry
    trained: int | float | None
    identity: tuple[str, ...]
    ablated: tuple[str, ...]
    start: str
    dtype: str
    n_prompts: int
    feedforward: bool
    ignores_state: bool
    heavy: HeavyToken | None
    skip_first: int
    verdicts: Verdicts | Missing
    rate: Median | Missing
    relative_rate: Median | Missing
    half_life: Median | Missing
    cyclicity: float | Missing
    mirroring: MirroringTable | Missing
    clusters: Clusters | Missing


def summarise(
    runs: Mapping[str, xr.Dataset], resampling: Resampling | None = None
) -> list[RunSummary]:
    """One row per run, in the order given; ``runs`` are results by name."""
    resampling = resampling or Resampling()
    names = display_names(runs)
    return [_summary(name, names[name], runs, resampling) for name in runs]


def _summary(
    name: str, model: str, runs: Mapping[str, xr.Dataset], resampling: Resampling
) -> RunSummary:
    data = runs[name]
    loop, feedforward = geometry_of(data), is_feedforward(data)
    ablated = tuple(ablated_layers(data))
    start = str(data.attrs.get("initial_state", ""))
    seed = str(data.attrs.get("state_seed", ""))
    told_apart = [str(data.attrs.get(key, "")) for key in ("model_identity", "dtype")]
    told_apart += [start, seed, str(feedforward)]
    told_apart += [str(data.attrs.get("skip_first", ""))]
    row = partial(
        RunSummary,
        run=name,
        model=model,
        prompts=str(data.attrs.get("prompt_set", "")),
        loop=loop,
        trained=trained_recurrences(data),
        identity=(model, *told_apart, *ablated),
        ablated=ablated,
        start=_start(start, seed),
        dtype=str(data.attrs.get("dtype", "")).removeprefix("torch."),
        n_prompts=data.sizes["prompt"],
        feedforward=feedforward,
        ignores_state=bool(data.attrs.get(IGNORES_STATE)),
        heavy=find_heavy_token(data),
        skip_first=int(data.attrs.get("skip_first", 0)),
    )
    if feedforward:
        no = Missing("no loop: every layer ran once")
        return row(
            verdicts=no, rate=no, relative_rate=no, half_life=no, cyclicity=no, mirroring=no,
            clusters=no,
        )  # fmt: skip
    mirrored = mirroring_of(name, runs, resampling)
    return row(
        verdicts=_verdicts(data),
        rate=_median(data, "rate"),
        relative_rate=_median(data, "relative_rate"),
        half_life=_median(data, "half_life"),
        cyclicity=_cyclicity(data, loop),
        mirroring=mirrored,
        clusters=mirrored if isinstance(mirrored, Missing) else _clusters(name, mirrored, runs),
    )


def _start(state: str, seed: str) -> str:
    if state:
        return f"initial state {state}"
    return f"state seed {seed}" if seed not in ("", "0") else ""


def by_model(summaries: Sequence[RunSummary]) -> list[list[RunSummary]]:
    """The runs of each model, models in the order of their first run."""
    found: dict[tuple[str, ...], list[RunSummary]] = {}
    for one in summaries:
        found.setdefault(one.identity, []).append(one)
    return list(found.values())


_OF_THE_END = ("verdicts", "rate", "half_life")


def most_telling(runs: Sequence[RunSummary], name: str) -> RunSummary:
    """The run of a model whose number of that name stands in its row; see the module."""

    def rank(run: RunSummary) -> tuple[int | float, ...]:
        n, trained = run.loop.R, run.trained
        if name in _OF_THE_END:
            return n, run.n_prompts
        if name == "mirroring":
            return run.n_prompts, -abs(n - trained) if trained else -n
        return run.n_prompts, n

    # The rate is that of the verdict beside it, or of none.
    judged = any(not isinstance(run.verdicts, Missing) for run in runs)
    having = "verdicts" if name in _OF_THE_END and judged else name
    there = [run for run in runs if not isinstance(getattr(run, having), Missing)]
    return max(there or runs, key=rank)


def mirrored_runs(summaries: Sequence[RunSummary]) -> list[RunSummary]:
    """The run of each model whose mirroring score stands in its row, of those that have one."""
    chosen = [most_telling(runs, "mirroring") for runs in by_model(summaries)]
    return [run for run in chosen if isinstance(run.mirroring, MirroringTable)]


def _clusters(
    name: str, mirrored: MirroringTable, runs: Mapping[str, xr.Dataset]
) -> Clusters | Missing:
    notices: list[str] = []
    rows = cluster_rows(name, mirrored.against, runs, notices)
    if not rows:
        return Missing("; ".join(notices))
    table = pd.DataFrame(rows)
    share, rand = table["agreement"], table["rand_index"]
    return Clusters(
        float(share.mean()), float(share.min()), float(share.max()), float(rand.mean()),
        N_CLUSTERS, int(table["seed"].iloc[0]),
    )  # fmt: skip


# -- convergence --------------------------------------------------------------------------------


def _lacks(name: str) -> Missing:
    return Missing(f"the results hold no {name}; the specification did not ask for it")


def _per_prompt(data: xr.Dataset, name: str) -> Float[np.ndarray, " prompt"]:
    if data[name].dims != ("prompt",):
        raise DataError(f"{name} must be one number per prompt, got dimensions {data[name].dims}")
    return data[name].to_numpy().astype(np.float64)


def _verdicts(data: xr.Dataset) -> Verdicts | Missing:
    if "verdict" not in data:
        return _lacks("verdict")
    values = _per_prompt(data, "verdict")
    known = {int(verdict) for verdict in Verdict}
    unknown = sorted({str(v) for v in values.tolist() if v not in known})
    if unknown:
        raise DataError(f"verdict holds {', '.join(unknown)}: values are {list(Verdict)}")
    if not len(values):
        return Missing("there is no prompt")
    counts = {verdict: int((values == int(verdict)).sum()) for verdict in Verdict}
    some = sorted((v for v in Verdict if counts[v]), key=lambda v: -counts[v])
    settled = np.zeros(0)
    if "settled_at" in data:
        settled = _per_prompt(data, "settled_at")
        settled = settled[settled >= 0]
    at = float(np.median(settled)) if len(settled) else math.nan
    said = data["verdict"].attrs.get("confirmed", data.attrs.get("confirmed"))
    confirmed = None if said is None else bool(said)
    return Verdicts({v: counts[v] for v in some}, len(values), at, len(settled), confirmed)


def _median(data: xr.Dataset, name: str) -> Median | Missing:
    if name not in data:
        return _lacks(name)
    values = _per_prompt(data, name)
    if "verdict" in data:
        arrived = np.isin(_per_prompt(data, "verdict"), FIXED_POINTS)
        if not arrived.any():
            return Missing("no prompt reaches a fixed point", applies=False)
        values = np.where(arrived, values, np.nan)
    there = values[~np.isnan(values)]
    if not len(there):
        return Missing(f"{name} is undefined for every prompt: too few steps above the noise")
    # Quartiles that are values of the data, outwards: halfway to infinity is no number.
    low = np.quantile(there, 0.25, method="lower")
    high = np.quantile(there, 0.75, method="higher")
    return Median(float(np.median(there)), float(low), float(high), len(there), len(values))


def _cyclicity(data: xr.Dataset, loop: LoopGeometry) -> float | Missing:
    name = "pairwise_residual_cosine"
    if name not in data:
        return _lacks(name)
    if loop.R < 2 or loop.k < 2:
        return Missing(
            f"undefined for {count(loop.R, 'recurrence')} of {count(loop.k, 'core layer')}: needs "
            "two of each"
        )
    matrix = data[name]
    if matrix.dims != ("effective_layer", "other_layer") or len(set(matrix.shape)) != 1:
        raise DataError(f"{name} must be (effective_layer, other_layer), got {dict(matrix.sizes)}")
    core = slice(loop.p, loop.p + loop.k * loop.R)
    similarity = torch.from_numpy(matrix.to_numpy()[core, core].astype(np.float64))
    index = float(cyclicity_index(similarity, loop.k))
    if math.isnan(index):
        return Missing("a core layer has no cosine: states of zero, or not finite")
    return index
