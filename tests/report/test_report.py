"""The report: its numbers against the metrics' own, its page against hostile texts, bad files."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from results import C, K, N, P, R, feedforward, result, with_numbers
from toys import identity

from tl_looped import LoopedTransformer
from tl_looped.errors import DataError, InputError
from tl_looped.experiments.prompts import load_prompts
from tl_looped.experiments.reading import read_results
from tl_looped.experiments.spec import PromptSet
from tl_looped.experiments.store import FORMAT
from tl_looped.metrics import cyclicity_index, from_cache, pairwise_residual_cosine
from tl_looped.paper.figures import draw
from tl_looped.report import run_report as report
from tl_looped.report.findings import read_findings
from tl_looped.report.run_report import write_report
from tl_looped.report.views import write_view
from tl_looped.viz import attention_view

pytestmark = pytest.mark.once

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' & {{ 7*7 }}"


# -- the page -----------------------------------------------------------------------------------


def add_figure(run: Path, number: int = 1, suffix: str = ".png", **changes: Any) -> Path:
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    return add_drawn(run, number, suffix, figure, **changes)


def add_drawn(run: Path, number: int, suffix: str, figure: Figure, **changes: Any) -> Path:
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    path = folder / f"fig{number:02d}{suffix}"
    figure.savefig(path, dpi=20)
    record = {
        "number": number, "title": f"Title {number}", "caption": "What it shows",
        "command": "tl-looped run x.toml", "settings": {"seed": 7, "model": "demo"},
    } | changes  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    return path


def add_run(folder: Path, data: xr.Dataset) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data.to_netcdf(folder / "results.nc", engine="h5netcdf")
    return folder


class Page(HTMLParser):
    """The elements of a page, their texts, and its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return add_run(tmp_path / "run", result())


def _keep(name: str) -> bool:
    return name.endswith(("hook_pattern", "hook_resid_post"))


def test_the_report_of_a_real_run(tmp_path: Path) -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    with torch.inference_mode():
        cache = model.run_with_cache(
            load_prompts(PromptSet("bundled")).texts[0],
            n_recurrences=3,
            state_seed=0,
            names_filter=_keep,
        )[1]
        data = from_cache(cache, "signature", by="depth")
        matrix = pairwise_residual_cosine(cache.stack_activation("resid_post")).numpy()
    data["pairwise_residual_cosine"] = ("effective_layer", "other_layer"), matrix
    data = data.assign_attrs(format=FORMAT, spec="{}", torch=str(torch.__version__))
    run = add_run(tmp_path / "demo", data)
    (drawn,) = draw(37, data)
    add_drawn(run, 37, ".svg", drawn.figure)
    path = write_report(run)
    page = Page(path)
    assert path == run / "report.html"
    assert page.all("h1")
    assert page.texts[page.texts.index("demo (2, 4 x 3, 2)")]
    expected = float(cyclicity_index(torch.from_numpy(matrix[2:-2, 2:-2]), 4))
    assert f"{expected:.2f}" in page.texts
    assert page.all("img")[0]["src"].startswith("data:image/svg+xml;base64,")
    assert not page.scripts


def test_the_summary_stands_before_figures_and_each_figure_says_how_it_was_made(run: Path) -> None:
    add_figure(run, 2, caption="Second")
    first = add_figure(run, 1, ".svg", caption="First")
    add_figure(run, 1, ".png", caption="First")
    page = Page(write_report(run, "A title"))
    order = [page.text.index(s) for s in ("A title", "Summary", "Contents", "First", "Second")]
    assert order == sorted(order)
    assert [image["alt"] for image in page.all("img")] == ["Title 1", "Title 2"]
    svg = base64.b64decode(page.all("img")[0]["src"].split(",")[1])
    assert svg == first.read_bytes()
    assert "Command tl-looped run x.toml Settings seed 7 model demo" in page.text
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [link["href"] for link in page.all("a")]
    assert links
    assert all(link[1:] in targets for link in links)


