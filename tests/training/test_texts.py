"""Corpora, the command and the models of Section 5.1."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from closeness import SAME
from conftest import random_config
from typer.testing import CliRunner

from tl_looped import (
    CheckpointError,
    ConfigError,
    DataError,
    Injection,
    LoopedTransformer,
    TokenizerError,
)
from tl_looped.cli import app
from tl_looped.paper.section51 import training as section51
from tl_looped.progress import Progress
from tl_looped.training import texts
from tl_looped.training.corpus import pack, read_texts, shared_tokenizer, split, train_tokenizer
from tl_looped.training.evaluation import loss_by_recurrences
from tl_looped.training.log import LOG_FIELDS, read_log
from tl_looped.training.losses import ExitWeighted
from tl_looped.training.record import rows_digest
from tl_looped.training.spec import TrainSpec
from tl_looped.training.texts import Shape, train_model_on_texts, train_on_texts

pytestmark = pytest.mark.once

TEXTS = [f"{a} plus {b} is {a + b}" for a in range(10) for b in range(10)]
SMALL = Shape(1, 1, 1, 2, d_model=16, heads=2, context=32, vocabulary=300)
SPEC = TrainSpec(steps=4, batch_size=2, warmup=1, evaluate_every=2, bf16=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "sums.txt"
    path.write_text("\n\n".join(TEXTS))
    return path


# -- corpora --------------------------------------------------------------------------------------


def test_paragraphs_lines_and_folders_are_documents(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one\nstill one\n\n \t\n two \n   \nthree\n")
    assert read_texts(str(tmp_path / "b.txt")) == ["one\nstill one", "two", "three"]
    lines = [
        {"text": "naïve\u2028数"},  # a line separator that JSON leaves as it is
        {"question": "6/2?", "answer": "<<6/2=3>>3"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(x, ensure_ascii=False) for x in lines) + "\n\n", "utf-8")
    assert read_texts(str(path)) == ["naïve\u2028数", "6/2?\n3"]
    (tmp_path / "c.md").write_text("not read")
    assert read_texts(str(tmp_path)) == [*read_texts(str(path)), "one\nstill one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty corpus"),
        ("a.txt", b" \n\n \n", "empty corpus"),
        ("a.jsonl", b"\n\n", "empty corpus"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2.*text is int"),
        ("a.jsonl", b'{"text": "a"}\n{"tex": "b"}\n', "line 2"),
        ("a.jsonl", b"[1]\n", "line 1"),
        ("a.jsonl", b"{", "line 1"),
        ("a.csv", b"a,b", r"\.txt or a \.jsonl"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "line 2.*RecursionError"),
        ("a.jsonl", b'{"text": "a", "z": ' + b"1" * 5000 + b"}", "line 1.*4300 digits"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1.*surrogate"),
        ("a.jsonl", b'{"question": "a", "answer": "\\udfff"}', "line 1.*surrogate"),
        ("a.jsonl", b'{"text": "' + b"word " * 900_000 + b'"}', "line 1.*4,500,000 characters"),
        ("a.txt", b"word " * 900_000, "4,499,999 characters.*blank lines"),
    ],
)
def test_corpora_that_cannot_be_read(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(str(tmp_path / name))


def test_an_absent_or_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(str(tmp_path / ("n" * 300)))
    with pytest.raises(DataError, match="does not exist"):
        read_texts(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="empty corpus"):
        read_texts(str(tmp_path))


def test_hub_data_sets_need_the_package_and_are_read_by_its_rules(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_texts("hub:some/set")
    calls = []

    class Rows(list):
        column_names = ("words",)

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "none":
            raise FileNotFoundError("no such set")
        return Rows([{"words": "a"}]) if args[0] == "odd" else Rows([{"text": "a"}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_texts("hub:some/set:main:test") == ["a", "b"]
    assert read_texts("hub:some/set") == ["a", "b"]
    assert calls == [
        (("some/set", "main"), {"split": "test"}),
        (("some/set",), {"split": "train"}),
    ]
    with pytest.raises(DataError, match="no such set"):
        read_texts("hub:none")
    with pytest.raises(DataError, match="words"):
        read_texts("hub:odd")
    with pytest.raises(DataError, match="expected hub:NAME"):
        read_texts("hub:a:b:c:d")


def test_a_tokenizer_is_trained_once_and_then_read(tmp_path: Path) -> None:
    first = shared_tokenizer(TEXTS, 300, tmp_path / "tokenizer")
    again = shared_tokenizer(["something else"], 290, tmp_path / "tokenizer")
    assert again.get_vocab() == first.get_vocab()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="no tokenizer that can be read"):
        shared_tokenizer(TEXTS, 300, tmp_path / "tokenizer")


def test_a_tokenizer_that_is_named_is_never_made_there(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer that can be read"):
        train_on_texts(str(corpus), tmp_path / "run", SMALL, SPEC, 10, tmp_path / "absent")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("vocabulary", [0, 258, 2**20 + 1, 10**12])
def test_vocabularies_that_no_tokenizer_has(vocabulary: int) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary .* 259 .* 1048576"):
        Shape(vocabulary=vocabulary)
    assert Shape(vocabulary=259).vocabulary == 259


def test_documents_are_packed_with_or_without_bos() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    rows = pack(["1 plus 1", "2"], tokenizer, 2, prepend_bos=False)
    text = [*tokenizer.encode("1 plus 1"), tokenizer.eos_token_id, *tokenizer.encode("2")]
    assert rows.flatten().tolist() == [*text, tokenizer.eos_token_id][: rows.numel()]
    assert int((pack(["1 plus 1", "2"], tokenizer, 2) == tokenizer.bos_token_id).sum()) == 2


# -- runs -----------------------------------------------------------------------------------------


def test_evaluation_is_the_models_loss_at_each_number_of_recurrences() -> None:
    model = LoopedTransformer.from_config(random_config(dtype=torch.float64))
    rows = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    table = loss_by_recurrences(model, rows, (1, 3, 6), batch_size=2)
    assert table["recurrences"].tolist() == [1, 3, 6]
    with torch.no_grad():
        for n, loss in zip(table["recurrences"], table["held_out_loss"], strict=True):
            expected = float(model(rows, return_type="loss", n_recurrences=int(n)))
            assert loss == pytest.approx(expected, abs=SAME)
    assert model.cfg.n_recurrences == 4


@pytest.mark.full
def test_the_command_trains_draws_and_goes_on(corpus, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(texts, "EVALUATED", range(1, 4))
    out = tmp_path / "run"
    arguments = (
        f"train {corpus} --out {out} --steps 4 --batch-size 2 --warmup 1 --evaluate-every 2 "
        "--no-bf16 --d-model 16 --heads 2 --context 32 --vocabulary 300 --held-out 10 --prelude 1 "
        "--core 1 --coda 1 --recurrences 2"
    ).split()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "step 4: train" in result.output
    assert [e["step"] for e in read_log(out / "log.csv")] == [2, 4]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    evaluation = pd.read_csv(out / "evaluation.csv")
    assert evaluation["recurrences"].tolist() == [1, 2, 3]
    # The same run in Python is the same run: it has nothing left to do.
    progress = Progress(tick=lambda tick: pytest.fail("trained again"))
    log, table = train_on_texts(str(corpus), out, SMALL, SPEC, 10, progress=progress)
    assert [e["step"] for e in log] == [2, 4]
    assert table["held_out_loss"].tolist() == pytest.approx(evaluation["held_out_loss"].tolist())
    final = LoopedTransformer.from_pretrained(out / "final", device="cpu")
    assert str(final.loop) == "(1, 1 x 2, 1)"
    assert final.to_tokens("1 plus 2").shape[1] > 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A looped model with a tokenizer of its own, which puts no BOS before a text."""
    changes = {"n_core": 1, "n_prelude": 1, "n_recurrences": 2, "exit_gate": True, "n_ctx": 24}
    tokenizer = train_tokenizer([t.replace("plus", "and") for t in TEXTS], 280)
    config = random_config(d_vocab=len(tokenizer), **changes)
    folder = tmp_path_factory.mktemp("source") / "looped"
    LoopedTransformer.from_config(config, tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.full
def test_the_command_goes_on_training_a_model(corpus, source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(texts, "EVALUATED", range(1, 3))
    out = tmp_path / "healed"
    arguments = (
        f"train {corpus} --from {source} --out {out} --steps 4 --batch-size 2 --warmup 1 "
        "--evaluate-every 2 --held-out 10 --loss exit --snapshots 1 --recurrences 3"
    ).split()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    before, first, final = (
        LoopedTransformer.from_pretrained(folder, device="cpu")
        for folder in (source, out / "snapshots" / "step-000000", out / "final")
    )
    assert str(final.loop) == "(1, 1 x 3, 1)"
    for a, b, c in zip(*(m.parameters() for m in (before, first, final)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert final.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert (final.tokenizer.eos_token, final.tokenizer.bos_token) == ("<|eos|>", "<|bos|>")
    # Rows of the model's own context, since it is shorter than 256, and without BOS.
    training, aside = split(read_texts(str(corpus)), 10, 0)
    record = json.loads((out / "run.json").read_text())
    for name, documents in (("rows", training), ("held_out", aside)):
        rows = pack(documents, before.tokenizer, 24, prepend_bos=False)
        assert record[name] == rows_digest(rows)
    steps: list[int] = []
    _, table = train_model_on_texts(
        LoopedTransformer.from_pretrained(source, n_recurrences=3, device="cpu"),
        str(corpus),
        out,
        TrainSpec(4, 2, warmup=1, evaluate_every=2, loss=ExitWeighted(0.1)),
        held_out=10,
        progress=Progress(tick=lambda tick: steps.append(tick.step), say=pytest.fail),
        fresh=True,
    )
    assert (steps, table["recurrences"].tolist()) == ([], [1, 2])


def test_a_folder_goes_on_with_the_model_that_it_began_with(corpus, source, tmp_path) -> None:
    out, other = tmp_path / "healed", tmp_path / "looped"
    base = f"train {corpus} --out {out} --steps 2 --batch-size 2 --evaluate-every 2 --held-out 10"
    started = LoopedTransformer.from_pretrained(source, device="cpu")
    spec = TrainSpec(2, 2, warmup=100, evaluate_every=2)
    train_model_on_texts(started, str(corpus), out, spec, held_out=10)
    started.save_pretrained(other)  # of the same name and shape, with other weights
    result = CliRunner().invoke(app, [*base.split(), "--from", str(other)])
    assert isinstance(result.exception, ConfigError)
    assert "weights that it begins with" in str(result.exception)
    result = CliRunner().invoke(app, [*base.split(), "--from", str(source), "--core", "4"])
    assert isinstance(result.exception, ConfigError)
    assert "leave out --core" in str(result.exception)


@pytest.mark.parametrize("start", [True, False])
def test_no_run_is_trained_into_the_folder_of_a_model(corpus, source, start: bool) -> None:
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    arguments = ["train", str(corpus), "--out", str(source), "--steps", "2", "--held-out", "10"]
    result = CliRunner().invoke(app, [*arguments, *(["--from", str(source)] if start else [])])
    assert isinstance(result.exception, ConfigError)
    assert "--from" in str(result.exception)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_models_that_cannot_be_trained_on_texts(corpus: Path, tmp_path: Path) -> None:
    plain = LoopedTransformer.from_config(random_config(d_vocab=300))
    with pytest.raises(TokenizerError, match="no tokenizer"):
        train_model_on_texts(plain, str(corpus), tmp_path, SPEC)
    plain.tokenizer = train_tokenizer(TEXTS, 300)
    plain.tokenizer.eos_token = None
    with pytest.raises(TokenizerError, match="without EOS"):
        train_model_on_texts(plain, str(corpus), tmp_path, SPEC)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["o" * 300, os.fsdecode(b"s\xff"), "a\0b"])
def test_names_that_no_run_can_have(corpus: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"cannot be (the|used as a) folder"):
        train_on_texts(str(corpus), tmp_path / name, SMALL, SPEC, held_out=10)
    assert os.listdir(tmp_path) == []


def test_dollar_signs_and_brackets_in_names_are_signs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(texts, "EVALUATED", range(1, 2))
    corpus, out = tmp_path / r"$\frac$.txt", tmp_path / r"$\bad{$ [b"
    corpus.write_text("\n\n".join(TEXTS))
    arguments = (
        "--steps 1 --batch-size 2 --evaluate-every 1 --d-model 16 --heads 2 --context 16 "
        "--vocabulary 259 --held-out 10 --prelude 0 --core 1 --coda 0 --recurrences 1"
    )
    result = CliRunner().invoke(app, ["train", str(corpus), "--out", str(out), *arguments.split()])
    assert result.exit_code == 0, result.exception
    assert str(out) in result.output
    again = CliRunner().invoke(app, ["train", str(corpus), "--out", str(out), *arguments.split()])
    assert again.exit_code == 0, again.exception
    assert "finished before" in again.output
    assert "loss" not in again.output
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_bad_runs_are_one_message(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"held_out must be 1\.\.99"):
        train_on_texts(str(corpus), tmp_path / "a", SMALL, SPEC, held_out=100)
    with pytest.raises(ConfigError, match="even multiple of heads"):
        train_on_texts(str(corpus), tmp_path / "b", replace(SMALL, heads=3), SPEC, 10)
    with pytest.raises(DataError, match="do not fill one row"):
        train_on_texts(str(corpus), tmp_path / "c", replace(SMALL, context=10**5), SPEC, 10)


def test_an_unreadable_log_is_named(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.csv") == []
    (tmp_path / "log.csv").write_text(",".join(LOG_FIELDS) + "\n1,2\n")
    with pytest.raises(DataError, match=r"log\.csv cannot be read"):
        read_log(tmp_path / "log.csv")


# -- Section 5.1 ----------------------------------------------------------------------------------


def test_configurations_of_section_51() -> None:
    configs = {n: section51.section51_config(n, 1024, 1) for n in section51.CONFIGURATIONS}
    shapes = {n: (c.n_prelude, c.n_core, c.n_recurrences, c.n_coda) for n, c in configs.items()}
    assert shapes == {
        "base4": (2, 4, 4, 2),
        "base8": (2, 8, 4, 2),
        "injection": (2, 4, 4, 2),
        "no-prelude-coda": (0, 4, 4, 0),
        "feedforward": (0, 12, 1, 0),
    }
    for name, config in configs.items():
        assert config.norm_layout.value == "pre"
        assert (config.injection is Injection.LINEAR) == (name == "injection")
        assert (config.init_mode, config.initializer_range, config.seed) == ("normal", 0.02, 1)
    with pytest.raises(ConfigError, match="name must be one of"):
        section51.section51_config("base12", 1024, 0)


@pytest.mark.full
def test_runs_of_section_51_share_rows_and_go_on(tmp_path: Path, monkeypatch) -> None:
    data = tmp_path / "gsm8k.jsonl"
    lines = [{"question": t, "answer": t} for t in TEXTS]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    for name, value in {"_VOCABULARY": 300, "_CONTEXT": 16, "_HELD_OUT_PROBLEMS": 10}.items():
        monkeypatch.setattr(section51, name, value)
    monkeypatch.setattr(section51, "EVALUATED", range(1, 4))
    names, spec = ("no-prelude-coda", "feedforward"), replace(SPEC, steps=2)
    spec = replace(spec, data_seed=section51.DATA_SEED)

    class Stop(Exception):
        pass

    def stop(run: str) -> Progress:
        def tick(tick) -> None:
            if run == "no-prelude-coda-seed1":
                raise Stop

        return Progress(tick=tick)

    with pytest.raises(Stop):
        section51.run_section51(data, tmp_path / "runs", names, (0, 1), spec, stop)
    assert (tmp_path / "runs" / "feedforward-seed0" / "evaluation.csv").is_file()
    trained = set()

    def note(run: str) -> Progress:
        return Progress(tick=lambda tick: trained.add(run))

    folders = section51.run_section51(data, tmp_path / "runs", names, (0, 1), spec, note)
    assert trained == {"no-prelude-coda-seed1", "feedforward-seed1"}
    with pytest.raises(ConfigError, match=r"spec\.clip"):  # finished, with other settings
        section51.run_section51(data, tmp_path / "runs", names, (0, 1), replace(spec, clip=2.0))
    records = [json.loads((folder / "run.json").read_text()) for folder in folders]
    assert len({(r["rows"], r["held_out"], r["spec"]["data_seed"]) for r in records}) == 1
    assert [r["model"]["seed"] for r in records] == [0, 0, 1, 1]
    counts = [len(pd.read_csv(folder / "evaluation.csv")) for folder in folders]
    assert counts == [3, 1, 3, 1]
    first, second = (
        LoopedTransformer.from_pretrained(folders[i] / "final", device="cpu") for i in (0, 2)
    )
    assert not torch.equal(first.W_E, second.W_E)
