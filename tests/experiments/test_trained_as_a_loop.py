"""Whether a model was trained as a loop, and with how many recurrences: what it, its files and
every figure of it say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, random_config
from feedforwards import feedforward
from results import result
from typer.testing import CliRunner

from tl_looped import ConfigError, LoopedTransformer, retrofit
from tl_looped.cli import app
from tl_looped.experiments.identity import module_identity
from tl_looped.experiments.reading import is_feedforward
from tl_looped.metrics import stream
from tl_looped.metrics.labels import trained_recurrences
from tl_looped.paper.figures import draw
from tl_looped.plots.captions import caption_of
from tl_looped.report.summary import summarise
from tl_looped.report.text import row
from tl_looped.training.recurrences import Constant, PoissonLogNormal
from tl_looped.training.spec import TrainSpec
from tl_looped.training.trainer import train

STAGES: dict[str, Any] = {"prelude": [0, 1], "core": [3, 4], "coda": [6]}
ROWS = torch.randint(0, 50, (6, 8), generator=torch.Generator().manual_seed(1))
SPEC = TrainSpec(steps=2, batch_size=2, warmup=0, evaluate_every=1, bf16=False)


def untrained(**options: Any) -> LoopedTransformer:
    return retrofit(feedforward("llama"), **(STAGES | {"device": "cpu"} | options))


def again(model: LoopedTransformer, folder: Path, format: str = "native") -> LoopedTransformer:
    model.save_pretrained(folder, format=format)
    return LoopedTransformer.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "trained"), [("demo", 4), ("demo-base", 4), ("demo-bare", 4), ("demo-control", 1)]
)
def test_bundled_models_say_what_they_were_trained_with(name: str, trained: int) -> None:
    model = LoopedTransformer.from_pretrained(name, n_recurrences=7, device="meta")
    assert (model.cfg.trained_recurrences, model.loop.R) == (trained, 7)


@pytest.mark.parametrize("case", ["huginn", "ouro", "retrofit_llama", "retrofit_olmo"])
def test_published_families_say_their_trained_number(case: str) -> None:
    raw = json.loads((GOLDEN / case / "config.json").read_text())
    model = LoopedTransformer.from_pretrained(GOLDEN / case, device="meta")
    expected = raw["total_ut_steps"] if case == "ouro" else raw["mean_recurrence"]
    assert model.cfg.trained_recurrences == expected


@pytest.mark.parametrize("mode", ["retrofit", "virtual-loop"])
def test_a_new_retrofit_or_virtual_loop_was_not_trained_as_a_loop(
    mode: str, tmp_path: Path
) -> None:
    model = untrained(mode=mode, n_recurrences=3)
    assert model.cfg.trained_recurrences is None
    assert again(model, tmp_path / "native").cfg.trained_recurrences is None
    if mode == "retrofit":
        read = again(model, tmp_path / "original", "original").cfg
        assert (read.trained_recurrences, read.n_recurrences) == (None, 3)
    # Written before the configuration had the field: it says where its layers are from.
    path = tmp_path / "native" / "config.json"
    raw = json.loads(path.read_text())
    del raw["trained_recurrences"]
    path.write_text(json.dumps(raw))
    read = LoopedTransformer.from_pretrained(tmp_path / "native", device="meta").cfg
    assert read.trained_recurrences is None


def test_the_original_format_keeps_number_of_the_run_and_number_of_the_training(
    tmp_path: Path,
) -> None:
    model = LoopedTransformer.from_pretrained(GOLDEN / "retrofit_llama", device="cpu")
    trained = model.cfg.trained_recurrences
    model.save_pretrained(tmp_path / "same", format="original")
    raw = json.loads((tmp_path / "same" / "config.json").read_text())
    assert "trained_recurrences" not in raw  # exactly the published keys
    assert isinstance(again(model, tmp_path / "same", "original").cfg.trained_recurrences, float)
    model.cfg.trained_recurrences = int(trained)  # trained anew, now with a fixed number
    fixed = again(model, tmp_path / "fixed", "original").cfg.trained_recurrences
    assert (fixed, type(fixed)) == (trained, int)
    model.cfg.trained_recurrences = trained
    model.set_recurrences(int(trained) + 5)
    read = again(model, tmp_path / "more", "original").cfg
    assert (read.trained_recurrences, read.n_recurrences) == (trained, trained + 5)


@pytest.mark.full
@pytest.mark.parametrize(
    ("recurrences", "stated"),
    [(Constant(3), 3), (PoissonLogNormal(2.0, 0.5), 2.0), (PoissonLogNormal(0.5, 0.1), 0.5)],
)
def test_the_trainer_says_it_from_the_first_step_on(
    recurrences: Constant | PoissonLogNormal, stated: float, tmp_path: Path
) -> None:
    model = LoopedTransformer.from_config(random_config(n_recurrences=2))
    spec = TrainSpec(**(vars(SPEC) | {"recurrences": recurrences}))
    train(model, ROWS, ROWS[:2], spec, tmp_path, snapshots=1)
    assert model.cfg.trained_recurrences == stated
    for folder, said in (("snapshots/step-000000", None), ("best", stated), ("final", stated)):
        read = LoopedTransformer.from_pretrained(tmp_path / folder, device="meta")
        assert read.cfg.trained_recurrences == said, folder
        assert isinstance(read.cfg.trained_recurrences, type(said)), folder  # a float is a mean
    # The same model, now trained, is no other run: it goes on, here at its end.
    train(model, ROWS, ROWS[:2], spec, tmp_path)


def test_a_healed_retrofit_is_trained(tmp_path: Path) -> None:
    model = untrained(n_recurrences=2)
    train(model, ROWS, ROWS[:2], SPEC, tmp_path / "run")
    assert again(model, tmp_path / "original", "original").cfg.trained_recurrences == 2


def test_random_weights_of_a_trained_configuration_are_not_trained() -> None:
    cfg = LoopedTransformer.from_pretrained("demo", device="meta").cfg
    assert cfg.trained_recurrences == 4
    assert LoopedTransformer.from_config(cfg).cfg.trained_recurrences is None


@pytest.mark.parametrize("bad", [0, -1, True, float("nan"), float("inf")])
def test_a_number_that_cannot_be(bad: Any) -> None:
    with pytest.raises(ConfigError, match="trained_recurrences must be a finite number above 0"):
        random_config(trained_recurrences=bad)


def test_it_decides_no_number_and_so_no_identity() -> None:
    model = LoopedTransformer.from_config(random_config())
    before = module_identity(model, model.cfg)
    model.cfg.trained_recurrences = 9
    assert module_identity(model, model.cfg) == before


@pytest.mark.parametrize(("trained", "attribute"), [(None, 0), (2, 2), (2.5, 2.5)])
def test_results_say_it(trained: float | None, attribute: float) -> None:
    model = LoopedTransformer.from_config(random_config(n_recurrences=3))
    model.cfg.trained_recurrences = trained
    data = stream(model, [[1, 2, 3]], metrics=["residual_mean"], by="depth")
    assert data.attrs["trained_recurrences"] == attribute
    assert trained_recurrences(data) == attribute
    assert trained_recurrences(data.drop_attrs()) is None


MARKED = {
    0: [], 2: ["last trained: r = 1"], 2.5: ["trained mean: r = 1.5"], 3.0: ["trained mean: r = 2"],
    4: [], None: [],
}  # fmt: skip


@pytest.mark.parametrize("trained", MARKED)
def test_captions_marks_and_rows_say_it(trained: float | None) -> None:
    data = result()
    dims = ("effective_layer", "prompt")
    ones = np.ones((data.sizes["effective_layer"], 5))
    data = data.assign(successive_abs=(dims, ones), successive_rel=(dims, ones))
    if trained is not None:
        data.attrs["trained_recurrences"] = trained
    words = {None: "", 0: "not trained as a loop"}.get(trained, f"trained with {trained or 0:g}")
    assert f"4 recurrences{f' ({words})' if words else ''}." in caption_of(data)
    (figure,) = draw(3, data)
    legend = [text.get_text() for text in figure.figure.legends[0].get_texts()]
    assert [text for text in legend if "trained" in text] == MARKED[trained]
    summaries = summarise({"run": data})
    assert row(summaries, {"run": "run0"}).shape == "(1, 3 x 4, 2)" + (words and f", {words}")


def test_a_core_alone_that_ran_once_and_was_never_trained_as_a_loop_is_feedforward() -> None:
    once = (0, 3, 0, 1)
    assert is_feedforward(result(once, trained_recurrences=0))
    assert is_feedforward(result(once, trained_recurrences=1))
    assert not is_feedforward(result(once, trained_recurrences=4))


def test_info_says_it(tmp_path: Path) -> None:
    untrained().save_pretrained(tmp_path)
    for model, says in (
        ("demo", "trained with 4 recurrences"),
        (tmp_path, "not trained as a loop"),
    ):
        printed = CliRunner().invoke(app, ["info", str(model), "--recurrences", "1"])
        assert printed.exit_code == 0, printed.output
        assert says in printed.output
        assert "1 recurrences" not in printed.output