def test_no_text_of_a_file_becomes_markup(tmp_path: Path) -> None:
    data = result(model=HOSTILE, spec=json.dumps({"prompts": [HOSTILE]}), other=HOSTILE)
    run = add_run(tmp_path / "a" / "<b onclick=x>", data)
    texts = dict.fromkeys(("title", "caption", "command"), HOSTILE + "\ud800")
    add_figure(run, **texts, settings={HOSTILE: [HOSTILE]})
    view = attention_view(identity(2)[None], [HOSTILE, "b"], [HOSTILE], HOSTILE)
    write_view(view, run / "views", 1, caption=HOSTILE, command=HOSTILE, settings={"x": HOSTILE})
    page = Page(write_report(tmp_path / "a", HOSTILE))
    assert len(page.all("script")) == 3
    assert len(page.all("img")) == 1
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert page.all("h1")
    assert page.texts.count(HOSTILE) >= 4
    assert json.loads(page.scripts[0])["tokens"] == [HOSTILE, "b"]


def test_the_page_needs_no_network_and_runs_no_script_but_its_own(run: Path) -> None:
    add_figure(run)
    view = attention_view(identity(2)[None], ["a", "b"], ["r0 l0 h0"], "t")
    write_view(view, run / "views", 1, caption="c", command="x", settings={})
    page = Page(write_report(run))
    addresses = [a[k] for _, a in page.elements for k in ("src", "href", "srcset") if k in a]
    assert addresses
    assert all(address.startswith(("data:image/png", "#")) for address in addresses)
    (policy,) = (m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert "default-src 'none'; img-src data:;" in policy
    assert re.findall("'sha256-([^']+)'", policy) == [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in (gzip.decompress(base64.b64decode(page.scripts[1])).decode(), page.scripts[2])
    ]
    assert json.loads(page.scripts[0])["cells"] == [[[1000], [0, 1000]]]


def test_views_that_find_no_room_stay_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = attention_view(identity(2)[None], ["a", "b"], ["r0 l0 h0"], "t")
    for number in (1, 2):
        write_view(view, run / "views", number, caption="c", command="x", settings={})
    script = len(report.packed_drawing())
    monkeypatch.setattr(report, "MAX_BYTES", script + 100)  # a view takes 66 bytes
    page = Page(write_report(run))
    assert len(page.scripts) == 3
    assert page.text.count("Too large for this page") == 1
    (run / "views" / "view02.html").unlink()
    with pytest.raises(DataError, match=r"view02\.html is missing"):
        write_report(run)


def test_several_runs_comparisons_and_runs_to_come(tmp_path: Path) -> None:
    for name, data in (("b", feedforward()), ("a", with_numbers(result(), verdict=[0] * N))):
        add_run(tmp_path / name, data)
    add_figure(tmp_path, caption="All together")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "spec.toml").write_text("")
    path = write_report(tmp_path)
    page = Page(path)
    assert "not yet run, so not in this report: later." in page.text
    assert "fixed point: 5 of 5" in page.text
    assert "Comparisons" in page.texts
    said = "toy: 5 prompts, 4 recurrences, against base (b): bootstrap over 5 and 5 prompts, 1,000 "
    assert said + "resamples, seed 0" in page.text
    before = path.read_bytes()
    assert write_report(tmp_path).read_bytes() == before


def test_runs_of_one_model_share_a_row(tmp_path: Path) -> None:
    """Each number is of the run that says most; other weights are another model."""
    dims = ("effective_layer", "other_layer")
    matrix = np.random.default_rng(0).random((P + K * R + C,) * 2)
    short = result(trained_recurrences=R).assign(pairwise_residual_cosine=(dims, matrix))
    short = with_numbers(short, verdict=[5] * N)
    shortest = result((P, K, C, 2), trained_recurrences=R)
    long_run = with_numbers(
        result((P, K, C, 9), trained_recurrences=R), verdict=[5] * N, rate=[0.9] * N
    )
    few = result((P, K, C, 50), n=2, trained_recurrences=R)
    few = with_numbers(few, verdict=[4, 0], rate=[1.0, 0.5], half_life=[np.inf, 1.0])
    for name, data in (
        ("r9", long_run),
        ("r4", short),
        ("r50", few),
        ("r2", shortest),
        ("f", feedforward()),
    ):
        add_run(tmp_path / name, data)
    add_run(tmp_path / "other", result(model_identity="other weights"))
    rows = read_findings(tmp_path).rows()
    assert [(row.model, row.shape, len(row.runs)) for row in rows] == [
        ("toy (weights other we)", f"({P}, {K} x {R}, {C})", 1),
        ("toy", f"({P}, {K} x R, {C}), trained with {R}", 4),
        ("base", "6 layers, feedforward", 1),
    ]  # fmt: skip
    fixed, rate, _, cyclicity, mirroring = rows[1].cells
    # What a loop does in the end is what its longest run says, of however few prompts.
    assert (fixed.main, fixed.source[1]) == ("fixed point: 1 of 2", "2 prompts, 50 recurrences")
    assert (rate.main, rate.source[1]) == ("0.500", "2 prompts, 50 recurrences")
    assert cyclicity.source[1] == mirroring.source[1] == "5 prompts, 4 recurrences"
    page = Page(write_report(tmp_path))
    assert "4 runs, listed below" in page.text
    assert page.text.index("toy: 5 prompts, 9 recurrences") < page.text.index("base: 5 prompts")


