"""The spectral view: radius against measured rate, in experiments, figures and over training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from closeness import assert_same_data
from conftest import VARIANTS, random_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import affine, cyclic_affine, iterate, negative_affine, start_state
from typer.testing import CliRunner

from tl_looped import ConfigError, DataError, InitialState, InputError, LoopedTransformer
from tl_looped.cli import app
from tl_looped.experiments import jobs as running
from tl_looped.experiments.runner import run_experiment
from tl_looped.experiments.snapshots import find_snapshots, over_training
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.experiments.store import find_runs, read_dataset
from tl_looped.metrics import (
    CONVERGENCE,
    Verdict,
    convergence_verdict,
    loop_jacobian_spectrum,
    loop_spectrum,
    stream,
)
from tl_looped.metrics.spectrum import SPECTRUM, reached_state
from tl_looped.plots.spectral_radius import (
    agreement_points,
    radius_against_rate,
    radius_over_training,
)
from tl_looped.training.corpus import train_tokenizer
from tl_looped.training.spec import TrainSpec
from tl_looped.training.trainer import train

TEXTS = ("Tom has 3 pens.", "She reads.")
R = 12
SPEC = Experiment(
    "small",
    prompts=PromptSet("text", texts=TEXTS),
    recurrences=R,
    metrics=CONVERGENCE,
    extras=("convergence", "spectrum"),
)
SMALL = VARIANTS["pre-injection"] | {
    "n_core": 1, "n_prelude": 1, "d_model": 8, "d_head": 4, "n_heads": 2, "d_mlp": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def small() -> LoopedTransformer:
    """(1, 1 x 4, 1) with a tokenizer."""
    tokenizer = train_tokenizer(list(TEXTS) * 5, 300)
    return LoopedTransformer.from_config(
        random_config(**SMALL | {"d_vocab": len(tokenizer)}), tokenizer
    )


@pytest.fixture(scope="module")
def measured(small: LoopedTransformer, tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    return run_experiment(SPEC, tmp_path_factory.mktemp("runs"), model=small, batch_size=2).load()


# -- radius and rate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "step", "radius"),
    [
        (affine(40, 0.8), lambda x: 0.8 * x + 1.0, 0.8),
        (negative_affine(40, -0.9), lambda x: -0.9 * x, 0.9),
        (cyclic_affine(20), lambda x: ((x / 2) + 1) / 2 + 2, 0.25),
    ],
    ids=["contraction", "alternating", "two layers"],
)
def test_the_rate_of_an_affine_loop_is_its_spectral_radius(states, step, radius: float) -> None:
    last = states[-1, -1]
    spectrum = loop_jacobian_spectrum(step, last)
    assert spectrum.spectral_radius.item() == pytest.approx(radius, rel=1e-12)
    assert spectrum.largest_singular_value.item() == pytest.approx(radius, rel=1e-12)
    assert convergence_verdict(states).rate.item() == pytest.approx(radius, rel=1e-6)


@settings(deadline=None, max_examples=6, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0.3, 0.9))
def test_the_rate_of_a_normal_map_tends_to_the_radius(seed: int, radius: float) -> None:
    """A symmetric map whose other eigenvalues are at most half of the largest."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(4, 4, generator=generator).double())[0]
    matrix = basis @ (radius * torch.tensor([1.0, 0.5, -0.3, 0.0]).double()).diag() @ basis.T
    states = iterate(lambda x: x @ matrix + 1.0, start_state(), 60)
    # Without the first steps, in which the smaller eigenvalues still show.
    rate = convergence_verdict(states[12:]).rate.item()
    found = loop_jacobian_spectrum(lambda x: x @ matrix + 1.0, states[-1, 0])
    assert found.spectral_radius.item() == pytest.approx(radius, rel=1e-6)
    assert rate == pytest.approx(radius, rel=2e-2)


def test_the_rate_of_a_map_far_from_normal_lies_above_its_radius_at_first() -> None:
    """Steps of ``[[a, b], [0, a]]`` shrink as ``n a^n``: the fit approaches ``a`` from above."""
    matrix = torch.tensor([[0.8, 20.0], [0.0, 0.8]]).double()
    start = torch.tensor([[0.0, 1.0]]).double()
    rates = []
    for n in (30, 140):
        states = iterate(lambda x: x @ matrix.T, start, n)
        rates.append(convergence_verdict(states).rate.item())
    assert rates[0] > 0.9
    assert 0.8 < rates[1] < 0.825


