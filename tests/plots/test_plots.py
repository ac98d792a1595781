"""Lines, bands, colours, axes and captions of plots, against the results they are made from."""

from __future__ import annotations

import colorsys
import io
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tl_looped.errors import InputError
from tl_looped.model.geometry import LoopGeometry
from tl_looped.plots import (
    draw_panels,
    layer_colours,
    layer_matrix,
    left_out,
    numbers_of,
    over_depth,
    over_realised_depth,
    over_recurrences,
    pca_path,
    probability_map,
    recurrence_colours,
    summary,
)
from tl_looped.plots.captions import caption_of
from tl_looped.plots.heat_maps import stage_ticks
from tl_looped.plots.limiting import algorithm_numbers, amplitudes
from tl_looped.plots.overlays import block_halves, neuron_panel
from tl_looped.plots.summaries import name_of

pytestmark = pytest.mark.once

NAME = "colsum_concentration"
NEURONS = ("prediction", "suppression")


def result(p: int = 2, k: int = 3, c: int = 1, R: int = 4, seed: int = 0, prompts: int = 5):
    """A result by depth, of uniform numbers."""
    loop = LoopGeometry(p, k, c, R)
    rng = np.random.default_rng(seed)
    headed = ("effective_layer", "head", "prompt")
    data = xr.Dataset(
        {
            NAME: (headed, rng.uniform(size=(loop.n_layers, 2, prompts))),
            "sink_rate": (headed[::2], rng.uniform(size=(loop.n_layers, prompts))),
            "residual_mean": (headed[::2], rng.uniform(1, 2, size=(loop.n_layers, prompts))),
        },
        coords={
            "prompt": np.arange(prompts),
            "n_tokens": ("prompt", np.arange(10, 10 + prompts)),
        },
        attrs={
            "model": "toy", "n_prelude": p, "n_core": k, "n_coda": c, "n_recurrences": R,
            "state_seed": 7,
        },
    )  # fmt: skip
    return data, loop


def drawn_line(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray, tuple]:
    (line,) = [line for line in axes.lines if line.get_gid() == label]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), line.get_color()


def only_axes(figure: Figure) -> Axes:
    return figure.axes[0]


def hue(colour: tuple[float, ...]) -> float:
    return colorsys.rgb_to_hsv(*colour[:3])[0]


@pytest.mark.parametrize("n", [2, 8, 32, 128])
def test_later_recurrences_are_yellower_and_later_layers_greener(n: int) -> None:
    # Hue: yellow 1/6, green 1/3, blue 2/3.
    for colours in (recurrence_colours(n), layer_colours(n)):
        assert (np.diff([hue(c) for c in colours]) < 0).all()
    assert hue(recurrence_colours(n)[-1]) < 1 / 6
    assert hue(recurrence_colours(n)[0]) > 1 / 3
    assert hue(layer_colours(n)[0]) > 0.6
    assert 0.3 < hue(layer_colours(n)[-1]) < 0.45
    assert recurrence_colours(1) == recurrence_colours(n)[:1]


def test_grouping_by_layer_shows_the_means_over_heads_and_prompts() -> None:
    data, loop = result()
    figure = draw_panels([over_recurrences(data, NAME)], "t", "c")
    expected = data[NAME].mean(("head", "prompt")).to_numpy()
    colours = layer_colours(loop.k)
    for layer in range(loop.k):
        x, y, colour = drawn_line(only_axes(figure), f"core layer {layer}")
        assert x.tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(y, [expected[loop.index(r, layer)] for r in range(loop.R)])
        assert colour == colours[layer]
    assert len([x for x in only_axes(figure).lines if "layer" in str(x.get_gid())]) == loop.k
    assert only_axes(figure).get_xlabel() == "recurrence r (0-based)"


