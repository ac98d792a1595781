"""The report's numbers as text: words for verdicts, three significant digits, reasons for gaps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tl_looped.experiments.reading import Missing
from tl_looped.metrics.catalogue import OUTPUTS
from tl_looped.metrics.convergence import VERDICT_WORDS, Verdict
from tl_looped.metrics.mirroring import MirroringInterval
from tl_looped.report.mirrored import MirroringTable
from tl_looped.report.parts import PageTable, SummaryCell, SummaryRow
from tl_looped.report.summary import Clusters, Median, RunSummary, Verdicts, most_telling
from tl_looped.words import IGNORED_STATE, count, heavy_token, training

NOT_COMPUTED = "not computed"
NOT_APPLICABLE = "not applicable"
_DIGITS = 3


@dataclass(frozen=True)
class VerdictText:
    """How a verdict is called, explained and coloured."""

    word: str
    meaning: str
    css: str


def _said(verdict: Verdict, meaning: str, css: str) -> tuple[Verdict, VerdictText]:
    return verdict, VerdictText(VERDICT_WORDS[verdict], meaning, css)


VERDICTS: dict[Verdict, VerdictText] = dict(
    [
        _said(
            Verdict.CONVERGED,
            "the steps became small and stay so, and nothing moves after them",
            "good",
        ),
        _said(Verdict.PROJECTIVE, "the direction settles while the norm keeps growing", "near"),
        _said(Verdict.DEGENERATE, "it settles, and all layers share one limit", "near"),
        _said(Verdict.ORBIT, "the state keeps coming back to where it was", "turn"),
        _said(Verdict.DRIFT, "the state moves on along a straight line", "away"),
        _said(
            Verdict.NOT_CONVERGED,
            "none of these; a loop that is still contracting included",
            "away",
        ),
        _said(
            Verdict.UNDEFINED,
            "a state is not finite, or there are fewer than four recurrences",
            "none",
        ),
    ]
)


def digits(x: float) -> str:
    """Three significant digits, without an exponent where it can be read without one."""
    if math.isnan(x):
        return "undefined"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if x == 0:
        return "0"
    text = f"{x:#.{_DIGITS}g}".rstrip(".")
    if "e" in text:
        if 1e-4 <= abs(x) < 1e6:
            return f"{float(text):.0f}".replace("-", "−")
        mantissa, exponent = text.split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return text.replace("-", "−")


def correlation(x: float) -> str:
    """Two decimals: a correlation's scale is known."""
    if math.isnan(x):
        return "undefined"
    return f"{round(x, 2) + 0.0:.2f}".replace("-", "−")  # no minus before 0.00


def value(x: Any) -> str:
    """A setting as text: strings as they are, whole numbers whole, the rest as JSON."""
    if isinstance(x, np.generic | np.ndarray):
        x = x.tolist()
    if isinstance(x, str):
        return x
    return json.dumps(x, ensure_ascii=False, default=str)


def run_name(summary: RunSummary) -> str:
    """A run in a few words, its model left out: ``32 bundled prompts, 8 recurrences``."""
    prompts = f"{summary.n_prompts:,} {summary.prompts}".strip()
    name = f"{prompts} prompt{'' if summary.n_prompts == 1 else 's'}"
    return name if summary.feedforward else f"{name}, {count(summary.loop.R, 'recurrence')}"


def model_name(summary: RunSummary) -> str:
    """A model, with what was taken from it or changed."""
    parts = [summary.model, summary.start]
    parts += [summary.dtype] if summary.dtype not in ("", "float32") else []
    if summary.skip_first:
        first = "first token" if summary.skip_first == 1 else f"first {summary.skip_first} tokens"
        parts.append(f"states without the {first}")
    if summary.ablated:
        parts.append(f"without the MLP output of {', '.join(summary.ablated)}")
    return ", ".join(filter(None, parts))


def heading(summary: RunSummary) -> str:
    """A run in a few words."""
    return f"{model_name(summary)}: {run_name(summary)}"


def row(runs: Sequence[RunSummary], anchors: Mapping[str, str]) -> SummaryRow:
    """A model's row of the summary table.

    Args:
        runs: Runs of the model.
        anchors: Id in the page of each run, by its name.
    """
    first = runs[0]
    shapes = {f"{one.loop}" for one in runs}
    loop = first.loop
    shape = f"({loop.p}, {loop.k} x R, {loop.c})" if len(shapes) > 1 else shapes.pop()
    if first.trained is not None:
        shape += f", {training(first.trained)}"
    return SummaryRow(
        model=model_name(first),
        shape=f"{loop.n_layers} layers, feedforward" if first.feedforward else shape,
        runs=tuple((anchors[one.run], run_name(one)) for one in runs),
        feedforward=first.feedforward,
        notes=_notes(runs),
        cells=tuple(_cell(name, runs, anchors) for name in _COLUMNS),
    )


def _notes(runs: Sequence[RunSummary]) -> tuple[str, ...]:
    """Of the run whose verdict and rate stand in the row."""
    judged = most_telling(runs, "verdicts")
    notes = []
    if judged.ignores_state:
        notes.append(f"{IGNORED_STATE[0].upper()}{IGNORED_STATE[1:]}.")
    if judged.heavy is not None and not judged.feedforward:
        heavy = judged.heavy
        said = heavy_token(heavy.prompts, heavy.of, heavy.most, heavy.is_first)
        leave = "; --skip-first 1 leaves it out" if heavy.is_first else ""
        notes.append(f"{said[0].upper()}{said[1:]}{leave}.")
    return tuple(notes)


