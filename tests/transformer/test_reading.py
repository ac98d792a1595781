"""What a person may give: texts, conversations, tokens in any holder; BOS; the end of a turn."""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from closeness import assert_same
from conftest import GOLDEN, random_config
from feedforwards import feedforward
from results import FEW, result
from results import feedforward as feedforward_result
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tl_looped import (
    ConfigError,
    DataError,
    InputError,
    LoopedTransformer,
    TokenizerError,
    retrofit,
)
from tl_looped.cli import app
from tl_looped.experiments.compare import compare_runs, load_runs
from tl_looped.experiments.engines import load_engine, tokens_of_prompts
from tl_looped.experiments.identity import run_hash
from tl_looped.experiments.prompts import load_prompts
from tl_looped.experiments.reading import specification
from tl_looped.experiments.runner import resolve, run_experiment
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.interventions import fixed_point
from tl_looped.metrics import stream
from tl_looped.metrics.spectrum import loop_spectrum
from tl_looped.model.bos import adds_bos
from tl_looped.paper.drawing import draw_over
from tl_looped.patching import attribute_recurrences, patch_recurrences
from tl_looped.report.summary import summarise
from tl_looped.report.text import mirroring, row
from tl_looped.training.corpus import pack, read_texts
from tl_looped.viz import attention_view, heads_at, settled_tokens

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
    assert stream(model, [once], **how)["n_tokens"].values.tolist() == [3]
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
    data = usual.load()
    assert data.attrs["prepend_bos"] == 1
    # Its hash is that of a time when nobody was asked about BOS.
    spec, source = resolve(Experiment.from_dict(specification(data)))
    assert data.attrs["hash"] == run_hash(spec, load_prompts(spec.prompts), source.identity)
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


# -- holders of texts and tokens --------------------------------------------------------------

TEXTS = ["a b c", "c"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}c{% endif %}"
)
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
IDS = [[A, B, C], [C, A, B]]


@pytest.fixture(scope="module")
def model() -> LoopedTransformer:
    made = small(words(False), n_prelude=0, n_core=1, n_coda=0, n_recurrences=2)
    made.tokenizer.chat_template = TEMPLATE
    return made


def one_batch(data: Any) -> Any:
    return next(iter(DataLoader(data, batch_size=2)))


TEXT_HOLDERS = {
    "list": TEXTS,
    "tuple": tuple(TEXTS),
    "array": np.array(TEXTS),
    "object array": np.array(TEXTS, dtype=object),
    "numpy strings": [np.str_(text) for text in TEXTS],
    "pandas": pd.Series(TEXTS, index=[7, 3]),
    "pandas index": pd.Index(TEXTS),
    "pandas strings": pd.Series(TEXTS, dtype="string"),
    "pandas categories": pd.Series(TEXTS, dtype="category"),
    "datasets": datasets.Dataset.from_dict({"text": TEXTS})["text"],
    "arrow": datasets.Dataset.from_dict({"text": TEXTS}).data.column("text"),
    "DataLoader": one_batch(TEXTS),
    "DataLoader of a column": one_batch([{"text": text} for text in TEXTS])["text"],
}


@pytest.mark.parametrize("holder", TEXT_HOLDERS)
def test_texts_are_read_from_any_holder(model, holder: str) -> None:
    given, expected = TEXT_HOLDERS[holder], model(TEXTS)
    assert torch.equal(model(given), expected)
    logits, cache = model.run_with_cache(given)
    assert torch.equal(logits, model.run_with_cache(TEXTS)[0])
    assert torch.equal(cache.attention_mask, model.tokenize(TEXTS)[1])
    assert torch.equal(model.to_tokens(given), model.to_tokens(TEXTS))
    assert model.to_str_tokens(given) == [["a", "b", "c"], ["c"]]
    assert [row.tolist() for row in model.token_rows(given)] == [[A, B, C], [C]]
    greedy = {"max_new_tokens": 2, "do_sample": False, "verbose": False, "stop_at_eos": False}
    assert model.generate(given, **greedy) == model.generate(TEXTS, **greedy)


def memmapped(folder: Path) -> np.ndarray:
    np.array(IDS, dtype=np.uint16).tofile(folder / "tokens.bin")
    return np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r", shape=(2, 3))


