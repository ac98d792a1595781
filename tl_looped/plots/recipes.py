"""How each kind of figure is made from results: one recipe a kind, used by a table of figures.

A recipe takes a ``Request`` (what the figure is called and shows) and results, and returns
``DrawnFigure``s: the figure, its caption and the numbers behind it. Recipes for single tokens
(limiting behaviour, orbits) are in ``tl_looped.plots.token_recipes``, those for several models in
``tl_looped.plots.grid_recipes``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from tl_looped.errors import InputError
from tl_looped.metrics.labels import trained_recurrences
from tl_looped.plots.attention_maps import attention_floor_plan
from tl_looped.plots.captions import About, ablated_layers, caption_of, verdict_of
from tl_looped.plots.groupings import over_depth, over_realised_depth, over_recurrences
from tl_looped.plots.heat_maps import layer_matrix, matrix_numbers
from tl_looped.plots.overlays import block_halves, neuron_panel
from tl_looped.plots.panels import Panel, all_zero, draw_panels, numbers_of
from tl_looped.plots.paths import path_numbers, pca_path, token_paths
from tl_looped.plots.summaries import Runs, as_runs, name_of, shape_of
from tl_looped.words import count

TITLES = {
    "sink_rate": "sink rate",
    "mixing_per_token": "mixing score",
    "colsum_concentration": "ColSum concentration",
    "entropy_bits": "residual entropy",
}


@dataclass(frozen=True)
class DrawOptions:
    """What a figure may be given besides its data.

    Args:
        feedforward: Results of a feedforward model to draw over the block (8, 32, 33, 40).
        control: Results of a feedforward control, one per seed (10, 54 to 62).
        baseline: The run without the ablation, drawn as a second figure (41).
        recurrences: Which recurrences the grouping R shows; all if None.
        band: In place of the figure's own band.
        prompt: Which prompt (16 to 18, by its number in the results); that of the greatest orbit
            amplitude if None.
        tokens: Titles of the tokens (15).
        window, tau, rho: Of Algorithm 1 (13, 16 to 18).
        prompt_set: What the prompts are, for captions.
        trained: Recurrences of the training, marked in the grouping L; what the results say if
            None. 0, for a model that was not trained as a loop, marks nothing.
        subtitle: Added to the titles of Figures 6 and 29 to 31, which name no model.
        with_caption: Write the caption under the figure too.
    """

    feedforward: Any = None
    control: Any = None
    baseline: Any = None
    recurrences: Sequence[int] | None = None
    band: str | None = None
    prompt: int | None = None
    tokens: Sequence[str] | None = None
    window: int = 64
    tau: float = 0.05
    rho: float = 0.9
    prompt_set: str | None = None
    trained: int | float | None = None
    subtitle: str | None = None
    with_caption: bool = True


@dataclass(frozen=True)
class Request:
    """A figure as it is asked for.

    Args:
        number: In the paper.
        title: What it shows.
        variables: What it draws.
        recurrences: The paper's; None if not stated.
        band: Of the lines.
        options: See :class:`DrawOptions`.
    """

    number: int
    title: str
    variables: tuple[str, ...]
    recurrences: int | None = None
    band: str = "none"
    options: DrawOptions = field(default_factory=DrawOptions)


@dataclass(frozen=True)
class DrawnFigure:
    """A figure and all that belongs to it.

    Attributes:
        number: In the paper.
        name: For files: ``fig07``, ``fig18_depth``.
        title: What it shows, and of which model; without the number, which captions and reports
            set before it. The figure itself is headed ``Figure 7.`` and the title.
        caption: What was run and how; see ``tl_looped.plots.captions``.
        figure: To be saved, ``figure.savefig``; never shown.
        numbers: What was drawn, as a table.
        settings: Thresholds, band and recurrences of the figure.
    """

    number: int
    name: str
    title: str
    caption: str
    figure: Figure
    numbers: pd.DataFrame
    settings: dict[str, Any]


Recipe: TypeAlias = Callable[[Request, Any], list[DrawnFigure]]


def finished(
    request: Request,
    runs: Runs,
    caption: str,
    paint: Callable[[str, str], Figure],
    numbers: pd.DataFrame,
    suffix: str = "",
    what: str = "",
    several: bool = False,
) -> DrawnFigure:
    """A drawn figure with its title and caption.

    Args:
        request: What was asked for.
        runs: What it was made from.
        caption: The caption.
        paint: ``(title, caption) -> Figure``.
        numbers: The numbers behind it.
        suffix: Of the name, where a request gives several figures.
        what: Added to the title.
        several: Of several models: the title names none.
    """
    run = as_runs(runs)[0]
    title = request.title + what + ("" if several else f", {name_of(run)}")
    title = title[0].upper() + title[1:]
    figure = paint(
        f"Figure {request.number}. {title}", caption if request.options.with_caption else ""
    )
    settings = {"band": band_of(request), "paper_recurrences": request.recurrences}
    if "n_recurrences" in run.attrs:
        settings["recurrences"] = int(run.attrs["n_recurrences"])
    name = f"fig{request.number:02d}{suffix}"
    return DrawnFigure(request.number, name, title, caption, figure, numbers, settings)


def band_of(request: Request) -> str:
    """The figure's band, or the one that was asked for."""
    return request.options.band or request.band