def test_grouping_by_recurrence_shows_prelude_block_and_coda_in_percent_of_depth() -> None:
    data, _ = result(p=1, k=2, c=2, R=3)
    figure = draw_panels([over_depth(data, NAME)], "t", "c")
    expected = data[NAME].mean(("head", "prompt")).to_numpy()
    for r in range(3):
        x, y, colour = drawn_line(only_axes(figure), f"recurrence {r}")
        assert x.tolist() == [0, 25, 50, 75, 100]
        layers = [0, 1 + 2 * r, 2 + 2 * r, 7, 8]
        np.testing.assert_allclose(y, expected[layers])
        assert colour == recurrence_colours(3)[r]
    spans = {s.label: (s.start, s.end) for s in over_depth(data, NAME).spans}
    assert spans == {"prelude": (0, 12.5), "coda": (62.5, 100)}


def test_realised_depth_shows_every_layer_once_and_coloured_lines_through_the_core() -> None:
    data, loop = result()
    figure = draw_panels([over_realised_depth(data, NAME)], "t", "c")
    expected = data[NAME].mean(("head", "prompt")).to_numpy()
    x, y, _ = drawn_line(only_axes(figure), "all layers in order")
    assert x.tolist() == list(range(loop.n_layers))
    np.testing.assert_allclose(y, expected)
    x, y, _ = drawn_line(only_axes(figure), "core layer 2")
    assert x.tolist() == [4, 7, 10, 13]
    np.testing.assert_allclose(y, expected[[4, 7, 10, 13]])


def test_numbers_are_those_drawn() -> None:
    data, _ = result()
    panel = over_depth(data, NAME, "sd")
    table = numbers_of([panel])
    for line in panel.lines:
        rows = table[table["line"] == line.label]
        np.testing.assert_array_equal(rows["mean"], line.values["mean"])
        np.testing.assert_array_equal(rows["low"], line.values["low"])
        np.testing.assert_array_equal(rows["high"], line.values["high"])
        assert (rows["low"] < rows["high"]).all()
        assert (rows["n"] == 5).all()
    assert len(table) == 4 * 6


def test_bands_are_over_prompts_of_one_run_and_over_seeds_of_several() -> None:
    runs = [result(seed=s)[0] for s in range(3)]
    per_prompt = runs[0][NAME].mean("head")
    one = summary(runs[0], NAME, "sd")
    np.testing.assert_allclose(one["high"] - one["mean"], per_prompt.std("prompt", ddof=1))
    quantiles = summary(runs[0], NAME, "quantiles")
    np.testing.assert_allclose(quantiles["low"], per_prompt.quantile(0.1, "prompt"))
    np.testing.assert_allclose(quantiles["high"], per_prompt.quantile(0.9, "prompt"))
    means = np.stack([run[NAME].mean(("head", "prompt")) for run in runs])
    seeds = summary(runs, NAME, "sd")
    np.testing.assert_allclose(seeds["mean"], means.mean(0))
    np.testing.assert_allclose(seeds["mean"] - seeds["low"], means.std(0, ddof=1))
    assert (seeds["n"] == 3).all()
    np.testing.assert_allclose(summary(runs, NAME, "range")["high"], means.max(0))
    assert np.isnan(summary(runs[:1], NAME, "sd")["low"]).all()


def test_undefined_prompts_are_left_out_and_counted_undefined_heads_undefine_their_prompt() -> None:
    data, _ = result()
    data[NAME][3, 0, 1] = np.nan
    data[NAME][4, 1, 2] = np.inf
    data[NAME][5] = np.nan
    found = summary(data, NAME)
    kept = data[NAME].mean("head", skipna=False).to_numpy()
    np.testing.assert_allclose(found["mean"][3], np.delete(kept[3], 1).mean())
    np.testing.assert_allclose(found["mean"][4], np.delete(kept[4], 2).mean())
    assert np.isnan(found["mean"][5])
    assert found["n"].iloc[3:6].tolist() == [4, 4, 0]
    assert left_out(data, NAME) == 2
    assert f"{NAME} of 2" in caption_of(data, [NAME])
    figure = draw_panels([over_recurrences(data, NAME)], "t", "c")
    assert np.isnan(drawn_line(only_axes(figure), "core layer 0")[1][1])