TOKEN_HOLDERS = {
    "list": IDS,
    "tuples": tuple(map(tuple, IDS)),
    "list of tensors": [torch.tensor(row) for row in IDS],
    "list of arrays": [np.array(row, dtype=np.uint16) for row in IDS],
    "reversed": np.array(IDS)[::-1, ::-1].copy()[::-1, ::-1],
    "columns first": np.asfortranarray(IDS),
    "every second": np.repeat(np.array(IDS, dtype=np.int32), 2, axis=1)[:, ::2],
    "big endian": np.array(IDS, dtype=">i4"),
    "DataLoader": one_batch(TensorDataset(torch.tensor(IDS))),
    "DataLoader of ids": one_batch([{"input_ids": torch.tensor(row)} for row in IDS]),
    "BatchEncoding": BatchEncoding({"input_ids": IDS, "token_type_ids": [[0] * 3] * 2}),
    "pandas": pd.Series(IDS),
} | {str(t): np.array(IDS, dtype=t) for t in ("i1", "i2", "i8", "u1", "u2", "u4", "u8")}
TOKEN_HOLDERS |= {
    str(t): torch.tensor(IDS).to(t) for t in (torch.int8, torch.int32, torch.uint16, torch.uint32)
}


@pytest.mark.parametrize("holder", [*TOKEN_HOLDERS, "memmap"])
def test_tokens_are_read_from_any_holder(model, holder: str, tmp_path: Path) -> None:
    given = memmapped(tmp_path) if holder == "memmap" else TOKEN_HOLDERS[holder]
    expected = model(torch.tensor(IDS))
    assert torch.equal(model(given), expected)
    cached = model.run_with_cache(torch.tensor(IDS))[0]
    assert torch.equal(model.run_with_cache(given)[0], cached)
    assert torch.equal(model.run_with_hooks(given), expected)
    assert [row.tolist() for row in model.token_rows(given)] == IDS
    first = {"max_new_tokens": 1, "do_sample": False, "verbose": False, "return_type": "tokens"}
    assert torch.equal(model.generate(given, **first)[:, :-1], torch.tensor(IDS))


@pytest.mark.parametrize("as_tensors", [True, False])
def test_what_a_tokenizer_returns_brings_its_mask(model, as_tensors: bool) -> None:
    encoding = model.tokenizer(
        ["a b c", "c"], padding=True, return_tensors="pt" if as_tensors else None
    )
    logits, exact = model(encoding), deepcopy(model).double()
    assert_same(exact(encoding)[1, :1], exact("c")[0])
    _, cache = model.run_with_cache(encoding)
    assert cache.attention_mask.tolist() == [[True] * 3, [True, False, False]]
    assert [row.tolist() for row in model.token_rows(encoding)] == [[A, B, C], [C]]
    batch = (
        one_batch([{k: v[i] for k, v in encoding.items()} for i in range(2)]) if as_tensors else {}
    )
    if as_tensors:
        assert torch.equal(model(batch), logits)
    single = model.tokenizer("a b", return_tensors=None)
    assert torch.equal(model(single), model("a b"))
    with pytest.raises(InputError, match="attention_mask is given twice"):
        model(encoding, attention_mask=torch.ones(2, 3))
    with pytest.raises(InputError, match="pad on the left"):
        model.generate(encoding, verbose=False)


