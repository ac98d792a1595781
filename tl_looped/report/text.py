"""The report's numbers as text: words for verdicts, three significant digits, reasons for gaps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tl_looped.experiments.reading import Missing
from tl_looped.metrics.convergence import VERDICT_WORDS, Verdict
from tl_looped.report.mirrored import Mirroring, MirroringTable
from tl_looped.report.summary import (
    Clusters,
    Median,
    RunSummary,
    Verdicts,
    most_telling,
)
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


_SAID = {
    Verdict.CONVERGED: (
        "the steps became small and stay so, and nothing moves after them",
        "good",
    ),
    Verdict.PROJECTIVE: (
        "the direction settles while the norm keeps growing",
        "near",
    ),
    Verdict.DEGENERATE: ("it settles, and all layers share one limit", "near"),
    Verdict.ORBIT: ("the state keeps coming back to where it was", "turn"),
    Verdict.DRIFT: ("the state moves on along a straight line", "away"),
    Verdict.NOT_CONVERGED: (
        "none of these; a loop that is still contracting included",
        "away",
    ),
    Verdict.UNDEFINED: (
        "a state is not finite, or there are fewer than four recurrences",
        "none",
    ),
}

VERDICTS = {v: VerdictText(VERDICT_WORDS[v], meaning, css) for v, (meaning, css) in _SAID.items()}


@dataclass(frozen=True)
class Cell:
    """A cell of the summary table.

    Args:
        label: Heading of its column.
        main: The number, or "not computed".
        note: Spread, counts or the reason, in small type.
        missing: Whether the number is missing.
        bar: Shares of the verdicts, in percent, with their colour.
        source: Anchor and short name of the run, where its model has several.
    """

    label: str
    main: str
    note: str = ""
    missing: bool = False
    bar: tuple[tuple[float, str], ...] = ()
    source: tuple[str, str] | None = None


@dataclass(frozen=True)
class Row:
    """A model in the summary table.

    Args:
        model: Its name.
        shape: Of its loop.
        runs: Anchor and short name of each of its runs.
        feedforward: Whether it has no loop.
        notes: What must be known to read the cells.
        cells: A column each.
    """

    model: str
    shape: str
    runs: tuple[tuple[str, str], ...]
    feedforward: bool
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]


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


def row(runs: Sequence[RunSummary], anchors: Mapping[str, str]) -> Row:
    """A model's row of the summary table; ``anchors`` by name of run."""
    first = runs[0]
    shapes = {f"{one.loop}" for one in runs}
    loop = first.loop
    shape = f"({loop.p}, {loop.k} x R, {loop.c})" if len(shapes) > 1 else shapes.pop()
    if first.trained is not None:
        shape += f", {training(first.trained)}"
    return Row(
        model=model_name(first),
        shape=f"{loop.n_layers} layers, feedforward" if first.feedforward else shape,
        runs=tuple((anchors[one.run], run_name(one)) for one in runs),
        feedforward=first.feedforward,
        notes=_notes(runs),
        cells=tuple(_cell(name, text, runs, anchors) for name, text in _COLUMNS.items()),
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


def _cell(
    name: str,
    text: Callable[[Any], Cell],
    runs: Sequence[RunSummary],
    anchors: Mapping[str, str],
) -> Cell:
    run = most_telling(runs, name)
    cell = text(getattr(run, name))
    per_token = run.relative_rate
    if name == "rate" and run.heavy and isinstance(per_token, Median) and not cell.missing:
        each = f"of relative steps, in which every token counts alike: {digits(per_token.value)}"
        cell = replace(cell, note=f"{cell.note}; {each}")
    if len(runs) == 1 or cell.missing:
        return cell
    return replace(cell, source=(anchors[run.run], run_name(run)))


def _missing(label: str, missing: Missing) -> Cell:
    main = NOT_COMPUTED if missing.applies else NOT_APPLICABLE
    return Cell(label, main, missing.reason, missing=True)


def _verdict(found: Verdicts | Missing) -> Cell:
    label = "Fixed point"
    if isinstance(found, Missing):
        return _missing(label, found)
    (first, n), *others = found.counts.items()
    notes = [f"{VERDICTS[v].word}: {m}" for v, m in others]
    if found.n_settled:
        at = f"{found.settled_at:g}"
        notes.append(f"settles at recurrence {at} (median of {found.n_settled}, 0-based)")
    if found.confirmed is None:
        notes.append("the results do not say whether a run twice as long confirmed it")
    elif not found.confirmed:
        notes.append("not checked against a run of twice the recurrences")
    bar = tuple((100 * m / found.n, VERDICTS[v].css) for v, m in found.counts.items())
    return Cell(label, f"{VERDICTS[first].word}: {n} of {found.n}", "; ".join(notes), bar=bar)


def _quartiles(found: Median) -> str:
    text = f"quartiles {digits(found.low)} to {digits(found.high)}"
    return text if found.n == found.of else f"{text}; {found.n} of {found.of} prompts have one"


def _rate(found: Median | Missing) -> Cell:
    label = "Rate"
    if isinstance(found, Missing):
        return _missing(label, found)
    return Cell(label, digits(found.value), _quartiles(found))


def _half_life(found: Median | Missing) -> Cell:
    label = "Half-life"
    if isinstance(found, Missing):
        return _missing(label, found)
    if math.isinf(found.value):
        return Cell(label, "∞", f"steps do not shrink; {_quartiles(found)}")
    return Cell(
        label,
        f"{digits(found.value)} recurrence{'' if found.value == 1 else 's'}",
        _quartiles(found),
    )


def _cyclicity(found: float | Missing) -> Cell:
    label = "Cyclicity"
    if isinstance(found, Missing):
        return _missing(label, found)
    return Cell(label, correlation(found) if abs(found) >= 0.01 else digits(found))


def interval(score: Mirroring) -> str:
    """The interval, or why there is none."""
    if math.isnan(score.low):
        return "no interval: one prompt, or curves without spread"
    ends = f"{correlation(score.low)} to {correlation(score.high)}"
    return f"{100 * score.confidence:g} % interval {ends}"


def _mirroring(found: MirroringTable | Missing) -> Cell:
    label = "Mirroring score"
    if isinstance(found, Missing):
        return _missing(label, found)
    score = found.scores[0]
    name = score.label.split("(")[0].strip()
    note = f"{interval(score)}; {name}, over {found.model}"
    return Cell(label, correlation(score.score), "; ".join(filter(None, (note, found.apart))))


_COLUMNS: Mapping[str, Callable[[Any], Cell]] = {
    "verdicts": _verdict,
    "rate": _rate,
    "half_life": _half_life,
    "cyclicity": _cyclicity,
    "mirroring": _mirroring,
}


def _clusters(found: Clusters | Missing) -> str:
    if isinstance(found, Missing):
        return f"stage clusters: {NOT_COMPUTED}, {found.reason}"
    return (
        f"stage clusters ({found.n_stages} k-means clusters of the feedforward layers, seed "
        f"{found.seed}): a share of {correlation(found.agreement)} of the layers is in the "
        f"feedforward model's stage at the same depth, mean over recurrences "
        f"({correlation(found.low)} to {correlation(found.high)}); adjusted Rand index "
        f"{correlation(found.rand_index)}, where chance gives 0"
    )


@dataclass(frozen=True)
class MirroringText:
    """The mirroring scores of one run.

    Args:
        caption: What was compared, and how.
        lines: A metric each: its label, then pairs of a column's label and the text.
        notes: Stage clusters; what is missing, and why.
    """

    caption: str
    lines: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...]


