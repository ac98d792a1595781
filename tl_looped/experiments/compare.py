"""Several runs side by side: curves over depth, mirroring scores, stages as clusters.

Curves are means over heads, then prompts, of ``[prelude, block_r, coda]`` of each recurrence; a
feedforward run (a core without prelude and coda that ran once) has one. Each looped run is compared
with each feedforward run by ``tl_looped.metrics.mirroring`` and ``tl_looped.metrics.clusters``,
where arXiv 2604.11791 (Fig. 8) overlays the curves.

Limits. Scores are of the mean curves: how they depend on the prompts is not said here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.experiments.reading import (
    bos_apart,
    display_names,
    is_feedforward,
    same_prompts,
    specification,
)
from tl_looped.experiments.store import (
    RESULTS,
    find_runs,
    has_checksum,
    no_checksum_notice,
    read_run,
)
from tl_looped.experiments.tables import write_csv_and_parquet
from tl_looped.metrics import mirroring_score
from tl_looped.metrics.catalogue import SIGNATURE
from tl_looped.metrics.clusters import cluster_table
from tl_looped.metrics.depth_curves import mean_curve, parts_of
from tl_looped.metrics.labels import geometry_of
from tl_looped.metrics.mirroring import MirroringScore

N_CLUSTERS = 3
_YES_NO = {0: "no", 1: "yes"}
_SCORES = ("pearson", "spearman", "rmse", "lag", "lag_pearson", "p_shift", "p_permutation")


@dataclass(frozen=True)
class Comparison:
    """Tables over runs.

    Attributes:
        runs: One row per run: model, shape, whether it is feedforward, its prompts and how they
            were read, and what was left out or set to zero.
        curves: ``run, metric, recurrence, depth, value``; depth in percent.
        mirroring: Each looped run against each feedforward run: metric, whether prelude and coda
            are part of the curve (``whole``, or ``block`` alone), recurrence, the scores, and
            whether both ran the same prompts.
        clusters: The same pairs: agreement of the stages with the feedforward model's and Rand
            index, by recurrence.
        notices: What could not be compared, and why.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    mirroring: pd.DataFrame
    clusters: pd.DataFrame
    notices: tuple[str, ...]

    def write(self, folder: Path) -> list[Path]:
        """Write the tables that have rows."""
        tables = {name: getattr(self, name) for name in ("runs", "curves", "mirroring", "clusters")}
        return [
            path
            for name, table in tables.items()
            if not table.empty
            for path in write_csv_and_parquet(table, folder / name)
        ]


@checked
def load_runs(folders: Sequence[str | Path]) -> dict[str, xr.Dataset]:
    """Results by the names of their folders.

    Raises:
        DataError: if a folder holds none.
        InputError: if two runs have one name.
    """
    found: dict[str, xr.Dataset] = {}
    for folder in folders:
        for run in find_runs(Path(folder)):
            name = run.resolve().name
            if name in found:
                raise InputError(f"two runs are called {name!r}: rename one of the folders")
            found[name] = read_run(run / RESULTS)
    return found


@checked
def compare_runs(runs: Mapping[str, xr.Dataset], seed: int = 0) -> Comparison:
    """Compare runs, by name.

    Args:
        runs: By depth, as ``results.nc`` holds them.
        seed: Of the null distributions and of k-means.

    Raises:
        InputError: with fewer than two runs.
    """
    if len(runs) < 2:
        raise InputError(f"compare needs at least two runs, got {len(runs)}: {', '.join(runs)}")
    notices = [no_checksum_notice(name) for name, data in runs.items() if not has_checksum(data)]
    names = display_names(runs)
    forward = [name for name, data in runs.items() if is_feedforward(data)]
    looped = [name for name in runs if name not in forward]
    pairs = [(a, b) for a in looped for b in forward]
    if not pairs:
        notices.append(
            "mirroring and clusters need a looped run and a feedforward one "
            "(tl-looped analyze MODEL --feedforward)"
        )
    mirrored, clustered = [], []
    for a, b in pairs:
        if not same_prompts(runs[a], runs[b]):
            notices.append(f"{a} and {b} did not run the same prompts")
        if apart := bos_apart(runs[a], runs[b]):
            notices.append(f"{a} and {b}: {apart}")
        mirrored += _mirroring(a, b, runs, notices, seed)
        clustered += cluster_rows(a, b, runs, notices, seed)
    return Comparison(
        runs=pd.DataFrame([_about(name, names[name], data) for name, data in runs.items()]),
        curves=pd.concat([_curves(*item) for item in runs.items()], ignore_index=True),
        mirroring=pd.DataFrame(mirrored),
        clusters=pd.DataFrame(clustered),
        notices=tuple(notices),
    )


