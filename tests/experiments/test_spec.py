"""An experiment as data: TOML and back, refusals, the subset of prompts."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_looped import ConfigError, DataError, InputError
from tl_looped.experiments.identity import run_hash
from tl_looped.experiments.prompts import choose, load_prompts
from tl_looped.experiments.spec import EXTRAS, TEST_SENTENCE, Experiment, PromptSet
from tl_looped.model import limits
from tl_looped.paper.figures import (
    FIGURES,
    parse_figures,
    with_needs,
)
from tl_looped.paper.plan import PAPER, paper_plan, parse_models

pytestmark = pytest.mark.once

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    model=text.filter(str.strip),
    texts=st.lists(text, min_size=1, max_size=3),
    recurrences=st.none() | st.integers(1, limits.most_layers),
    extras=st.sets(st.sampled_from(EXTRAS)),
    seed=st.integers(-(2**63), 2**63 - 1),
    revision=st.none() | text,
)
def test_toml_and_back_is_the_same(model, texts, recurrences, extras, seed, revision) -> None:
    prompts = PromptSet("text", texts=tuple(texts), seed=seed)
    spec = Experiment(
        model,
        prompts=prompts,
        recurrences=recurrences,
        extras=tuple(sorted(extras)),
        revision=revision,
    )
    assert Experiment.from_toml(spec.to_toml()) == spec
    assert Experiment.from_dict(spec.to_dict()) == spec


def test_a_file_holds_all_fields_that_are_set(tmp_path: Path) -> None:
    spec = Experiment("demo", recurrences=3)
    path = spec.write(tmp_path / "spec.toml")
    assert Experiment.read(path) == spec
    written = path.read_text()
    for field in fields(Experiment):
        if getattr(spec, field.name) is not None:
            assert field.name in written


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('model = "demo"\nrecurences = 3', "unknown key recurences; did you mean recurrences?"),
        (
            'model = "demo"\n[prompts]\nsede = 3',
            "unknown key prompts.sede; did you mean prompts.seed",
        ),
        ('model = "demo"\nzzz = 3', "unknown key zzz; known: model, kind"),
        ('model = "demo"\nrecurrences = "8"', "recurrences must be of type int, got '8'"),
        ('model = "demo"\nrecurrences = true', "recurrences must be of type int, got True"),
        ('model = "demo"\nmetrics = "all"', "metrics must be a list"),
        ('model = "demo"\nprompts = 3', "prompts must be a table, got 3"),
        ('model = "demo"\nrecurrences = 0', "at least 1"),
        ('model = "demo"\ndtype = "int8"', "floating point"),
        ('model = "demo"\nmetrics = ["colsum"]', "there is no 'colsum'"),
        ('model = "demo"\nextras = ["pcaa"]', "extras must be one of"),
        ('model = "demo"\nkind = "feedforward"\nextras = ["pca"]', "need a loop"),
        ('model = "demo"\nkind = "feedforward"\nrecurrences = 2', "1 recurrence"),
        ('model = "demo"\n[prompts]\nsource = "file"', "needs prompts.file"),
        ('model = "demo"\n[prompts]\nfile = "x"', "no effect"),
        ('model = "demo"\n[prompts]\nsource = "text"', "texts"),
        ('model = "demo"\n[prompts]\nsubset = -1', "at least 0"),
        ("recurrences = 3", "names no model"),
        ("model = ", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(toml: str, says: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, InputError), match=re.escape(says)):
        Experiment.from_toml(toml)


def test_an_unreadable_experiment_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.toml"):
        Experiment.read(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("modell = 1")
    with pytest.raises(ConfigError, match=r"bad.toml.*did you mean model"):
        Experiment.read(tmp_path / "bad.toml")


# -- prompts ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, derandomize=True)
@given(n=st.integers(1, 400), subset=st.integers(0, 500), seed=st.integers())
def test_a_subset_is_a_sorted_set_of_its_size(n: int, subset: int, seed: int) -> None:
    rows = choose(n, subset, seed)
    assert list(rows) == sorted(set(rows))
    assert set(rows) <= set(range(n))
    assert len(rows) == (min(subset, n) if subset else n)
    if subset > 1:
        assert set(choose(n, subset - 1, seed)) <= set(rows)


def test_the_subset_never_changes() -> None:
    """Spelled out, so that another version of anything cannot draw another one unnoticed."""
    assert choose(1319, 5, 0) == (87, 392, 404, 942, 1023)
    assert choose(1319, 5, 1) != choose(1319, 5, 0)


def test_files_of_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_bytes("one\r\n\n  two \u2028 still two\n".encode())
    assert load_prompts(PromptSet("file", str(lines))).texts == ("one", "  two \u2028 still two")
    rows = tmp_path / "a.jsonl"
    rows.write_text('\ufeff{"answer": "x", "question": "q\\u2028r"}\n{"question": "s"}\n')
    assert load_prompts(PromptSet("file", str(rows))).texts == ("q\u2028r", "s")
    assert load_prompts(PromptSet("file", str(rows), "question")).texts == ("q\u2028r", "s")
    hellaswag = tmp_path / "h.jsonl"
    hellaswag.write_text('{"ctx": "A man", "ctx_a": "no", "text": "neither"}\n')
    assert load_prompts(PromptSet.parse(f"hellaswag:{hellaswag}")).texts == ("A man",)
    assert PromptSet.parse(str(lines)).label == "a"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("e.txt", "", "e.txt is empty"),
        ("e.jsonl", "\n \n", "e.jsonl is empty"),
        ("b.jsonl", '{"question": "a"}\n{"question": 3}\n', "line 2 .*no text in 'question'"),
        ("c.jsonl", '{"question": "a"}\nnot\n', "line 2 .*not JSON"),
        ("d.jsonl", '{"query": "a"}\n', "line 1 .*none of question, ctx.*query"),
        ("f.jsonl", '["a"]\n', "line 1"),
    ],
)
def test_a_bad_file_names_its_line(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says):
        load_prompts(PromptSet.parse(str(tmp_path / name)))


def test_what_is_no_set_of_prompts_is_named() -> None:
    with pytest.raises(DataError, match="did you mean gsm8k"):
        PromptSet.parse("gsm8")
    with pytest.raises(DataError, match=r"absent.jsonl cannot be read"):
        load_prompts(PromptSet.parse("gsm8k:absent.jsonl"))


def test_a_data_set_that_is_not_here_names_the_file_to_give(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets.*--prompts gsm8k:PATH.*'question'"):
        load_prompts(PromptSet("gsm8k"))


def test_sources_that_need_no_file() -> None:
    assert load_prompts(PromptSet("sentence")).texts == (TEST_SENTENCE,)
    assert TEST_SENTENCE == "Hello! I\u2019ve been well. I hope that you\u2019re doing well."
    bundled = load_prompts(PromptSet())
    assert len(bundled.texts) == bundled.available == 32
    five = load_prompts(PromptSet(subset=5, seed=3))
    assert five.texts == tuple(bundled.texts[row] for row in five.rows)


# -- hash and figures ---------------------------------------------------------------------------


def test_the_hash_changes_with_what_decides_the_numbers_alone(tmp_path: Path) -> None:
    spec = Experiment("demo", recurrences=4)
    prompts = load_prompts(spec.prompts)
    same = run_hash(spec, prompts, "m")
    changed = [
        Experiment("demo", recurrences=5),
        Experiment("demo", recurrences=4, state_seed=1),
        Experiment("demo", recurrences=4, dtype="bfloat16"),
        Experiment("demo", recurrences=4, metrics=("signature",)),
        Experiment("demo", recurrences=4, extras=("pca",)),
        Experiment("demo", recurrences=4, initial_state="zeros"),
        Experiment("demo", recurrences=4, reference_recurrences=8),
        Experiment("demo", recurrences=4, prompts=PromptSet(too_long="truncate")),
    ]
    hashes = [run_hash(other, prompts, "m") for other in changed]
    assert len({same, *hashes, run_hash(spec, prompts, "n")}) == len(changed) + 2
    fewer = load_prompts(PromptSet(subset=3))
    assert run_hash(spec, fewer, "m") != same
    # The same texts from another place, the same metrics by other names: the same run.
    copy = tmp_path / "copy.txt"
    copy.write_text("\n".join(prompts.texts))
    moved = PromptSet.parse(str(copy))
    assert (
        run_hash(Experiment("other", recurrences=4, prompts=moved), load_prompts(moved), "m")
        == same
    )


def test_figures_bring_what_they_need() -> None:
    assert parse_figures(" 2,7 ,2,") == (2, 7)
    assert parse_figures("") == ()
    for unknown in ("99", "x", "2;4", "-2"):
        with pytest.raises(InputError, match=r"there is no .*drawn as 2, 3, 4"):
            parse_figures(unknown)
    with pytest.raises(InputError, match=r"Fig\. 8 shows a looped run over a feedforward one"):
        parse_figures("8")
    with pytest.raises(InputError, match="ablate-mlp"):
        with_needs(Experiment("demo"), (41,))
    spec = with_needs(Experiment("demo", metrics=("mixing_raw",)), (2, 4, 5))
    assert spec.metrics == ("mixing_raw", "signature", "fixed_point")
    assert spec.extras == ("pairwise", "pca")


def test_the_papers_runs_have_their_figures() -> None:
    assert parse_models("all") == tuple(PAPER)
    with pytest.raises(InputError, match="did you mean huginn"):
        parse_models("hugin")
    with pytest.raises(InputError, match="none was given"):
        parse_models(",")
    runs = paper_plan("huginn", PromptSet("gsm8k"), PromptSet("hellaswag")).runs
    assert [run.spec.recurrences for run in runs] == [8, 32, 128, 128, 8]
    assert "pairwise" in runs[0].spec.extras
    assert "confirm" in runs[2].spec.extras
    plan = paper_plan("ouro-1.4b", PromptSet("gsm8k"), None)
    labels = [run.spec.prompts.label for run in plan.runs]
    assert labels == ["gsm8k", "gsm8k", "sentence", "text", "gsm8k"]
    assert plan.runs[-1].spec.kind == "feedforward"
    (over,) = plan.overlays
    assert (over.looped, over.feedforward) == (plan.runs[0].spec, plan.runs[-1].spec)
    assert over.looped.feedforward == over.feedforward.model


def test_every_figure_of_a_model_is_drawn_by_some_plan() -> None:
    plans = [paper_plan(model, PromptSet(), PromptSet()) for model in PAPER]
    alone = {number for plan in plans for run in plan.runs for number in run.figures}
    over = {number for plan in plans for one in plan.overlays for number in one.figures}
    elsewhere = {number for number, spec in FIGURES.items() if spec.data.elsewhere}
    assert alone == set(FIGURES) - elsewhere
    assert over == {8, 40}
    # With those of random and of trained models, the paper's figures but 1 and 53.
    assert set(FIGURES) == {*range(2, 53), *range(54, 64)}
    two_point_six = paper_plan("ouro-2.6b", PromptSet(), None)
    assert [run.spec.recurrences for run in two_point_six.runs] == [4, None]
    local = paper_plan("ouro-2.6b", PromptSet(), None, feedforward="some/folder")
    assert local.overlays[0].feedforward.model == "some/folder"
    moved = paper_plan("huginn", PromptSet(), None, checkpoint="my/copy")
    assert {run.spec.model for run in moved.runs} == {"my/copy"}
