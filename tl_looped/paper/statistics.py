"""Tables of means, intervals and paired contrasts over seeds, for experiments of several models.

Input is a long table: a row holds one value, with columns for the condition (any number of factors,
such as norm, injection or block size), ``seed``, and ``prompt`` where there are several values a
model. The unit is the seed, a trained (or random) model: prompts of one model are not independent
evidence about models. A contrast pairs models of the same seed.

Every row says what it rests on: seeds, prompts, values left out, resamples and their seed. ``says``
is a sentence made from the numbers of the row. Its rule, ours: a difference is *decided* only if
the t-interval leaves out 0 and the exact sign-flip p is at most ``1 - confidence``. With n seeds
that p cannot fall below ``2 / 2^n``, so that fewer than six seeds decide nothing at 95 %.

Limits. Nothing is corrected for the number of contrasts. With three seeds there are ten different
resamples, and bootstrap intervals are too narrow; see :mod:`tl_looped.metrics.bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_looped.errors import InputError
from tl_looped.metrics import bootstrap_ci, hierarchical_bootstrap_ci, paired_contrast
from tl_looped.metrics.bootstrap import BootstrapCI, Resampling

SEED, PROMPT = "seed", "prompt"


@dataclass(frozen=True)
class Contrast:
    """``first - second`` of one factor, all else being equal: ``Contrast("norm", "pre", "post")``.

    Args:
        factor: Column of the factor.
        first, second: Its two levels.
    """

    factor: str
    first: Any
    second: Any

    @property
    def name(self) -> str:
        """``pre - post``; with the factor where the levels say nothing, as True and False."""
        what = f"{self.factor} " if isinstance(self.first, bool) else ""
        return f"{what}{self.first} - {self.second}"


def condition_table(
    values: pd.DataFrame,
    factors: Sequence[str],
    value: str = "value",
    resampling: Resampling | None = None,
) -> pd.DataFrame:
    """Mean over seeds of every condition, with its intervals.

    Each seed counts the same: its value is the mean over its prompts. Values that are NaN are left
    out and counted; a condition without any is a row of NaN.

    Args:
        values: Columns ``factors``, ``seed``, ``value``, and ``prompt`` if there are several values
            a seed.
        factors: Columns that tell conditions apart.
        value: Column of the numbers, in any unit.
        resampling: Resamples, confidence and seed; 1,000 and 95 % if None.

    Returns:
        A row per condition, in the order of their first appearance: ``factors``; ``mean``, ``sd``
        (n - 1, of the seeds); ``hierarchical_low`` and ``_high``, the percentile bootstrap over
        seeds and, within them, prompts (one draw of prompts for all seeds where all have a value
        for the same ones: ``shared_prompts``), NaN without prompts; ``percentile_*``, ``bca_*`` and
        ``t_*`` over seeds alone; ``n_seeds``, ``seeds``, ``n_prompts`` (each seed's),
        ``n_left_out``; ``confidence``, ``n_resamples``, ``resampling_seed``.

    Raises:
        InputError: if a column is missing, a value is infinite, or a seed has two values for one
            prompt of a condition.
    """
    resampling = resampling or Resampling()
    table = _checked(values, factors, value)
    rows = []
    for key, part in _groups(table, factors):
        prompts = _by_seed(part, value)
        kept = {seed: row for seed, row in prompts.items() if len(row)}
        rows.append(dict(key) | _condition(kept, len(part), PROMPT in part, resampling))
    return pd.DataFrame(rows)


def seed_table(values: pd.DataFrame, factors: Sequence[str], value: str = "value") -> pd.DataFrame:
    """One value a condition and seed, the mean over prompts: columns ``factors``, ``seed``, value.

    Raises:
        InputError: as :func:`condition_table`.
    """
    table = _checked(values, factors, value).dropna(subset=[value])
    return table.groupby([*factors, SEED], sort=False, dropna=False)[value].mean().reset_index()


def contrast_table(
    values: pd.DataFrame,
    factors: Sequence[str],
    contrasts: Iterable[Contrast],
    value: str = "value",
    over: Sequence[str] = (),
    resampling: Resampling | None = None,
    words: str = "",
) -> pd.DataFrame:
    """Paired contrasts over seeds, for every combination of the other factors.

    The seeds of a contrast are those that have a value under both levels. Where factors are
    averaged over, it is over the combinations of them that some seed has under *both* levels, and
    a seed that lacks one of these is left out: both sides are means of the same combinations.

    Args:
        values, factors, value, resampling: As in :func:`condition_table`.
        contrasts: What is compared.
        over: Factors to average over first, for a main effect.
        words: How sentences call a row, ``"{quantity}, {contrast}"``; ``contrast`` and the other
            factors are filled in. The values one after the other if empty.

    Returns:
        A row per contrast and combination: ``contrast``, the other factors; the levels of ``over``
        that were averaged over, as text (``"4 12 16"``); ``mean`` of
        ``first - second`` over seeds, ``sd``, ``percentile_*``, ``bca_*``, ``t_*``,
        ``sign_flip_p``, ``least_p`` (``2 / 2^n``), ``n_seeds``, ``seeds``, ``differences`` (a
        seed each), ``decided``, ``says``, and the settings of the resamples.

    Raises:
        InputError: as :func:`condition_table`, or for a factor that is not there.
    """
    resampling = resampling or Resampling()
    means = seed_table(values, factors, value)
    if not set(over) <= set(factors):
        raise InputError(f"over must be among the factors {list(factors)}, got {list(over)}")
    left = [name for name in factors if name not in over]
    rows = []
    for contrast in contrasts:
        if contrast.factor not in left:
            raise InputError(f"contrast of {contrast.factor!r}: the factors are {left}")
        others = [name for name in left if name != contrast.factor]
        for key, part in _groups(means, others):
            pair, levels = _paired(part, contrast, value, over)
            if len(pair):
                seeds, first, second = pair.index, pair["first"], pair["second"]
                named = {"contrast": contrast.name, **dict(key)}
                what = words.format(**named) if words else ", ".join(map(str, named.values()))
                row = _contrast(first.to_numpy(), second.to_numpy(), what, resampling)
                seeds_text = " ".join(map(str, seeds))
                rows.append({**named, **levels, "seeds": seeds_text, **row})
    return pd.DataFrame(rows)


def decision(what: str, found: BootstrapCI) -> tuple[bool, str]:
    """Whether a paired difference is decided, and a sentence that says so; see the module.

    Args:
        what: The difference in words, ``"injection - base4, rate"``.
        found: Of :func:`tl_looped.metrics.paired_contrast`.
    """
    n, alpha, least = found.n, 1 - found.confidence, 2 / 2**found.n
    what = f"{what} (mean {found.mean:+.3g})"
    undecided = f"{what}: this scale cannot decide whether there is a difference"
    if n == 1:
        return False, f"{undecided}; one seed says nothing about how seeds vary."
    ends = f"{100 * found.confidence:g} % t-interval {found.t.low:.3g} to {found.t.high:.3g}"
    if found.mean == found.t.low == found.t.high == 0:
        return False, f"{undecided}; there is none in any of the {n} seeds."
    if found.t.low <= 0 <= found.t.high:
        return False, f"{undecided}; the {ends} over {n} seeds includes 0."
    p = f"exact sign-flip p = {found.sign_flip_p:.3g}"
    if not math.isnan(found.sign_flip_p) and found.sign_flip_p <= alpha * (1 + 1e-12):
        side = "above" if found.mean > 0 else "below"
        return True, f"{what}: {side} 0 ({ends} over {n} seeds, {p})."
    why = f"cannot fall below {least:.3g} with {n} seeds" if least > alpha else "is not small"
    return False, (
        f"{undecided}; the {ends} leaves out 0 but takes seeds for normal, and the {p} {why}."
    )


# -- parts --------------------------------------------------------------------------------------


def _paired(
    part: pd.DataFrame, contrast: Contrast, value: str, over: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """``first`` and ``second`` by seed, means of the same levels of ``over``; and these levels."""
    keys = [SEED, *over]
    sides = [
        part[part[contrast.factor] == level][[*keys, value]].rename(columns={value: name})
        for name, level in (("first", contrast.first), ("second", contrast.second))
    ]
    both = sides[0].merge(sides[1], on=keys)
    n_combinations = len(both.drop_duplicates(list(over))) if over else 1
    grouped = both.groupby(SEED, sort=True)
    whole = grouped.size() == n_combinations
    levels = {name: " ".join(map(str, sorted(both[name].unique()))) for name in over}
    return grouped[["first", "second"]].mean()[whole], levels


def _checked(values: pd.DataFrame, factors: Sequence[str], value: str) -> pd.DataFrame:
    missing = [name for name in (*factors, SEED, value) if name not in values]
    if missing:
        raise InputError(f"values must have the columns {', '.join(missing)}; it has {[*values]}")
    keys = [*factors, SEED, *([PROMPT] if PROMPT in values else [])]
    table = values[[*keys, value]].astype({value: np.float64})
    twice = table.duplicated(keys)
    if twice.any():
        row = table.loc[twice, keys].iloc[0].to_dict()
        raise InputError(f"values has two rows for {row}: give every factor that tells them apart")
    if np.isinf(table[value]).any():
        raise InputError(
            f"values: {value} holds an infinity, which has no mean; use a rate, not a half-life"
        )
    return table


def _groups(
    table: pd.DataFrame, factors: Sequence[str]
) -> list[tuple[tuple[tuple[str, Any], ...], pd.DataFrame]]:
    """Parts of a table by the values of some columns, all of it if there is none."""
    if not factors:
        return [((), table)] if len(table) else []
    grouped = table.groupby(list(factors), sort=False, dropna=False)
    return [
        (tuple(zip(factors, key if isinstance(key, tuple) else (key,), strict=True)), part)
        for key, part in grouped
    ]


def _by_seed(part: pd.DataFrame, value: str) -> dict[Any, pd.Series]:
    """The values of each seed that are not NaN, by prompt, in the order of prompts."""
    found = {}
    for seed, mine in part.groupby(SEED, sort=True):
        row = mine.set_index(PROMPT)[value].sort_index() if PROMPT in mine else mine[value]
        found[seed] = row.dropna()
    return found


def _condition(
    seeds: dict[Any, pd.Series], n_rows: int, prompts: bool, resampling: Resampling
) -> dict[str, Any]:
    rows = [row.to_numpy(dtype=np.float64) for row in seeds.values()]
    out: dict[str, Any] = {"mean": math.nan, "sd": math.nan}
    edges = ["hierarchical", "percentile", "bca", "t"]
    out |= {f"{edge}_{end}": math.nan for edge in edges for end in ("low", "high")}
    shared = prompts and len({tuple(row.index) for row in seeds.values()}) == 1
    if rows:
        means = np.array([row.mean() for row in rows])
        over_seeds = bootstrap_ci(means, **asdict(resampling))
        out |= {"mean": over_seeds.mean, "sd": _sd(means)} | _edges(over_seeds)
        if prompts:
            both = hierarchical_bootstrap_ci(
                rows, shared_prompts=shared, **asdict(resampling)
            ).percentile
            out |= {"hierarchical_low": both.low, "hierarchical_high": both.high}
    return out | {
        "n_seeds": len(rows),
        "seeds": " ".join(map(str, seeds)),
        "n_prompts": " ".join(str(len(row)) for row in rows) if prompts else "",
        "n_left_out": n_rows - sum(map(len, rows)),
        "shared_prompts": shared,
        "n_resamples": resampling.n_resamples,
        "confidence": resampling.confidence,
        "resampling_seed": resampling.seed,
    }


def _contrast(
    first: Float[np.ndarray, " seed"],
    second: Float[np.ndarray, " seed"],
    what: str,
    resampling: Resampling,
) -> dict[str, Any]:
    found = paired_contrast(first, second, **asdict(resampling))
    decided, says = decision(what, found)
    return {
        "mean": found.mean,
        "sd": _sd(first - second),
        **_edges(found),
        "sign_flip_p": found.sign_flip_p,
        "least_p": 2 / 2**found.n,
        "n_seeds": found.n,
        "differences": " ".join(f"{x:.6g}" for x in first - second),
        "decided": decided,
        "says": says,
        "n_resamples": found.n_resamples,
        "confidence": found.confidence,
        "resampling_seed": found.seed,
    }


def _edges(found: BootstrapCI) -> dict[str, float]:
    return {
        f"{name}_{end}": getattr(getattr(found, name), end)
        for name in ("percentile", "bca", "t")
        for end in ("low", "high")
    }


def _sd(x: Float[np.ndarray, " seed"]) -> float:
    return float(x.std(ddof=1)) if len(x) > 1 else math.nan