def caption_for(
    request: Request, runs: Runs, extra: Sequence[str] = (), about: About = "prompts"
) -> str:
    """The caption of a request; ``extra`` are sentences of its own."""
    return caption_of(
        runs, request.variables, band_of(request), request.recurrences,
        request.options.prompt_set, extra, about,
    )  # fmt: skip


def of_panels(
    request: Request,
    runs: Runs,
    panels: list[Panel],
    columns: int = 2,
    extra: Sequence[str] = (),
    size: tuple[float, float] = (4.6, 3.1),
    share_y: bool = False,
    suffix: str = "",
    what: str = "",
    several: bool = False,
) -> DrawnFigure:
    """Panels of lines as a drawn figure; see ``finished`` and ``draw_panels``."""
    if any(panel.log and not all_zero(panel) for panel in panels):
        extra = [*extra, "on logarithmic axes, zeros are not drawn"]
    caption = caption_for(request, runs, extra, "models" if several else "prompts")

    def paint(title: str, text: str) -> Figure:
        return draw_panels(panels, title, text, columns, size, share_y)

    return finished(request, runs, caption, paint, numbers_of(panels), suffix, what, several)


def _title_of(request: Request, name: str) -> str:
    return TITLES.get(name, "") if len(request.variables) > 1 else ""


def by_layer(request: Request, data: Runs, log: bool = False) -> list[DrawnFigure]:
    """Grouping L: each variable over the recurrences."""
    trained = request.options.trained
    if trained is None:
        trained = trained_recurrences(as_runs(data)[0])
    panels = [
        over_recurrences(data, name, band_of(request), log, _title_of(request, name), trained)
        for name in request.variables
    ]
    # The distance to the last state falls whatever the run does: the title says if it converges.
    found = verdict_of(as_runs(data)[0]) if _to_last_state(request, data) else None
    what = f" ({found[0]} for {found[1]:,} of {count(found[2], 'prompt')})" if found else ""
    return [of_panels(request, data, panels, what=what)]


def _to_last_state(request: Request, data: Runs) -> bool:
    own = "reference_recurrences" not in as_runs(data)[0].attrs
    return own and any(name.startswith("fixed_point") for name in request.variables)


def by_recurrence_over_depth(
    request: Request,
    data: Runs,
    last: int | None = None,
    feedforward: Any = None,
    suffix: str = "",
    what: str = "",
    extra: Sequence[str] = (),
) -> list[DrawnFigure]:
    """Grouping R: each variable over the depth of the block, of the last recurrences or all."""
    loop, chosen = shape_of(data), request.options.recurrences
    if chosen is None and last is not None:
        chosen = range(max(0, loop.R - last), loop.R)
    panels = [
        over_depth(data, name, band_of(request), _title_of(request, name), chosen, feedforward)
        for name in request.variables
    ]
    extra = [*extra] + ([] if chosen is None else [f"shown are recurrences {_ranges(chosen)}"])
    if feedforward is not None:
        extra.append(_feedforward(feedforward))
    return [of_panels(request, data, panels, extra=extra, suffix=suffix, what=what)]


