"""What a checkpoint holds and which options count; the certificate that holds it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CASES, GOLDEN, copy_of, write_tensors
from feedforwards import feedforward
from rawcheckpoints import raw_config
from safetensors.torch import load_file, save_file

from tl_looped import DataError
from tl_looped.cli.console import console
from tl_looped.cli.verify import show
from tl_looped.verification import Certificate, Finding, Outcome, verify
from tl_looped.verification import opening as opening_module
from tl_looped.verification.inventory import Option, options_of_config, tensors_of
from tl_looped.verification.markdown import LONGEST, code, grouped, verdict
from tl_looped.verification.opening import hashes, open_subject

pytestmark = pytest.mark.once


def options(folder: Path) -> dict[str, Option]:
    return {one.key: one for one in options_of_config(open_subject(folder, None, None).checkpoint)}


def changed(case: str, folder: Path, **changes: Any) -> Path:
    copy_of(case, folder)
    raw = {k: v for k, v in raw_config(case, **changes).items() if v != "left out"}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_options_that_no_adapter_knows_are_ignored_and_no_others(case: str, tmp_path: Path) -> None:
    before = options(GOLDEN / case)
    added = {"my_note": "x", "my_switch": True, "my_object": {"a": [1], "b": None}, "my_null": None}
    after = options(changed(case, tmp_path / "more", **added))
    assert {key: one for key, one in after.items() if key not in added} == before
    assert [after[key] for key in added] == [Option(k, v, False) for k, v in added.items()]


def test_options_that_count_set_their_fields() -> None:
    found = options(GOLDEN / "retrofit_llama")
    assert found["n_embd"].fields == ("d_model",)
    assert found["rope_theta"].fields == ("rotary_base",)
    assert found["rope_scaling.factor"].fields == ("rope_scaling",)
    assert found["init_values.std"].fields == ("initial_state_std",)
    assert "n_recurrences" in found["mean_recurrence"].fields
    # Looked at, and refused if they say anything else: checked, and of no field.
    for key in ("nonlin_name", "injection_type", "bias", "test_time_noise", "architectures"):
        assert found[key].read, key
        assert found[key].fields == (), key
    # Stale in the published files: the reference reads others in their place.
    for key in ("block_size", "rope_base", "initial_state_mode", "init_values.embedding"):
        assert not found[key].read, key
        assert found[key].value is not None


def test_what_one_family_reads_another_ignores() -> None:
    huginn, ouro = options(GOLDEN / "huginn"), options(GOLDEN / "ouro")
    assert huginn["rope_base"].fields == ("rotary_base",)
    assert "block_size" in huginn
    assert huginn["block_size"].fields == ("n_ctx",)
    assert not huginn["init_values.embed_scale"].read
    assert not ouro["max_window_layers"].read
    assert ouro["layer_types"].read
    assert ouro["early_exit_threshold"].fields == ("exit_threshold",)


def test_either_of_the_names_of_a_family_counts(tmp_path: Path) -> None:
    for case in ("huginn", "ouro"):
        found = options(GOLDEN / case)
        assert found["model_type"].read
        assert found["architectures"].read


def test_a_null_that_would_be_refused_with_a_value_counts(tmp_path: Path) -> None:
    found = options(changed("ouro", tmp_path / "null", quantization_config=None))
    assert found["quantization_config"] == Option("quantization_config", None, True)
    assert found["rope_scaling"].read


def test_options_of_a_feedforward_model(tmp_path: Path) -> None:
    feedforward("llama").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"my_note": 1}))
    found = options(tmp_path)
    assert found["rms_norm_eps"].fields == ("eps",)
    assert found["rope_parameters.rope_theta"].fields == ("rotary_base",)
    assert found["attention_bias"].read
    for key in ("my_note", "bos_token_id", "use_cache", "transformers_version"):
        assert not found[key].read, key


def test_reading_the_options_changes_nothing(tmp_path: Path) -> None:
    checkpoint = open_subject(GOLDEN / "huginn", None, None).checkpoint
    before = json.dumps(checkpoint.raw)
    options_of_config(checkpoint)
    assert json.dumps(checkpoint.raw) == before


# -- tensors and files ----------------------------------------------------------------------------


def test_tensors_say_what_they_become() -> None:
    checkpoint = open_subject(GOLDEN / "huginn", None, None).checkpoint
    found = {one.name: one for one in tensors_of(checkpoint, checkpoint.config())}
    bias = found["transformer.core_block.1.attn.qk_bias"]
    assert bias.use == "indexed"
    assert bias.parameters == ("core.1.attn.q_bias", "core.1.attn.k_bias")
    assert found["transformer.wte.weight"].parameters == ("embed.W_E",)
    checkpoint = open_subject(GOLDEN / "ouro", None, None).checkpoint
    joined = {one.name: one for one in tensors_of(checkpoint, checkpoint.config())}
    assert joined["model.layers.2.self_attn.k_proj.weight"].use == "joined"
    assert joined["model.layers.2.self_attn.k_proj.weight"].parameters == ("core.2.attn.qkv",)


def test_hashes_are_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("ouro", tmp_path / "a")

    def of(folder: Path) -> dict[str, str]:
        found = hashes(open_subject(folder, None, None).checkpoint)
        return {name: one["sha256"] for name, one in found.items()}

    before = of(folder)
    assert before == of(GOLDEN / "ouro")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    write_tensors(folder, tensors)
    after = of(folder)
    assert after["config.json"] == before["config.json"]
    assert after["model.safetensors"] != before["model.safetensors"]
    # Of a large file the header and the size: values do not count there, shapes do.
    monkeypatch.setattr(opening_module, "HASHED_WHOLE", 1000)
    large = of(folder)["model.safetensors"]
    tensors["model.norm.weight"][0] += 1
    write_tensors(folder, tensors)
    assert of(folder)["model.safetensors"] == large
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    write_tensors(folder, tensors)
    assert of(folder)["model.safetensors"] != large


def test_special_tokens_of_the_adapter(tmp_path: Path) -> None:
    """Ouro's tokenizer says bos = eos = pad = 0, and its adapter 1, 2 and 0."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = copy_of("ouro", tmp_path / "ouro")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(str, range(90))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, "5")),
        bos_token=names[0], eos_token=names[0], pad_token=names[0],
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": names[1:3]})
    tokenizer.save_pretrained(folder)
    certificate = verify(folder, device="cpu")
    found = {
        one["kind"]: (one["id"], one["from"]) for one in certificate.inventory["special_tokens"]
    }
    assert found["bos"] == (1, "adapter")
    assert found["eos"] == (2, "adapter")
    assert found["pad"][0] == 0