# A pad token in the middle of a text is no padding where the mask says so.
def test_the_mask_of_an_encoding_wins_over_its_pad_tokens(model) -> None:
    ids = torch.tensor([[PAD, A, B], [A, B, PAD]])
    given = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert torch.equal(given, model(ids, attention_mask=torch.ones_like(ids)))
    assert not torch.equal(given, model(ids))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "None"),
        (b"a b", "bytes"),
        (5, "a single token is"),
        ({"a", "b"}, "a set"),
        ((text for text in TEXTS), "a generator"),
        ([], "there is no prompt"),
        (np.array([], dtype=str), "there is no prompt"),
        (["a", None], "item 1 of the input is None"),
        ([None, "a"], "item 0 of the input is None"),
        (["a", [A, B]], "item 1 of the input is a list"),
        (pd.Series(["a", None]), "item 1 of the input is"),
        (pd.DataFrame({"text": TEXTS}), r"a table.*\['text'\]"),
        (datasets.Dataset.from_dict({"text": TEXTS}), r"a table.*\['text'\]"),
        (np.array([["a"], ["b"]]), "one dimension"),
        ("half \ud83d", "half of a surrogate pair at character 5"),
        (["a", "\udc80"], "text 1 holds half"),
        ([[A, B], [A]], r"have \[2, 1\] tokens"),
        ([[A, B], "a"], "row 1 of the tokens"),
        ([A, "a"], "numbers"),
        ([[A, None]], "item 0|numbers|row 0"),
        ([torch.tensor(IDS), torch.tensor(IDS)], "2 arrays of tokens"),
        ([0.5, 1.0], "tokens must be integers"),
        (torch.tensor(IDS).float(), "tokens must be integers"),
        (torch.tensor(IDS) > 3, "tokens must be integers"),
        (torch.complex(torch.ones(2), torch.ones(2)), "tokens must be integers"),
        (np.array(["2026-01-01"], dtype="datetime64[D]"), "datetime64"),
        ({"input_ids": IDS, "labels": IDS}, r"the keys \['labels'\]"),
        ({"attention_mask": IDS}, "no input_ids"),
        ({"input_ids": [[A, B], [A]]}, "input_ids: the rows of tokens"),
        ({"input_ids": IDS, "attention_mask": [[1, 1], [1]]}, "attention_mask must be numbers"),
        ({"input_ids": TEXTS}, "got text"),
        ({"role": "user", "content": "a"}, "a single message"),
        ([{"content": "a"}], r"message 0 must be.*\['content'\]"),
        ([CHAT[0], "a"], "message 1 must be"),
        ([CHAT, ["a"]], "message 0 must be"),
    ],
)
def test_what_could_mean_two_things_or_none_is_refused(model, given: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        model(given)


def test_columns_and_chats_in_patching(model) -> None:
    _, cache = model.run_with_cache("a b c")
    metric = lambda logits: logits[0, -1, A]  # noqa: E731
    run = {"progress": False, "source_recurrences": [0], "target_recurrences": [0]}
    wanted = [("c b a",), pd.Series(["c b a"]), model.tokenizer(["c b a"])]
    expected = patch_recurrences(model, "c b a", cache, metric, "resid_post", **run)
    for given in wanted:
        found = patch_recurrences(model, given, cache, metric, "resid_post", **run)
        xr.testing.assert_equal(found, expected)


# -- conversations ----------------------------------------------------------------------------


@pytest.mark.parametrize("holder", ["one", "tuple", "several", "pandas"])
def test_conversations_are_taken_wherever_text_is(model, holder: str) -> None:
    given = {"one": CHAT, "tuple": tuple(CHAT), "several": [CHAT], "pandas": pd.Series(CHAT)}[
        holder
    ]
    ids = [BOS, A, B, C]  # what the template writes, the opening of a reply at its end
    assert model.to_tokens(given).tolist() == [ids]
    expected = model(torch.tensor([ids]))
    assert torch.equal(model(given), expected)
    assert torch.equal(model.run_with_cache(given)[0], model.run_with_cache(torch.tensor([ids]))[0])
    assert torch.equal(model.run_with_hooks(given), expected)
    strings = ["<bos>", "a", "b", "c"]
    assert model.to_str_tokens(given) == ([strings] if holder == "several" else strings)
    assert model.get_token_position("b", given) == 2
    assert [row.tolist() for row in model.token_rows(given)] == [ids]
    assert stream(model, given)["n_tokens"].values.tolist() == [4]
    assert torch.equal(
        model.loop_map(given).run(1)[-1], model.loop_map(torch.tensor([ids])).run(1)[-1]
    )
    assert model.to_tokens(model.chat_text(CHAT, add_generation_prompt=False)).tolist() == [ids[:3]]


@pytest.mark.parametrize("tool", ["patching", "attribution", "fixed point", "exits"])
def test_tools_take_a_conversation_for_its_tokens(tool: str) -> None:
    model = small(
        words(True),
        n_prelude=0,
        n_core=1,
        n_coda=0,
        n_recurrences=2,
        dtype=torch.float64,
        exit_gate=True,
    )
    model.tokenizer.chat_template = TEMPLATE
    _, cache = model.run_with_cache("c b a")
    metric = lambda logits: logits[0, -1, A]  # noqa: E731
    given = {
        "patching": lambda x: patch_recurrences(
            model, x, cache, metric, "resid_post", progress=False
        ),
        "attribution": lambda x: attribute_recurrences(model, x, cache, metric, "resid_post"),
        "fixed point": lambda x: fixed_point(model, x, 3, tolerance=math.inf).state,
        "exits": lambda x: model.exits(x).exit_logits,
    }[tool]
    found, expected = given(CHAT), given(torch.tensor([[BOS, A, B, C]]))
    if isinstance(expected, xr.Dataset):
        xr.testing.assert_allclose(found, expected, rtol=1e-10)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_spectrum_takes_tokens_and_says_so_of_text(model) -> None:
    for given in ("a b c", CHAT, TEXTS):
        with pytest.raises(InputError, match=r"got text: model\.to_tokens"):
            loop_spectrum(model, given)


def test_views_take_the_prompt_as_the_model_does(model) -> None:
    _, cache = model.run_with_cache(CHAT)
    ids = [BOS, A, B, C]
    for given in (CHAT, [CHAT], ids, torch.tensor([ids]), {"input_ids": [ids]}, np.array(ids)):
        assert heads_at(cache, given, 0, 0).tokens == ("<bos>", "a", "b", "c")
        assert settled_tokens(cache, given, lens="logit").tokens == ("<bos>", "a", "b", "c")
    strings = pd.Series(["x", "y", "z", "w"])
    assert heads_at(cache, strings, 0, 0).tokens == ("x", "y", "z", "w")
    for given in ([CHAT, CHAT], torch.tensor([ids, ids])):
        with pytest.raises(InputError, match="of the one prompt that is shown, got 2"):
            heads_at(cache, given, 0, 0)
    with pytest.raises(InputError, match="4 positions, 3 tokens"):
        heads_at(cache, "a b c", 0, 0)
    with pytest.raises(InputError, match="tokens must be strings"):
        attention_view(torch.ones(1, 2, 2), "ab", ["x"], "t")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": CHAT}, "conversations are not taken: .*chat_text"),
        ({"question": CHAT, "answer": "b"}, "question is list"),
        ({"text": CHAT}, "text is list"),
    ],
)
def test_training_texts_refuse_conversations_by_name(tmp_path: Path, row, reason: str) -> None:
    write_rows(tmp_path / "t.jsonl", row)
    with pytest.raises(DataError, match=f"line 1.*{reason}"):
        read_texts(str(tmp_path / "t.jsonl"))


