"""The report: its numbers against the metrics' own, its page against hostile texts, bad files."""

from __future__ import annotations

import base64
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

from tests.toys import identity
from tl_looped import LoopedTransformer
from tl_looped.errors import DataError, InputError
from tl_looped.experiments import report
from tl_looped.experiments.figures import draw
from tl_looped.experiments.mirrored import MirroringTable, Resampling
from tl_looped.experiments.prompts import load_prompts
from tl_looped.experiments.reading import Missing, read_results
from tl_looped.experiments.report import write_report
from tl_looped.experiments.report_text import digits, value
from tl_looped.experiments.spec import PromptSet
from tl_looped.experiments.store import FORMAT
from tl_looped.experiments.summary import Median, RunSummary, Verdicts, summarise
from tl_looped.metrics import cyclicity_index, over_cache, pairwise_residual_cosine
from tl_looped.metrics.convergence import Verdict
from tl_looped.metrics.mirroring import mirroring_score
from tl_looped.plots.views import attention_view, write_view

P, K, C, R, N = 1, 3, 2, 4, 5
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' & {{ 7*7 }}"
FEW = Resampling(n_resamples=200)


def result(shape: tuple[int, int, int, int] = (P, K, C, R), n: int = N, **extra: Any) -> xr.Dataset:
    """A result by depth with one metric of random numbers; ``extra`` are attributes."""
    p, k, c, r = shape
    rng = np.random.default_rng(sum(shape))
    dims = ("effective_layer", "head", "prompt")
    values = rng.random((p + k * r + c, 2, n))
    attributes: dict[str, Any] = {"model": "toy", "format": FORMAT, "prompts_digest": "words"}
    attributes |= dict(zip(("n_prelude", "n_core", "n_coda", "n_recurrences"), shape, strict=True))
    data = xr.Dataset({"colsum_concentration": (dims, values)}, attrs=attributes | extra)
    return data.assign_coords(source_row=("prompt", range(n)))


def feedforward(layers: int = 6, n: int = N, **extra: Any) -> xr.Dataset:
    return result((0, layers, 0, 1), n, **({"model": "base"} | extra))


def with_numbers(data: xr.Dataset, **numbers: list[float]) -> xr.Dataset:
    return data.assign({name: ("prompt", values) for name, values in numbers.items()})


def only(data: xr.Dataset, *others: xr.Dataset) -> RunSummary:
    names = [f"other{i}" for i in range(len(others))]
    return summarise({"run": data, **dict(zip(names, others, strict=True))}, FEW)[0]


def curves(data: xr.Dataset) -> np.ndarray:
    return data["colsum_concentration"].mean("head").to_numpy()


# -- the numbers --------------------------------------------------------------------------------


def test_verdicts_are_counted_over_prompts() -> None:
    data = with_numbers(result(), verdict=[3, 0, 5, 0, 0], settled_at=[-1, 4, -1, 6, 9])
    found = only(data).verdicts
    assert found == Verdicts(
        {Verdict.CONVERGED: 3, Verdict.ORBIT: 1, Verdict.NOT_CONVERGED: 1}, 5, 6.0, 3, None
    )
    data.attrs["confirmed"] = 0
    assert only(data).verdicts.confirmed is False


@pytest.mark.parametrize("bad", [7.0, -1.0, 0.5, math.nan])
def test_a_number_that_is_no_verdict(bad: float) -> None:
    with pytest.raises(DataError, match=re.escape(f"verdict holds {bad}")):
        only(with_numbers(result(), verdict=[0, 0, 0, 0, bad]))


def test_medians_over_the_prompts_that_have_the_number() -> None:
    nan, inf = math.nan, math.inf
    data = with_numbers(
        result(), rate=[0.5, nan, 0.7, 1.2, nan], half_life=[1.0, nan, 2.0, inf, inf]
    )
    found = only(data)
    assert found.rate == Median(0.7, 0.5, 1.2, 3, 5)
    assert found.half_life == Median(inf, 1.0, inf, 4, 5)
    empty = only(with_numbers(result(), rate=[nan] * 5)).rate
    assert isinstance(empty, Missing)
    assert "undefined for every prompt" in empty.reason


