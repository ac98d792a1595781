"""Texts that are too long to be tokenized at all, and names that no file can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_looped import CheckpointError, ConfigError, DataError, InputError, LoopedTransformer
from tl_looped.experiments.prompts import load_prompts
from tl_looped.experiments.runner import run_experiment, run_folder
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.transformer import text_length
from tl_looped.transformer.text_length import checked_lengths, is_surely_longer, longest_token

LETTERS = sorted(text_length._byte_letters())
BYTES = {f"<0x{n:02X}>": n for n in range(256)}


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_level(longest: int = 8, **changes: object) -> PreTrainedTokenizerFast:
    """BPE over all bytes, with one long token of spaces, as GPT-NeoX's and Llama 3's have."""
    vocab = {letter: n for n, letter in enumerate(LETTERS)}
    merges = []
    space = "Ġ"
    for n in (n for n in (2, 4, 8) if n <= longest):
        merges.append((space * (n // 2), space * (n // 2)))
        vocab[space * n] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(backend, name, value)
    return fast(backend)


def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE with bytes for what it does not know, as Llama 2's and Mistral's."""
    vocab = BYTES | {"<unk>": 256, "▁": 257, "a": 258, "▁a": 259, "▁▁": 260}
    merges = [("▁", "a"), ("▁", "▁")]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return fast(backend)


def words() -> PreTrainedTokenizerFast:
    """One token for a word of any length, none for white space."""
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(backend)


KNOWN: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": byte_level,
    "bytes and NFC": lambda: byte_level(1, normalizer=normalizers.NFC()),
    "sentencepiece": sentencepiece,
    "demo": lambda: LoopedTransformer.from_pretrained("demo", device="meta").tokenizer,
}
UNKNOWN: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "words": words,
    "strips": lambda: byte_level(normalizer=normalizers.Strip()),
    "NFKC": lambda: byte_level(normalizer=normalizers.NFKC()),
    "drops": lambda: byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
        )
    ),
    "lacks a byte": lambda: fast(Tokenizer(models.BPE({"a": 0}, []))),
}


# Characters that a composition shortens, white space that a long token stands for, any others.
composed = st.text(st.sampled_from("ιΐ\u0308\u0301\u212b\u1fbe\u1100\u1161\u11a8 a"))
text = st.one_of(composed, st.text(st.characters(exclude_categories=["Cs"])), st.just(" " * 64))


@pytest.mark.parametrize("name", KNOWN)
def test_no_token_stands_for_more_than_the_longest(name: str) -> None:
    tokenizer = KNOWN[name]()
    longest = longest_token(tokenizer)
    assert longest is not None

    @settings(deadline=None, max_examples=60, derandomize=True)
    @given(text)
    def check(text: str) -> None:
        n = len(tokenizer.encode(text, add_special_tokens=False))
        assert len(text.encode()) <= n * longest

    check()


def test_the_longest_tokens_are_what_they_are_made_of() -> None:
    assert longest_token(byte_level()) == 8
    assert len(byte_level().encode(" " * 64)) == 8  # so the bound is reached
    assert longest_token(sentencepiece()) == 6  # "▁▁", and the spelling of a byte


@pytest.mark.parametrize("name", UNKNOWN)
def test_tokenizers_that_lose_something_have_no_longest_token(name: str) -> None:
    tokenizer = UNKNOWN[name]()
    assert longest_token(tokenizer) is None
    assert not is_surely_longer(tokenizer, "a" * 2**19, 2)


def test_added_tokens_count_and_those_that_eat_space_have_no_bound() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["x" * 100])
    assert longest_token(tokenizer) == 400
    backend = tokenizer.backend_tokenizer
    about = json.loads(backend.to_str())
    about["added_tokens"][0]["lstrip"] = True
    assert longest_token(fast(Tokenizer.from_str(json.dumps(about)))) is None


class NoTokenizer:
    """Stands in place of a tokenizer that would abort the process."""

    def __init__(self, backend: object) -> None:
        self.backend_tokenizer = backend

    def encode(self, *_: object, **__: object) -> list[int]:
        raise AssertionError("a text that is too long was tokenized")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> LoopedTransformer:
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    monkeypatch.setattr(model.tokenizer.__class__, "encode", NoTokenizer.encode)
    return model