@pytest.mark.parametrize("n", [8, 9, 128])
def test_up_to_eight_recurrences_get_a_legend_more_a_colour_bar(n: int) -> None:
    data, _ = result(R=n)
    figure = draw_panels([over_depth(data, "sink_rate")], "t", "c")
    lines = [x for x in figure.axes[0].lines if str(x.get_gid()).startswith("recurrence")]
    assert len(lines) == n
    if n <= 8:
        assert [t.get_text() for t in figure.legends[0].get_texts()][-1] == f"recurrence {n - 1}"
        assert len(figure.axes) == 1
    else:
        bar = figure.axes[1]
        assert not figure.legends
        # A block of one unit for each recurrence, its number in the middle.
        assert bar.get_ylim() == (-0.5, n - 0.5)
        assert min(tick for tick in bar.get_yticks() if tick >= -0.5) == 0
        assert bar.get_ylabel() == "recurrence (0-based)"


def test_axes_are_logarithmic_only_where_something_is_positive() -> None:
    data, loop = result()
    data["residual_mean"][loop.index(3, 0)] = 0.0
    axes = only_axes(draw_panels([over_recurrences(data, "residual_mean", log=True)], "t", "c"))
    assert axes.get_yscale() == "log"
    assert np.isnan(drawn_line(axes, "core layer 0")[1][3])
    assert np.isfinite(drawn_line(axes, "core layer 1")[1]).all()
    for value in (0.0, np.nan, -1.0):
        data["residual_mean"][:] = value
        panel = over_recurrences(data, "residual_mean", log=True)
        assert only_axes(draw_panels([panel], "t", "c")).get_yscale() == "linear"


@pytest.mark.parametrize("shape", [(0, 1, 0, 1), (0, 1, 0, 3), (0, 2, 0, 1), (1, 1, 1, 1)])
def test_shapes_without_prelude_coda_or_loop_are_drawn(shape: tuple[int, ...]) -> None:
    data, loop = result(*shape, prompts=1)
    panels = [make(data, NAME) for make in (over_recurrences, over_depth, over_realised_depth)]
    figure = draw_panels(panels, "t", "c")
    figure.savefig(io.BytesIO(), dpi=30)
    n = loop.p + loop.k + loop.c
    x = drawn_line(figure.axes[1], "recurrence 0")[0]
    assert x.tolist() == [100 * i / max(1, n - 1) for i in range(n)]
    neurons = xr.Dataset({name: ("unique_layer", np.zeros(n)) for name in NEURONS})
    panels.append(neuron_panel(neurons.assign_attrs(data.attrs)))
    here = {name for name, size in (("prelude", loop.p), ("coda", loop.c)) if size}
    for panel in panels[1:]:
        assert {span.label for span in panel.spans} == here


def test_a_defined_point_between_undefined_ones_is_a_dot() -> None:
    data, loop = result(k=1, R=20)
    rows = [loop.index(r, 0) for r in (4, 6)]
    data["sink_rate"][rows] = np.nan
    axes = only_axes(draw_panels([over_recurrences(data, "sink_rate")], "t", "c"))
    dots = [x for x in axes.lines if x.get_marker() == "."]
    assert [x.get_xdata().tolist() for x in dots] == [[5.0]]


def test_axes_have_labels_with_units_and_the_caption_says_what_was_run() -> None:
    data, _ = result()
    data["entropy_bits"] = data["sink_rate"]
    data["mixing_raw"] = data["sink_rate"].assign_attrs(long_name="mixing score", units="nats")
    assert over_depth(data, "entropy_bits").y_label == "residual entropy (bits)"
    assert over_depth(data, "mixing_raw").y_label == "mixing score (nats)"
    text = caption_of(data, ["sink_rate"], "sd", 128, "GSM8K")
    for part in (
        "Model toy (2, 3 x 4, 1)", "5 prompts of GSM8K, 10 to 14 tokens", "4 recurrences",
        "paper's figure has 128", "State seed 7", "at least 0.3",
        "mean ± one standard deviation over prompts",
    ):  # fmt: skip
        assert part in text
    fixed = data.rename(sink_rate="fixed_point_rel")
    assert "last recurrence, r = 3" in caption_of(fixed, ["fixed_point_rel"])
    longer = fixed.assign_attrs(reference_recurrences=8)
    assert "run of 8 recurrences" in caption_of(longer, ["fixed_point_rel"])


