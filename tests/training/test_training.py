from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import random_config

from tl_looped import DataError, InitialState, Injection, LoopedTransformer
from tl_looped.training.corpus import pack, read_problems, split, train_tokenizer
from tl_looped.training.evaluation import held_out_loss
from tl_looped.training.log import LOG_FIELDS
from tl_looped.training.spec import TrainSpec
from tl_looped.training.trainer import train

TEXTS = [f"{a} plus {b}\nis {a + b}" for a in range(10) for b in range(10)]


def trained(out: Path, seed: int = 0):
    tokenizer = train_tokenizer(TEXTS, 300)
    rows = pack(TEXTS, tokenizer, 32)
    config = random_config(
        d_vocab=len(tokenizer),
        injection=Injection.LINEAR,
        initial_state=InitialState.RANDOM,
        initial_state_std=0.5,
        n_recurrences=2,
    )
    model = LoopedTransformer.from_config(config, tokenizer)
    spec = TrainSpec(steps=30, batch_size=4, warmup=5, evaluate_every=10, bf16=False, seed=seed)
    return train(model, rows, rows[:4], spec, out), model, rows


def test_loss_falls_and_the_log_and_best_model_are_written(tmp_path: Path) -> None:
    log, model, rows = trained(tmp_path)
    assert [entry["step"] for entry in log] == [10, 20, 30]
    assert log[-1]["held_out_loss"] < log[0]["held_out_loss"] - 0.3
    with (tmp_path / "log.csv").open() as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == LOG_FIELDS
    assert [float(row["held_out_loss"]) for row in read] == [e["held_out_loss"] for e in log]
    best = LoopedTransformer.from_pretrained(tmp_path / "best", device="cpu")
    expected = min(entry["held_out_loss"] for entry in log)
    assert held_out_loss(best, rows[:4], 16) == pytest.approx(expected, abs=1e-4)
    assert not model.training


@pytest.mark.full
@pytest.mark.once
def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    one, other, third = (
        trained(tmp_path / name, seed)[1] for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    same = [torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(one.W_E, third.W_E)


def test_rate_rises_to_the_peak_and_falls_to_its_fraction() -> None:
    spec = TrainSpec(steps=100, warmup=10, learning_rate=1.0, final_fraction=0.1)
    assert spec.rate(0) == pytest.approx(0.1)
    assert spec.rate(10) == pytest.approx(1.0)
    assert spec.rate(55) == pytest.approx(0.55)
    assert spec.rate(100) == pytest.approx(0.1)


def test_problems_lose_their_calculator_notes(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    problem = {"question": "Half of 6?", "answer": "6/2 = <<6/2=3>>3\n#### 3"}
    path.write_text(json.dumps(problem) + "\n\n")
    assert read_problems(path) == ["Half of 6?\n6/2 = 3\n#### 3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "b"}\nnot json\n', "line 2"),
        ('{"question": "a"}\n', "line 1.*answer"),
        ('["a"]\n', "line 1"),
        ("\n", "no problem"),
    ],
)
def test_bad_problem_files_are_named_with_their_line(tmp_path, content, message) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_problems(path)
    with pytest.raises(DataError, match="does not exist"):
        read_problems(tmp_path / "absent.jsonl")


def test_tokenizer_spells_numbers_and_gives_back_any_text() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    assert len(tokenizer) <= 300
    text = "12345 naïve 数 — plus"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert [tokenizer.decode([i]) for i in ids[:5]] == list("12345")


def test_rows_hold_every_document_between_bos_and_eos() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    rows = pack(TEXTS, tokenizer, 32)
    stream = rows.flatten().tolist()
    assert stream[0] == tokenizer.bos_token_id
    first = tokenizer.decode(stream[1 : stream.index(tokenizer.eos_token_id)])
    assert first == TEXTS[0]
    with pytest.raises(DataError, match="do not fill one row"):
        pack(TEXTS[:1], tokenizer, 32)


def test_held_out_texts_are_set_aside_by_seed() -> None:
    training, held_out = split(TEXTS, 10, seed=3)
    assert len(held_out) == 10
    assert sorted(training + held_out) == sorted(TEXTS)
    assert split(TEXTS, 10, seed=3)[1] == held_out
    assert split(TEXTS, 10, seed=4)[1] != held_out
    with pytest.raises(DataError, match=r"held_out must be 1\.\.99"):
        split(TEXTS, 100, seed=0)