# -- the certificate ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return verify(GOLDEN / "retrofit_llama", device="cpu")


def test_a_certificate_is_read_back(certificate: Certificate) -> None:
    again = Certificate.from_json(certificate.to_json())
    assert again == certificate
    assert again.to_markdown() == certificate.to_markdown()
    assert certificate.holds
    json.loads(certificate.to_json(), parse_constant=pytest.fail)


def test_a_certificate_says_nothing_of_the_machine(tmp_path: Path) -> None:
    """No path of this machine: of the folder, of the config's values, of an error's message."""
    folder = copy_of("retrofit_llama", tmp_path / "me")
    raw = raw_config(
        "retrofit_llama", _name_or_path="/home/somebody/models/mine", note="~/secret/x"
    )
    (folder / "config.json").write_text(json.dumps(raw | {"windows": r"C:\Users\somebody\x"}))
    certificate = verify(folder, device="cpu")
    for text in (certificate.to_json(), certificate.to_markdown()):
        for word in (str(tmp_path), "somebody", "secret", str(Path.home()) + "/"):
            assert word not in text
        assert "(path)" in text
    assert certificate.model == "me"


def test_paths_are_cut_out_and_other_texts_stay() -> None:
    from tl_looped.verification.certificate import without_paths

    for text in ("1/2 and/or 3 km/h", "https://x.org/a/b", "ByteDance/Ouro-1.4B", "model.layers.0"):
        assert without_paths(text) == text
    assert without_paths("in '/a/b c' (~/d/e.x), C:\\f") == "in '(path)' ((path)), (path)"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('File "/home/a friend/my models/x.py", line 3', 'File "(path)", line 3'),
        (r"C: 'C:\Users\a friend\x'", "C: '(path)'"),
        ("file:///home/me/x and file:/etc", "(path) and (path)"),
        ("LIBS=/a/b/c:/home/me/q", "LIBS=(path):(path)"),
        (r"\\server\share\me", "(path)"),
        (r"'\\\\server\\share\\me'", "'(path)'"),
        ("~me/models", "(path)"),
        ("'/'|'/x' and 7/8 of \"a/b\"", "'/'|'/x' and 7/8 of \"a/b\""),
        ("in ../my secret/m and m", "in (path) and m"),
        ("in ../my secret/m/x.py", "in (path)"),
        ("beyond ../my secret/more", "beyond (path)"),
    ],
)
def test_paths_of_every_spelling_are_cut_out(text: str, left: str) -> None:
    from tl_looped.verification.certificate import without_paths

    known = ("../my secret/m", "m", "/", ".", "..")
    assert without_paths(text, known) == left
    assert without_paths(left, known) == left


