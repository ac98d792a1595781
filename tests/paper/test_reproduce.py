"""From a plan to one report: runs, overlays, views; and what cannot be had."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from tl_looped import InputError
from tl_looped.cli import app
from tl_looped.cli.execution import carry_out
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.experiments.store import find_runs, read_dataset
from tl_looped.paper.figures import with_needs
from tl_looped.paper.plan import Overlay, PaperRun, Plan

pytestmark = [pytest.mark.once, pytest.mark.full]

TEXTS = ("Tom has 3 pens and 4 boxes.", "It is so, is it?", "She reads 12 pages a day.")
PROMPTS = PromptSet("text", texts=TEXTS)
FEW = Experiment("demo", prompts=PROMPTS, recurrences=3, feedforward="demo-control")
BASE = Experiment("demo-control", prompts=PROMPTS)


def planned(spec: Experiment, *figures: int) -> PaperRun:
    return PaperRun(with_needs(spec, figures), figures)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduction")
    few, base = planned(FEW, 37), planned(BASE, 32)
    ablated = planned(replace(FEW, ablate_mlp=("prelude.1",), feedforward=None), 41)
    sheet = planned(replace(FEW, prompts=PromptSet("sentence"), recurrences=2), 63)
    plan = Plan([few, ablated, sheet, base], [Overlay(few.spec, base.spec, (8, 40))])
    carry_out([plan], folder, "cpu", "2")
    return folder


def test_every_run_has_its_figures_and_the_folder_one_report(out: Path) -> None:
    drawn = {path.name for path in out.glob("*/figures/*.png")}
    assert drawn == {"fig37.png", "fig41.png", "fig63.png", "fig32.png"}
    assert len(find_runs(out)) == 4
    assert not list(out.glob("*/report.html"))
    page = (out / "report.html").read_text()
    for text in ("demo, without the MLP output of prelude.1", "Comparisons", "depth clusters"):
        assert text in page


def test_the_overlays_stand_with_their_numbers_beside_them(out: Path) -> None:
    names = sorted(path.name for path in (out / "figures").glob("*.json"))
    assert [name[:5] for name in names] == ["fig08", "fig40"]
    (tables,) = (out / "tables").iterdir()
    mirroring = pd.read_csv(tables / "mirroring.csv")
    assert mirroring["same_prompts"].all()
    assert set(mirroring["recurrence"]) == {0, 1, 2}
    assert (tables / "clusters.csv").is_file()


def test_attention_views_are_of_the_run_that_kept_its_patterns(out: Path) -> None:
    heads, changing = sorted(out.glob("*/views/*.json"))
    data = read_dataset(heads.parents[1] / "results.nc")
    view = json.loads(heads.read_text())["view"]
    assert view["tokens"] == data["pattern_token"].values.tolist()
    assert view["labels"] == [f"r1 l0 h{head}" for head in range(4)]
    # The last row of the first core layer at recurrence 1, in thousandths.
    row = data["pattern"].values[2 + 4, 0, -1]
    assert view["cells"][0][-1] == [round(1000 * float(x)) for x in row]
    labels = json.loads(changing.read_text())["view"]["labels"]
    assert [label[:2] for label in labels] == ["r0", "r1"]
    (name,) = {label[3:] for label in labels}
    core = data["pattern"].values[2:-2].reshape(2, 4, 4, *data["pattern"].shape[2:])
    change = ((core[1] - core[0]) ** 2).sum((-2, -1))
    layer, head = divmod(int(change.argmax()), 4)
    assert name == f"l{layer} h{head}"
    assert all(path.stat().st_size < 5_000_000 for path in out.glob("*/views/*.html"))


def test_a_model_that_cannot_be_had_does_not_cost_the_others(out: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/results.nc")}
    missing = planned(replace(BASE, model="absent/folder/of/weights", kind="feedforward"), 32)
    few = planned(FEW, 37)
    plan = Plan([missing, few], [Overlay(few.spec, missing.spec, (8,))])
    with pytest.raises(InputError, match="not reproduced: absent/folder/of/weights: the feedf"):
        carry_out([plan], out, "cpu", "2")
    assert "nothing was run again" in " ".join(capsys.readouterr().out.split())
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/results.nc")} == before
    nothing = out / "nothing"
    with pytest.raises(InputError, match="not reproduced"):
        carry_out([Plan([missing, missing])], nothing, "cpu", "2")
    assert not (nothing / "report.html").exists()


def test_compare_draws_over_every_feedforward_run(out: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(out), "--out", str(tmp_path / "c")])
    assert result.exit_code == 0, result.output
    # Three looped runs, one of them of another prompt, over the control.
    images = sorted(path.name[:5] for path in (tmp_path / "c" / "figures").glob("*.png"))
    assert images == ["fig08"] * 3 + ["fig40"] * 3
    assert "did not run the same prompts" in " ".join(result.output.split())
