"""The bundled model and the demo command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from tl_looped import DataError, LoopedTransformer
from tl_looped.checkpoints import BUNDLED
from tl_looped.cli import app, main
from tl_looped.experiments.demo import figures, read_prompts, run_demo, write_demo
from tl_looped.training.demo import demo_config


@pytest.fixture(scope="module")
def demo() -> LoopedTransformer:
    return LoopedTransformer.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return read_prompts()


def test_the_bundle_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in BUNDLED["demo"].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png"} <= set(
        files
    )
    assert sum(files.values()) < 5_000_000


def test_the_bundled_model_is_the_one_described(demo: LoopedTransformer) -> None:
    assert str(demo.loop) == "(2, 4 x 4, 2)"
    assert len(demo.tokenizer) <= 2048
    expected = demo_config(len(demo.tokenizer), seed=0).to_json()
    stored = demo.cfg.to_json()
    assert {k: v for k, v in stored.items() if v != expected[k]} == {}


def test_the_bundled_model_has_learned(demo: LoopedTransformer, prompts: list[str]) -> None:
    """On its own word problems, written after its training data: far below a uniform guess."""
    losses = [demo(prompt, return_type="loss").item() for prompt in prompts]
    card = (BUNDLED["demo"] / "README.md").read_text(encoding="utf-8")
    held_out = float(re.search(r"held-out loss ([\d.]+) nats", card)[1])
    assert 1.5 < held_out < 3.5
    assert np.mean(losses) < held_out + 1.0 < math.log(2048) - 2


def test_the_log_in_the_bundle_has_levelled() -> None:
    log = pd.read_csv(BUNDLED["demo"] / "log.csv")
    held_out = log["held_out_loss"].to_numpy()
    last_fifth = held_out[-max(2, len(held_out) // 5) :]
    assert held_out[0] - held_out[-1] > 1.0
    assert last_fifth.max() - last_fifth.min() < 0.05


def test_there_are_32_different_problems(prompts: list[str], demo: LoopedTransformer) -> None:
    assert len(set(prompts)) == 32
    assert all(demo.to_tokens(prompt).shape[1] < demo.cfg.n_ctx for prompt in prompts)


@pytest.fixture(scope="module")
def written(
    demo: LoopedTransformer, prompts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_demo(run_demo(demo, prompts[:3], n_recurrences=6), out)
    return out


def test_two_runs_write_the_same_numbers(demo, prompts, written: Path, tmp_path: Path) -> None:
    write_demo(run_demo(demo, prompts[:3], n_recurrences=6), tmp_path)
    for name in ("numbers.csv", "attention_similarity.csv", "settings.json"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_numbers_are_those_of_the_cache(demo, prompts, written: Path) -> None:
    numbers = (
        pd.read_csv(written / "numbers.csv")
        .set_index(["metric", "recurrence", "layer"])
        .sort_index()
    )
    steps, shares = [], []
    for prompt in prompts[:3]:
        _, cache = demo.run_with_cache(prompt, n_recurrences=6)
        now, before = cache["resid_post", (4, 1)][0], cache["resid_post", (3, 1)][0]
        steps.append(((now - before).norm(dim=-1) / now.norm(dim=-1)).mean().item())
        share = cache["pattern", (2, 3)][0].mean(1)  # [head, key]: column sums over T
        n = share.shape[-1]
        shares.append((1 + (share * share.log()).sum(-1) / math.log(n)).mean().item())
    row = numbers.loc["step", 4, 1]
    assert row["mean"] == pytest.approx(np.mean(steps), rel=1e-4)
    assert row["sd"] == pytest.approx(np.std(steps, ddof=1), rel=1e-3)
    row = numbers.loc["colsum_concentration", 2, 3]
    assert row["mean"] == pytest.approx(np.mean(shares), rel=1e-4)
    assert numbers.loc["distance", 5, 0]["mean"] == 0
    assert math.isnan(numbers.loc["step", 0, 0]["mean"])
    assert (numbers.drop(index=("step", 0))["prompts"] == 3).all()


def test_similarity_is_one_on_the_diagonal_and_below_elsewhere(written: Path) -> None:
    table = pd.read_csv(written / "attention_similarity.csv", index_col=0)
    assert list(table.index) == list(table.columns)
    assert list(table.index[:3]) == ["prelude.0", "prelude.1", "r0.l0"]
    matrix = table.to_numpy()
    assert matrix.shape == (28, 28)
    assert (matrix.diagonal() == 1).all()
    assert np.array_equal(matrix, matrix.T)
    assert ((matrix > 0) & (matrix <= 1)).all()


def test_every_file_is_whole(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == {
        "colsum_concentration.png",
        "step.png",
        "distance.png",
        "attention_similarity.png",
        "numbers.csv",
        "attention_similarity.csv",
        "settings.json",
    }
    settings = json.loads((written / "settings.json").read_text())
    assert settings["state_seed"] == 0
    assert settings["recurrences"] == 6
    assert settings["torch"] == torch.__version__


def test_figures_have_a_line_a_layer_and_a_caption(demo, prompts) -> None:
    made = figures(run_demo(demo, prompts[:2], n_recurrences=3))
    axes = made["step"].axes[0]
    assert [line.get_label() for line in axes.get_lines()][:4] == [
        f"core layer {i}" for i in range(4)
    ]
    assert axes.get_yscale() == "log"
    assert "2 word problems" in made["step"].get_supxlabel()


def test_no_prompt_is_an_error(demo) -> None:
    with pytest.raises(DataError, match="no prompt"):
        run_demo(demo, [])


def test_help_version_and_mistakes() -> None:
    run = CliRunner().invoke
    assert "demo" in run(app, ["--help"]).output
    assert re.search(r"tl-looped \d+\.\d+", run(app, ["--version"]).output)
    for mistake in (["demoo"], ["demo", "--outt", "x"], ["train-demo"]):
        result = run(app, mistake)
        assert result.exit_code == 2
        assert "Usage" in result.output


def test_errors_are_one_message(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr("sys.argv", ["tl-looped", "demo", "--out", str(tmp_path / "taken")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert "taken" in printed
    assert "Traceback" not in printed