def test_a_text_far_beyond_the_context_is_refused_and_not_tokenized(demo) -> None:
    with pytest.raises(InputError, match=r"text 0 has 5000000 characters.*context of 256 tokens"):
        demo.tokenize("word " * 1_000_000, prepend_bos=True)


def test_a_text_for_which_there_is_no_memory_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(text_length, "free_bytes", lambda device: 10**8)
    texts = ["a" * 390_000, "a" * 400_000]
    given = checked_lengths(words(), texts, 10)
    assert next(given) == texts[0]
    with pytest.raises(InputError, match=r"text 1 has 400000 characters.*97\.7 MiB.*95\.4 MiB"):
        next(given)


def test_a_prompt_far_beyond_the_context_is_left_out_or_named(
    tmp_path: Path, monkeypatch, demo
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"question": "word " * 200_000}) + "\n")
    spec = Experiment("demo", prompts=PromptSet("file", file=str(path)), recurrences=2)
    with pytest.raises(DataError, match="all 1 are longer than the model's context of 256"):
        run_experiment(spec, tmp_path, device="cpu")
    monkeypatch.setattr(text_length, "free_bytes", lambda device: 10**8)
    cut = replace(spec, prompts=replace(spec.prompts, too_long="truncate"))
    with pytest.raises(DataError, match=r"row 0 of .*x.jsonl: text 0 has 1000000 characters"):
        run_experiment(cut, tmp_path, device="cpu")


def test_a_line_without_end_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tl_looped.experiments.prompts._LONGEST_LINE", 100)
    path = tmp_path / "x.txt"
    path.write_text("short\n" + "x" * 98 + "\n" + "x" * 99 + "\n")
    with pytest.raises(DataError, match=r"line 3 of .*x\.txt has 100 characters or more"):
        load_prompts(PromptSet("file", file=str(path)))
    path.write_text("short\n" + "x" * 98 + "\n")
    assert load_prompts(PromptSet("file", file=str(path))).texts == ("short", "x" * 98)


# -- what no file can hold ----------------------------------------------------------------------


def test_half_of_a_surrogate_pair_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "fine"}\n{"question": "a\\ud800 x"}\n')
    with pytest.raises(DataError, match=r"line 2 of .*x\.jsonl holds half of a surrogate.* 1,"):
        load_prompts(PromptSet("file", file=str(path)))
    with pytest.raises(DataError, match=r"prompts: text 1 holds half of a surrogate"):
        load_prompts(PromptSet("text", texts=("fine", "\udfff")))
    for wrong in (lambda: Experiment("a\ud800"), lambda: PromptSet("file", file="\udcff.txt")):
        with pytest.raises(ConfigError, match=r"(model|prompts\.file) holds what is no character"):
            wrong()


@pytest.mark.parametrize("model", ["x" * 5000, "nul\0", "owner/" + "x" * 5000])
def test_a_model_name_that_no_file_can_have_is_no_model(model: str, tmp_path: Path) -> None:
    for spec in (Experiment(model), Experiment(model, kind="feedforward")):
        with pytest.raises(CheckpointError):
            run_experiment(spec, tmp_path, device="cpu")
    with pytest.raises(DataError, match="neither a file nor one of"):
        PromptSet.parse(model)


def test_folders_of_runs_have_names_that_fit_and_stay_as_they_were(tmp_path: Path) -> None:
    long = Experiment(f"folder/{'é' * 200}", prompts=PromptSet("file", file="x" * 240))
    name = run_folder(replace(long, recurrences=3), "ab" * 32)
    assert name == f"{'é' * 40}_{'x' * 80}_r3_abababab"
    short = Experiment("folder/a b$", prompts=PromptSet("file", file="c/d.txt"), recurrences=8)
    assert run_folder(short, "ab" * 32) == "a-b-_d_r8_abababab"


@pytest.mark.parametrize(
    "toml", ["recurrences = " + "1" * 5000, "metrics = " + "[" * 5000 + "]" * 5000, "a = \ud800"]
)
def test_toml_without_end_is_named(toml: str, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(f'model = "demo"\n{toml}', errors="surrogatepass")
    with pytest.raises((ConfigError, DataError), match=r"s\.toml"):
        Experiment.read(path)
