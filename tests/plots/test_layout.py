"""Whether a reader can read the figures: what overlaps, what is hidden, what is undefined."""

from __future__ import annotations

import html
import io

import matplotlib
import numpy as np
import pytest
import xarray as xr
from test_plots import NAME, NEURONS, only_axes, result

from tl_looped.model.geometry import LoopGeometry
from tl_looped.plots import (
    draw_panels,
    layer_matrix,
    over_depth,
    over_realised_depth,
    over_recurrences,
    pca_path,
)
from tl_looped.plots.attention_maps import attention_floor_plan
from tl_looped.plots.overlays import neuron_panel
from tl_looped.plots.panels import as_written, new_figure

pytestmark = pytest.mark.once


@pytest.mark.parametrize("R", [4, 8, 12])
@pytest.mark.parametrize("title", ["A title", "Figure 8. A title that goes on and on " * 3])
def test_title_caption_and_legend_stay_within_the_figure_and_apart(R: int, title: str) -> None:
    data, _ = result(R=R)
    base, _ = result(p=0, k=7, c=0, R=1)
    base.attrs["model"] = "an-organisation/A-model-with-a-long-name-of-32-layers"
    panel = over_depth(data, NAME, feedforward=base)
    figure = draw_panels([panel], title, "Numbers 0123456789 mean WWWW and MMMM. " * 9)
    figure.draw_without_rendering()
    box = figure.get_window_extent()
    (legend,) = figure.legends
    for item in (figure._suptitle, figure._supxlabel, legend, *figure.axes[0].texts):
        extent = item.get_window_extent()
        assert box.x0 <= extent.x0
        assert extent.x1 <= box.x1 + 1
        assert box.y0 <= extent.y0 + 1
        assert extent.y1 <= box.y1 + 1
    space = legend.get_window_extent()
    assert not figure._suptitle.get_window_extent().overlaps(space)
    for axes in figure.axes:
        assert not axes.get_window_extent().overlaps(space)
    assert figure.axes[0].get_window_extent().width > 5.0 * figure.dpi


def test_lines_that_coincide_both_show() -> None:
    data, _ = result()
    for name in ("residual_max", "residual_first"):
        data[name] = data["residual_mean"]
    names = ("residual_mean", "residual_max", "residual_first")
    _, largest, first = over_realised_depth(data, names, by_layer=False).lines
    assert largest.width > first.width + 1
    assert (largest.style, first.style) == ("-", "--")
    neurons = xr.Dataset({name: ("unique_layer", np.zeros(3)) for name in NEURONS})
    under, over = neuron_panel(neurons).lines
    assert under.width > over.width + 1


@pytest.mark.parametrize(("low", "high", "plain"), [(4.0, 5.0, True), (2.0, 60.0, True),
                                                    (1e-5, 1.0, False)])  # fmt: skip
def test_short_logarithmic_axes_have_plain_numbers(low: float, high: float, plain: bool) -> None:
    data, loop = result()
    data["residual_mean"][:] = np.geomspace(low, high, loop.n_layers)[:, None]
    axes = only_axes(draw_panels([over_recurrences(data, "residual_mean", log=True)], "t", ""))
    axes.figure.savefig(io.BytesIO(), dpi=30)
    bottom, top = axes.get_ylim()
    ticks = [t for t in (*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks())
             if t.label1.get_text() and bottom <= t.get_loc() <= top]  # fmt: skip
    assert 2 <= len(ticks) <= 14
    for tick in ticks:
        text = tick.label1.get_text()
        assert ("$" not in text) is plain
        if plain:
            assert float(text) == pytest.approx(tick.get_loc())


def test_what_is_undefined_throughout_says_so() -> None:
    loop, nan = LoopGeometry(1, 2, 1, 2), np.nan
    data, _ = result()
    data["sink_rate"][:] = nan
    figures = [
        layer_matrix(np.full((6, 6), nan), loop, "t", "cosine"),
        pca_path(np.full((2, 2, 2), nan), np.full(2, nan), "t"),
        attention_floor_plan(np.full((6, 2, 3, 3), nan, dtype=np.float32), loop, "t"),
        draw_panels([over_recurrences(data, "sink_rate", log=True)], "t", ""),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO(), dpi=30)
        assert "undefined throughout" in [t.get_text() for t in only_axes(figure).texts]
    whole = draw_panels([over_recurrences(data, NAME)], "t", "")
    assert "undefined throughout" not in [t.get_text() for t in only_axes(whole).texts]