def test_conversations_of_unequal_length_are_padded(model) -> None:
    assert model.to_tokens([CHAT, CHAT[:1]]).tolist() == [[BOS, A, B, C], [BOS, A, C, PAD]]
    exact = deepcopy(model).double()
    assert_same(exact([CHAT, CHAT[:1]])[1, :3], exact(CHAT[:1])[0])


def test_conversations_need_a_template_that_takes_them(model) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        small(words(False))(CHAT)
    strict = small(words(False))
    strict.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TokenizerError, match="roles must alternate"):
        strict.to_tokens(CHAT)
    with pytest.raises(InputError, match="one conversation"):
        model.chat_text([CHAT])


def test_a_conversation_has_the_bos_of_its_template_alone() -> None:
    model = small(words(True))
    model.tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    assert model.to_tokens(CHAT).tolist() == [[A, B, C]]
    assert model.to_tokens(CHAT, prepend_bos=True).tolist() == [[BOS, A, B, C]]


def write_rows(path: Path, *rows: Any) -> PromptSet:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptSet("file", file=str(path), subset=0)


def with_template(folder: Path, adds: bool = True) -> str:
    tokenizer = words(adds)
    tokenizer.chat_template = TEMPLATE
    return str(published(folder, tokenizer))


def test_a_file_of_prompts_may_hold_conversations(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "model")
    wanted = write_rows(tmp_path / "p.jsonl", {"messages": CHAT}, {"messages": "a b c a b"})
    assert load_prompts(wanted).texts == (CHAT, "a b c a b")
    wide = {"dtype": "float64", "recurrences": 2, "metrics": ("magnitude",)}
    spec = Experiment(folder, prompts=wanted, **wide)
    run = run_experiment(spec, tmp_path / "out", device="cpu")
    data = run.load()
    # <bos> a b c, once as the template writes it; text as the tokenizer does.
    assert data["n_tokens"].values.tolist() == [4, 6]
    assert data.attrs["bos"].endswith("conversations as their template writes them")
    model = LoopedTransformer.from_pretrained(folder, device="cpu", dtype="float64")
    alone = stream(model, [CHAT], ("magnitude",), n_recurrences=2)
    first = data["residual_mean"].isel(prompt=0)
    core = first.isel(effective_layer=data["stage"].to_numpy() == "core")
    np.testing.assert_allclose(core, alone["residual_mean"].values.ravel(), rtol=1e-10)
    assert run_experiment(spec, tmp_path / "out", device="cpu").is_new is False


def test_the_template_and_what_was_asked_decide_the_hash_of_conversations(tmp_path: Path) -> None:
    folder = Path(with_template(tmp_path / "model"))
    chats = write_rows(tmp_path / "p.jsonl", {"messages": CHAT})
    texts = write_rows(tmp_path / "t.jsonl", {"text": "a"})

    def digest(wanted: PromptSet, prepend_bos: bool | None = None) -> str:
        spec, source = resolve(Experiment(str(folder), prompts=wanted, prepend_bos=prepend_bos))
        said = (load_prompts(wanted), source.identity, True, source.chat_template)
        return run_hash(spec, *said)

    before = digest(chats), digest(texts)
    assert digest(chats, True) != before[0]
    assert digest(texts, True) == before[1]
    (folder / "chat_template.jinja").write_text(TEMPLATE + " b")
    assert digest(chats) != before[0]
    assert digest(texts) == before[1]


