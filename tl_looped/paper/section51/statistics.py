"""The statistics of Section 5.1 over seeds: mirroring, stages, rates, losses, counts.

Everything is computed from :class:`tl_looped.paper.section51.tables.SmallModels`.

- Mirroring: a model is compared with the control of its own seed. The score of a seed is Pearson's
  r between the curves over depth of ``[prelude, block_r, coda]`` (or the block alone) and of the
  control, averaged over recurrences. Null: random orders of the core layers, the same at every
  recurrence. Over seeds the layers are permuted in every seed independently, and the mean score is
  compared with the means so drawn, ``p = (1 + #{null >= observed}) / (1 + N)``: one test of the
  mean, valid whatever the scores' distribution, where p values of single seeds cannot fall
  below 1 / k!. It asks about the order of the block's layers, not whether seeds vary.
- ``ceiling``: the same score between controls of two seeds, the mean over all pairs: how alike two
  trainings of one architecture are.
- Stages: :func:`tl_looped.experiments.compare.cluster_rows`, averaged over recurrences.
- Conditions and contrasts: :mod:`tl_looped.paper.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from tl_looped.experiments.compare import cluster_rows
from tl_looped.metrics import bootstrap_ci
from tl_looped.metrics.bootstrap import Resampling
from tl_looped.metrics.catalogue import SIGNATURE
from tl_looped.metrics.depth_curves import parts_of
from tl_looped.metrics.mirroring import PermutedScore, permutation_p, permuted_mirroring
from tl_looped.paper.section51.models import CONTROL
from tl_looped.paper.section51.tables import SmallModels
from tl_looped.paper.statistics import Contrast, condition_table, contrast_table
from tl_looped.plots.recipes import TITLES
from tl_looped.words import count

BASE = "base4"
N_PERMUTATIONS = 1000
_MOST_COMBINATIONS = 20_000
WORDS = "{quantity} at {recurrences} recurrences, {contrast}"
FACTORS = ("configuration", "recurrences", "quantity")


@dataclass(frozen=True)
class Statistics:
    """Tables of the statistics, each row with what it rests on.

    Args:
        mirroring: Configuration and metric: mean and SD over seeds, intervals, p over seeds.
        mirroring_seeds: The same for each seed.
        ceiling: Metric: the score between controls of different seeds.
        clusters: Configuration and quantity: agreement and Rand indices over seeds.
        clusters_seeds: Each seed and recurrence, with the stages themselves.
        conditions: Configuration, recurrences and quantity: rates, shares of verdicts, losses.
        contrasts: Paired differences between configurations.
        training: Configuration: models, parameters, steps, tokens.
        counts: Configuration and recurrences: what was run.
    """

    mirroring: pd.DataFrame
    mirroring_seeds: pd.DataFrame
    ceiling: pd.DataFrame
    clusters: pd.DataFrame
    clusters_seeds: pd.DataFrame
    conditions: pd.DataFrame
    contrasts: pd.DataFrame
    training: pd.DataFrame
    counts: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def statistics_of(models: SmallModels, resampling: Resampling | None = None) -> Statistics:
    """All statistics; seeds of a configuration that have no control are left out of mirroring."""
    resampling = resampling or Resampling()
    seeds, over_seeds = _mirroring(models, resampling)
    clusters_seeds, clusters = _clusters(models, resampling)
    values = values_of(models)
    others = [name for name in models.looped if name != BASE]
    contrasts = [Contrast("configuration", name, BASE) for name in (*others, CONTROL)]
    arguments: dict[str, Any] = {"factors": FACTORS, "resampling": resampling}
    with_prompts = values["prompt"].notna()
    tables = [
        condition_table(values[with_prompts], **arguments),
        condition_table(values[~with_prompts].drop(columns="prompt"), **arguments),
    ]
    conditions = pd.concat([t for t in tables if len(t)], ignore_index=True)
    # What it is compared at is not what it ran with.
    conditions.loc[conditions["configuration"] == CONTROL, "recurrences"] = 1
    return Statistics(
        mirroring=over_seeds,
        mirroring_seeds=seeds,
        ceiling=_ceiling(models),
        clusters=clusters,
        clusters_seeds=clusters_seeds,
        conditions=conditions,
        contrasts=contrast_table(values, contrasts=contrasts, words=WORDS, **arguments),
        training=_training(models),
        counts=_counts(models),
    )


def values_of(models: SmallModels) -> pd.DataFrame:
    """Rates, verdicts and losses as a long table: ``FACTORS``, ``seed``, ``prompt``, ``value``.

    Quantities: ``rate``, the convergence rate of a prompt; ``share CONVERGED`` and so on, 1 or 0 a
    prompt, of every verdict that some prompt has at that number of recurrences; ``held-out loss``
    in nats at the trained recurrences and at the most that were evaluated; ``loss rise``, the
    difference of these two; ``best recurrences``, where the loss is lowest. No prompt: NaN.
    """
    columns = [*FACTORS, "seed", "prompt", "value"]
    tables = []
    for _, part in models.prompts.groupby("recurrences", sort=True):
        long = part[["configuration", "seed", "recurrences", "prompt"]]
        tables.append(long.assign(quantity="rate", value=part["rate"]))
        tables += [
            long.assign(quantity=f"share {v}", value=(part["verdict"] == v).astype(float))
            for v in sorted(part["verdict"].unique())
        ]
    losses = _losses(models, columns)
    return pd.concat([*(table[columns] for table in tables), losses], ignore_index=True)


def _losses(models: SmallModels, columns: list[str]) -> pd.DataFrame:
    rows: list[tuple[Any, ...]] = []
    # The control's only recurrence is compared with the trained ones of the others.
    about = models.about["models"]
    trained = max((about[name]["recurrences"] for name in models.looped), default=1)
    for (name, seed), part in models.evaluation.groupby(["configuration", "seed"], sort=False):
        own, loss = about[name]["recurrences"], part.set_index("recurrences")["held_out_loss"]
        n = trained if name == CONTROL else own
        rows.append((name, n, "held-out loss", seed, math.nan, loss[own]))
        most = int(part["recurrences"].max())
        if most > own:
            best = int(part["recurrences"].iloc[int(part["held_out_loss"].argmin())])
            found = {
                "held-out loss": loss[most],
                "loss rise": loss[most] - loss[own],
                "best recurrences": float(best),
            }
            rows += [(name, most, what, seed, math.nan, x) for what, x in found.items()]
    return pd.DataFrame(rows, columns=columns)


# -- mirroring ----------------------------------------------------------------------------------


def _mirroring(models: SmallModels, resampling: Resampling) -> tuple[pd.DataFrame, pd.DataFrame]:
    seeds, over_seeds = [], []
    for name in models.looped:
        p, _, c = models.about["models"][name]["shape"]
        forms = ("whole", "block") if p + c else ("whole",)
        for metric in SIGNATURE:
            for form in forms:
                found = _scores(models, name, metric, form == "whole", resampling.seed)
                about = {"configuration": name, "metric": metric, "curve": form}
                seeds += [
                    {
                        **about,
                        "seed": seed,
                        "score": one.score,
                        "null_mean": _mean(one.null),
                        "p_permutation": one.p,
                        "n_orders": one.n_orders,
                        "n_permutations": len(one.null),
                        "permutation_seed": resampling.seed,
                    }
                    for seed, one in found.items()
                ]
                over_seeds.append(
                    about | _together(found, f"{name}, {TITLES[metric]}, {form} curve", resampling)
                )
    return pd.DataFrame(seeds), pd.DataFrame(over_seeds)


def _scores(
    models: SmallModels, name: str, metric: str, whole: bool, seed: int
) -> dict[int, PermutedScore]:
    """The score of every seed that has a control."""
    found = {}
    for model_seed in sorted({*models.seeds(name)} & {*models.seeds(CONTROL)}):
        data, control = models.dataset(name, model_seed), models.dataset(CONTROL, model_seed)
        prelude, core, coda = parts_of(data, data[metric].to_numpy())
        found[model_seed] = permuted_mirroring(
            core,
            control[metric].to_numpy(),
            prelude=prelude if whole else None,
            coda=coda if whole else None,
            n_permutations=N_PERMUTATIONS,
            seed=(seed, model_seed),
        )
    return found


def _together(
    found: Mapping[int, PermutedScore], what: str, resampling: Resampling
) -> dict[str, Any]:
    """One row over seeds, with the permutation p of the mean score.

    Seeds without a p (no score, or a block whose layers all have the same value, which no order
    changes) are left out of everything and counted, unless none has one.
    """
    scored = {seed: one for seed, one in found.items() if not math.isnan(one.score)}
    good = {seed: one for seed, one in scored.items() if not math.isnan(one.p)} or scored
    scores = np.array([one.score for one in good.values()])
    n = len(scores)
    row: dict[str, Any] = dict.fromkeys(("mean", "sd", "t_low", "t_high"), math.nan)
    row |= {"p_permutation": math.nan, "least_p": math.nan}
    if n:
        ci = bootstrap_ci(scores, **asdict(resampling))
        p, least = joint_permutation_p(list(good.values()), ci.mean)
        row |= {
            "mean": ci.mean,
            "sd": float(scores.std(ddof=1)) if n > 1 else math.nan,
            "t_low": ci.t.low,
            "t_high": ci.t.high,
            "p_permutation": p,
            "least_p": least,
        }
    row |= {
        "n_seeds": n,
        "seeds": " ".join(map(str, good)),
        "n_left_out": len(found) - n,
        "p_seeds": " ".join(f"{one.p:.3g}" for one in good.values()),
        "confidence": resampling.confidence,
        "n_permutations": N_PERMUTATIONS,
        "permutation_seed": resampling.seed,
    }
    return row | dict(zip(("decided", "says"), _says(what, row), strict=True))


def joint_permutation_p(scores: Sequence[PermutedScore], mean: float) -> tuple[float, float]:
    """P of a mean score over seeds, and the least that it can be.

    Each seed's block has an order of its own. Where all combinations of them are few, p is exact.
    """
    if len(scores) == 1:
        one = scores[0]
        return one.p, 1 / one.n_orders if one.every is not None else 1 / (1 + len(one.null))
    every = [one.every for one in scores if one.every is not None]
    n = math.prod(map(len, every))
    if len(every) == len(scores) and n <= _MOST_COMBINATIONS:
        sums = every[0]
        for other in every[1:]:
            sums = np.add.outer(sums, other).ravel()
        return permutation_p(sums[1:] / len(scores), mean), 1 / n  # the first is the given one
    null = np.mean([one.null for one in scores], axis=0)
    return permutation_p(null, mean), 1 / (1 + len(null))


def _says(what: str, row: Mapping[str, Any]) -> tuple[bool, str]:
    n, p, alpha = row["n_seeds"], row["p_permutation"], 1 - row["confidence"]
    of = count(n, "seed")
    if not n or math.isnan(p):
        return False, f"{what}: no score, or no other order of the block."
    r = f"mean r = {row['mean']:.2f} over {of}, permutation p = {p:.3g}"
    if p <= alpha:
        alone = "; one seed says nothing about other trainings" * (n == 1)
        return True, f"{what}: more like the control than random orders of the block ({r}){alone}."
    floor = f", where {row['least_p']:.2g} is the least there can be" * (row["least_p"] > alpha)
    return False, (
        f"{what}: this scale cannot decide whether the block's order mirrors the control "
        f"({r}{floor})."
    )


def _ceiling(models: SmallModels) -> pd.DataFrame:
    rows = []
    controls = {seed: models.dataset(CONTROL, seed) for seed in models.seeds(CONTROL)}
    for metric in SIGNATURE:
        curves = [data[metric].to_numpy() for data in controls.values()]
        scores = [
            permuted_mirroring(a[None], b, n_permutations=1).score
            for a, b in combinations(curves, 2)
        ]
        least, most = (min(scores), max(scores)) if scores else (math.nan, math.nan)
        row = {"metric": metric, "mean": _mean(np.array(scores)), "least": least, "most": most}
        rows.append(row | {"n_pairs": len(scores), "seeds": " ".join(map(str, controls))})
    return pd.DataFrame(rows)


# -- stages -------------------------------------------------------------------------------------


def _clusters(models: SmallModels, resampling: Resampling) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows: list[dict[str, Any]] = []
    columns = {"agreement": "agreement with the control", "rand_index": "Rand, with the control"}
    columns["rand_index_recurrences"] = "Rand, core between recurrences"
    for name in models.looped:
        for seed in sorted({*models.seeds(name)} & {*models.seeds(CONTROL)}):
            pair = {one: models.dataset(one, seed).expand_dims("prompt") for one in (name, CONTROL)}
            notices: list[str] = []
            found = cluster_rows(name, CONTROL, pair, notices, resampling.seed)
            about = {"configuration": name, "model_seed": seed}
            rows += [about | {k: v for k, v in row.items() if k != "run"} for row in found]
            if notices:
                rows.append(about | {"notice": "; ".join(notices)})
    table = pd.DataFrame(rows)
    if table.empty or "agreement" not in table:
        return table, pd.DataFrame()
    long = table.melt(
        ["configuration", "model_seed", "recurrence"], list(columns), "quantity"
    ).dropna(subset=["value"])
    long = long.replace({"quantity": columns}).rename(columns={"model_seed": "seed"})
    means = long.groupby(["configuration", "quantity", "seed"], sort=False)["value"].mean()
    over = condition_table(
        means.reset_index(), ["configuration", "quantity"], resampling=resampling
    )
    return table, over


# -- counts -------------------------------------------------------------------------------------


def _training(models: SmallModels) -> pd.DataFrame:
    """What was trained; ``evaluated_rows``: held-out rows times numbers of recurrences."""
    rows = []
    for name in models.configurations:
        about = models.about["models"][name]
        last = models.curves[models.curves["configuration"] == name].groupby("seed").last()
        evaluated = models.evaluation[models.evaluation["configuration"] == name]
        p, k, c = about["shape"]
        rows.append(
            {
                "configuration": name,
                "shape": f"({p}, {k} x {about['recurrences']}, {c})",
                "models": len(last),
                "seeds": " ".join(map(str, about["seeds"])),
                "parameters": about["parameters"],
                "steps": int(last["step"].iloc[0]),
                "tokens_a_model": int(last["tokens"].iloc[0]),
                "tokens": int(last["tokens"].sum()),
                "seconds": float(last["seconds"].sum()),
                "evaluated_rows": int(evaluated["rows"].sum()),
            }
        )
    return pd.DataFrame(rows)


def _counts(models: SmallModels) -> pd.DataFrame:
    """What was run of the trained models.

    A sequence is one prompt of one model. Every sequence ran forward once with ``recurrences``, and
    once more with twice as many where a verdict is confirmed. (Where the disk has no room for the
    states, each forward pass is done twice, to the same numbers.)
    """
    prompts = models.about["prompts"]
    rows = []
    for name in models.configurations:
        about = models.about["models"][name]
        for n in sorted({int(n) for run in about["runs"].values() for n in run}):
            n_models = sum(str(n) in run for run in about["runs"].values())
            passes = 1 if n == about["recurrences"] else 2
            sequences = n_models * prompts["run"]
            rows.append(
                {
                    "configuration": name,
                    "recurrences": n,
                    "confirmed_at": 2 * n if passes == 2 else 0,
                    "models": n_models,
                    "prompts": prompts["run"],
                    "sequences": sequences,
                    "forward_passes": passes * sequences,
                    "tokens_read": passes * n_models * prompts["tokens"],
                }
            )
    return pd.DataFrame(rows)


def _mean(x: np.ndarray) -> float:
    there = x[np.isfinite(x)]
    return float(there.mean()) if len(there) else math.nan
