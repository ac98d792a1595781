"""Section 5.1 from finished trainings to data, figures and page, on tiny models of random weights.

Every shape is that of a real run; widths, prompts and recurrences are few.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tl_looped import DataError, InputError, LoopedTransformer
from tl_looped.cli import app
from tl_looped.experiments.spec import PromptSet
from tl_looped.experiments.store import read_dataset
from tl_looped.metrics import mirroring_score
from tl_looped.metrics.bootstrap import Resampling
from tl_looped.metrics.depth_curves import mean_curve
from tl_looped.paper.section51.data import Section51, read_data, shipped_models, write_data
from tl_looped.paper.section51.models import (
    FIGURES_OF,
    Measured,
    experiments,
    measure,
    trained_runs,
)
from tl_looped.paper.section51.page import draw_section51, write_section51
from tl_looped.paper.section51.statistics import statistics_of, values_of
from tl_looped.paper.section51.tables import tables_of
from tl_looped.paper.section51.training import section51_config
from tl_looped.training.corpus import train_tokenizer

pytestmark = [pytest.mark.once, pytest.mark.full]

TEXTS = [f"{a} plus {b}\nis {a + b}" for a in range(10) for b in range(10)]
PROMPTS = ("1 plus 2\nis 3", "7 plus 5\nis 12 and more", "9 plus 9")
MODELS = [
    ("base4", 0), ("base4", 1), ("injection", 0), ("injection", 1),
    ("no-prelude-coda", 0), ("feedforward", 0), ("feedforward", 1),
]  # fmt: skip
LONGER = (6,)
FEW = Resampling(n_resamples=50)


def finished_run(folder: Path, name: str, seed: int) -> None:
    """What a training leaves behind, with an untrained model."""
    tokenizer = train_tokenizer(TEXTS, 280)
    config = section51_config(name, len(tokenizer), seed)
    config.d_model, config.d_head, config.n_heads, config.d_mlp = 16, 8, 2, 24
    LoopedTransformer.from_config(config, tokenizer).save_pretrained(folder / "final")
    spec = {"steps": 20, "batch_size": 2, "seed": seed, "data_seed": 0}
    record = {"spec": spec, "model": config.to_json(), "rows": "a" * 64, "held_out": "b" * 64}
    (folder / "run.json").write_text(json.dumps(record))
    log = {"step": [10, 20], "tokens": [640, 1280], "held_out_loss": [5.0, 4.0 + seed]}
    log |= {"train_loss": [5.5, 4.5], "seconds": [1.0, 2.0]}
    pd.DataFrame(log).to_csv(folder / "log.csv", index=False)
    n = range(1, 2 if name == "feedforward" else 9)
    losses = [4.0 + seed + 0.5 * abs(r - 4) for r in n]
    table = {"recurrences": list(n), "held_out_loss": losses, "rows": 16, "state_seed": 0}
    pd.DataFrame(table).to_csv(folder / "evaluation.csv", index=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    for name, seed in MODELS:
        finished_run(folder / f"{name}-seed{seed}", name, seed)
    (folder / "base8-seed1").mkdir()
    (folder / "base8-seed1" / "log.csv").write_text("step\n10\n")
    return folder


@dataclass(frozen=True)
class Made:
    out: Path
    prompts: Path
    models: list[Measured]
    data: Section51


@pytest.fixture(scope="module")
def made(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("section51")
    prompts = out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": text}) + "\n" for text in PROMPTS))
    found, missing = trained_runs(runs)
    chosen = PromptSet.parse(str(prompts))
    models = [measure(one, out / "runs", chosen, LONGER) for one in found]
    write_data(tables_of(models, missing), out / "data", FEW)
    return Made(out, prompts, models, read_data(out / "data"))


# -- what is there ------------------------------------------------------------------------------


def test_finished_runs_are_found_and_the_others_named_with_the_reason(runs: Path) -> None:
    found, missing = trained_runs(runs)
    assert {(one.configuration, one.seed) for one in found} == set(MODELS)
    assert missing["base8-seed1"] == "training is not finished"
    assert missing["base8-seed2"] == "not trained"
    assert len(missing) == 15 - len(MODELS)
    by_name = {one.name: one for one in found}
    assert by_name["no-prelude-coda-seed0"].shape == (0, 4, 0)
    assert by_name["feedforward-seed0"].recurrences == 1


def test_the_control_gets_its_stages_alone_and_loops_get_confirmed_verdicts(runs: Path) -> None:
    found = {one.name: one for one in trained_runs(runs)[0]}
    (control,) = experiments(found["feedforward-seed1"], PromptSet())
    assert control.recurrences == 1
    assert not control.extras
    stages, *longer = experiments(found["injection-seed1"], PromptSet())
    assert stages.recurrences == 4
    assert [one.recurrences for one in longer] == [32, 128]
    assert all(one.extras == ("confirm",) for one in longer)


def test_folders_that_are_no_trainings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        trained_runs(tmp_path / "absent")
    with pytest.raises(DataError, match="no finished run"):
        trained_runs(tmp_path)
    finished_run(tmp_path / "base4-seed0", "base8", 0)
    with pytest.raises(DataError, match=r"base4-seed0 is of shape \(2, 8, 2, 4\)"):
        trained_runs(tmp_path)
    (tmp_path / "base4-seed0" / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"base4-seed0 cannot be read"):
        trained_runs(tmp_path)
    finished_run(tmp_path / "base4-seed0", "base4", 0)
    (tmp_path / "base4-seed0" / "log.csv").write_text("step,tokens\n10,640\n")
    with pytest.raises(DataError, match="10 of 20 steps"):
        trained_runs(tmp_path)


# -- tables -------------------------------------------------------------------------------------


def test_tables_hold_the_means_of_the_results(made: Made) -> None:
    (path,) = (made.out / "runs" / "injection-seed1").glob("*_r4_*/results.nc")
    data = read_dataset(path)
    again = made.data.models.dataset("injection", 1)
    for metric in ("colsum_concentration", "entropy_bits", "residual_mean", "sink_rate"):
        assert again[metric].values == pytest.approx(mean_curve(data, metric), rel=1e-12)
    assert again["label"].values.tolist() == data["label"].values.tolist()
    longer = made.data.models.dataset("injection", 1, 6)
    (path,) = (made.out / "runs" / "injection-seed1").glob("*_r6_*/results.nc")
    steps = mean_curve(read_dataset(path), "successive_rel")
    assert longer["successive_rel"].values == pytest.approx(steps, rel=1e-6, nan_ok=True)


def test_verdicts_and_rates_are_those_of_the_results(made: Made) -> None:
    prompts = made.data.models.prompts
    assert len(prompts) == 5 * len(PROMPTS)
    assert prompts["confirmed"].all()
    here = (prompts["configuration"] == "base4") & (prompts["seed"] == 1)
    mine = prompts[here & (prompts["recurrences"] == 6)]
    (path,) = (made.out / "runs" / "base4-seed1").glob("*_r6_*/results.nc")
    data = read_dataset(path)
    assert mine["rate"].to_numpy() == pytest.approx(data["rate"].values, rel=1e-7)
    assert mine["verdict"].tolist() == data["verdict_name"].values.tolist()


def test_an_unknown_run_is_refused_with_what_there_is(made: Made) -> None:
    with pytest.raises(InputError, match=r"'no-prelude-coda', seed 1.*seeds \[0\]"):
        made.data.models.dataset("no-prelude-coda", 1)
    with pytest.raises(InputError, match="7 recurrences"):
        made.data.models.dataset("base4", 0, 7)


def test_losses_of_the_evaluation_are_read_off_where_they_belong(made: Made) -> None:
    values = values_of(made.data.models).set_index(
        ["configuration", "seed", "quantity", "recurrences"]
    )
    values = values["value"]
    # 4 + seed + |r - 4| / 2 at r = 1 to 8.
    assert values["base4", 1, "loss rise", 8] == 2
    assert values["base4", 1, "best recurrences", 8] == 4
    assert [values["base4", 1, "held-out loss", n] for n in (4, 8)] == [5, 7]
    assert values["feedforward", 0, "held-out loss", 4] == 5.5


# -- statistics ---------------------------------------------------------------------------------


def test_a_contrast_is_the_difference_of_its_conditions_seed_by_seed(made: Made) -> None:
    statistics = made.data.statistics
    rates = statistics.contrasts[statistics.contrasts["quantity"] == "rate"]
    row = rates[(rates["contrast"] == "injection - base4") & (rates["recurrences"] == 6)].iloc[0]
    prompts = made.data.models.prompts
    prompts = prompts[prompts["recurrences"] == 6]
    mean = prompts.groupby(["configuration", "seed"])["rate"].mean()
    difference = [mean["injection", s] - mean["base4", s] for s in (0, 1)]
    assert row["mean"] == pytest.approx(np.mean(difference), rel=1e-6)
    assert row["seeds"] == "0 1"
    assert row["sign_flip_p"] in (0.5, 1.0)
    assert not row["decided"]
    one = rates[rates["contrast"] == "no-prelude-coda - base4"].iloc[0]
    assert one["seeds"] == "0"
    assert "one seed says nothing" in one["says"]


def test_mirroring_is_that_of_the_metric_against_the_control_of_the_same_seed(made: Made) -> None:
    seeds = made.data.statistics.mirroring_seeds
    row = seeds[
        (seeds["configuration"] == "base4")
        & (seeds["metric"] == "entropy_bits")
        & (seeds["curve"] == "whole")
        & (seeds["seed"] == 1)
    ].iloc[0]
    looped, control = (made.data.models.dataset(n, 1) for n in ("base4", "feedforward"))
    curve = looped["entropy_bits"].values
    score = mirroring_score(
        curve[2:-2].reshape(4, 4),
        control["entropy_bits"].values,
        prelude=curve[:2],
        coda=curve[-2:],
    )
    assert row["score"] == pytest.approx(score.pearson.mean(), rel=1e-6)
    assert row["n_orders"] == 24
    over = made.data.statistics.mirroring
    # Untrained heads attend evenly, so that the sink rate has no curve.
    seeds = over.groupby("metric")["n_seeds"].agg(lambda n: sorted(set(n)))
    assert seeds.pop("sink_rate") == [0]
    assert seeds.tolist() == [[1, 2]] * 3
    bare = over[over["configuration"] == "no-prelude-coda"]
    assert set(bare["curve"]) == {"whole"}


def test_counts_say_what_was_run(made: Made) -> None:
    counts = made.data.statistics.counts.set_index(["configuration", "recurrences"])
    assert counts.loc[("base4", 4), "forward_passes"] == 2 * 3
    assert counts.loc[("base4", 6), "forward_passes"] == 2 * 3 * 2
    assert counts.loc[("base4", 6), "confirmed_at"] == 12
    assert counts.loc[("feedforward", 1), "sequences"] == 2 * 3
    training = made.data.statistics.training.set_index("configuration")
    assert training.loc["base4", "tokens"] == 2 * 1280
    assert training.loc["no-prelude-coda", "seeds"] == "0"
    # Embedding (tied), a final gain, and a block of attention, gated MLP and two gains each.
    block, vocabulary = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16, len(train_tokenizer(TEXTS, 280))
    assert training.loc["feedforward", "parameters"] == vocabulary * 16 + 16 + 12 * block


def test_a_control_alone_has_counts_and_curves(runs: Path, made: Made, tmp_path: Path) -> None:
    only = tmp_path / "trainings"
    only.mkdir()
    (only / "feedforward-seed0").symlink_to(runs / "feedforward-seed0")
    result = CliRunner().invoke(
        app,
        ["reproduce", "--section", "5.1", "--runs", str(only), "--out", str(tmp_path / "out"),
         "--prompts", str(made.prompts), "--device", "cpu"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "base4-seed0: not trained" in result.output
    data = read_data(tmp_path / "out" / "data")
    assert data.models.looped == []
    assert data.statistics.mirroring.empty
    assert data.statistics.contrasts.empty
    assert (tmp_path / "out" / "section-5.1.html").is_file()


# -- files --------------------------------------------------------------------------------------


def test_nothing_is_run_again_and_the_same_data_are_written(
    runs: Path, made: Made, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.out.glob("runs/*/*/results.nc")}
    found, missing = trained_runs(runs)
    prompts = PromptSet.parse(str(made.prompts))
    models = [measure(one, made.out / "runs", prompts, LONGER) for one in found]
    assert len(before) == 2 * 5 + 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    write_data(tables_of(models, missing), tmp_path, FEW)
    for path in tmp_path.rglob("*.*"):
        assert path.read_bytes() == (made.out / "data" / path.relative_to(tmp_path)).read_bytes()


def test_statistics_can_be_made_again_from_the_files(made: Made) -> None:
    again = statistics_of(made.data.models, FEW)
    for name, table in made.data.statistics.tables().items():
        other = getattr(again, name)
        assert list(other.columns) == list(table.columns), name
        for column in table.select_dtypes("number"):
            assert other[column].to_numpy(dtype=float) == pytest.approx(
                table[column].to_numpy(dtype=float), rel=1e-5, abs=1e-7, nan_ok=True
            ), (name, column)


def test_the_files_name_no_folder_of_the_machine(made: Made, runs: Path) -> None:
    for path in (made.out / "data").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(made.out).encode() not in content
            assert str(runs).encode() not in content


def test_figures_and_page_of_what_there_is(made: Made) -> None:
    some = [one for one in made.models if one.trained.configuration in ("base4", "feedforward")]
    said: list[str] = []
    draw_section51(some, made.data, made.out / "figures", "a command", said.append)
    assert said == [f"figure {n}: no model {FIGURES_OF[n]}" for n in (55, 57, 60)]
    numbers = pd.read_csv(made.out / "figures" / "fig54.csv")
    assert any("feedforward" in line for line in numbers["line"].unique())
    numbers = pd.read_csv(made.out / "figures" / "fig_loss.csv").set_index(["line", "x"])
    assert numbers.loc[("base4", 4.0), "mean"] == pytest.approx(4.5)
    assert numbers.loc[("base4", 4.0), "high"] == pytest.approx(4.5 + math.sqrt(0.5), rel=1e-5)
    assert math.isnan(numbers.loc[("no-prelude-coda", 4.0), "high"])
    page = write_section51(made.data, made.out).read_text()
    for text in ("Figure 10.", "Figure 54.", "Training curves", "cannot decide",
                 "7 small models, 1 to 2 seeds", "base8-seed2 (not trained)"):  # fmt: skip
        assert text in page
    assert page.count('<img src="data:image/') == 5
    assert "<script" not in page


def test_damaged_data_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold the tables of Section"):
        read_data(tmp_path)
    write_data(made.data.models, tmp_path, FEW)
    about = json.loads((tmp_path / "manifest.json").read_text()) | {"format": 99}
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="format 99"):
        read_data(tmp_path)


def test_models_on_other_prompts_do_not_share_a_table(made: Made, runs: Path) -> None:
    found = {one.name: one for one in trained_runs(runs)[0]}
    one = found["feedforward-seed0"]
    (path,) = (made.out / "runs" / one.name).glob("*/results.nc")
    data = read_dataset(path)
    other = data.assign_attrs(prompts_digest="other")
    models = [Measured(one, {1: data}), Measured(replace(one, seed=7), {1: other})]
    with pytest.raises(InputError, match="same prompts"):
        tables_of(models, {})


def test_unknown_sections_and_absent_runs_are_refused() -> None:
    for arguments, message in (
        (["--section", "9.9"], "section must be"),
        (["--section", "5.1"], "--runs FOLDER"),
    ):
        result = CliRunner().invoke(app, ["reproduce", *arguments])
        assert isinstance(result.exception, InputError)
        assert message in str(result.exception)


# -- what is shipped ----------------------------------------------------------------------------


def test_shipped_data_say_what_they_are_and_their_statistics_follow() -> None:
    data = shipped_models()
    assert data.models.configurations[0] == "base4"
    assert data.models.about["prompts"]["set"] == "bundled"
    for name in data.models.looped:
        for seed in data.models.seeds(name):
            assert data.models.dataset(name, seed, 128)["successive_rel"].notnull().any()
    again = statistics_of(data.models, FEW).conditions
    assert again["mean"].to_numpy() == pytest.approx(
        data.statistics.conditions["mean"].to_numpy(), rel=1e-6, nan_ok=True
    )
    folder = Path(__file__).parents[2] / "tl_looped" / "data" / "section51"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_500_000
