"""The bundled model and the demo command."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tl_looped import LoopedTransformer
from tl_looped.checkpoints import BUNDLED
from tl_looped.cli import app, main
from tl_looped.experiments.prompts import load_prompts
from tl_looped.experiments.spec import PromptSet
from tl_looped.paper.section51.training import section51_config
from tl_looped.training.demo import demo_config

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def demo() -> LoopedTransformer:
    return LoopedTransformer.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return list(load_prompts(PromptSet("bundled")).texts)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundles_are_small_and_complete(name: str) -> None:
    files = {path.name: path.stat().st_size for path in BUNDLED[name].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png"} <= set(
        files
    )
    assert sum(files.values()) < 5 * 2**20


def test_all_bundles_together_are_small() -> None:
    sizes = [path.stat().st_size for folder in BUNDLED.values() for path in folder.iterdir()]
    assert len(BUNDLED) == 4
    assert sum(sizes) < 15e6


@pytest.mark.parametrize(
    ("name", "configuration", "shape"),
    [
        ("demo-base", "base4", "(2, 4 x 4, 2)"),
        ("demo-bare", "no-prelude-coda", "(0, 4 x 4, 0)"),
        ("demo-control", "feedforward", "(0, 12 x 1, 0)"),
    ],
)
def test_the_models_of_section_51_have_learned(
    name: str, configuration: str, shape: str, prompts: list[str]
) -> None:
    model = LoopedTransformer.from_pretrained(name, device="cpu")
    assert str(model.loop) == shape
    assert model.cfg.injection.value == "none"
    expected = section51_config(configuration, len(model.tokenizer), seed=0).to_json()
    stored = model.cfg.to_json() | {"model_name": expected["model_name"]}
    assert stored.pop("trained_recurrences") == model.loop.R
    assert {k: v for k, v in stored.items() if v != expected[k]} == {}
    card = (BUNDLED[name] / "README.md").read_text(encoding="utf-8")
    held_out = float(re.search(r"held-out loss ([\d.]+) nats", card)[1])
    losses = [model(prompt, return_type="loss").item() for prompt in prompts]
    assert np.mean(losses) < held_out + 1.0 < math.log(1024) - 2


def test_the_bundled_model_is_the_one_described(demo: LoopedTransformer) -> None:
    assert str(demo.loop) == "(2, 4 x 4, 2)"
    assert len(demo.tokenizer) <= 2048
    expected = demo_config(len(demo.tokenizer), seed=0).to_json()
    stored = demo.cfg.to_json()
    assert stored.pop("trained_recurrences") == 4
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