@pytest.mark.parametrize("shape", [(2, 4, 2, 32), (0, 3, 1, 1), (1, 1, 0, 60), (4, 6, 4, 8)])
def test_towers_of_maps_hold_every_map_once_and_part_no_recurrence(shape: tuple[int, ...]) -> None:
    loop, heads, T = LoopGeometry(*shape), 4, 3
    # Every map has its own number, on the diagonal only.
    number = 1 + np.arange(loop.n_layers * heads).reshape(loop.n_layers, heads)
    patterns = (number[..., None, None] * np.eye(T)).astype(np.float32)
    figure = attention_floor_plan(patterns, loop, "t")
    towers = [axes for axes in figure.axes if axes.get_xlabel()]
    assert (len(towers) > 1) is (loop.n_layers >= 56)
    seen, next_layer = [], 0
    for axes in towers:
        sheet = axes.images[0].get_array().filled(np.nan) ** 2
        sky = int((sheet == 0).all(1).sum()) // (T + 2)
        rows = (sheet.shape[0] + 2) // (T + 2)
        for row in range(rows - 1, sky - 1, -1):
            tiles = [sheet[row * 5 : row * 5 + 3, h * 5 : h * 5 + 3] for h in range(heads)]
            seen.append([tile.trace() / T for tile in tiles])
        place = loop.locate(next_layer)
        assert place.layer == 0
        next_layer += rows - sky
    np.testing.assert_allclose(seen, number, rtol=1e-5)
    colours = [tuple(patch.get_edgecolor()[:3]) for axes in towers for patch in axes.patches]
    assert len(colours) == (loop.p > 0) + (loop.c > 0)
    names = [t.get_text() for axes in towers for t in axes.get_yticklabels()]
    assert (names[0] == "prelude") is (loop.p > 0)
    assert (names[-1] == "coda") is (loop.c > 0)


def test_names_of_prelude_and_coda_stay_clear_of_the_panel_s_title() -> None:
    data, _ = result(p=2, k=1, c=1, R=1)
    panels = [over_depth(data, NAME, title="ColSum concentration and more")] * 2
    figure = draw_panels(panels, "t", "")
    figure.draw_without_rendering()
    axes = only_axes(figure)
    names = [text for text in axes.texts if text.get_text() in ("prelude", "coda")]
    assert len(names) == 2
    for name in names:
        assert not name.get_window_extent().overlaps(axes.title.get_window_extent())


def test_the_floor_plan_frames_the_prelude_blue_below_and_the_coda_red_above() -> None:
    loop = LoopGeometry(2, 3, 1, 2)
    patterns = np.full((loop.n_layers, 2, 4, 4), 0.25, dtype=np.float32)
    figure = attention_floor_plan(patterns, loop, "t")
    prelude, coda = (patch for axes in figure.axes for patch in axes.patches)
    blue, red = prelude.get_edgecolor(), coda.get_edgecolor()
    assert blue[2] > 0.7 > blue[0]
    assert red[0] > 0.7 > red[2]
    # Rows count from the top of the sheet: what stands higher has the smaller y.
    assert coda.get_y() < prelude.get_y()
    assert prelude.get_height() == 2 * coda.get_height()


@pytest.mark.parametrize("name", ["a$b$", "$x_^$", r"\$", "50 %"])
def test_a_dollar_in_a_name_begins_no_mathematics(name: str) -> None:
    """Names of models, files and tokens hold any character; drawing must not read them."""
    figure = new_figure(4.0, 3.0, name, f"of {name}")
    figure.subplots().set_title(as_written(name))
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(content, format="svg")
    assert html.unescape(content.getvalue().decode()).count(name) >= 3