def _about(name: str, model: str, data: xr.Dataset) -> dict[str, object]:
    attributes = data.attrs
    return {
        "run": name,
        "model": model,
        "shape": str(geometry_of(data)),
        "feedforward": is_feedforward(data),
        "prompt_set": attributes.get("prompt_set", ""),
        "prompts": data.sizes["prompt"],
        "dtype": attributes.get("dtype", ""),
        "bos": _YES_NO.get(attributes.get("prepend_bos", -1), ""),
        "skip_first": attributes.get("skip_first", 0),
        # As text: runs without a drawn state have none, and a seed may be beyond 64 bits.
        "state_seed": str(attributes.get("state_seed", "")),
        "ablated": ", ".join(map(str, specification(data).get("ablate_mlp", []))),
        "hash": attributes.get("hash", ""),
    }


def _curves(name: str, data: xr.Dataset) -> pd.DataFrame:
    tables = []
    for metric in (m for m in SIGNATURE if m in data):
        prelude, core, coda = parts_of(data, mean_curve(data, metric))
        for r, block in enumerate(core):
            whole = np.concatenate((prelude, block, coda))
            depth = 100 * np.arange(len(whole)) / max(1, len(whole) - 1)
            tables.append(
                pd.DataFrame(
                    {
                        "run": name,
                        "metric": metric,
                        "recurrence": r,
                        "depth": depth,
                        "value": whole,
                    }
                )
            )
    columns = ["run", "metric", "recurrence", "depth", "value"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _mirroring(
    a: str, b: str, runs: Mapping[str, xr.Dataset], notices: list[str], seed: int
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    data, other = runs[a], runs[b]
    for metric in SIGNATURE:
        if metric not in data or metric not in other:
            notices.append(f"{a} and {b} do not both have {metric}")
            continue
        prelude, core, coda = parts_of(data, mean_curve(data, metric))
        target = mean_curve(other, metric)
        for form, before, after in (("whole", prelude, coda), ("block", None, None)):
            try:
                score = mirroring_score(core, target, prelude=before, coda=after, seed=seed)
            except InputError as error:  # a block of one layer is no curve
                notices.append(f"{a} and {b}, {metric}, {form}: {error}")
                continue
            about = {"run": a, "feedforward": b, "metric": metric, "curve": form}
            same = same_prompts(data, other)
            rows += [about | row | {"same_prompts": same} for row in _by_recurrence(score)]
    return rows


def _by_recurrence(score: MirroringScore) -> list[dict[str, object]]:
    draws = {"n_permutations": score.n_permutations, "seed": score.seed}
    rows: list[dict[str, object]] = []
    for r in range(len(score.pearson)):
        values = {name: float(getattr(score, name)[r]) for name in _SCORES}
        rows.append({"recurrence": r, **values, **draws})
    return rows


def cluster_rows(
    a: str, b: str, runs: Mapping[str, xr.Dataset], notices: list[str], seed: int = 0
) -> list[dict[str, object]]:
    """Stages of the looped run ``a`` as clusters of the feedforward ``b``, a row per recurrence.

    Args:
        a, b: Names in ``runs``.
        runs: Results by depth.
        notices: Gets the reason if there is no row.
        seed: Of k-means.
    """
    try:
        table = cluster_table(runs[a], runs[b], N_CLUSTERS, seed)
    except InputError as error:
        notices.append(f"clusters of {a} and {b}: {error}")
        return []
    rows = table.to_dict("records")
    return [{"run": a, "feedforward": b} | {str(k): v for k, v in row.items()} for row in rows]