def test_figures_are_free_of_pyplot_and_save_as_svg() -> None:
    data, _ = result()
    figure = draw_panels([over_depth(data, NAME)], "A title", caption_of(data, [NAME]))
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )
    svg = io.BytesIO()
    figure.savefig(svg, format="svg")
    assert ET.fromstring(svg.getvalue()).tag.endswith("svg")


def test_the_last_trained_recurrence_is_marked_and_named_in_the_legend() -> None:
    data, _ = result(R=6)
    figure = draw_panels([over_recurrences(data, NAME, trained=2)], "t", "")
    assert [t.get_text() for t in figure.legends[0].get_texts()][-1] == "last trained: r = 1"
    dotted = [x for x in only_axes(figure).lines if x.get_linestyle() == ":"]
    assert [x.get_xdata() for x in dotted] == [[1.0, 1.0]]
    assert over_recurrences(data, NAME, trained=6).marked_x is None


def test_models_in_folders_are_called_by_the_last_part_of_their_path() -> None:
    data, _ = result()
    for model, name in (("/a/b/c-7", "c-7"), ("org/name-1.4B", "org/name-1.4B"), ("demo", "demo")):
        data.attrs["model"] = model
        assert name_of(data) == name
        assert f"Model {name} (2" in caption_of(data)
        (*_, line) = over_depth(data, NAME, feedforward=data).lines
        assert line.label == f"feedforward: {name}"
    del data.attrs["model"]
    assert caption_of(data).startswith("Model without a name (2")


def test_captions_claim_no_band_that_is_not_there() -> None:
    one, many = result(prompts=1)[0], result()[0]
    assert "means over heads." in caption_of(one, [NAME], "sd")
    assert "band" not in caption_of(one, [NAME], "sd")
    assert "eans over" not in caption_of(one, ["sink_rate"], "quantiles")
    assert "means over heads and prompts, bands mean ±" in caption_of(many, [NAME], "sd")
    assert "heads, prompts and seeds, bands least" in caption_of([many, many], [NAME], "range")
    assert "bands are least to largest of seeds" not in caption_of([one], ["sink_rate"], "range")


def test_a_mean_outside_of_its_quantiles_is_explained() -> None:
    data, _ = result(prompts=12)
    sentence = "mean outside its band"
    assert sentence not in caption_of(data, ["residual_mean"], "quantiles")
    data["residual_mean"][3, 4] = 1e6
    assert summary(data, "residual_mean", "quantiles")["high"][3] < 1e5
    assert sentence in caption_of(data, ["residual_mean"], "quantiles")
    assert sentence not in caption_of(data, ["residual_mean"], "sd")


def test_ticks_of_a_matrix_stand_in_the_middle_and_apart() -> None:
    assert stage_ticks(LoopGeometry(2, 4, 2, 2)) == [
        (0.5, "prelude"), (3.5, "r0"), (7.5, "r1"), (10.5, "coda"),
    ]  # fmt: skip
    for R in (1, 8, 32, 128):
        ticks = stage_ticks(LoopGeometry(2, 4, 2, R))
        assert len(ticks) <= 26
        assert min(np.diff([at for at, _ in ticks])) >= (4 * R + 4) / 30


def test_a_matrix_keeps_its_values_and_refuses_another_shape() -> None:
    loop = LoopGeometry(1, 2, 1, 2)
    matrix = np.arange(36.0).reshape(6, 6)
    matrix[0, 1] = np.nan
    shown = only_axes(layer_matrix(matrix, loop, "t", "cosine")).images[0].get_array()
    np.testing.assert_array_equal(shown.filled(np.nan), matrix)
    with pytest.raises(InputError, match=r"\[6, 6\]"):
        layer_matrix(matrix[:5, :5], loop, "t", "cosine")


