"""The command line from the folder of a pretrained model to reports, with a loop and without."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from closeness import rounding_bound
from typer.testing import CliRunner

from tl_looped import LoopedTransformer, metrics
from tl_looped.cli import app
from tl_looped.experiments.store import find_runs, read_dataset

PROMPTS = [
    "Tom has 3 boxes with 12 pens each. He gives away 5 pens.",
    "The capital of France is Paris, and the capital of Italy is",
]
TABLES, FIGURES = ("csv", "parquet"), ("png", "svg", "csv", "json")
CURVES = ("colsum_concentration", "entropy_bits", "mixing_per_token", "residual_mean")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "facts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    return file


@pytest.fixture(scope="module")
def loop(real_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The virtual loop over layers 12 to 17, as the command line saves it."""
    out = tmp_path_factory.mktemp("models") / "loop"
    printed = run("retrofit", real_folder, out, "--core", "12-17", "--mode", "virtual-loop")
    assert "(12, 6 x 4, 12), 48 effective layers" in printed
    return out


@pytest.fixture(scope="module")
def runs(
    loop: Path, real_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The loop at 1, 2 and 8 recurrences, and the model without a loop, on the same prompts."""
    out = tmp_path_factory.mktemp("runs")
    common = ("--prompts", prompts, "--out", out, "--device", "cpu")
    run("analyze", loop, "--recurrences", "1,8", "--figures", "2,4,7", *common)
    # More prompts, and fewer recurrences.
    run("analyze", loop, "--recurrences", "2", "--figures", "", "--subset", "6", *common[2:])
    run("analyze", real_folder, "--feedforward", "--figures", "2", *common)
    return out


def text_of(page: Path) -> str:
    return " ".join(re.sub("<[^>]*>", " ", page.read_text(encoding="utf-8")).split())


def folder_of(runs: Path, n: int, kind: str = "looped") -> Path:
    attributes = {folder: read_dataset(folder / "results.nc").attrs for folder in find_runs(runs)}
    [folder] = [
        folder
        for folder, said in attributes.items()
        if (said["kind"], said["n_recurrences"]) == (kind, n)
    ]
    return folder


def curve(folder: Path, metric: str) -> torch.Tensor:
    """Means over prompts by effective layer, from the table."""
    table = pd.read_csv(folder / "tables" / "layers.csv")
    rows = table[table["metric"] == metric].sort_values("effective_layer")
    assert (rows["prompts"] == len(PROMPTS)).all()
    return torch.tensor(rows["mean"].tolist(), dtype=torch.float64)


@pytest.fixture(scope="module")
def exact(loop: Path) -> xr.Dataset:
    """The same numbers in fp64, from the model and not from the command line."""
    model = LoopedTransformer.from_pretrained(loop, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        data = metrics.stream(model, PROMPTS, list(CURVES), by="depth", n_recurrences=1)
    return data.mean([dim for dim in ("head", "prompt") if dim in data.dims])


def test_a_plain_folder_is_pointed_to_what_takes_it(real_folder: Path) -> None:
    command = [sys.executable, "-m", "tl_looped", "info", str(real_folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "tl_looped.retrofit" in done.stderr
    assert "--feedforward" in done.stderr
    assert "Traceback" not in done.stderr


def test_retrofit_writes_a_folder_that_info_describes(loop: Path) -> None:
    assert {file.name for file in loop.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "generation_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    said = run("info", loop)
    for fact in (
        "48 effective layers", "not trained as a loop", "134,515,008 parameters",
        "vocabulary 49152, context 8192", "read without BOS", "<|im_end|>",
    ):  # fmt: skip
        assert fact in said, fact


def test_a_saved_retrofit_is_the_one_in_memory(real_folder: Path, tmp_path: Path) -> None:
    layers = ("--prelude", "0-3", "--core", "10-15", "--coda", "26-29")
    printed = run("retrofit", real_folder, tmp_path / "adapted", *layers)
    assert "original format" in printed
    generation = json.loads((tmp_path / "adapted" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    model = LoopedTransformer.from_pretrained(tmp_path / "adapted", device="cpu")
    assert str(model.loop) == "(4, 6 x 4, 4)"
    # Its adapter ignores the state, and the page says so beside a fixed point that means nothing.
    run(
        "analyze",
        tmp_path / "adapted",
        "--prompts",
        "sentence",
        "--figures",
        "4",
        "--out",
        tmp_path,
    )
    [folder] = find_runs(tmp_path)
    data = read_dataset(folder / "results.nc")
    assert data.attrs["adapter_ignores_state"] == 1
    assert data.attrs["trained_recurrences"] == 0
    last = data["successive_abs"].sel(effective_layer=slice(4 + 6 * 3, 4 + 6 * 4 - 1))
    assert (last == 0).all()
    assert "adapter ignores the state" in text_of(folder / "report.html")


def test_runs_leave_their_files(runs: Path) -> None:
    # Figure 4 is of steps, and one recurrence has none.
    figures = {(1, "looped"): (2, 7), (8, "looped"): (2, 4, 7), (1, "feedforward"): (2,)}
    for (n, kind), numbers in figures.items():
        folder = folder_of(runs, n, kind)
        names = ["results.nc", "spec.toml", "report.html"]
        names += [f"tables/{table}.{end}" for table in ("layers", "prompts") for end in TABLES]
        names += [f"figures/fig{number:02}.{end}" for number in numbers for end in FIGURES]
        for name in names:
            assert (folder / name).stat().st_size > 0, name


def test_numbers_of_the_tables_are_finite(runs: Path) -> None:
    for folder in find_runs(runs):
        layers = pd.read_csv(folder / "tables" / "layers.csv")
        # A recurrence without an earlier one, and a model without a loop, have nothing to compare.
        compared = layers["metric"].str.startswith(("successive", "fixed_point"))
        assert np.isfinite(layers[~compared]["mean"]).all(), folder
        inside = layers[compared & (layers["stage"] == "core") & (layers["in_recurrence"] > 0)]
        assert np.isfinite(inside["mean"]).all(), folder
    assert len(inside) or len(find_runs(runs)) == 4


@pytest.mark.parametrize("metric", CURVES)
def test_loop_at_one_recurrence_is_measured_as_the_model_without_a_loop(
    runs: Path, exact: xr.Dataset, metric: str
) -> None:
    """Two engines, two ways through the model; in between lies what fp32 rounds."""
    found = curve(folder_of(runs, 1), metric)
    bound = rounding_bound(torch.from_numpy(exact[metric].values), found)
    without = curve(folder_of(runs, 1, "feedforward"), metric)
    torch.testing.assert_close(found, without, atol=bound, rtol=0.0)
    assert found.std() > 100 * bound


def test_the_report_takes_the_verdict_of_the_longest_run(runs: Path) -> None:
    run("report", runs)
    data = read_dataset(folder_of(runs, 8) / "results.nc")
    assert data["verdict_name"].values.tolist() == ["NOT_CONVERGED"] * 2
    page = text_of(runs / "report.html")
    assert "not converged: 2 of 2" in page  # and not those of six prompts at two recurrences
    assert "of 6" not in page
    assert "not trained as a loop" in page
    assert "the first token holds more than half of the summed norm" in page


def test_compare_tells_the_runs_apart(runs: Path, tmp_path: Path) -> None:
    run("compare", runs, "--out", tmp_path, "--no-figures")
    listed = pd.read_csv(tmp_path / "tables" / "runs.csv")
    assert listed["run"].nunique() == len(listed) == 4
    assert listed["model"].nunique() == 2
    table = pd.read_csv(tmp_path / "tables" / "mirroring.csv")
    assert np.isfinite(table.select_dtypes("number")).all().all()
    # At one recurrence the loop is the model without a loop.
    same = table[(table["run"] == folder_of(runs, 1).name) & (table["curve"] == "whole")]
    assert len(same) == 4
    assert (same["lag"] == 0).all()
    assert (same["pearson"] > 1 - 1e-4).all()
