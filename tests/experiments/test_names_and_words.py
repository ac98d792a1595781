"""What runs and models are called, and what is said where a number would mislead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import random_config
from feedforwards import feedforward as small_feedforward
from results import C, K, N, P, R, feedforward, result, with_numbers
from typer.testing import CliRunner

from tl_looped import Injection, LoopedTransformer, retrofit
from tl_looped.cli import app
from tl_looped.experiments.compare import compare_runs
from tl_looped.experiments.reading import display_names
from tl_looped.experiments.store import RESULTS, write_dataset
from tl_looped.metrics import convergence_verdict, stream
from tl_looped.metrics.convergence import Verdict
from tl_looped.metrics.labels import ignores_state
from tl_looped.metrics.verdicts import CONVERGENCE
from tl_looped.paper.figures import draw
from tl_looped.plots.captions import caption_of, verdict_of
from tl_looped.report.summary import summarise
from tl_looped.report.text import VERDICTS, row
from tl_looped.words import called, count, differing


def test_one_of_a_thing_has_no_s() -> None:
    assert [count(n, "recurrence") for n in (0, 1, 2, 1200)] == [
        "0 recurrences", "1 recurrence", "2 recurrences", "1,200 recurrences"
    ]  # fmt: skip
    assert ". 1 recurrence." in caption_of(result((P, K, C, 1)))


def named(model: str, weights: str, where: str | None = None, **extra: Any) -> xr.Dataset:
    spec = {} if where is None else {"spec": f'{{"model": "{where}"}}'}
    return result(model=model, model_identity=weights, **spec, **extra)


def test_models_are_called_by_the_last_part_and_told_apart_where_that_is_not_enough() -> None:
    assert called("/a/b/final") == "final"
    assert called("owner/name") == "owner/name"
    runs = {
        "a": named("final", "aaaaaaaa11", "/home/me/runs/seed0/final"),
        "b": named("final", "bbbbbbbb22", "/home/me/runs/seed1/final"),
        "c": named("final", "aaaaaaaa11", "/home/me/runs/seed0/final"),
        "d": named("demo", "cccccccc33", "demo"),
        "e": named("/old/version/base", "dddddddd44"),
    }
    names = display_names(runs)
    assert names == {
        "a": "final (in seed0)", "b": "final (in seed1)", "c": "final (in seed0)", "d": "demo",
        "e": "base",
    }  # fmt: skip
    same = {"a": named("final", "aaaaaaaa11", "/x/final"), "b": named("final", "bbbbbbbb22")}
    assert list(display_names(same).values()) == [
        "final (weights aaaaaaaa)", "final (weights bbbbbbbb)"
    ]  # fmt: skip
    for text in (str(compare_runs(runs).runs), *(one.model for one in summarise(runs))):
        assert "/" not in text


def test_a_feedforward_folder_is_named_like_any_other_and_still_found(tmp_path: Path) -> None:
    base = tmp_path / "base-model"
    small_feedforward("llama").save_pretrained(base)
    data = {"a": result(feedforward=str(base)), "f": feedforward(model="base-model")}
    assert summarise(data)[0].mirroring.model == "base-model"
    old = {"a": result(feedforward="base-model"), "f": feedforward(model=str(base))}
    assert summarise(old)[0].mirroring.model == "base-model"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["m_bundled_r4_aa", "m_bundled_r8_bb", "m_bundled_r128_cc"], ["r4", "r8", "r128"]),
        (["m_bundled_r4_aa", "m_bundled_r4_bb"], ["aa", "bb"]),
        (["m_a_r4_aa", "n_a_r8_bb", "m_a_r8_cc"], ["m_r4", "n_r8", "m_r8"]),
        (["m_r4_aa", "other"], ["m_r4_aa", "other"]),
        (["only_one"], ["only_one"]),
    ],
)
def test_names_in_tables_are_what_differs(names: list[str], short: list[str]) -> None:
    assert differing(names) == short


@pytest.mark.full
def test_compare_cuts_nothing_off(tmp_path: Path) -> None:
    """Three runs of one model on one set of prompts, in a terminal of 80 columns."""
    start = "SmolLM2-135M-Instruct-retrofit-core-10-19_bundled"
    runs = {f"{start}_r{r}_{r:08x}": result((P, K, C, r)) for r in (4, 8, 128)}
    runs[f"{start}-base_bundled_r1"] = feedforward()
    for name, data in runs.items():
        (tmp_path / name).mkdir()
        write_dataset(data, tmp_path / name / RESULTS)
    arguments = ["compare", str(tmp_path), "--out", str(tmp_path / "c"), "--no-figures"]
    printed = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert printed.exit_code == 0, printed.output
    assert "…" not in printed.output
    for name in runs:
        assert name in printed.output.replace("\n", "")


ADAPTER = {"injection": Injection.LINEAR, "n_coda": 1, "n_recurrences": 5}


def test_an_adapter_that_ignores_the_state_is_said() -> None:
    stages = {"prelude": [0, 1], "core": [3, 4], "coda": [6], "device": "cpu"}
    model = retrofit(small_feedforward("llama"), **stages, n_recurrences=5)
    assert ignores_state(model)
    assert not ignores_state(LoopedTransformer.from_config(random_config(**ADAPTER)))
    assert not ignores_state(LoopedTransformer.from_config(random_config()))
    metrics = [*CONVERGENCE, "fixed_point_rel"]
    data = stream(model, [[1, 2, 3, 4]], metrics, by="depth")
    assert float(np.nanmax(data["successive_abs"])) == 0.0
    data = xr.merge([data, convergence_verdict(data)], compat="override", combine_attrs="override")
    summaries = summarise({"a": data})
    assert summaries[0].verdicts.counts == {Verdict.CONVERGED: 1}
    (note,) = row(summaries, {"a": "run0"}).notes
    assert note.startswith("The adapter ignores the state")
    (figure,) = draw(4, data)
    assert "adapter ignores the state" in figure.caption
    texts = [text.get_text() for axes in figure.figure.axes for text in axes.texts]
    assert texts.count("0 everywhere") == 2
    model.injection.weight.data[0, 0] = 1e-30
    assert not ignores_state(model)
    said = stream(model, [[1, 2, 3, 4]], metrics, by="depth")
    assert "adapter ignores" not in caption_of(said)


@pytest.mark.parametrize("verdict", Verdict)
def test_the_distance_to_the_last_state_says_what_the_run_does(verdict: Verdict) -> None:
    dims = ("effective_layer", "prompt")
    falling = np.linspace(1, 0, P + K * R + C)[:, None] + np.zeros((1, N))
    data = result().assign(fixed_point_abs=(dims, falling), fixed_point_rel=(dims, falling))
    plain = "every run approaches its own last state, even one that drifts"
    assert plain in draw(4, data)[0].caption.replace("Every", "every")
    data = with_numbers(data, verdict=[0, verdict, verdict, verdict, verdict])
    (figure,) = draw(4, data)
    if verdict in (Verdict.CONVERGED, Verdict.DEGENERATE):
        assert verdict_of(data) is None
        assert VERDICTS[Verdict.DRIFT].word not in figure.title
        return
    word = VERDICTS[verdict].word
    assert verdict_of(data) == (word, 4, 5)
    assert f"({word} for 4 of 5 prompts)" in figure.title
    assert f"is {word} for 4 of 5 prompts: every run approaches" in figure.caption
    # With a longer run's state for the fixed point the distance does say something.
    data.attrs["reference_recurrences"] = 2 * R
    assert word not in draw(4, data)[0].title