def test_a_relative_path_with_spaces_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("retrofit_llama", (tmp_path / "a secret")) / ".." / "a secret"
    (folder / "config.json").write_text(
        json.dumps(raw_config("retrofit_llama", note=f"in {tmp_path / 'a secret'} and elsewhere"))
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:3]
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    certificate = verify("../" + tmp_path.name + "/a secret", device="cpu")
    assert certificate.wrong == ("names",)
    assert certificate.model == "a secret"
    for text in (certificate.to_json(), certificate.to_markdown()):
        assert tmp_path.name not in text
        assert "(path) secret" not in text


def finding(**changes: Any) -> Finding:
    values: dict[str, Any] = {"check": "c", "outcome": Outcome.WRONG, "found": "f", "if_wrong": "w"}
    return Finding(**(values | changes))


@pytest.mark.parametrize("outcome", Outcome)
def test_wrong_alone_decides(outcome: Outcome) -> None:
    certificate = Certificate("m", {}, (finding(check="a", outcome=outcome),))
    assert certificate.holds is (outcome is not Outcome.WRONG)


def test_numbers_that_are_none_and_texts_that_are_none_are_written() -> None:
    numbers = {"nan": float("nan"), "inf": [float("inf")], "half": "\ud800", "t": (1, None)}
    certificate = Certificate("m", {}, (finding(numbers=numbers),))
    again = Certificate.from_json(certificate.to_json())
    expected = {"nan": "nan", "inf": ["inf"], "half": "\\ud800", "t": [1, None]}
    assert again.findings[0].numbers == expected
    assert certificate.wrong == ("c",)
    certificate.to_markdown().encode("utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "null", "[" * 100_000, '{"schema": 1}', '{"schema": 2, "model": "m"}',
        "\ud800",
    ],
)  # fmt: skip
def test_what_is_no_certificate_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        Certificate.from_json(text)


FOUND: dict[str, Any] = json.loads(Certificate("m", {}, (finding(),)).to_json())["findings"][0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", "1"), ("schema", True), ("model", 3), ("holds", True), ("holds", 0),
        ("about", []), ("findings", {}), ("findings", [3]), ("inventory", None), ("more", 1),
        ("findings", [FOUND | {"outcome": "fine"}]), ("findings", [FOUND | {"numbers": []}]),
        ("findings", [FOUND | {"outcome": "exact"}]), ("findings", [FOUND, FOUND]),
    ],
)  # fmt: skip
def test_a_changed_certificate_is_refused(key: str, value: Any) -> None:
    values = json.loads(Certificate("m", {}, (finding(),)).to_json())
    assert Certificate.from_json(json.dumps(values)).wrong == ("c",)
    with pytest.raises(DataError):
        Certificate.from_json(json.dumps(values | {key: value}))


