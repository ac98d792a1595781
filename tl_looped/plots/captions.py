"""Captions: what was run, on what, with which recurrences, thresholds, seeds and bands.

Everything comes from the results themselves, so that a caption cannot disagree with its figure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import xarray as xr

from tl_looped import words
from tl_looped.metrics.attention_patterns import SINK_THRESHOLD
from tl_looped.metrics.convergence import FIXED_POINTS, VERDICT_WORDS, Verdict
from tl_looped.metrics.heavy_tokens import find_heavy_token
from tl_looped.metrics.labels import IGNORES_STATE, trained_recurrences
from tl_looped.plots.summaries import Band, Runs, as_runs, left_out, name_of, shape_of, summary
from tl_looped.words import count, training

About = Literal["prompts", "prompt", "weights", "models"]

_BANDS = {
    "sd": "mean ± one standard deviation over {}",
    "quantiles": "10 to 90 % of {}",
    "range": "least to largest of {}",
    "none": "",
}
_PROMPT_SETS = {
    "bundled": "the bundled word problems",
    "sentence": "the test sentence alone",
    "text": "the specification",
}


# What is a mean over tokens of states, or their entropy.
_OF_STATES = ("successive_abs", "fixed_point_abs", "residual_mean", "residual_rms", "entropy")


def caption_of(
    runs: Runs,
    names: Sequence[str] = (),
    band: Band | str = "none",
    paper_recurrences: int | None = None,
    prompt_set: str | None = None,
    extra: Iterable[str] = (),
    about: About = "prompts",
) -> str:
    """The caption of a figure of one model, in sentences.

    Args:
        runs: What was drawn.
        names: Variables that were drawn.
        band: Of the lines.
        paper_recurrences: The paper's number of recurrences, said where it differs.
        prompt_set: What the prompts are; the attribute ``prompt_set`` if None.
        extra: Further sentences, without full stops.
        about: ``"prompts"``: all that were run; ``"prompt"``: one of them, which ``extra`` names;
            ``"weights"``: nothing was run; ``"models"``: several models, which ``extra`` names.
    """
    every = as_runs(runs)
    run = every[0]
    seeds = 0 if isinstance(runs, xr.Dataset) else len(every)
    sentences = [
        "" if about == "models" else _model(run),
        _prompts(every, prompt_set) if about in ("prompts", "models") else "",
        *([] if about == "weights" else [_recurrences(run, paper_recurrences), _start(run)]),
        words.IGNORED_STATE if IGNORES_STATE in run.attrs and about == "prompts" else "",
        f"{count(seeds, 'run')}, one per seed" if seeds and about != "models" else "",
        *_of_metrics(run, names),
        _lines(band, seeds, run, names),
        _outside(runs, names, band),
        _left_out(runs, names),
        *extra,
    ]
    return ". ".join(s[0].upper() + s[1:] for s in sentences if s) + "."


def _model(run: xr.Dataset) -> str:
    name = name_of(run)
    text = name if name.startswith("model ") else f"model {name}"
    text = f"{text} {shape_of(run)}" if "n_core" in run.attrs else text
    dtype = str(run.attrs.get("dtype", "")).removeprefix("torch.")
    if dtype not in ("", "float32"):
        text += f" in {dtype}"
    layers = ablated_layers(run)
    return f"{text}, without the MLP output of {', '.join(layers)}" if layers else text


def ablated_layers(run: xr.Dataset) -> list[str]:
    """Layers that the experiment behind a result took the MLP output from."""
    try:
        return list(map(str, json.loads(run.attrs.get("spec", "{}"))["ablate_mlp"]))
    except (KeyError, TypeError, ValueError):
        return []


def _prompts(runs: list[xr.Dataset], prompt_set: str | None) -> str:
    run = runs[0]
    if "prompt" not in run.sizes:
        return ""
    n, what = run.sizes["prompt"], prompt_set or run.attrs.get("prompt_set", "")
    what = _PROMPT_SETS.get(what, what)
    text = count(n, "prompt") + (f" of {what}" if what else "")
    if n == 1 and "prompt" in run.coords:
        text += f" (number {run['prompt'].to_numpy()[0]})"
    if "n_tokens" in run.coords:
        tokens = np.concatenate([np.atleast_1d(r["n_tokens"].to_numpy()) for r in runs])
        low, high = int(tokens.min()), int(tokens.max())
        text += f", {count(low, 'token')}" if low == high else f", {low} to {high} tokens"
    return text


def _recurrences(run: xr.Dataset, paper: int | None) -> str:
    R = shape_of(run).R
    text = count(R, "recurrence")
    notes = []
    trained = trained_recurrences(run)
    if trained is not None:
        notes.append(training(trained))
    if paper is not None and paper != R:
        notes.append(f"the paper's figure has {paper}")
    return text + (f" ({'; '.join(notes)})" if notes else "")


def _start(run: xr.Dataset) -> str:
    if "initial_state" in run.attrs:
        return f"initial state: {run.attrs['initial_state']}"
    return f"state seed {run.attrs['state_seed']}" if "state_seed" in run.attrs else ""


def _of_metrics(run: xr.Dataset, names: Sequence[str]) -> list[str]:
    out = []
    if any(name.startswith(_OF_STATES) for name in names):
        if skipped := int(run.attrs.get("skip_first", 0)):
            first = "token" if skipped == 1 else count(skipped, "token")
            out.append(f"metrics of states leave out the first {first}")
        if found := find_heavy_token(run):
            out.append(words.heavy_token(found.prompts, found.of, found.most, found.is_first))
    if "sink_rate" in names:
        out.append(f"a head is a sink if its score is at least {SINK_THRESHOLD}")
    if any(name.startswith("fixed_point") for name in names):
        longer = run.attrs.get("reference_recurrences")
        last = shape_of(run).R - 1
        where = (
            f"in a run of {count(int(longer), 'recurrence')}"
            if longer
            else f"at the last recurrence, r = {last}"
        )
        out.append(f"the fixed point is taken for the state {where}")
        if not longer:
            out.append(_what_the_distance_says(run))
    if any(f"{name}_state_out" in run for name in names):
        out.append("the last core layer's values are those before the loop norm")
    if "prediction" in names:
        threshold = run.attrs.get("kurtosis_threshold", run.attrs.get("threshold", 10.0))
        out.append(f"kurtosis above {threshold:g}, skew above (below) 0: prediction (suppression)")
    return out


def verdict_of(run: xr.Dataset) -> tuple[str, int, int] | None:
    """The most frequent verdict of prompts that reach no fixed point, how many, and of how many.

    None where most prompts reach one, and where the results hold no verdicts.
    """
    if "verdict" not in run or run["verdict"].dims != ("prompt",) or not run.sizes["prompt"]:
        return None
    values = run["verdict"].to_numpy()
    if 2 * np.isin(values, FIXED_POINTS).sum() > len(values):
        return None
    others = values[~np.isin(values, FIXED_POINTS)].tolist()
    most = max(sorted(set(others)), key=others.count)
    return VERDICT_WORDS[Verdict(int(most))], others.count(most), len(values)


def _what_the_distance_says(run: xr.Dataset) -> str:
    """The distance to the last state falls to zero whatever a run does."""
    found = verdict_of(run)
    if found is None:
        return "every run approaches its own last state, even one that drifts"
    word, n, of = found
    return (
        f"the verdict is {word} for {n:,} of {count(of, 'prompt')}: every run approaches its own "
        "last state, and the lines show no convergence"
    )


def _lines(band: Band | str, seeds: int, run: xr.Dataset, names: Sequence[str]) -> str:
    headed = any(name in run and "head" in run[name].dims for name in names)
    if not _line_variables(run, names):
        return ""
    many = run.sizes.get("prompt", 1) > 1
    over = ["heads"] * headed + ["prompts"] * many + ["seeds"] * (seeds > 1)
    joined = ", ".join(over[:-1]) + " and " * (len(over) > 1) + (over or [""])[-1]
    text = f"lines are means over {joined}" if over else ""
    what = _BANDS[band].format("seeds" if seeds else "prompts")
    if what and (seeds > 1 if seeds else many):
        text += f", bands {what}" if text else f"bands are {what}"
    return text


def _outside(runs: Runs, names: Sequence[str], band: Band | str) -> str:
    """That means lie outside of their quantiles, where a few large values do that."""
    if band != "quantiles":
        return ""
    for name in _line_variables(as_runs(runs)[0], names):
        found = summary(runs, name, band)
        if ((found["mean"] > found["high"]) | (found["mean"] < found["low"])).any():
            return "a mean outside its band is pulled there by a few values far from the others"
    return ""


def _left_out(runs: Runs, names: Sequence[str]) -> str:
    known = _line_variables(as_runs(runs)[0], names)
    out = {name: left_out(runs, name) for name in known}
    missing = [f"{name} of {n}" for name, n in out.items() if n]
    return f"undefined and left out of the means, prompts: {', '.join(missing)}" if missing else ""


def _line_variables(run: xr.Dataset, names: Sequence[str]) -> list[str]:
    """Those that lines show as means over prompts: not those of single tokens."""
    return [n for n in names if n in run and "prompt" in run[n].dims and "token" not in run[n].dims]