def _ranges(chosen: Sequence[int]) -> str:
    if isinstance(chosen, range) and len(chosen) > 2:
        return f"{chosen[0]} to {chosen[-1]}"
    return ", ".join(map(str, chosen))


def _feedforward(runs: Runs) -> str:
    """What the curve of a feedforward model is, for captions."""
    run = as_runs(runs)[0]
    n = shape_of(run).n_layers
    return f"feedforward: the {n} layers of {name_of(run)} over their own depth"


def over_feedforward(request: Request, data: Runs) -> list[DrawnFigure]:
    """Grouping R with the curve of a feedforward model (Fig. 8)."""
    base = _needed(request, "feedforward")
    return by_recurrence_over_depth(request, data, feedforward=base)


def ablated(request: Request, data: Runs) -> list[DrawnFigure]:
    """Grouping R of a run with an ablation, and of the one without it if given (Fig. 41)."""
    what = ", second layer's MLP output zeroed"
    layers = ablated_layers(as_runs(data)[0])
    extra = ["that the output was zeroed is the caller's word: results do not record hooks"]
    if layers:
        extra = []
        what = f", MLP output of {', '.join(layers)} zeroed"
    out = by_recurrence_over_depth(request, data, what=what, extra=extra)
    if request.options.baseline is not None:
        base = request.options.baseline
        out += by_recurrence_over_depth(request, base, suffix="_baseline", what=", nothing zeroed")
    return out


def realised(request: Request, data: Runs, extra: Sequence[str] = ()) -> list[DrawnFigure]:
    """Grouping N + L: each variable over all effective layers."""
    panels = [
        over_realised_depth(data, name, band_of(request), _title_of(request, name))
        for name in request.variables
    ]
    long = shape_of(data).R > 8
    columns, size = (1, (7.6, 2.4)) if long else (2, (4.6, 3.1))
    return [of_panels(request, data, panels, columns, extra, size)]


def residual_norms(request: Request, data: Runs) -> list[DrawnFigure]:
    """Grouping N: norms of the residual stream on one logarithmic axis."""
    panel = over_realised_depth(data, request.variables, band_of(request), by_layer=False, log=True)
    return [of_panels(request, data, [panel])]


def halves(request: Request, data: Runs) -> list[DrawnFigure]:
    """Both halves of the block over a feedforward model (Fig. 40)."""
    base = _needed(request, "feedforward")
    panels = [
        block_halves(data, base, name, band_of(request), TITLES.get(name, ""))
        for name in request.variables
    ]
    k = shape_of(data).k
    extra = [
        f"solid: core layers 0 to {k // 2 - 1}; dashed: {k // 2} to {k - 1}, each half over its "
        "own depth, without prelude and coda",
        _feedforward(base),
    ]
    return [of_panels(request, data, panels, extra=extra)]


def matrix(request: Request, data: xr.Dataset) -> list[DrawnFigure]:
    """A matrix between all effective layers."""
    name = request.variables[0]
    loop, values = shape_of(data), data[name]
    if values.ndim != 2:
        raise InputError(f"data: {name} must be [effective_layer, other_layer], got {values.dims}")
    array = values.to_numpy().astype(np.float64)
    cosine = "cosine" in name
    label = "residual cosine, mean over tokens and prompts"
    if not cosine:
        label = "Frobenius distance of patterns, mean over heads and prompts"

    def paint(title: str, caption: str) -> Figure:
        limits = (None, 1.0) if cosine else (0.0, None)
        return layer_matrix(array, loop, title, label, caption, limits)

    caption = caption_for(request, data, ["grey: undefined"] if np.isnan(array).any() else [])
    return [finished(request, data, caption, paint, matrix_numbers(array, loop))]