def test_what_is_not_there_is_missing_with_its_reason() -> None:
    found = only(result())
    for name in ("verdicts", "rate", "half_life", "cyclicity"):
        assert "the results hold no" in getattr(found, name).reason
    assert found.mirroring == Missing("no feedforward result among the runs")


def test_cyclicity_is_that_of_the_core() -> None:
    matrix = np.random.default_rng(0).random((P + K * R + C,) * 2)
    dims = ("effective_layer", "other_layer")
    data = result().assign(pairwise_residual_cosine=(dims, matrix))
    core = torch.from_numpy(matrix[P : P + K * R, P : P + K * R])
    assert only(data).cyclicity == pytest.approx(float(cyclicity_index(core, K)), abs=1e-12)
    for shape, said in (((0, 1, 0, 4), "4 recurrence"), ((1, 3, 1, 1), "1 recurrence")):
        n = shape[0] + shape[1] * shape[3] + shape[2]
        flat = result(shape).assign(pairwise_residual_cosine=(dims, np.ones((n, n))))
        assert said in only(flat).cyclicity.reason


def test_the_mirroring_score_is_the_metric_of_the_mean_curves() -> None:
    data, base = result(), feedforward(7)
    score = only(data, base).mirroring.scores[0]
    mean, f = curves(data).mean(-1), curves(base).mean(-1)
    each = mirroring_score(
        mean[P : P + K * R].reshape(R, K), f, prelude=mean[:P], coda=mean[P + K * R :]
    ).pearson
    assert score.score == pytest.approx(each.mean(), abs=1e-9)
    assert score.best == (int(each.argmax()), pytest.approx(each.max(), abs=1e-9))
    assert score.low < score.score < score.high
    assert (score.n_prompts, score.left_out, score.paired) == ((N, N), (0, 0), True)


def test_an_affine_image_of_the_feedforward_curve_mirrors_it() -> None:
    base = feedforward(P + K + C)
    values = base["colsum_concentration"].to_numpy()
    looped = np.concatenate((values[:P], *[values[P : P + K]] * R, values[P + K :]))
    dims = base["colsum_concentration"].dims
    data = result().assign(colsum_concentration=(dims, 3 * looped + 2))
    score = only(data, base).mirroring.scores[0]
    assert (score.score, score.low, score.high) == pytest.approx((1, 1, 1), abs=1e-12)
    # Drawn by themselves, the prompts differ between the two.
    unpaired = only(data, base.assign_attrs(prompts_digest="others")).mirroring.scores[0]
    assert not unpaired.paired
    assert unpaired.score == pytest.approx(1, abs=1e-12)
    assert unpaired.low < 0.99


def test_the_interval_has_a_seed_and_needs_two_prompts() -> None:
    runs = {"run": result(), "base": feedforward()}
    first, again, other = (
        summarise(runs, Resampling(200, seed=seed))[0].mirroring.scores[0] for seed in (1, 1, 2)
    )
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    one = only(result(n=1), feedforward(n=1)).mirroring.scores[0]
    assert math.isfinite(one.score)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    for bad in ({"n_resamples": 1}, {"confidence": 1.0}, {"seed": -1}):
        with pytest.raises(InputError, match="n_resamples must be at least 2"):
            Resampling(**bad)


def test_prompts_with_values_that_are_not_finite_are_left_out() -> None:
    data, base = result(), feedforward()
    clean = only(data.isel(prompt=slice(1, None)), base.isel(prompt=slice(1, None)))
    for bad in (math.nan, math.inf):
        broken = data.copy(deep=True)
        broken["colsum_concentration"][P + 1, 0, 0] = bad
        score = only(broken, base).mirroring.scores[0]
        assert score.score == clean.mirroring.scores[0].score
        assert (score.n_prompts, score.left_out) == ((N - 1, N - 1), (1, 1))
    broken["colsum_concentration"][0] = math.nan
    assert "every prompt" in only(broken, base).mirroring.reason
    flat = base.assign(colsum_concentration=base["colsum_concentration"] * 0 + 0.1)
    assert "constant over depth" in only(data, flat).mirroring.reason


