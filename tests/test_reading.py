"""What a person may give as text, and what the model makes of it: BOS first of all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, random_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tl_looped import ConfigError, LoopedTransformer
from tl_looped.cli import app
from tl_looped.experiments.compare import load_runs
from tl_looped.experiments.run import run_experiment
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.metrics import stream_metrics
from tl_looped.model.bos import adds_bos
from tl_looped.training.corpus import pack

BOS, EOS, PAD, A, B, C = range(6)
WORDS = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD, "a": A, "b": B, "c": C}


def words(adds: bool, **special: Any) -> PreTrainedTokenizerFast:
    """Words as tokens; it adds BOS to every text by itself, or does not."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "<bos> $A" if adds else "$A"
    backend.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B", special_tokens=[("<bos>", BOS)]
    )
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def small(tokenizer: Any, **changes: Any) -> LoopedTransformer:
    """A model whose configuration says nothing about BOS unless asked to."""
    cfg = random_config(**{"default_prepend_bos": None, "d_vocab": len(WORDS)} | changes)
    return LoopedTransformer.from_config(cfg, tokenizer)


def published(folder: Path, tokenizer: Any, case: str = "retrofit_llama") -> Path:
    """A checkpoint in its authors' format, which has no word on BOS, with a tokenizer."""
    shutil.copytree(GOLDEN / case, folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- BOS: the tokenizer's own habit -----------------------------------------------------------


@pytest.mark.parametrize("adds", [True, False])
def test_a_tokenizer_is_asked_what_it_does(adds: bool) -> None:
    assert adds_bos(words(adds)) is adds
    assert adds_bos(words(adds, bos_token=None)) is False
    # What it puts first is not what it calls BOS.
    assert adds_bos(words(adds, bos_token="<eos>")) is False


@pytest.mark.parametrize("case", ["retrofit_llama", "retrofit_olmo"])
@pytest.mark.parametrize("adds", [True, False])
def test_a_published_model_reads_text_as_its_tokenizer_does(case, adds, tmp_path: Path) -> None:
    folder = published(tmp_path / "model", words(adds), case)
    model = LoopedTransformer.from_pretrained(folder, device="cpu")
    assert (model.cfg.default_prepend_bos, model.cfg.bos_from) == (adds, "tokenizer")
    assert model.to_tokens("a b").tolist() == [model.tokenizer.encode("a b")]
    assert model.to_tokens("a b").tolist() == [[BOS, A, B] if adds else [A, B]]
    assert "as its tokenizer does" in model.describe_bos()

    other = LoopedTransformer.from_pretrained(folder, device="meta", default_prepend_bos=not adds)
    assert (other.cfg.default_prepend_bos, other.cfg.bos_from) == (not adds, "caller")
    assert "as was asked for" in other.describe_bos()
    model.cfg.default_prepend_bos = not adds  # TransformerLens's way to say it
    assert "as was asked for" in model.describe_bos()
    assert "as was asked for" in other.describe_bos(prepend_bos=adds)


def test_huginn_reads_with_bos_as_its_authors_do(tmp_path: Path) -> None:
    folder = published(tmp_path / "model", words(False), "huginn")
    cfg = LoopedTransformer.from_pretrained(folder, device="meta").cfg
    assert (cfg.default_prepend_bos, cfg.bos_from) == (True, "config")


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_a_saved_model_stays_as_it_was_whatever_its_tokenizer_does(says, adds, tmp_path) -> None:
    small(words(adds), default_prepend_bos=says).save_pretrained(tmp_path)
    again = LoopedTransformer.from_pretrained(tmp_path, device="meta")
    assert (again.cfg.default_prepend_bos, again.cfg.bos_from) == (says, "config")


def test_the_bundled_models_were_trained_with_bos_though_their_tokenizer_adds_none() -> None:
    demo = LoopedTransformer.from_pretrained("demo", device="meta")
    assert adds_bos(demo.tokenizer) is False
    assert (demo.cfg.default_prepend_bos, demo.cfg.bos_from) == (True, "config")


def test_a_new_tokenizer_brings_its_habit_unless_somebody_said_otherwise() -> None:
    model = small(words(True))
    model.set_tokenizer(words(False))
    assert model.to_tokens("a").tolist() == [[A]]
    model.cfg.default_prepend_bos = True
    model.set_tokenizer(words(False))
    assert model.to_tokens("a").tolist() == [[BOS, A]]
    late = small(None)
    assert late.cfg.default_prepend_bos is None
    late.tokenizer = words(True)
    assert late.to_tokens("a").tolist() == [[BOS, A]]


def test_the_authors_format_is_written_where_the_tokenizer_tells_the_rest(tmp_path: Path) -> None:
    model = LoopedTransformer.from_pretrained(
        published(tmp_path / "model", words(True)), device="cpu"
    )
    model.cfg.bos_from = "config"  # as if it had been saved in between
    model.save_pretrained(tmp_path / "again", format="original")
    model.cfg.default_prepend_bos = False
    with pytest.raises(ConfigError, match="default_prepend_bos=False would be read back as True"):
        model.save_pretrained(tmp_path / "never", format="original")


# -- BOS: never twice -------------------------------------------------------------------------


@pytest.mark.parametrize("prepend_bos", [None, True])
def test_bos_is_never_there_twice(prepend_bos: bool | None) -> None:
    model = small(words(True), n_recurrences=1)
    once, how = "<bos> a b", {"prepend_bos": prepend_bos}
    assert model.to_tokens(once, **how).tolist() == [[BOS, A, B]]
    assert model.to_tokens([once, "a b c"], **how).tolist() == [[BOS, A, B, PAD], [BOS, A, B, C]]
    assert model.to_str_tokens(once, **how) == ["<bos>", "a", "b"]
    assert model.get_token_position("b", once, **how) == 2
    assert [row.tolist() for row in model.token_rows([once], **how)] == [[BOS, A, B]]
    assert torch.equal(model(once, **how), model("a b", **how))
    _, cache = model.run_with_cache(once, **how)
    assert cache["embed"].shape[1] == 3
    greedy = {"max_new_tokens": 1, "do_sample": False, "verbose": False, "return_type": "tokens"}
    assert model.generate(once, **greedy, **how).shape[1] == 4
    assert stream_metrics(model, [once], **how)["n_tokens"].values.tolist() == [3]
    assert model.to_tokens(once, prepend_bos=False).tolist() == [[BOS, A, B]]


def test_training_texts_begin_with_one_bos() -> None:
    rows = pack(["a b", "<bos> a b"], words(False), 4)
    assert rows.tolist() == [[BOS, A, B, EOS], [BOS, A, B, EOS]]


# -- BOS: experiments -------------------------------------------------------------------------


def ran(model: str, out: Path, prepend_bos: bool | None = None) -> Any:
    prompts = PromptSet(source="text", texts=("a b c a", "<bos> b c a b"))
    spec = Experiment(
        model, prompts=prompts, recurrences=2, metrics=("magnitude",), prepend_bos=prepend_bos
    )
    return run_experiment(spec, out, device="cpu", batch_size=2)


def test_an_experiment_records_its_bos_and_says_otherwise_if_asked(tmp_path: Path) -> None:
    folder = str(published(tmp_path / "model", words(False)))
    usual = ran(folder, tmp_path / "out")
    data = usual.load()
    assert data.attrs["prepend_bos"] == 0
    assert "as its tokenizer does" in data.attrs["bos"]
    assert data["n_tokens"].values.tolist() == [4, 5]
    asked = ran(folder, tmp_path / "out", True)
    assert asked.folder != usual.folder
    assert asked.load().attrs["prepend_bos"] == 1
    assert asked.load()["n_tokens"].values.tolist() == [5, 5]
    # The same prompts, asked for by name, are the same run.
    assert ran(folder, tmp_path / "out", False).is_new is False


def test_a_run_of_the_bundled_model_keeps_its_folder(tmp_path: Path) -> None:
    usual = ran("demo", tmp_path)
    assert usual.load().attrs["prepend_bos"] == 1
    assert ran("demo", tmp_path, True).is_new is False
    assert ran("demo", tmp_path, False).folder != usual.folder


def test_the_command_line_says_which_and_takes_the_other(tmp_path: Path) -> None:
    folder = published(tmp_path / "model", words(True))
    result = CliRunner().invoke(app, ["info", str(folder)], catch_exceptions=False)
    assert "text is read with BOS '<bos>', as its tokenizer does" in result.output
    (tmp_path / "prompts.txt").write_text("a b c\n")
    call = ["analyze", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--figures", ""]
    call += ["--extras", "", "--recurrences", "1", "--out", str(tmp_path / "out")]
    lengths = []
    for switch in ("--bos", "--no-bos"):
        result = CliRunner().invoke(app, [*call, switch], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "as was asked for" in result.output
    for data in load_runs([tmp_path / "out"]).values():
        lengths.append((data.attrs["prepend_bos"], int(data["n_tokens"][0])))
    assert sorted(lengths) == [(0, 3), (1, 4)]