def test_probabilities_are_written_into_their_cells() -> None:
    figure = probability_map(np.array([[1.0, 0.25], [np.nan, np.nan]]), ["a", "b"], ["a", "b"], "t")
    texts = [t.get_text() for t in only_axes(figure).texts]
    assert texts == ["1", "0.25", "none seen", "none seen"]


@pytest.mark.parametrize(("R", "panels"), [(4, 2), (8, 3), (128, 3)])
def test_a_path_has_all_points_and_its_last_half(R: int, panels: int) -> None:
    path = np.random.default_rng(0).normal(size=(R, 3, 2))
    figure = pca_path(path, np.array([0.5, np.nan]), "t")
    axes = [a for a in figure.axes if "component" in a.get_xlabel()]
    assert len(axes) == panels
    points = [np.asarray(a.collections[0].get_offsets()) for a in axes]
    np.testing.assert_allclose(points[0], path.reshape(-1, 2))
    if panels == 3:
        np.testing.assert_allclose(points[2], path[R // 2 :].reshape(-1, 2))
    assert "50.0 %" in axes[0].get_xlabel()
    assert "undefined" in axes[0].get_ylabel()
    colours = axes[1].collections[0].get_facecolors()
    np.testing.assert_allclose(colours[-1][:3], recurrence_colours(R)[-1])
    with pytest.raises(InputError, match="at least two components"):
        pca_path(path[..., :1], np.array([1.0]), "t")


@pytest.mark.parametrize("turns", [4, 8, 32])
def test_the_drawn_amplitude_is_that_of_the_oscillation_and_of_the_algorithm(turns: int) -> None:
    # On a Fourier bin the amplitude is exact but for the fitted line.
    series = 1 - 0.2 * (1 + np.cos(2 * np.pi * turns / 64 * np.arange(129)))
    _, spectrum = amplitudes(series, 64)
    assert spectrum.max() == pytest.approx(spectrum[turns], rel=1e-9)
    assert spectrum[turns] == pytest.approx(0.2, rel=0.03)
    table = algorithm_numbers(series[None], ["x"])
    assert table["amplitude"][0] == pytest.approx(spectrum[turns], rel=1e-9)
    assert table["label"][0] == "ORBIT"


def test_both_halves_of_a_block_run_over_the_whole_axis() -> None:
    data, _ = result(p=1, k=5, c=0, R=2)
    base, _ = result(p=0, k=7, c=0, R=1, seed=1)
    lines = {x.label: x for x in block_halves(data, base, NAME).lines}
    mean = data[NAME].mean(("head", "prompt")).to_numpy()
    assert lines["recurrence 1, first half"].x.tolist() == [0, 100]
    assert lines["recurrence 1, second half"].x.tolist() == [0, 50, 100]
    np.testing.assert_allclose(lines["recurrence 1, first half"].values["mean"], mean[6:8])
    np.testing.assert_allclose(lines["recurrence 1, second half"].values["mean"], mean[8:11])
    expected = base[NAME].mean(("head", "prompt"))
    np.testing.assert_allclose(lines["feedforward: toy"].values["mean"], expected)


def test_wrong_results_are_named() -> None:
    data, _ = result()
    with pytest.raises(InputError, match=r"no variable 'nothing'.*sink_rate"):
        summary(data, "nothing")
    with pytest.raises(InputError, match="one shape"):
        summary([data, result(R=5)[0]], NAME)
    with pytest.raises(InputError, match="must be by depth"):
        summary(data.expand_dims("layer"), NAME)
    with pytest.raises(InputError, match="no attribute 'n_core'"):
        over_depth(data.drop_attrs().assign_attrs(n_prelude=1), NAME)
    with pytest.raises(InputError, match="band must be one of"):
        summary(data, NAME, "se")
    with pytest.raises(InputError, match="no recurrence"):
        over_recurrences(data.assign_attrs(n_recurrences=0), NAME)
