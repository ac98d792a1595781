"""Recipes for figures about single tokens: Algorithm 1 (13, 14) and the strongest orbit (16-18)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.figure import Figure

from tl_looped.errors import InputError
from tl_looped.metrics.limiting import (
    LimitingBehavior,
    LimitingBehaviors,
    classify_limiting_behavior,
    cooccurrence,
)
from tl_looped.plots.heat_maps import probability_map
from tl_looped.plots.limiting import algorithm_numbers, algorithm_steps
from tl_looped.plots.recipes import (
    DrawnFigure,
    Request,
    by_recurrence_over_depth,
    caption_for,
    finished,
    realised,
)
from tl_looped.plots.summaries import shape_of
from tl_looped.words import count

_KINDS = ("FIXED", "SLIDER", "ORBIT", "UNKNOWN")


def limiting_steps(request: Request, data: xr.Dataset) -> list[DrawnFigure]:
    """Algorithm 1's steps for one token of each behaviour: that of the largest amplitude."""
    series, places = _series(request, data)
    found = _classified(request, series)
    chosen = []
    for kind in _KINDS:
        of_kind = np.flatnonzero(found.labels.numpy() == LimitingBehavior[kind])
        if len(of_kind):
            chosen.append(int(of_kind[found.amplitude.numpy()[of_kind].argmax()]))
    if not chosen:
        raise InputError("data: token_similarity is undefined for every token")
    options = request.options
    names = [f"prompt {places[i][0]}, token {places[i][1]}" for i in chosen]
    counts = [int((found.labels == LimitingBehavior[kind]).sum()) for kind in _KINDS]
    seen = ", ".join(f"{n} {kind.lower()}" for kind, n in zip(_KINDS, counts, strict=True))
    layer = data.sizes["layer"] - 1
    extra = [
        *_thresholds(request),
        f"core layer {layer}; of each behaviour the token of the largest amplitude",
        "late: within tau of the last state all through the window, in less than rho of the run",
        f"tokens: {seen}",
    ]
    rules = (options.window, options.tau, options.rho)

    def paint(title: str, text: str) -> Figure:
        return algorithm_steps(series[chosen], names, title, text, *rules)

    values = pd.DataFrame(series[chosen], index=names).T.rename_axis("recurrence").reset_index()
    steps = values.melt("recurrence", var_name="token", value_name="similarity")
    numbers = steps.merge(algorithm_numbers(series[chosen], names, *rules), on="token")
    caption = caption_for(request, data, extra)
    drawn = finished(request, data, caption, paint, numbers)
    settings = dict(zip(("window", "tau", "rho"), rules, strict=True))
    return [replace(drawn, settings=drawn.settings | settings)]


def _thresholds(request: Request) -> list[str]:
    options = request.options
    return [
        f"Algorithm 1 with tau = {options.tau:g}, rho = {options.rho:g}, window {options.window}"
    ]


def _of_labels(data: xr.Dataset) -> list[str]:
    """Thresholds that a result's labels were made with; nothing if it does not say."""
    rules = {name: data.attrs.get(name) for name in ("tau", "rho", "window")}
    if None in rules.values():
        return []
    text = ", ".join(f"{name} = {value:g}" for name, value in rules.items())
    return [f"labels of Algorithm 1 with {text}"]


def cooccurring(request: Request, data: xr.Dataset) -> list[DrawnFigure]:
    """``P(some layer shows b | some layer shows a)`` at the same token (Fig. 14)."""
    labels = data["limiting_label"].transpose("prompt", "layer", "token").to_numpy()
    kinds = [LimitingBehavior[kind] for kind in _KINDS]
    every = torch.from_numpy(labels.astype(np.int64))
    p = cooccurrence(every).numpy()[np.ix_(kinds, kinds)]
    counts = [int((labels == kind).any(1).sum()) for kind in kinds]
    real = int((labels != LimitingBehavior.UNDEFINED).any(1).sum())
    rows = [f"{kind.lower()}\n{count(n, 'token')}" for kind, n in zip(_KINDS, counts, strict=True)]
    columns = [kind.lower() for kind in _KINDS]

    def paint(title: str, text: str) -> Figure:
        return probability_map(p, rows, columns, title, text)

    extra = [*_of_labels(data), f"{count(real, 'token')}, {count(labels.shape[1], 'core layer')}"]
    numbers = pd.DataFrame(p, index=list(_KINDS), columns=list(_KINDS)).rename_axis("given")
    caption = caption_for(request, data, extra)
    return [finished(request, data, caption, paint, numbers.assign(tokens=counts).reset_index())]