def test_which_feedforward_result() -> None:
    data, base = result(), feedforward()
    assert "no feedforward" in only(data, base.assign_attrs(model="toy")).mirroring.reason
    assert "2 feedforward results (other0, other1)" in only(data, base, base).mirroring.reason
    named = data.assign_attrs(spec='{"feedforward": "other1"}')
    found = only(named, base, base).mirroring
    assert isinstance(found, MirroringTable)
    assert found.against == "other1"
    assert "'other1' is not among" in only(named, base).mirroring.reason
    # By its model, and of two the one on the same prompts.
    by_name = data.assign_attrs(spec='{"feedforward": "base"}')
    elsewhere = base.assign_attrs(prompts_digest="others")
    assert (
        only(by_name, elsewhere, base, base.assign_attrs(model="x")).mirroring.against == "other1"
    )
    assert only(data, elsewhere).mirroring.scores[0].paired is False
    assert only(base, data).mirroring == Missing("no loop: every layer ran once")


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.75, "0.750"), (29.0, "29.0"), (123.4, "123"), (12345.0, "12300"), (-0.5, "−0.500"),
        (0.0, "0"), (math.inf, "∞"), (-math.inf, "−∞"), (math.nan, "undefined"),
        (1.5e-7, "1.50e−7"), (0.000123, "0.000123"),
    ],
)  # fmt: skip
def test_three_digits(x: float, text: str) -> None:
    assert digits(x) == text


def test_settings_as_text() -> None:
    assert value("a <b>") == "a <b>"
    assert value(np.int64(3)) == "3"
    assert value({"seeds": [0, 1], "é": None}) == '{"seeds": [0, 1], "é": null}'


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
        data = over_cache(cache, "stage", over="depth")
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
        for script in page.scripts[1:]
    ]
    assert json.loads(page.scripts[0])["cells"] == [[[1000], [0, 1000]]]


def test_views_that_find_no_room_stay_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = attention_view(identity(2)[None], ["a", "b"], ["r0 l0 h0"], "t")
    for number in (1, 2):
        write_view(view, run / "views", number, caption="c", command="x", settings={})
    script = len(report.drawing_script().encode())
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
    said = "toy: 5 prompts, 4 recurrences, against b: bootstrap over 5 and 5 prompts, 1,000 "
    assert said + "resamples, seed 0" in page.text
    before = path.read_bytes()
    assert write_report(tmp_path).read_bytes() == before


def test_runs_of_one_model_share_a_row(tmp_path: Path) -> None:
    """Each number is of the run that says most; other weights are another model."""
    dims = ("effective_layer", "other_layer")
    matrix = np.random.default_rng(0).random((P + K * R + C,) * 2)
    short = result(trained_recurrences=R).assign(pairwise_residual_cosine=(dims, matrix))
    long_run = with_numbers(result((P, K, C, 9), trained_recurrences=R), verdict=[0] * N)
    few = with_numbers(result((P, K, C, 50), n=2), verdict=[5, 5])
    for name, data in (("r9", long_run), ("r4", short), ("r50", few), ("f", feedforward())):
        add_run(tmp_path / name, data)
    add_run(tmp_path / "other", result(model_identity="other weights"))
    rows = report.summary_rows(tmp_path)
    assert [(row.model, row.shape, len(row.runs)) for row in rows] == [
        ("toy", f"({P}, {K} x {R}, {C})", 1), ("toy", f"({P}, {K} x R, {C})", 3),
        ("base", "6 layers, feedforward", 1),
    ]  # fmt: skip
    fixed, rate, _, cyclicity, mirroring = rows[1].cells
    assert (fixed.main, fixed.source[1]) == ("fixed point: 5 of 5", "5 prompts, 9 recurrences")
    assert rate.missing
    assert cyclicity.source[1] == mirroring.source[1] == "5 prompts, 4 recurrences"
    page = Page(write_report(tmp_path))
    assert "3 runs, listed below" in page.text
    assert page.text.index("toy: 5 prompts, 9 recurrences") < page.text.index("base: 5 prompts")


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