def test_the_rate_of_a_random_model_agrees_with_its_radius() -> None:
    """To 0.03 as a fit over all steps, transients included, and to 0.005 without the first ones."""
    changes = VARIANTS["pre-injection"] | {"n_core": 2, "n_prelude": 1, "init_mode": "normal"}
    model = LoopedTransformer.from_config(random_config(**changes)).double()
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
    data = stream(model, tokens, CONVERGENCE, by="depth", n_recurrences=40)
    found = convergence_verdict(data)
    spectrum = loop_spectrum(model, tokens, n_recurrences=40, n_iterations=120)
    radius = spectrum["spectral_radius"].values
    assert found["verdict"].values.tolist() == [Verdict.CONVERGED] * 3
    assert (spectrum["spectral_radius_error"] < 1e-3).all()
    np.testing.assert_allclose(found["rate"], radius, atol=0.03)
    states = [model.loop_map(row[None]).run(40)[:, None, 0].detach() for row in tokens]
    late = [convergence_verdict(one[12:]).rate.item() for one in states]
    np.testing.assert_allclose(late, radius, atol=0.005)
    # And not because nothing differs: prompts do, and the singular value says something else.
    assert np.ptp(radius) > 0.1
    assert (spectrum["largest_singular_value"] > 3).all()


# -- spectra of states --------------------------------------------------------------------------