def path(request: Request, data: xr.Dataset) -> list[DrawnFigure]:
    """A PCA path of the last token, or of several (Fig. 15) where ``pca`` has tokens."""
    points, explained = data["pca"], data["pca_explained"].to_numpy().astype(np.float64)
    if "token" in points.dims:
        return _token_paths(request, data)
    array = points.transpose("recurrence", "layer", "component").to_numpy().astype(np.float64)
    extra = (
        f"last token of {_first_prompt(data)}; every point is the state behind one core layer",
        "components of all points shown; grey lines join them in the order of the run",
    )
    caption = caption_for(request, data, extra, "prompt")

    def paint(title: str, text: str) -> Figure:
        return pca_path(array, explained, title, text)

    return [finished(request, data, caption, paint, path_numbers(array))]


def _first_prompt(data: xr.Dataset) -> str:
    numbers = [int(n) for n in data["prompt"].to_numpy()] if "prompt" in data.coords else []
    return f"the first prompt (number {numbers[0]})" if numbers else "one prompt"


def _token_paths(request: Request, data: xr.Dataset) -> list[DrawnFigure]:
    order = ("token", "recurrence", "layer", "component")
    array = data["pca"].transpose(*order).to_numpy().astype(np.float64)
    explained = data["pca_explained"].to_numpy().astype(np.float64)
    names = list(request.options.tokens or [f"token {i}" for i in range(len(array))])
    if len(names) != len(array):
        raise InputError(f"tokens must name the {len(array)} tokens of pca, got {len(names)}")
    extra = ["a panel per token; components of all tokens, layers and recurrences"]
    caption = caption_for(request, data, extra, "prompt")

    def paint(title: str, text: str) -> Figure:
        return token_paths(array, explained, names, title, text)

    tables = [path_numbers(p).assign(token=name) for p, name in zip(array, names, strict=True)]
    return [finished(request, data, caption, paint, pd.concat(tables, ignore_index=True))]


def neurons(request: Request, data: xr.Dataset, looped: bool) -> list[DrawnFigure]:
    """Prediction and suppression neurons over depth (Figs 32, 33)."""
    feedforward = False
    if "n_core" in data.attrs:
        loop = shape_of(data)
        feedforward = loop.p == 0 and loop.c == 0 and loop.R == 1
    elif "stage" in data.coords:
        feedforward = set(map(str, data["stage"].to_numpy())) == {"feedforward"}
    if feedforward is looped:
        kind = "looped" if looped else "feedforward"
        other = 32 if looped else 33
        raise InputError(
            f"Fig. {request.number} is of a {kind} model, the run is not: see Fig. {other}"
        )
    base = request.options.feedforward
    panel = neuron_panel(data, base)
    extra = ["of the weights alone; prediction drawn wider, for where both are equal"]
    if base is not None:
        extra.append(f"dashed: {name_of(base)} over its own depth")
    caption = caption_for(request, data, extra, "weights")

    def paint(title: str, text: str) -> Figure:
        return draw_panels([panel], title, text)

    return [finished(request, data, caption, paint, numbers_of([panel]))]


def attention_sheet(request: Request, data: xr.Dataset) -> list[DrawnFigure]:
    """Every attention map of one prompt (Fig. 63)."""
    patterns = data["pattern"].transpose("effective_layer", "head", "query", "key").to_numpy()
    loop = shape_of(data)

    def paint(title: str, text: str) -> Figure:
        return attention_floor_plan(patterns, loop, title, text)

    extra = [
        f"one prompt of {patterns.shape[-1]} tokens; queries downwards, keys to the right",
        "depth upwards, one tower after the other; prelude framed blue, coda red",
    ]
    caption = caption_for(request, data, extra, "prompt")
    cells = np.indices(patterns.shape).reshape(4, -1)
    columns = ("effective_layer", "head", "query", "key")
    numbers = pd.DataFrame(dict(zip(columns, cells, strict=True)) | {"weight": patterns.ravel()})
    return [finished(request, data, caption, paint, numbers[numbers["key"] <= numbers["query"]])]


def _needed(request: Request, name: str) -> Any:
    value = getattr(request.options, name)
    if value is None:
        raise InputError(
            f"Fig. {request.number} needs {name}=: results by depth of the feedforward model on "
            "the same prompts, from stream or from_cache"
        )
    return value
