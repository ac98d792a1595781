"""Where a generated text ends: stop tokens of all origins, the end of a turn, stop strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from tl_looped import InputError, LoopedTransformer
from tl_looped.transformer.stopping import Ends, end_of_turn

BOS, EOS, PAD = 0, 1, 2
PROMPT = torch.tensor([[7, 8, 9]])
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "verbose": False}
TURNS = "{% for m in messages %}{{ m['content'] }} <end> {% endfor %}"


def named(end: int | None = None) -> PreTrainedTokenizerFast:
    """Token i is the word ``wi``; one of them is the special token ``<end>``."""
    names = {0: "<bos>", 1: "<eos>", 2: "<pad>"} | ({} if end is None else {end: "<end>"})
    backend = Tokenizer(models.WordLevel({names.get(i, f"w{i}"): i for i in range(50)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(names.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def model() -> LoopedTransformer:
    cfg = random_config(n_prelude=0, n_core=1, n_coda=0, n_recurrences=1, seed=5)
    return LoopedTransformer.from_config(cfg, named())


@pytest.fixture(scope="module")
def free(model: LoopedTransformer) -> list[int]:
    """What the model says if nothing stops it."""
    found = model.generate(PROMPT, stop_at_eos=False, **GREEDY)[0, 3:].tolist()
    assert len(set(found)) >= 4
    assert not {BOS, EOS, PAD} & set(found)
    return found


def place(free: list[int]) -> int:
    """Where a token stands for the first time, in the middle."""
    return next(i for i in range(2, 7) if free[i] not in free[:i])


def test_the_checkpoints_own_stop_tokens_count(model, free, tmp_path: Path) -> None:
    at = place(free)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, free[at]]}))
    loaded = LoopedTransformer.from_pretrained(tmp_path, device="cpu")
    assert loaded.stop_tokens() == [EOS, free[at]]
    assert loaded.generate(PROMPT, **GREEDY)[0, 3:].tolist() == free[: at + 1]
    explicit = loaded.generate(PROMPT, eos_token_id=EOS, **GREEDY)
    assert explicit[0, 3:].tolist() == free
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": free[at]}))
    one = LoopedTransformer.from_pretrained(tmp_path, device="cpu")
    assert one.generate(PROMPT, **GREEDY)[0, 3:].tolist() == free[: at + 1]


def test_a_turn_ends_where_the_chat_template_ends_it(model, free) -> None:
    at = place(free)
    end = free[at]
    model.tokenizer = named(end)
    model.tokenizer.chat_template = TURNS
    try:
        assert model.stop_tokens() == [EOS, end]
        assert model.generate(PROMPT, **GREEDY)[0, 3:].tolist() == free[: at + 1]
        text = " ".join(f"w{i}" for i in free[:at])
        assert model.generate("w7 w8 w9", **GREEDY) == f"w7 w8 w9 {text}"
        pieces = list(model.generate_stream("w7 w8 w9", max_tokens_per_yield=1, **GREEDY))
        assert pieces[1:] == [*(f" w{i}" for i in free[1:at]), ""]
        # Where somebody says otherwise the text goes on, and the marker stays in sight.
        on = model.generate("w7 w8 w9", eos_token_id=EOS, **GREEDY)
        assert on.split()[3 + at] == "<end>"
        assert len(on.split()) == 3 + 8
    finally:
        model.tokenizer = named()


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (None, None),
        (TURNS, 20),
        ("{% for m in messages %}{{ m['content'] }}\n<end>\n{% endfor %}", 20),
        ("{% for m in messages %}{{ m['content'] }} <eos>{% endfor %}", EOS),
        ("{% for m in messages %}<bos> {{ m['content'] }} {% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] }} <bos> {% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] }} w5 <end> {% endfor %}", None),
        ("{{ raise_exception('other roles') }}", None),
        ("nothing of it", None),
    ],
)
def test_the_end_of_a_turn_is_read_off_the_template(template: str | None, found: Any) -> None:
    tokenizer = named(20)
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == found


def test_a_stop_string_ends_a_row_and_stays(model, free) -> None:
    at = place(free)
    string = f"w{free[at - 1]} w{free[at]}"
    for given in (string, [string], ("w499", string)):
        out = model.generate(PROMPT, stop_strings=given, **GREEDY)
        assert out[0, 3:].tolist() == free[: at + 1]
    text = "w7 w8 w9 " + " ".join(f"w{i}" for i in free[: at + 1])
    assert model.generate("w7 w8 w9", stop_strings=string, **GREEDY) == text
    assert model.generate("w7 w8 w9", stop_strings=string, stop_at_eos=False, **GREEDY) == text
    stream = model.generate_stream(
        "w7 w8 w9", stop_strings=string, max_tokens_per_yield=3, **GREEDY
    )
    assert "".join(stream) == text
    # A row that has ended is filled up, which is no part of its text.
    both = model.generate(["w7 w8 w9", "w30 w31"], stop_strings=string, **GREEDY)
    assert both[0] == text
    alone = model.generate("w30 w31", stop_strings=string, **GREEDY)
    assert both[1] == alone
    assert model.generate(PROMPT, stop_strings="w7 w8", **GREEDY)[0, 3:].tolist() == free


@pytest.mark.parametrize(
    "string", ["STOP", "pens", "ens. ", " 12", "boxes of p", "é", ". S", "never"]
)
def test_stop_strings_end_where_those_of_transformers_end(string: str) -> None:
    tokenizer = LoopedTransformer.from_pretrained("demo", device="meta").tokenizer
    ids = tokenizer.encode("Tom has 3 boxes of pens. STOP the café, 12 pens STOP")
    criterion = StopStringCriteria(tokenizer, [string])
    stops = [bool(criterion(torch.tensor([ids[: n + 1]]), None)) for n in range(len(ids))]
    expected = stops.index(True) + 1 if True in stops else None
    ends = Ends(1, [], (string,), tokenizer)
    for token in ids:
        ends.note(torch.tensor([token]))
    assert ends.lengths == [expected]


@pytest.mark.parametrize("strings", ["", [""], [3], 3, b"w5"])
def test_what_is_no_stop_string_is_refused(model, strings: Any) -> None:
    with pytest.raises(InputError, match="stop_strings must be"):
        model.generate(PROMPT, max_new_tokens=1, verbose=False, stop_strings=strings)


def test_stop_strings_need_a_tokenizer() -> None:
    cfg = random_config(n_prelude=0, n_core=1, n_coda=0, n_recurrences=1)
    alone = LoopedTransformer.from_config(cfg)
    with pytest.raises(InputError, match="stop_strings need a tokenizer"):
        alone.generate(PROMPT, max_new_tokens=1, verbose=False, stop_strings="a")