def test_the_spectrum_is_that_of_the_brute_force_jacobian_whatever_the_padding() -> None:
    model = LoopedTransformer.from_config(random_config(**SMALL)).double()
    tokens = torch.tensor([[7, 7, 3, 1, 4], [1, 5, 9, 2, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    data = loop_spectrum(model, tokens, n_recurrences=6, attention_mask=mask)
    for prompt, row in enumerate((tokens[0, 2:], tokens[1])):
        loop_map = model.loop_map(row[None])
        state = loop_map.run(6)[-1].detach()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            whole = torch.func.jacrev(loop_map)(state)
        n = state.numel()
        jacobian = whole.reshape(n, n).detach()
        radius = torch.linalg.eigvals(jacobian).abs().max().item()
        found = data.isel(prompt=prompt)
        assert found["spectral_radius"].item() == pytest.approx(radius, rel=5e-3)
        sigma = torch.linalg.svdvals(jacobian)[0].item()
        assert found["largest_singular_value"].item() == pytest.approx(sigma, rel=1e-5)
        step = (loop_map(state) - state).norm(dim=-1) / state.norm(dim=-1)
        residual = found["fixed_point_residual"].item()
        assert residual == pytest.approx(step.mean().item(), rel=1e-9)
        alone = loop_spectrum(model, row[None], n_recurrences=6)
        for name in SPECTRUM:
            assert alone[name].item() == pytest.approx(found[name].item(), rel=1e-12), name


def test_given_states_are_where_the_spectrum_is_taken(small: LoopedTransformer) -> None:
    tokens = torch.tensor([[3, 1, 4], [1, 5, 9]])
    model = LoopedTransformer.from_config(replace_dtype(small, torch.float64))
    states = reached_state(model.loop_map(tokens), 5)
    at_them = loop_spectrum(model, tokens, states, n_iterations=20)
    from_start = loop_spectrum(model, tokens, n_recurrences=5, n_iterations=20)
    assert_same_data(at_them, from_start)
    elsewhere = loop_spectrum(model, tokens, 3 * states, n_iterations=20)
    assert (elsewhere["spectral_radius"] != at_them["spectral_radius"]).all()
    assert at_them.attrs == {
        "spectrum_iterations": 20, "spectrum_tolerance": 1e-3, "spectrum_seed": 0,
    }  # fmt: skip
    assert all(at_them[name].attrs["units"] == "1" for name in SPECTRUM)


def test_the_reached_state_is_that_of_the_run_also_where_it_skips_the_adapter() -> None:
    changes = SMALL | {"initial_state": InitialState.PRELUDE_SKIP_ADAPTER, "initial_state_std": 0.0}
    model = LoopedTransformer.from_config(random_config(**changes))
    loop_map = model.loop_map(torch.tensor([[3, 1, 4]]))
    for n in (1, 4):
        assert torch.equal(reached_state(loop_map, n), loop_map.run(n)[-1])
    with pytest.raises(InputError, match="n_recurrences must be"):
        reached_state(loop_map, 0)


def test_half_precision_gives_the_radius_within_its_rounding(small: LoopedTransformer) -> None:
    tokens = torch.tensor([[3, 1, 4]])
    exact = loop_spectrum(small, tokens, n_recurrences=R)
    rough = LoopedTransformer.from_config(replace_dtype(small, torch.bfloat16))
    rough.load_state_dict(small.state_dict())
    found = loop_spectrum(rough, tokens, n_recurrences=R)
    radius = exact["spectral_radius"].item()
    assert found["spectral_radius"].item() == pytest.approx(radius, rel=0.03)
    assert found["spectral_radius"].dtype == np.float64


def replace_dtype(model: LoopedTransformer, dtype: torch.dtype):
    return random_config(**SMALL | {"d_vocab": model.cfg.d_vocab, "dtype": dtype})


@pytest.mark.parametrize("name", ["pre-injection", "sandwich-loop-norm", "residual-injection"])
def test_an_ablated_map_is_the_run_with_the_mlp_output_set_to_zero(name: str) -> None:
    changes = VARIANTS[name] | {"n_core": 2, "n_prelude": 1}
    model = LoopedTransformer.from_config(random_config(**changes))
    tokens = torch.tensor([[3, 1, 4, 1]])
    loop_map = model.loop_map(tokens, without_mlp=("prelude.0", "core.1"))
    places = ["prelude.0", *(f"recurrence.{r}.blocks.1" for r in range(4))]
    hooks = [(f"{place}.hook_mlp_out", lambda x, hook: 0 * x) for place in places]
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("state_out"))
    assert torch.equal(loop_map.run(4), cache.stack_recurrences("state_out"))
    assert not torch.equal(model.loop_map(tokens).run(4), loop_map.run(4))
    with pytest.raises(
        InputError, match=r"there is no layer 'core\.2'; there are prelude\.0, core"
    ):
        model.loop_map(tokens, without_mlp=("core.2",))


def test_what_cannot_be_asked_for(small: LoopedTransformer) -> None:
    tokens = torch.tensor([[3, 1, 4]])
    for shape in ((1, 2, 8), (1, 3, 9)):
        with pytest.raises(InputError, match=r"states must have shape \(1, 3, 8\)"):
            loop_spectrum(small, tokens, torch.zeros(shape))
    with pytest.raises(InputError, match=r"without_mlp must be a list of layers, got 'core.0'"):
        small.loop_map(tokens, without_mlp="core.0")
    with pytest.raises(InputError, match="attention_mask must be like tokens"):
        loop_spectrum(small, tokens, attention_mask=torch.tensor([[0, 0, 0]]))
    with pytest.raises(InputError, match="n_iterations"):
        loop_spectrum(small, tokens, n_iterations=2)


def test_a_state_that_is_not_finite_has_no_spectrum(small: LoopedTransformer) -> None:
    state = torch.full((1, 3, 8), math.nan)
    data = loop_spectrum(small, torch.tensor([[3, 1, 4]]), state, n_iterations=8)
    assert np.isnan(data["spectral_radius"].item())
    assert data["spectrum_converged"].item() == 0


# -- the extra of an experiment -----------------------------------------------------------------


def rows_of(model: LoopedTransformer) -> list[Tensor]:
    return [model.tokenize(text)[0] for text in TEXTS]


def test_the_extra_writes_the_spectra_of_the_model(
    small: LoopedTransformer, measured: xr.Dataset
) -> None:
    for prompt, row in enumerate(rows_of(small)):
        wanted = loop_spectrum(small, row, n_recurrences=R)
        for name in SPECTRUM:
            found = measured[name].isel(prompt=prompt)
            assert float(found) == pytest.approx(wanted[name].item(), rel=1e-6), name
            assert found.attrs["long_name"]
            assert found.attrs["units"] == "1"
    assert measured.attrs["spectrum_iterations"] == 300
    assert measured.attrs["spectrum_seed"] == 0
    assert measured.attrs["spectrum_most_prompts"] == 32
    assert {"rate", "verdict"} <= set(measured)


def test_prompts_beyond_the_most_have_none(
    small: LoopedTransformer, measured: xr.Dataset, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(running, "MOST_SPECTRA", 1)
    data = run_experiment(SPEC, tmp_path, model=small, batch_size=3).load()
    for name in SPECTRUM:
        assert data[name].values[0] == measured[name].values[0]
        assert np.isnan(data[name].values[1:]).all()
    assert np.isfinite(data["rate"]).all()


def test_an_ablated_run_has_the_spectrum_of_the_ablated_model(
    small: LoopedTransformer, measured: xr.Dataset, tmp_path: Path
) -> None:
    spec = replace(SPEC, ablate_mlp=("core.0", "prelude.0"))
    data = run_experiment(spec, tmp_path, model=small, batch_size=3).load()
    without = LoopedTransformer.from_config(small.cfg, small.tokenizer)
    without.load_state_dict(small.state_dict())
    with torch.no_grad():
        without.core[0].mlp.down.zero_()
        without.prelude[0].mlp.down.zero_()
    for prompt, row in enumerate(rows_of(small)):
        wanted = loop_spectrum(without, row, n_recurrences=R)
        found = float(data["spectral_radius"][prompt])
        assert found == pytest.approx(wanted["spectral_radius"].item(), rel=1e-6)
    assert (np.abs(data["spectral_radius"] - measured["spectral_radius"]) > 1e-3).all()


def test_models_whose_runs_are_not_their_loop_maps_are_refused(
    small: LoopedTransformer, tmp_path: Path
) -> None:
    small.add_hook("recurrence.1.blocks.0.hook_mlp_out", lambda x, hook: 0 * x)
    try:
        with pytest.raises(InputError, match=r"model has hooks, at blocks\.\d+\.hook_mlp_out"):
            run_experiment(SPEC, tmp_path, model=small)
    finally:
        small.reset_hooks()
    with pytest.raises(ConfigError, match=r"\['spectrum'\] need a loop"):
        Experiment("gpt2", kind="feedforward", extras=("spectrum",))


# -- figures ------------------------------------------------------------------------------------


def points(radius: list[float], rate: list[float], **others: list[float]) -> xr.Dataset:
    columns = {"spectral_radius": radius, "rate": rate, "verdict": [0] * len(rate)} | others
    return xr.Dataset({name: ("prompt", np.array(v)) for name, v in columns.items()})


def test_the_caption_counts_every_point_and_the_correlation_is_of_the_full_ones() -> None:
    one = points(
        [0.2, 0.4, 0.6, 0.9, 0.5, 0.7, 1.2],
        [0.3, 0.5, 0.7, 1.0, math.nan, 0.1, 0.2],
        verdict=[0, 0, 0, 0, 0, Verdict.ORBIT, Verdict.NOT_CONVERGED],
        spectral_radius_error=[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    )
    two = points([0.3, math.nan], [0.9, 0.4], spectral_radius_error=[0.1, 0.0])
    drawn = radius_against_rate({"a": one, "b": two}, "Two models")
    assert drawn.settings["n"] == 4
    assert drawn.settings["pearson"] == pytest.approx(1)
    assert drawn.settings["spearman"] == pytest.approx(1)
    assert drawn.settings["median_difference"] == pytest.approx(0.1)
    assert drawn.settings["median_signed_difference"] == pytest.approx(0.1)
    assert drawn.caption.startswith("Two models. Rate: ")
    assert (
        "7 prompts are drawn, 3 of them open: 2 where the run did not end at a fixed point, 1 "
        "where the radius has an error above 1 %. Over the 4 full ones: Pearson 1.00, Spearman "
        "1.00, median |rate - radius| 0.100" in drawn.caption
    )
    assert "1 without a rate" in drawn.caption
    assert "1 without a radius" in drawn.caption
    shapes = {line.get_markerfacecolor() for line in drawn.figure.axes[0].lines[:3]}
    assert "none" in shapes
    assert len(drawn.numbers) == 9


def test_a_fixed_point_is_told_by_the_verdict_or_else_by_the_residual() -> None:
    degenerate = points(
        [0.1] * 3, [0.1] * 3, verdict=[Verdict.DEGENERATE] * 2 + [Verdict.PROJECTIVE],
        settled_at=[5, -1, 5],
    )  # fmt: skip
    found = agreement_points({"a": degenerate})
    assert found["full"].tolist() == [True, False, False]
    residual = points([0.1] * 3, [0.1] * 3, fixed_point_residual=[1e-6, 1e-2, math.nan])
    found = agreement_points({"a": residual.drop_vars("verdict")})
    assert found["full"].tolist() == [True, False, False]
    half = residual.drop_vars("verdict").assign_attrs(dtype="torch.bfloat16")
    assert agreement_points({"a": half})["full"].tolist() == [True, True, False]


def test_dimensions_of_a_grid_are_all_points() -> None:
    grid = xr.Dataset(
        {
            "spectral_radius": (("seed", "prompt"), [[0.1, 0.2], [0.3, 0.4]]),
            "rate": (("seed", "prompt"), [[0.1, 0.2], [0.3, 0.4]]),
            "fixed_point_residual": (("seed", "prompt"), [[0.0, 0.0], [0.0, 1.0]]),
        }
    )
    found = agreement_points({"pre": grid})
    assert found["spectral_radius"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert found["full"].tolist() == [True, True, True, False]


@pytest.mark.parametrize("rate", [[0.5, 0.5, 0.5], [0.5, 0.6, math.nan], [math.nan] * 3])
def test_correlations_that_are_not_defined(rate: list[float]) -> None:
    drawn = radius_against_rate({"a": points([0.1, 0.2, 0.3], rate)})
    assert math.isnan(drawn.settings["pearson"])
    assert math.isnan(drawn.settings["spearman"])
    assert ("Pearson undefined" in drawn.caption) != ("Too few full points" in drawn.caption)


def test_lines_over_training_are_medians_and_quartiles() -> None:
    radius = np.array([[0.1, 0.2, 0.3, 0.4, 0.9], [0.5, 0.6, 0.7, 0.8, math.nan]])
    data = xr.Dataset(
        {
            "spectral_radius": (("step", "prompt"), radius),
            "rate": (("step", "prompt"), np.where(radius == 0.9, math.nan, radius + 0.01)),
            "held_out_loss": ("step", [math.nan, 3.5]),
        },
        coords={"step": [0, 50]},
    )
    drawn = radius_over_training(data, "A run")
    table = drawn.numbers.set_index(["line", "x"])
    assert table.loc[("spectral radius", 0)][["mean", "low", "high", "n"]].tolist() == [
        0.3, 0.2, 0.4, 5,
    ]  # fmt: skip
    assert table.loc[("spectral radius", 50), "mean"] == pytest.approx(0.65)
    assert table.loc[("measured rate", 0), "mean"] == pytest.approx(0.26)
    assert table.loc[("held-out loss", 50), "mean"] == 3.5
    assert "1 rates are undefined" in drawn.caption
    assert "1 radii were not computed" in drawn.caption
    assert drawn.settings == {"steps": [0, 50]}


def test_lines_over_training_of_seeds_are_means_and_deviations() -> None:
    values = np.array([[[0.1, 0.3], [0.4, 0.6]], [[0.5, 0.7], [0.8, 1.0]]])  # step, seed, prompt
    dims = ("step", "seed", "prompt")
    data = xr.Dataset({"spectral_radius": (dims, values), "rate": (dims, values)})
    data["held_out_loss"] = (("step", "seed"), [[4.0, 6.0], [2.0, 2.0]])
    table = radius_over_training(data.assign_coords(step=[0, 9])).numbers.set_index(["line", "x"])
    found = table.loc[("spectral radius", 0)]
    spread = 0.3 / math.sqrt(2)
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(
        [0.35, 0.35 - spread, 0.35 + spread]
    )
    assert table.loc[("held-out loss", 0), "mean"] == 5


def test_data_without_what_is_drawn_are_refused() -> None:
    data = points([0.1], [0.1])
    for gone, wanted in (("rate", "lacks rate"), ("verdict", "neither verdict")):
        with pytest.raises(InputError, match=rf"{wanted}.*convergence and spectrum"):
            radius_against_rate({"a": data.drop_vars(gone)})
    with pytest.raises(InputError, match="at least one dataset"):
        radius_against_rate({})
    with pytest.raises(InputError, match="must be over step"):
        radius_over_training(data)
    with pytest.raises(InputError, match="must be over the same"):
        radius_against_rate({"a": data.assign(rate=("other", [0.1]))})


# -- over training ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with three snapshots."""
    out = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer(list(TEXTS) * 5, 300)
    model = LoopedTransformer.from_config(
        random_config(**SMALL | {"d_vocab": len(tokenizer), "n_recurrences": 2}), tokenizer
    )
    rows = torch.randint(0, len(tokenizer), (8, 10), generator=torch.Generator().manual_seed(1))
    spec = TrainSpec(steps=6, batch_size=2, warmup=2, evaluate_every=3, bf16=False)
    train(model, rows, rows[:2], spec, out, snapshots=1)
    return out


def spectrum_command(*arguments: object) -> str:
    command = ["spectrum", *map(str, arguments)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.full
@pytest.mark.once
def test_a_training_run_is_measured_at_every_snapshot_and_drawn(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    arguments = (
        trained, "--prompts", tmp_path / "texts.txt", "--subset", 2, "--recurrences", R,
        "--out", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    printed = spectrum_command(*arguments)
    assert "Spectral radius and rate of convergence over training" in printed
    folders = find_runs(tmp_path / "out")
    assert [p.name.split("_")[0] for p in folders] == ["step-000000", "step-000003", "step-000006"]
    for name in ("spectral_radius_over_training", "spectral_radius_against_rate"):
        record = json.loads((tmp_path / "out" / "figures" / f"{name}.json").read_text())
        start = f"3 snapshots of the training run {trained.name}, (1, 1 x 12, 1). 2 prompts of"
        assert record["caption"].startswith(start)
        assert record["number"] == 0
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 10_000
    results = {int(p.name[5:11]): read_dataset(p / "results.nc") for p in folders}
    data = over_training(results, [{"step": 3, "held_out_loss": 2.5}])
    assert data["spectral_radius"].shape == (3, 2)
    np.testing.assert_array_equal(data["rate"].sel(step=3), results[3]["rate"])
    np.testing.assert_array_equal(data["held_out_loss"], [np.nan, 2.5, np.nan])
    last = LoopedTransformer.from_pretrained(trained / "final", device="cpu")
    prompt = int(results[6]["source_row"][0])
    wanted = loop_spectrum(last, last.tokenize(TEXTS[prompt])[0], n_recurrences=R)
    radius = data["spectral_radius"].sel(step=6)[0].item()
    assert radius == pytest.approx(wanted["spectral_radius"].item(), rel=1e-6)
    again = spectrum_command(*arguments)
    assert again.count("nothing was run again") == 3
    other = results | {3: results[3].assign_attrs(n_recurrences=7)}
    with pytest.raises(DataError, match="step 3 and 0 differ in n_recurrences"):
        over_training(other, [])


def test_a_folder_of_results_is_drawn_at_once(small: LoopedTransformer, tmp_path: Path) -> None:
    run_experiment(SPEC, tmp_path, model=small, batch_size=3)
    without = replace(SPEC, extras=("convergence",))
    other = run_experiment(without, tmp_path, model=small, batch_size=3)
    printed = spectrum_command(tmp_path)
    assert f"without a spectrum and left out: {other.folder.name}" in printed
    record = tmp_path / "spectrum" / "figures" / "spectral_radius_against_rate.json"
    assert "2 prompts" in json.loads(record.read_text())["caption"]


def test_folders_that_hold_nothing_to_draw(trained: Path, tmp_path: Path) -> None:
    assert list(find_snapshots(trained)) == [0, 3, 6]
    with pytest.raises(DataError, match=r"no snapshot.*--snapshots 1"):
        find_snapshots(tmp_path)
    with pytest.raises(DataError, match="holds no finished run"):
        spectrum_command(tmp_path)