def test_a_feedforward_model_reads_conversations_as_its_looped_sister(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    feedforward("llama", vocab_size=len(WORDS)).save_pretrained(folder)
    wanted = write_rows(tmp_path / "p.jsonl", {"messages": CHAT}, {"messages": "a b"})
    for adds in (True, False):
        for template in (TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}")):
            tokenizer = words(adds)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder)
            chat = [BOS, A, B, C] if template is TEMPLATE else [A, B, C]
            spec = Experiment(str(folder), kind="feedforward", prompts=wanted)
            spec, found = resolve(spec)
            rows, _, _ = tokens_of_prompts(
                load_engine(spec, found, "cpu"), load_prompts(wanted), "skip"
            )
            expected = [chat, [BOS, A, B] if adds else [A, B]]
            assert [row.tolist() for row in rows] == expected, (adds, template)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "no prompt"),
        ([{"content": "a"}], "message 0 must be"),
        ([CHAT, CHAT], "no text in 'messages', and no conversation"),
        ([A, B], "no text in 'messages', and no conversation"),
        ([{"role": "user", "content": "half \ud83d"}], "surrogate"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(tmp_path: Path, row: Any, reason: str) -> None:
    wanted = write_rows(tmp_path / "p.jsonl", {"messages": CHAT}, {"messages": row})
    with pytest.raises(DataError, match=f"line 2 of .*p.jsonl.*{reason}"):
        load_prompts(wanted)


def test_a_conversation_for_a_model_without_a_template_names_file_and_row(tmp_path: Path) -> None:
    wanted = write_rows(tmp_path / "p.jsonl", {"text": "a"}, {"text": CHAT})
    spec = Experiment("demo-base", prompts=wanted, recurrences=1, metrics=("magnitude",))
    with pytest.raises(
        TokenizerError, match=r"row 1 of .*p\.jsonl.*demo-base has no chat template"
    ):
        run_experiment(spec, tmp_path / "out", device="cpu")


# -- runs that were read in different ways -----------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_a_comparison_of_runs_with_bos_and_without_says_so(same: bool, tmp_path: Path) -> None:
    looped = result().assign_attrs(prepend_bos=1)
    other = feedforward_result().assign_attrs(prepend_bos=int(same))
    runs = {"a": looped, "b": other}
    said: list[str] = []
    images = draw_over("a", looped, other, [8], tmp_path, "x", said.append)
    summary, _ = summarise(runs, FEW)
    cells = row([summary], {"a": "run0"}).cells
    about = [*said, *compare_runs(runs).notices, *(cell.note for cell in cells)]
    about += mirroring(summary).notes
    apart = [text for text in about if "read with BOS, the second without" in text]
    assert len(apart) == (0 if same else 4), about
    assert bool(images) is same


# -- a retrofit says how it reads ---------------------------------------------------------------


@pytest.mark.parametrize("says", [None, True, False])
def test_a_retrofit_reads_with_bos_if_asked_to(says: bool | None, tmp_path: Path) -> None:
    source = feedforward("llama", vocab_size=len(WORDS))
    made = retrofit(source, core=[2], tokenizer=words(False), default_prepend_bos=says)
    decided = (False, "tokenizer") if says is None else (says, "caller")
    assert (made.cfg.default_prepend_bos, made.cfg.bos_from) == decided
    assert made.to_tokens("a").tolist() == [[BOS, A] if says else [A]]
    made.save_pretrained(tmp_path)
    read = LoopedTransformer.from_pretrained(tmp_path, device="meta")
    assert read.to_tokens("a").shape == (1, 2 if says else 1)


@pytest.mark.parametrize("switch", ["", "--bos", "--no-bos"])
def test_the_retrofit_command_says_how_the_model_reads(switch: str, tmp_path: Path) -> None:
    feedforward("llama", vocab_size=len(WORDS)).save_pretrained(tmp_path / "source")
    words(True).save_pretrained(tmp_path / "source")
    call = ["retrofit", str(tmp_path / "source"), str(tmp_path / "made"), "--core", "2"]
    result = CliRunner().invoke(app, [*call, *filter(None, [switch])], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    how = "without BOS" if switch == "--no-bos" else "with BOS '<bos>'"
    assert f"text is read {how}" in result.output
    read = LoopedTransformer.from_pretrained(tmp_path / "made", device="meta")
    assert read.cfg.default_prepend_bos is (switch != "--no-bos")