def _cell(name: str, runs: Sequence[RunSummary], anchors: Mapping[str, str]) -> SummaryCell:
    run = most_telling(runs, name)
    label, text = _COLUMNS[name]
    found = getattr(run, name)
    if isinstance(found, Missing):
        main = NOT_COMPUTED if found.applies else NOT_APPLICABLE
        return SummaryCell(label, main, found.reason, missing=True)
    main, note = text(found)
    per_token = run.relative_rate
    if name == "rate" and run.heavy and isinstance(per_token, Median):
        each = f"of relative steps, in which every token counts alike: {digits(per_token.value)}"
        note = f"{note}; {each}"
    return SummaryCell(
        label,
        main,
        note,
        bar=_bar(found) if isinstance(found, Verdicts) else (),
        source=(anchors[run.run], run_name(run)) if len(runs) > 1 else None,
    )


def _bar(found: Verdicts) -> tuple[tuple[float, str], ...]:
    return tuple((100 * m / found.n, VERDICTS[v].css) for v, m in found.counts.items())


def _verdict(found: Verdicts) -> tuple[str, str]:
    (first, n), *others = found.counts.items()
    notes = [f"{VERDICTS[v].word}: {m}" for v, m in others]
    if found.n_settled:
        at = f"{found.settled_at:g}"
        notes.append(f"settles at recurrence {at} (median of {found.n_settled}, 0-based)")
    if found.confirmed is None:
        notes.append("the results do not say whether a run twice as long confirmed it")
    elif not found.confirmed:
        notes.append("not checked against a run of twice the recurrences")
    return f"{VERDICTS[first].word}: {n} of {found.n}", "; ".join(notes)


def _quartiles(found: Median) -> str:
    text = f"quartiles {digits(found.low)} to {digits(found.high)}"
    return text if found.n == found.of else f"{text}; {found.n} of {found.of} prompts have one"


def _rate(found: Median) -> tuple[str, str]:
    return digits(found.value), _quartiles(found)


def _half_life(found: Median) -> tuple[str, str]:
    if math.isinf(found.value):
        return "∞", f"steps do not shrink; {_quartiles(found)}"
    return f"{digits(found.value)} recurrence{'' if found.value == 1 else 's'}", _quartiles(found)


def _cyclicity(found: float) -> tuple[str, str]:
    return correlation(found) if abs(found) >= 0.01 else digits(found), ""


def interval(score: MirroringInterval) -> str:
    """The interval, or why there is none."""
    low, high = score.percentile.low, score.percentile.high
    if math.isnan(low):
        return "no interval: one prompt, or curves without spread"
    ends = f"{correlation(low)} to {correlation(high)}"
    return f"{100 * score.resampling.confidence:g} % interval {ends}"


def _mirroring(found: MirroringTable) -> tuple[str, str]:
    metric, score = next(iter(found.scores.items()))
    name = OUTPUTS[metric].label.split("(")[0].strip()
    note = f"{interval(score)}; {name}, over {found.model}"
    return correlation(score.score), "; ".join(filter(None, (note, found.apart)))


_COLUMNS: Mapping[str, tuple[str, Callable[[Any], tuple[str, str]]]] = {
    "verdicts": ("Fixed point", _verdict),
    "rate": ("Rate", _rate),
    "half_life": ("Half-life", _half_life),
    "cyclicity": ("Cyclicity", _cyclicity),
    "mirroring": ("Mirroring score", _mirroring),
}
"""Heading of a column, and the number and note of its cells."""


def _clusters(found: Clusters | Missing) -> str:
    if isinstance(found, Missing):
        return f"depth clusters: {NOT_COMPUTED}, {found.reason}"
    return (
        f"depth clusters ({found.n_clusters} k-means clusters of the feedforward layers, seed "
        f"{found.seed}): a share of {correlation(found.agreement)} of the layers is in the "
        f"feedforward model's stage at the same depth, mean over recurrences "
        f"({correlation(found.low)} to {correlation(found.high)}); adjusted Rand index "
        f"{correlation(found.rand_index)}, where chance gives 0"
    )


def mirroring(summary: RunSummary) -> PageTable:
    """One run's mirroring scores, one metric per line; notes on clusters and on what is missing."""
    table = summary.mirroring
    assert isinstance(table, MirroringTable)
    first = next(iter(table.scores.values()))
    rows = []
    for metric, score in table.scores.items():
        best = int(score.by_recurrence.round(12).argmax())  # the first of equal ones
        alike = f"recurrence {best}, {correlation(float(score.by_recurrence[best]))}"
        rows.append((OUTPUTS[metric].label, correlation(score.score), interval(score), alike))
    notes = [
        *([f"of this run and the feedforward one {table.apart}"] if table.apart else []),
        _clusters(summary.clusters),
        *(f"{m}: {NOT_COMPUTED}, {gap.reason}" for m, gap in table.without.items()),
        *(
            f"{m}: {s.left_out[0]} and {s.left_out[1]} prompts left out, values not finite"
            for m, s in table.scores.items()
            if any(s.left_out)
        ),
    ]
    drawn = "the same prompts for both" if first.paired else "prompts of each by themselves"
    caption = (
        f"{heading(summary)}, against {table.model} ({table.against}): bootstrap over "
        f"{first.n_prompts[0]} and {first.n_prompts[1]} prompts, "
        f"{first.resampling.n_resamples:,} resamples, seed {first.resampling.seed}, {drawn}."
    )
    columns = ("Metric", "Score", "Interval over prompts", "Most alike")
    return PageTable(caption, columns, tuple(rows), tuple(notes))
