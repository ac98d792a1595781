"""Figures 6 and 29 to 31 of Section 4.2, and its page, ``section-4.2.html``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from tl_looped.errors import InputError
from tl_looped.experiments.drawing import save_figures
from tl_looped.files import make_folder
from tl_looped.metrics.convergence import FIXED_POINTS, VERDICT_WORDS, Verdict
from tl_looped.paper.figures import draw
from tl_looped.paper.section42.cells import Cell, CellSize
from tl_looped.paper.section42.tables import INJECTIONS, GridTables, is_zero
from tl_looped.plots.grids import NORM_NAMES, Condition, condition_name
from tl_looped.plots.recipes import DrawnFigure
from tl_looped.plots.spectral_radius import radius_against_rate
from tl_looped.report.exhibits import named_figures
from tl_looped.report.page import table_of, write_page
from tl_looped.report.parts import PagePart, PageTable

_PAGE = "section-4.2.html"
FIGURE_OF = {4: (30,), 12: (6, 29), 16: (31,)}
"""Figures of a number of layers."""

INIT_NAMES = {"normal": "N(0, 0.02²)", "fan_in": "N(0, 1 / fan-in)"}


def draw_section42(
    found: Mapping[Cell, xr.Dataset],
    folder: Path,
    command: str,
    say: Callable[[str], None],
) -> list[Path]:
    """Draw the grid's figures, one of each a kind of weights, and rate against spectral radius.

    What cannot be drawn of an incomplete grid is said.

    Args:
        found: Results by cell.
        folder: Where figures go: ``fig06_normal``, ``fig29_fan_in_successive_abs``, ...
        command: That made them.
        say: Gets notices.

    Returns:
        The images.
    """
    images: list[Path] = []
    grids: dict[tuple[str, int], dict[Condition, list[xr.Dataset]]] = {}
    for cell, data in sorted(found.items()):
        grid = grids.setdefault((cell.init, cell.n_layers), {})
        grid.setdefault((cell.norm, cell.injected), []).append(data)
    for init, words in INIT_NAMES.items():
        for n_layers, numbers in FIGURE_OF.items():
            grid = grids.get((init, n_layers), {})
            if not grid:
                say(f"{init}, {n_layers} layers: no cell was run")
                continue
            for number in numbers:
                try:
                    drawn = draw(number, grid, subtitle=words, prompt_set=_input(grid))
                except InputError as error:
                    say(f"figure {number}, {init}: {error}")
                    continue
                named = [replace(one, name=_named(one.name, init)) for one in drawn]
                images += save_figures(named, folder, command)
    images += save_figures(_radii(found), folder, command)
    return images


def _radii(found: Mapping[Cell, xr.Dataset]) -> list[DrawnFigure]:
    """Rate over spectral radius, a point per model, of the conditions with any fixed point."""
    groups: dict[str, list[xr.Dataset]] = {}
    for cell, data in sorted(found.items()):
        if np.isfinite(data["spectral_radius"]).any():
            name = f"{condition_name((cell.norm, cell.injected))}, {INIT_NAMES[cell.init]}"
            names = ("spectral_radius", "spectral_radius_error", "rate", "verdict", "settled_at")
            groups.setdefault(name, []).append(data[list(names)])
    if not groups:
        return []
    joined = {name: xr.concat(runs, "model") for name, runs in groups.items()}
    n = sum(map(len, groups.values()))
    about = (
        f"Section 4.2: {n} of {len(found)} models of random weights, those that reach a fixed "
        "point; 4 to 16 layers, one input each"
    )
    drawn = radius_against_rate(joined, about, unit="models")
    return [replace(drawn, name=f"fig_{drawn.name}")]


def _named(name: str, init: str) -> str:
    """``fig29_successive_abs`` as ``fig29_fan_in_successive_abs``."""
    number, _, rest = name.partition("_")
    return "_".join(filter(None, (number, init, rest)))


def _input(grid: Mapping[Any, list[xr.Dataset]]) -> str:
    n = next(iter(grid.values()))[0].attrs["cell_n_tokens"]
    return f"{n} random vectors each, others for every seed"


def write_section42(tables: GridTables, out: Path) -> Path:
    """Write ``OUT/section-4.2.html`` of the tables and of the figures in ``OUT/figures``.

    Raises:
        DataError: if the file cannot be written.
    """
    cells = tables.cells
    seeds = cells["seed"].nunique()
    size = CellSize(**tables.about["size"])
    lead = (
        f"{len(cells)} looped models of random weights, {seeds} seeds per condition, width "
        f"{size.d_model}, {size.n_recurrences} recurrences of one random input of {size.n_tokens} "
        f"tokens; verdicts are confirmed by {2 * size.n_recurrences}. It is Section 4.2 of arXiv "
        "2604.11791, with the sizes, the initialisation and the form of injection that the paper "
        "does not give chosen here."
    )
    parts = [
        _answer(tables),
        verdict_part(tables),
        *(_figures(init, out) for init in INIT_NAMES if init in set(cells["init"])),
        *_spectral(tables, out),
        *_contrasts(tables),
        _counts(tables, size),
    ]
    make_folder(out)
    title = "Section 4.2: looped models of random weights"
    return write_page(out / _PAGE, title, parts, lead=lead)


def _answer(tables: GridTables) -> PagePart:
    """Which conditions always, sometimes, never have a fixed point."""
    cells, sentences = tables.cells, []
    for init in INIT_NAMES:
        of = cells[cells["init"] == init]
        if not len(of):
            continue
        words = INIT_NAMES[init]
        sentences.append(
            f"Weights {words}: {int(of['fixed_point'].sum())} of {len(of)} models reach a fixed "
            "point" + _by_condition(of)
        )
    contrasts = tables.contrasts
    decided = int(contrasts["decided"].sum()) if len(contrasts) else 0
    n = cells["seed"].nunique()
    least = 2 / 2**n
    rule = (
        f"Of {len(contrasts)} paired contrasts, {decided} are decided. A contrast is decided if "
        "its t-interval leaves out 0 and the exact sign-flip p is at most 0.05; over "
        f"{n} seeds that p cannot fall below {least:.3g}"
    )
    if least > 0.05:
        rule += (
            ", so that no contrast can be. The intervals are what this scale gives; "
            "--seeds 6 or more could decide"
        )
    rule += "."
    title = "Who reaches a fixed point"
    return PagePart("answer", title, (rule,), findings=tuple(sentences))


def _by_condition(of: pd.DataFrame) -> str:
    """`` (pre-norm with injection 15 of 15, ...); no other``, or nothing."""
    some = []
    for norm, name in NORM_NAMES.items():
        for injection in INJECTIONS:
            these = of[(of["norm"] == norm) & (of["injection"] == injection)]["fixed_point"]
            if these.any():
                how = "with" if injection == INJECTIONS[0] else "without"
                some.append(f"{name} {how} injection {int(these.sum())} of {len(these)}")
    return f" ({', '.join(some)}; no other)." if some else "."


def verdict_part(tables: GridTables) -> PagePart:
    """A table per kind of weights; a rate only where a seed of the condition has a fixed point."""
    cells = tables.cells
    rates = tables.conditions[tables.conditions["quantity"] == "rate"]
    keys = ["init", "layers", "norm", "injection"]
    parts = []
    for init, words in INIT_NAMES.items():
        rows = []
        for key, of in cells[cells["init"] == init].groupby(keys, sort=False):
            rate = rates[(rates[keys] == list(key)).all(axis=1)]
            rows.append(_verdict_row(key, of, rate.iloc[0]))
        if rows:
            columns = (
                "Layers", "Norm", "Injection", "Verdict (seeds)", "Rate", "95 % bootstrap",
                "Relative step", "Cosine", "Norm growth", "Lowest cosine of layers",
            )  # fmt: skip
            caption = (
                f"Weights {words}. Means over seeds. Rate: the factor by "
                "which steps shrink, a fit over all above the noise floor; no rate where no seed "
                "reaches a fixed point, and of all seeds where some do. Relative step: the "
                "largest of any layer at the last recurrence, over the norm of the state. Cosine: "
                "the lowest of a layer's last two states. Norm growth: over "
                "the second half. Lowest cosine: of the first layer's last state "
                "with any layer's; 1 is one state for all layers."
            )
            parts.append(PageTable(caption, columns, tuple(rows)))
    return PagePart("verdicts", "The verdict of every cell", (), tuple(parts))


def _verdict_row(key: tuple[object, ...], of: pd.DataFrame, rate: pd.Series) -> tuple[str, ...]:
    _, layers, norm, injection = key
    counts = of["verdict"].value_counts(sort=True)
    verdict = ", ".join(f"{VERDICT_WORDS[Verdict[str(name)]]} {n}" for name, n in counts.items())
    ends = [rate["percentile_low"], rate["percentile_high"]]
    arrives = of["verdict"].isin([verdict.name for verdict in FIXED_POINTS]).any()
    has_ends = arrives and np.isfinite(ends).all()
    interval = " to ".join(f"{end:.3f}" for end in ends) if has_ends else "–"
    return (
        str(layers),
        NORM_NAMES[str(norm)],
        "yes" if injection == INJECTIONS[0] else "no",
        verdict,
        f"{rate['mean']:.3f}" if arrives else "–",
        interval,
        f"{of['relative_step'].mean():.2g}",
        f"{of['cosine_step'].mean():.4f}",
        f"{of['growth'].mean():.3g}",
        f"{of['lowest_layer_cosine'].mean():.3f}",
    )


def _figures(init: str, out: Path) -> PagePart:
    names = [
        f"fig06_{init}",
        f"fig29_{init}_successive_abs",
        f"fig29_{init}_successive_cosine",
        f"fig30_{init}",
        f"fig31_{init}",
    ]
    words = INIT_NAMES[init]
    anchor, title = f"figures-{init}", f"Figures, weights {words}"
    figures = named_figures(out / "figures", names, anchor, out)
    return PagePart(anchor, title, figures=figures)


def _spectral(tables: GridTables, out: Path) -> list[PagePart]:
    if not tables.cells["spectral_radius"].notna().any():
        return []
    figures = named_figures(out / "figures", ("fig_spectral_radius_against_rate",), "spectral", out)
    text = (
        "At a fixed point, small deviations shrink in the long run by the spectral radius of the "
        "loop's Jacobian a recurrence. The measured rate is a fit over all steps, the first ones "
        "included."
    )
    return [PagePart("spectral", "Spectral radius and rate", (text,), figures=figures)]


def _contrasts(tables: GridTables) -> list[PagePart]:
    shown = tables.contrasts
    if not len(shown):
        return []
    zero = is_zero(shown)
    columns = {
        "quantity": "Quantity",
        "contrast": "Contrast",
        "init": "Weights",
        "norm": "Norm",
        "injection": "Injection",
        "layers": "Layers",
        "mean": "Mean difference",
        "percentile": "95 % bootstrap",
        "bca": "95 % BCa",
        "t": "95 % t-interval",
        "sign_flip_p": "Sign-flip p",
        "n_seeds": "Seeds",
        "decided": "Decided",
    }
    kept = shown[~zero]
    named = [name for name in ("contrast", "norm") if name in kept]
    kept = kept.assign(**{name: kept[name].map(_spelled) for name in named})
    columns = {name: text for name, text in columns.items() if name in kept or name in _INTERVALS}
    text = (
        f"Differences between models of one seed. {int(zero.sum())} of {len(shown)} contrasts, "
        "whose difference is 0 in every seed, are left out here and kept in contrasts.csv."
    )
    caption = "Paired contrasts over seeds. Fixed points: difference of the shares of models."
    return [PagePart("contrasts", "Contrasts", (text,), (table_of(kept, columns, caption),))]


def _spelled(text: object) -> object:
    """``pre - residual`` as ``pre-norm - Huginn norm``."""
    if not isinstance(text, str):
        return text
    return " − ".join(NORM_NAMES.get(part, part) for part in text.split(" - "))


_INTERVALS = ("percentile", "bca", "t")


def _counts(tables: GridTables, size: CellSize) -> PagePart:
    cells = tables.cells
    passes = 2 * size.n_recurrences * int(cells["layers"].sum())
    found = int(cells["spectral_radius"].notna().sum())
    text = (
        f"{len(cells)} models, one input each; {len(cells)} forward passes of "
        f"{2 * size.n_recurrences} recurrences, {passes:,} layers in all, of {size.n_tokens} "
        f"tokens. Spectral radius of {found} models, {size.n_iterations} iterations each."
    )
    return PagePart("counts", "What was run", (text,))