def test_an_inventory_from_outside_is_no_traceback() -> None:
    for inventory in ({"tensors": [1]}, {"files": 3}, {"options": [{}]}, {"texts": "abc"}):
        certificate = Certificate("m", {}, (), inventory)
        with pytest.raises(DataError):
            certificate.to_markdown()


def test_markdown_holds_what_a_checkpoint_says_as_text(tmp_path: Path) -> None:
    hostile = "</details>\n# @somebody | `x` ``y`` <img src=x> [a](b) #12"
    inventory = {
        "options": [{"key": hostile, "value": hostile, "read": False, "fields": []}],
        "special_tokens": [{"kind": "bos", "id": 0, "token": hostile, "from": "tokenizer"}],
    }
    certificate = Certificate(hostile, {"a": hostile}, (finding(found=hostile),), inventory)
    text = certificate.to_markdown()
    lines = text.splitlines()
    assert sum(line.startswith("#") for line in lines) == 1
    assert lines.count("</details>") == sum(line.startswith("<details>") for line in lines)
    for line in lines:
        if line.startswith("| "):  # cells are kept apart
            assert line.replace("\\|", "").count("|") in (3, 4, 5)
    plain = re.sub(r"(`+) ?.*?[^`]\1(?!`)", "", text)
    assert "@somebody" in text
    assert not {"@somebody", "#12", "<img"} & set(re.findall(r"@somebody|#12|<img", plain))