def mirroring(summary: RunSummary) -> MirroringText:
    """The table of one run's mirroring scores, a metric a line."""
    table = summary.mirroring
    assert isinstance(table, MirroringTable)
    first = table.scores[0]
    lines = tuple(
        (
            s.label,
            ("Score", correlation(s.score)),
            ("Interval over prompts", interval(s)),
            ("Most alike", f"recurrence {s.best[0]}, {correlation(s.best[1])}"),
        )
        for s in table.scores
    )
    drawn = "the same prompts for both" if first.paired else "prompts of each by themselves"
    notes = [f"{m}: {NOT_COMPUTED}, {gap.reason}" for m, gap in table.without.items()]
    notes += [
        f"{s.metric}: {s.left_out[0]} and {s.left_out[1]} prompts left out, values not finite"
        for s in table.scores
        if any(s.left_out)
    ]
    notes.insert(0, _clusters(summary.clusters))
    if table.apart:
        notes.insert(0, f"of this run and the feedforward one {table.apart}")
    caption = (
        f"{heading(summary)}, against {table.model} ({table.against}): bootstrap over "
        f"{first.n_prompts[0]} and {first.n_prompts[1]} prompts, "
        f"{first.n_resamples:,} resamples, seed {first.seed}, {drawn}."
    )
    return MirroringText(caption, lines, tuple(notes))
