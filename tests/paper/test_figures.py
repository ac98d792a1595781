"""The table of the paper's figures and its door, on a small run and on made-up behaviour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import random_config

from tl_looped import LoopedTransformer, NormLayout
from tl_looped.errors import InputError
from tl_looped.metrics import stream
from tl_looped.metrics.limiting import LimitingBehavior
from tl_looped.metrics.neurons import prediction_suppression
from tl_looped.paper.figures import FIGURES, draw

pytestmark = pytest.mark.once

GROUPS = ("signature", "magnitude", "successive", "fixed_point")


def run(R: int = 3, metrics=GROUPS, **config) -> xr.Dataset:
    model = LoopedTransformer.from_config(random_config(**config))
    tokens = [torch.arange(n) for n in (5, 7)]
    return stream(model, tokens, metrics, by="depth", n_recurrences=R)


@pytest.fixture(scope="module")
def looped() -> xr.Dataset:
    data = run()
    loop, rng = (3, 3), np.random.default_rng(0)
    n = data.sizes["effective_layer"]
    pairs = ("effective_layer", "other_layer")
    data["pairwise_attention_distance"] = (pairs, rng.uniform(size=(n, n)))
    data["pairwise_residual_cosine"] = (pairs, rng.uniform(size=(n, n)))
    data["pca"] = (("recurrence", "layer", "component"), rng.normal(size=(*loop, 2)))
    data["pca_explained"] = ("component", [0.6, 0.2])
    data["limiting_label"] = (("layer", "token", "prompt"), rng.integers(0, 4, (3, 7, 2)))
    model = LoopedTransformer.from_config(random_config())
    neurons = prediction_suppression(model)
    for name in ("prediction", "suppression"):
        data[name] = ("unique_layer", neurons[name].to_numpy())
    weights = rng.uniform(size=(n, 4, 5, 5)) * np.tril(np.ones((5, 5)))
    data["pattern"] = (("effective_layer", "head", "query", "key"), weights)
    return data


@pytest.fixture(scope="module")
def feedforward() -> xr.Dataset:
    return run(1, "signature", n_prelude=0, n_coda=0, n_core=5, model_name="base")


def test_the_table_holds_the_figures_of_the_paper() -> None:
    assert sorted(FIGURES) == [*range(2, 53), *range(54, 64)]


@pytest.mark.parametrize("number", [2, 3, 5, 7, 9, 12, 14, 22, 33, 47, 63])
def test_a_figure_has_caption_numbers_and_the_paper_s_recurrences(
    number: int, looped: xr.Dataset
) -> None:
    (drawn,) = draw(number, looped, prompt_set="toys")
    assert drawn.name == f"fig{number:02d}"
    assert drawn.title[0].isupper()
    assert str(number) not in drawn.title
    assert " ".join(drawn.figure._suptitle.get_text().split()) == f"Figure {number}. {drawn.title}"
    assert len(drawn.numbers) > 0
    assert "(2, 3 x 3, 1)" in drawn.caption
    paper = FIGURES[number].recurrences
    if number != 33 and paper is not None:
        assert (
            f"3 recurrences (not trained as a loop; the paper's figure has {paper})"
            in drawn.caption
        )
    assert drawn.settings["recurrences"] == 3
    for axes in drawn.figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel()


@pytest.mark.parametrize("number", [3, 4, 7, 9, 14, 20, 5, 33, 63, 13])
def test_missing_variables_are_named_with_the_run_that_makes_them(
    number: int, looped: xr.Dataset
) -> None:
    spec = FIGURES[number]
    bare = looped.drop_vars(spec.variables[0], errors="ignore")
    with pytest.raises(InputError, match=rf"Fig. {number} needs {spec.variables[0]}.*Made by:"):
        draw(number, bare)


@pytest.mark.parametrize("number", [1, 53, 64, "x", -3])
def test_an_unknown_number_lists_the_valid_ones(number: int | str, looped: xr.Dataset) -> None:
    with pytest.raises(InputError, match="valid are 2 to 52, 54 to 63"):
        draw(number, looped)


def test_figures_that_do_not_apply_say_why(looped: xr.Dataset, feedforward: xr.Dataset) -> None:
    with pytest.raises(InputError, match="unknown options colour; there are feedforward"):
        draw(7, looped, colour="red")
    with pytest.raises(InputError, match=r"Fig\. 8 needs feedforward="):
        draw(8, looped)
    with pytest.raises(InputError, match="is of a feedforward model"):
        draw(32, looped)
    with pytest.raises(InputError, match="shows a model of 4 core layers with prelude"):
        draw(54, looped)
    with pytest.raises(InputError, match=r"Fig\. 7 is of one model"):
        draw(7, {"a": looped})
    one = run(1)
    with pytest.raises(InputError, match=r"Fig\. 3 compares recurrences, 2 at least"):
        draw(3, one)


def test_the_feedforward_curve_lies_over_its_own_depth(
    looped: xr.Dataset, feedforward: xr.Dataset
) -> None:
    (drawn,) = draw(8, looped, feedforward=feedforward)
    rows = drawn.numbers[drawn.numbers["line"] == "feedforward: base"]
    assert rows["x"].tolist() == [0, 25, 50, 75, 100]
    expected = feedforward["colsum_concentration"].mean(("head", "prompt"))
    np.testing.assert_allclose(rows["mean"], expected)


@pytest.fixture(scope="module")
def behaviours() -> xr.Dataset:
    """128 recurrences of one layer: orbits of period 8, the stronger one in prompt 6."""
    R = 128
    r = np.arange(R)
    series = np.ones((R, 1, 4, 3))
    for prompt, radius in ((1, 0.3), (2, 0.5)):
        a = radius**2
        series[:, 0, 2, prompt] = (1 + a * np.cos(np.pi / 4 * (R - 1 - r))) / (1 + a)
    series[:, 0, 3, 0] = np.nan
    rng = np.random.default_rng(0)
    dims = ("effective_layer", "prompt")
    names = ("sink_rate", "mixing_per_token", "colsum_concentration", "entropy_bits")
    return xr.Dataset(
        {
            "token_similarity": (("recurrence", "layer", "token", "prompt"), series),
            **{name: (dims, rng.uniform(size=(R, 3))) for name in names},
        },
        coords={"prompt": [4, 5, 6]},
        attrs={"model": "toy", "n_prelude": 0, "n_core": 1, "n_coda": 0, "n_recurrences": R},
    )


def test_the_steps_of_algorithm_1_show_each_behaviour_by_its_largest_amplitude(
    behaviours: xr.Dataset,
) -> None:
    (drawn,) = draw(13, behaviours)
    assert "9 fixed, 0 slider, 2 orbit, 0 unknown" in drawn.caption
    assert "tau = 0.05, rho = 0.9, window 64" in drawn.caption
    rows = drawn.numbers.drop_duplicates("token").set_index("label")
    assert rows.loc["ORBIT", "token"] == "prompt 6, token 2"
    assert rows.loc["ORBIT", "period"] == 8
    assert len(drawn.figure.axes) == 6
    with pytest.raises(InputError, match="needs 129 recurrences for a window of 128"):
        draw(13, behaviours, window=128)


def test_the_strongest_orbit_names_its_prompt(behaviours: xr.Dataset) -> None:
    first, second = draw(18, behaviours)
    assert [first.name, second.name] == ["fig18_depth", "fig18_block"]
    assert first.settings["prompt"] == 6
    assert "1 prompt (number 6)" in first.caption
    lines = first.numbers[first.numbers["line"] == "all layers in order"]
    sink = lines[lines["panel"] == "sink rate"]
    np.testing.assert_allclose(sink["mean"], behaviours["sink_rate"].sel(prompt=6))
    assert "recurrences 64 to 127" in second.caption
    assert set(second.numbers["line"]) == {f"recurrence {r}" for r in range(64, 128)}
    for drawn in (first, second):
        assert "Prompt 6 has the orbit of the greatest amplitude, 0.2, at token 2" in drawn.caption
        assert "period is 8 recurrences" in drawn.caption
        assert "tau = 0.05, rho = 0.9, window 64" in drawn.caption
    (other,) = draw(16, behaviours, prompt=4)
    assert other.settings["prompt"] == 4
    assert other.title == "Signature metrics of prompt 4, toy"
    assert "orbit" not in other.caption
    with pytest.raises(InputError, match=r"prompt must be one of \[4, 5, 6\], got 2"):
        draw(16, behaviours, prompt=2)
    longer = behaviours.assign_attrs(reference_recurrences=256)
    for number in (13, 16):
        with pytest.raises(InputError, match="leave reference_recurrences out"):
            draw(number, longer)
    still = behaviours.copy()
    still["token_similarity"] = xr.ones_like(still["token_similarity"])
    with pytest.raises(InputError, match=r"no token of this run is an orbit.*prompt="):
        draw(17, still)


def test_cooccurrence_is_the_share_of_tokens(looped: xr.Dataset) -> None:
    data = looped.copy()
    fixed, slider, undefined = (LimitingBehavior[n] for n in ("FIXED", "SLIDER", "UNDEFINED"))
    labels = np.full((3, 7, 2), undefined)
    labels[:, :4, 0] = fixed
    labels[1, 0, 0] = slider
    data["limiting_label"] = (("layer", "token", "prompt"), labels)
    (drawn,) = draw(14, data)
    table = drawn.numbers.set_index("given")
    assert table.loc["FIXED", "SLIDER"] == 0.25
    assert table.loc["SLIDER", "FIXED"] == 1
    assert np.isnan(table.loc["ORBIT", "FIXED"])
    assert table["tokens"].tolist() == [4, 1, 0, 0]
    rows = [t.get_text() for t in drawn.figure.axes[0].get_yticklabels()]
    assert rows[:2] == ["fixed\n4 tokens", "slider\n1 token"]
    # The caption has the thresholds that the labels were made with, not those of the options.
    assert "tau" not in drawn.caption
    made = data.assign_attrs(tau=0.02, rho=0.8, window=32)
    assert "tau = 0.02, rho = 0.8, window = 32" in draw(14, made, tau=0.3)[0].caption


def _random_grid() -> dict[tuple[str, bool], list[xr.Dataset]]:
    shape = {"n_prelude": 0, "n_coda": 0, "n_core": 4, "d_model": 16}
    layouts = ("pre", "sandwich")
    return {
        (norm, flag): [
            # Other weights with the flag than without: a panel of the wrong one differs.
            run(3, GROUPS[2:], norm_layout=NormLayout(norm), seed=seed + 5 * flag, **shape)
            for seed in (range(2) if norm == "pre" else range(1, 3))
        ]
        for norm in layouts
        for flag in (True, False)
    }


def test_a_grid_of_conditions_has_a_panel_each_and_means_over_seeds() -> None:
    grid = _random_grid()
    (drawn,) = draw(30, grid)
    titles = [axes.get_title() for axes in drawn.figure.axes]
    assert titles[:3] == [
        "pre-norm + injection", "Ouro norm + injection", "lowest cosine, with injection",
    ]  # fmt: skip
    assert len(titles) == 6
    table = drawn.numbers
    rows = table[(table["panel"] == titles[1]) & (table["line"] == "core layer 2")]
    seeds = [x["fixed_point_rel"].mean("prompt")[2::4] for x in grid["sandwich", True]]
    np.testing.assert_allclose(rows["mean"], np.mean(seeds, 0))
    assert (rows["n"] == 2).all()
    for flag, panel in ((True, titles[2]), (False, titles[5])):
        rows = table[(table["panel"] == panel) & (table["line"] == "Ouro norm")]
        seeds = [x["fixed_point_lowest_cosine"].mean("prompt") for x in grid["sandwich", flag]]
        np.testing.assert_allclose(rows["mean"], np.mean(seeds, 0))
    with pytest.raises(InputError, match=r"Fig\. 6 shows 12 layers"):
        draw(6, grid)
    with pytest.raises(InputError, match=r"without a run: \[\('pre', False\)\]"):
        draw(30, {key: runs for key, runs in grid.items() if key != ("pre", False)})
    with pytest.raises(InputError, match="a condition is"):
        draw(30, {"pre": grid["pre", True]})


def test_small_models_share_one_control(feedforward: xr.Dataset, looped: xr.Dataset) -> None:
    (drawn,) = draw(10, {"three": [looped, looped], "control": [feedforward]})
    assert [axes.get_title() for axes in drawn.figure.axes] == ["three"]
    assert "three (2, 3 x 3, 1)" in drawn.caption
    assert {"recurrence 2", "feedforward: base"} <= set(drawn.numbers["line"])
    with pytest.raises(InputError, match="needs the feedforward control"):
        draw(10, {"three": looped})
    with pytest.raises(InputError, match="more than one feedforward control"):
        draw(10, {"a": feedforward, "b": feedforward})


def test_the_floor_plan_has_depth_upwards(looped: xr.Dataset) -> None:
    (drawn,) = draw(63, looped)
    sheet = drawn.figure.axes[0].images[0].get_array()
    patterns = looped["pattern"].to_numpy()
    side = 7
    for layer, head in ((0, 0), (11, 3), (4, 1)):
        top = (11 - layer) * side
        tile = sheet[top : top + 5, head * side : head * side + 5].filled(np.nan)
        np.testing.assert_allclose(tile**2, patterns[layer, head])
    frames = {patch.get_edgecolor()[:3]: patch for patch in drawn.figure.axes[0].patches}
    bottom = max(frames.items(), key=lambda item: item[1].get_y())
    assert bottom[0][2] > bottom[0][0]  # the prelude's frame is blue and at the bottom
    assert len(drawn.numbers) == 12 * 4 * 15


def test_halves_of_the_block_are_those_of_the_data(feedforward: xr.Dataset) -> None:
    data = run(2, "signature", n_core=5)
    (drawn,) = draw(40, data, feedforward=feedforward)
    # (2, 5 x 2, 1): the second recurrence is layers 7 to 11, its halves 7, 8 and 9, 10, 11.
    for panel, name in (("sink rate", "sink_rate"), ("residual entropy", "entropy_bits")):
        dims = [dim for dim in ("head", "prompt") if dim in data[name].dims]
        expected = data[name].mean(dims).to_numpy()
        table = drawn.numbers[drawn.numbers["panel"] == panel].set_index("line")
        first = table.loc["recurrence 1, first half"]
        second = table.loc["recurrence 1, second half"]
        np.testing.assert_allclose(first["mean"], expected[7:9])
        np.testing.assert_allclose(second["mean"], expected[9:12])
        assert first["x"].tolist() == [0, 100]
        assert second["x"].tolist() == [0, 50, 100]
    assert "core layers 0 to 1; dashed: 2 to 4" in drawn.caption
    assert "the 5 layers of base over their own depth" in drawn.caption


def test_an_ablation_is_titled_as_one_and_its_baseline_is_not(looped: xr.Dataset) -> None:
    ablated, baseline = draw(41, looped, baseline=looped)
    assert (ablated.name, baseline.name) == ("fig41", "fig41_baseline")
    assert ablated.title.startswith(
        "Signature metrics over block depth, second layer's MLP output zero"
    )
    assert "caller's word" in ablated.caption
    assert baseline.title.startswith("Signature metrics over block depth, nothing zeroed")
    assert "caller's word" not in baseline.caption
    layers = looped.assign_attrs(spec='{"ablate_mlp": ["prelude.1", "core.0"]}')
    (recorded,) = draw(41, layers)
    assert "without the MLP output of prelude.1, core.0." in recorded.caption
    assert "zeroed" in recorded.title


def test_neurons_of_a_feedforward_model_have_its_layers(feedforward: xr.Dataset) -> None:
    data = feedforward.copy()
    for i, name in enumerate(("prediction", "suppression")):
        data[name] = ("unique_layer", (np.arange(5) + i) / 100)
    (drawn,) = draw(32, data)
    table = drawn.numbers.set_index("line")
    assert table.loc["prediction", "mean"].tolist() == [0, 1, 2, 3, 4]
    assert table.loc["suppression", "mean"].tolist() == [1, 2, 3, 4, 5]
    assert table.loc["prediction", "x"].tolist() == [0, 25, 50, 75, 100]
    assert "neurons of the layer's MLP (%)" in drawn.figure.axes[0].get_ylabel()
    with pytest.raises(InputError, match="is of a looped model"):
        draw(33, data)


def test_both_figures_of_steps_and_cosines_say_which_they_are() -> None:
    shape = {"n_prelude": 0, "n_coda": 0, "n_core": 12, "d_model": 16}
    data = {("pre", True): [run(2, ("successive",), seed=seed, **shape) for seed in (0, 1)]}
    steps, cosines = draw(29, data)
    assert steps.title == "Steps and cosines, random weights, step norms"
    assert cosines.title == "Steps and cosines, random weights, cosines of successive states"
    assert steps.figure.axes[0].get_yscale() == "log"
    assert cosines.figure.axes[0].get_yscale() == "linear"
    for drawn, name in ((steps, "successive_abs"), (cosines, "successive_cosine")):
        rows = drawn.numbers[drawn.numbers["line"] == "core layer 11"].set_index("x")
        seeds = [float(x[name][23].mean()) for x in data["pre", True]]
        assert rows.loc[1, "mean"] == pytest.approx(np.mean(seeds))
        assert rows.loc[1, "low"] == pytest.approx(min(seeds))
        assert np.isnan(rows.loc[0, "mean"])


def test_numbers_of_a_matrix_name_rows_and_columns(looped: xr.Dataset) -> None:
    table = draw(2, looped)[0].numbers.set_index("effective_layer")
    assert list(table.index) == list(table.columns)
    assert list(table.index)[:4] == ["prelude.0", "prelude.1", "r0.l0", "r0.l1"]
    values = looped["pairwise_attention_distance"].to_numpy()
    assert table.loc["r1.l2", "coda.0"] == values[7, 11]
    assert table.loc["coda.0", "r1.l2"] == values[11, 7]


def test_numbers_of_a_path_are_the_points_of_the_data(looped: xr.Dataset) -> None:
    table = draw(5, looped)[0].numbers.set_index(["recurrence", "layer"])
    for r, layer in ((0, 0), (2, 1), (1, 2)):
        expected = looped["pca"].to_numpy()[r, layer]
        np.testing.assert_array_equal(table.loc[(r, layer), ["pc1", "pc2"]], expected)


@pytest.mark.parametrize("other", ["feedforward", "control", "baseline"])
def test_runs_that_a_figure_does_not_draw_are_refused(other: str, looped: xr.Dataset) -> None:
    with pytest.raises(InputError, match=f"Fig. 35 draws no {other}; of figures"):
        draw(35, looped, **{other: looped})