def _series(
    request: Request, data: xr.Dataset
) -> tuple[Float[np.ndarray, "series recurrence"], list[tuple[int, int]]]:
    """Similarities of the last core layer, one row per real token, and (prompt, token) of each."""
    window, R = request.options.window, shape_of(data).R
    if "reference_recurrences" in data.attrs:
        raise InputError(
            f"Fig. {request.number} compares with the run's own last state, and the data compare "
            "with a longer run: leave reference_recurrences out"
        )
    if window + 1 > R:
        raise InputError(
            f"Fig. {request.number} needs {window + 1} recurrences for a window of {window} "
            f"(128 in the paper), the run has {R}: run more, or pass a smaller window="
        )
    similarity = data["token_similarity"].isel(layer=-1).transpose("prompt", "token", "recurrence")
    values = similarity.to_numpy().astype(np.float64)
    real = ~np.isnan(values).all(-1)
    prompts = data["prompt"].to_numpy() if "prompt" in data.coords else np.arange(len(values))
    places = [(int(prompts[p]), int(t)) for p, t in np.argwhere(real)]
    return values[real], places


def _classified(request: Request, series: Float[np.ndarray, "n recurrence"]) -> LimitingBehaviors:
    options = request.options
    return classify_limiting_behavior(
        torch.from_numpy(series), options.window, options.tau, options.rho
    )


def strongest_orbit(request: Request, data: xr.Dataset) -> tuple[int, str]:
    """The prompt that holds the orbit of the greatest amplitude at the last core layer.

    Returns:
        Its number, and a sentence about that orbit.

    Raises:
        InputError: if no token is an orbit, or the run is too short to say.
    """
    series, places = _series(request, data)
    found = _classified(request, series)
    orbit = found.labels.numpy() == LimitingBehavior.ORBIT
    if not orbit.any():
        raise InputError(
            f"Fig. {request.number} is of the prompt with the greatest orbit amplitude: no token "
            "of this run is an orbit. prompt= takes a prompt of your choice"
        )
    at = int(np.where(orbit, found.amplitude.numpy(), -1.0).argmax())
    prompt, token = places[at]
    why = (
        f"prompt {prompt} has the orbit of the greatest amplitude, {found.amplitude[at]:.3g}, at "
        f"token {token} and core layer {data.sizes['layer'] - 1}; its period is "
        f"{found.period[at]:.3g} recurrences"
    )
    return prompt, why


def of_strongest_orbit(request: Request, data: xr.Dataset, views: str) -> list[DrawnFigure]:
    """Signature of one prompt: over realised depth, by layer, and the last loops over depth.

    Args:
        request: What was asked for.
        data: Signature metrics, and ``token_similarity`` unless ``prompt=`` is given.
        views: ``"N"``, ``"R"`` or both, ``"NR"``.
    """
    number = request.options.prompt
    if number is None:
        number, why = strongest_orbit(request, data)
        extra = [*_thresholds(request), why]
    else:
        # Whether it has an orbit is not known then.
        request = replace(request, title=f"signature metrics of prompt {number}")
        extra = [f"prompt {number} was asked for"]
    prompts = [int(x) for x in data["prompt"].to_numpy()]
    if number not in prompts:
        raise InputError(f"prompt must be one of {prompts}, got {number}")
    one = data.isel(prompt=[prompts.index(number)])
    out = []
    for view in views:
        if view == "N":
            drawn = realised(request, one, extra)
        else:
            last = request.options.window
            drawn = by_recurrence_over_depth(request, one, last=last, extra=extra)
        suffix = "" if len(views) == 1 else {"N": "_depth", "R": "_block"}[view]
        out += [_renamed(x, x.name + suffix, number) for x in drawn]
    return out


def _renamed(drawn: DrawnFigure, name: str, prompt: int) -> DrawnFigure:
    return replace(drawn, name=name, settings=drawn.settings | {"prompt": prompt})