def test_a_feedforward_run_can_be_named_when_the_report_is_written(tmp_path: Path) -> None:
    for name, data in (("a", result()), ("f", feedforward()), ("g", feedforward(7))):
        add_run(tmp_path / name, data)
    (ambiguous, *_) = read_findings(tmp_path).summaries
    assert "tl-looped report --feedforward" in ambiguous.mirroring.reason
    (chosen, *_) = read_findings(tmp_path, feedforward="g").summaries
    assert chosen.mirroring.against == "g"
    with pytest.raises(InputError, match="there are f, g"):
        read_findings(tmp_path, feedforward="a")


# -- bad files ----------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def rewrite(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


SPOILS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no results": (lambda run: (run / "results.nc").unlink(), r"no results\.nc"),
    "cut off": (lambda run: cut(run / "results.nc"), "cannot be read as netCDF"),
    "another kind": (lambda run: (run / "results.nc").write_text("hi"), "cannot be read as netCDF"),
    "next format": (
        lambda run: add_run(run, result(format=FORMAT + 1, tl_looped="9.0")),
        r"is of format 2, and this version reads format 1: use the version that wrote it \(9\.0\)",
    ),
    "no format": (lambda run: add_run(run, result(format="x")), "no integer attribute 'format'"),
    "no shape": (
        lambda run: add_run(run, xr.Dataset(attrs={"format": 1})), "does not say the run's shape"
    ),
    "other shape": (
        lambda run: add_run(run, result().isel(effective_layer=slice(3))), "must be by depth"
    ),
    "spec": (lambda run: add_run(run, result(spec="{")), "spec is not JSON"),
    "spec list": (lambda run: add_run(run, result(spec="[]")), "spec must be a JSON object"),
    "no figure": (lambda run: (run / "figures/fig01.png").unlink(), r"no figure fig01\.svg or"),
    "no record": (lambda run: (run / "figures/fig01.json").unlink(), r"no record fig01\.json"),
    "half a PNG": (lambda run: cut(run / "figures/fig01.png"), "no whole PNG"),
    "half an SVG": (lambda run: cut(add_figure(run, 1, ".svg")), "no whole SVG"),
    "no JSON": (lambda run: cut(run / "figures/fig01.json"), "cannot be read as JSON"),
    "no caption": (
        lambda run: rewrite(run / "figures/fig01.json", caption=None), "must hold caption, str"
    ),
    "settings": (
        lambda run: rewrite(run / "figures/fig01.json", settings=[1]), "must hold settings, dict"
    ),
    "view": (lambda run: rewrite(run / "views/view01.json", view=3), "tokens, labels, cells"),
    "view NaN": (
        lambda run: rewrite(
            run / "views/view01.json", view={"tokens": [], "labels": [], "cells": [math.nan]}
        ),
        "not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILS)
def test_a_bad_file_is_named_and_nothing_is_written(run: Path, name: str) -> None:
    add_figure(run)
    view = attention_view(identity(2)[None], ["a", "b"], ["r0 l0 h0"], "t")
    write_view(view, run / "views", 1, caption="c", command="x", settings={})
    (run / "report.html").write_text("the last one")
    spoil, message = SPOILS[name]
    spoil(run)
    with pytest.raises(DataError, match=message):
        write_report(run)
    assert (run / "report.html").read_text() == "the last one"
    assert not list(run.glob("*.partial"))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "spec.toml").write_text("")
    with pytest.raises(DataError, match="not yet run: x"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="run the experiment first"):
        read_results(tmp_path / "results.nc")