def test_a_certificate_from_outside_is_text_in_markdown_and_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every place of it; colours, reversed writing, links that need no brackets."""
    hostile = "\x1b[31m|</details>\u202e https://x.org www.x.org \x9b2J"
    inventory = {
        "files": {hostile: {"bytes": 3, "sha256": hostile, "hashed": hostile}},
        "options": [],
        "special_tokens": [{"kind": hostile, "id": hostile, "token": hostile, "from": hostile}],
        "texts": [{"text": hostile, "ids": [0], "tokens": [hostile]}],
        "tensors": [
            {
                "name": hostile,
                "shape": hostile,
                "dtype": hostile,
                "use": hostile,
                "parameters": [hostile],
            }
        ],
    }
    bad = finding(check=hostile, found=hostile, if_wrong=hostile, numbers={hostile: hostile})
    certificate = Certificate(hostile, {hostile: hostile}, (bad,), inventory)
    text = certificate.to_markdown()
    show(certificate)
    full = capsys.readouterr().out
    show(certificate, full=False)
    for written in (text, full, capsys.readouterr().out):
        assert not set("\x1b\u202e\x9b") & set(written)
    outside = re.sub(r"(`+) ?.*?[^`]\1(?!`)", "", text)
    assert "https://" not in outside
    assert "www." not in outside
    assert outside.count("</details>") == outside.count("<details>")
    for line in outside.splitlines():
        if line.startswith("| "):
            assert line.replace("\\|", "").count("|") in (3, 4, 5)


def test_the_last_line_counts_names_and_says_what_was_not_compared() -> None:
    def told(*found: Finding) -> str:
        return verdict(Certificate("m", {}, found))

    exact, likely = finding(outcome=Outcome.EXACT), finding(check="p", outcome=Outcome.PLAUSIBLE)
    odd = finding(check="loss on text", outcome=Outcome.SUSPICIOUS)
    for option in ("--reference-python", "--source"):
        not_run = finding(
            check="reference", outcome=Outcome.NOT_APPLICABLE, found=f"{option} PATH compares them"
        )
        line = told(exact, likely, odd, not_run)
        assert line.startswith("m: 1 exactness check held, none failed; 1 ")
        assert "1 suspicious: loss on text." in line
        assert line.endswith(f"({option})")
    assert "Not compared" in told(exact)
    assert "Not compared" in told(finding(check="reference", outcome=Outcome.NOT_APPLICABLE))
    line = told(finding(check="names"), finding(check="reference", outcome=Outcome.EXACT), likely)
    assert line.startswith("m is WRONG in names; 1 exactness check held; 1 ")
    assert line.endswith("0 suspicious")


def test_numbers_have_separators() -> None:
    files = {"w": {"bytes": 4321000, "sha256": "0", "hashed": "the whole file"}}
    about = {"parameters": 1878144, "seconds": 1234.5, "family": "f"}
    text = Certificate("m", about, (), {"files": files}).to_markdown()
    assert "| parameters | 1,878,144 |" in text
    assert "| 4,321,000 |" in text
    assert "| seconds | 1234.5 |" in text


def test_the_screen_is_short_unless_all_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 80)
    name, sha = "transformer.h.0.w", "c7a4f7c04943"
    tensor = {"name": name, "shape": [2], "dtype": "F32", "use": "whole", "parameters": ["core.w"]}
    inventory = {
        "files": {"model.safetensors": {"bytes": 8, "sha256": sha, "hashed": "all"}},
        "options": [{"key": "a", "value": "the value", "read": False, "fields": []}],
        "special_tokens": [],
        "texts": [{"text": "", "ids": [], "tokens": [f"piece{i}" for i in range(50)]}],
        "tensors": [tensor],
    }
    bad = finding(check="loss under exchanges of weights", if_wrong="nonsense is seen")
    certificate = Certificate("m", {"versions": {"torch": "9.9"}, "n": 1234}, (bad,), inventory)
    only_full = {name, sha, "torch 9.9", "the value", "piece49"}
    for full in (True, False):
        show(certificate, full)
        out = capsys.readouterr().out
        assert {text for text in only_full if text in out} == (only_full if full else set())
        assert "n: 1,234" in out
        assert "piece19" in out
        assert "nonsense is seen" in out.lower().replace("\n", " ")
        (top,) = (line for line in out.splitlines() if line.startswith("┏"))
        assert top.index("┳") <= 19
        assert len(top) <= 80


def test_values_within_hundreds_of_values_are_cut_off(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(450):
        deep = [deep]
    certificate = Certificate("m", {"a": deep}, (), {"options": []})
    again = Certificate.from_json(certificate.to_json())
    inside, n = again.about["a"], 0
    while isinstance(inside, list):
        (inside,), n = inside, n + 1
    assert (inside, n) == ("(deeper)", 62)  # of 64 with the certificate and "about"
    assert Certificate.from_json(again.to_json()) == again
    certificate.to_markdown()


def test_code_holds_any_text() -> None:
    assert code("a") == "`a`"
    assert code("`") == "`` ` ``"
    assert code("a\n|") == r"`a\n\|`"
    assert code("") == "`  `"
    assert code("x" * 500).endswith("... (500 characters)`")


def test_markdown_fits_into_an_issue() -> None:
    tensors = [
        {
            "name": f"{'x' * 90}{i}",
            "shape": [1],
            "dtype": "F32",
            "use": "whole",
            "parameters": ["p"],
        }
        for i in range(3000)
    ]
    options = [
        {"key": f"{'k' * 100}{i}", "value": "v" * 500, "read": True, "fields": []}
        for i in range(3000)
    ]
    text = Certificate("m", {}, (), {"tensors": tensors, "options": options}).to_markdown()
    assert len(text) < LONGEST + 1000
    assert text.count("<details>") == text.count("</details>")


def test_layers_that_are_alike_are_one_name() -> None:
    names = [f"core.{i}.attn.qkv" for i in (0, 1, 2, 5)] + ["embed.W_E", "coda.0.ln1.w"]
    assert grouped(names) == ["core.{0..2, 5}.attn.qkv", "embed.W_E", "coda.0.ln1.w"]


def test_dtypes_are_counted(certificate: Certificate) -> None:
    assert certificate.about["stored as"] == "46 F32"
    assert certificate.findings[0].numbers["dtypes"] == {"F32": 46}
