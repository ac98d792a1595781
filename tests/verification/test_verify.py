"""``tl-looped verify`` end to end: right checkpoints pass, and each fault turns its own check."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import CASES, GOLDEN, copy_of, files_of_at_most, write_tensors
from feedforwards import KINDS, feedforward
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

import tl_looped
from tl_looped import (
    CheckpointError,
    DataError,
    InputError,
    LoopedTransformer,
    Source,
    TLLoopedError,
    UnknownArchitectureError,
    register_adapter,
    unregister_adapter,
)
from tl_looped.adapters.retrofit_llama import RetrofitLlamaAdapter
from tl_looped.checkpoints import BUNDLED, HubOptions
from tl_looped.cli import app
from tl_looped.retrofitting import build
from tl_looped.verification import Certificate, Finding, Outcome, run, verify
from tl_looped.verification.plausibility import OF_TEXT

pytestmark = pytest.mark.once

EXACT = [
    "names",
    "finite",
    "cached = uncached",
    "padded = alone",
    "decomposition",
    "recurrences",
    "saved = loaded",
]
ALL_EXACT = dict.fromkeys(EXACT, Outcome.EXACT)


def invoke(name: str | Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["verify", str(name), "--device", "cpu", *options])


def verified(name: str | Path, out: Path, *options: str, code: int = 0) -> Certificate:
    """What the command wrote of a checkpoint, with the exit code that it must have."""
    result = invoke(name, "--out", str(out), *options)
    assert result.exit_code == code, result.output
    return Certificate.from_json(out.with_name(out.name + ".json").read_text(encoding="utf-8"))


def outcomes(certificate: Certificate) -> dict[str, Outcome]:
    return {f.check: f.outcome for f in certificate.findings if f.check in EXACT}


def only(wrong: str, *exact: str) -> dict[str, Outcome]:
    """One check failed, those before it held, and the others could not be run."""
    held = dict.fromkeys(exact, Outcome.EXACT)
    return dict.fromkeys(EXACT, Outcome.NOT_APPLICABLE) | held | {wrong: Outcome.WRONG}


def golden_tensors(case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / case / "model.safetensors")


# -- what is right --------------------------------------------------------------------------------


@pytest.mark.every_family
@pytest.mark.parametrize("case", CASES)
def test_the_authors_checkpoints_are_exact(case: str, tmp_path: Path) -> None:
    certificate = verified(GOLDEN / case, tmp_path / "c")
    assert outcomes(certificate) == ALL_EXACT
    assert certificate.model == case
    assert certificate.inventory["special_tokens"] == []
    assert "texts" not in certificate.inventory
    assert set(certificate.inventory["files"]) == {"config.json", "model.safetensors"}
    numbers = certificate.findings[0].numbers
    assert numbers["ignored"] == (["freqs_cis"] if case == "huginn" else [])
    assert numbers["copies"] == []
    date = datetime.strptime(certificate.about["date"], "%Y-%m-%d %H:%M UTC")
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    assert timedelta() <= now - date < timedelta(hours=2)
    assert 0 < certificate.about["wall time in seconds"] < 7200
    names = {one["name"] for one in certificate.inventory["tensors"]}
    assert names == set(golden_tensors(case))
    of_text = {f.check: f.outcome for f in certificate.findings if f.check in OF_TEXT}
    assert of_text == dict.fromkeys(OF_TEXT, Outcome.NOT_APPLICABLE)


@pytest.mark.parametrize(
    "name", ["demo", *(pytest.param(n, marks=pytest.mark.full) for n in BUNDLED if n != "demo")]
)
def test_bundled_models_are_exact_and_show_their_tokens(name: str, tmp_path: Path) -> None:
    certificate = verified(name, tmp_path / "c")
    assert outcomes(certificate) == ALL_EXACT
    first, model = certificate.inventory["texts"][0], LoopedTransformer.from_pretrained(name)
    assert "".join(first["tokens"]) == "<|bos|>" + first["text"]
    assert first["ids"] == model.to_tokens(first["text"])[0].tolist()
    special = {
        one["kind"]: (one["id"], one["from"]) for one in certificate.inventory["special_tokens"]
    }
    assert special["bos"] == (model.tokenizer.bos_token_id, "tokenizer")


@pytest.mark.parametrize(
    "kind", ["qwen2", *(pytest.param(k, marks=pytest.mark.full) for k in KINDS if k != "qwen2")]
)
def test_feedforward_models_are_examined_as_loops_run_once(kind: str, tmp_path: Path) -> None:
    feedforward(kind).save_pretrained(tmp_path / kind)
    certificate = verified(tmp_path / kind, tmp_path / "c")
    assert outcomes(certificate) == ALL_EXACT
    reference = {f.check: f.outcome for f in certificate.findings}["reference"]
    assert reference is Outcome.EXACT
    assert certificate.about["shape"] == "(0, 7 x 1, 0)"
    uses = {one["use"].split()[0] for one in certificate.inventory["tensors"]}
    assert uses <= {"whole", "joined", "duplicate"}
    assert uses >= {"whole", "joined"}


def test_what_was_made_here_is_exact(tmp_path: Path) -> None:
    for mode in ("retrofit", "virtual-loop"):
        model = tl_looped.retrofit(
            feedforward("llama"), core=range(2, 5), mode=mode, n_recurrences=3, device="cpu"
        )
        model.save_pretrained(tmp_path / mode)
        assert outcomes(verified(tmp_path / mode, tmp_path / "c")) == ALL_EXACT


def test_a_registered_family_is_exact(tmp_path: Path) -> None:
    folder = copy_of("retrofit_llama", tmp_path / "mine")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "m", "architectures": []}))

    @register_adapter
    class Mine(RetrofitLlamaAdapter):
        name = "mine"
        aliases: ClassVar = {}

        def matches(self, config: Any, tensor_names: Any) -> bool:
            return config.get("model_type") == "m"

    try:
        certificate = verified(folder, tmp_path / "c")
    finally:
        unregister_adapter("mine")
    assert outcomes(certificate) == ALL_EXACT
    assert certificate.about["adapter"] == "mine"


def test_another_dtype_of_the_run(tmp_path: Path) -> None:
    certificate = verified(GOLDEN / "retrofit_olmo", tmp_path / "c", "--dtype", "bfloat16")
    assert outcomes(certificate) == ALL_EXACT
    assert certificate.about["run in"] == "bfloat16"
    finite = next(f for f in certificate.findings if f.check == "finite")
    assert set(finite.numbers) == {"bfloat16", "float32"}


def test_nothing_is_called_exact_where_rounding_hides_everything(tmp_path: Path) -> None:
    """A random Huginn in bf16: roundings change its logits as much as another token does."""
    certificate = verified(GOLDEN / "huginn", tmp_path / "c", "--dtype", "bfloat16")
    found = outcomes(certificate)
    assert found["cached = uncached"] is found["padded = alone"] is Outcome.NOT_APPLICABLE
    assert certificate.holds


@pytest.mark.parametrize("kind", ["looped", pytest.param("feedforward", marks=pytest.mark.full)])
def test_the_revision_of_a_hub_id_is_pinned(kind: str, tmp_path: Path) -> None:
    commits = {"main": "a" * 40, "v2": "b" * 40}
    repository = tmp_path / "models--me--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    for revision, commit in commits.items():
        (repository / "refs" / revision).write_text(commit)
        if kind == "looped":
            copy_of("retrofit_llama", repository / "snapshots" / commit)
        else:
            feedforward("llama").save_pretrained(repository / "snapshots" / commit)
    hub = HubOptions(cache_dir=tmp_path, local_files_only=True)
    for revision, commit in commits.items():
        certificate = verify("me/mine", revision=revision, device="cpu", hub=hub)
        assert certificate.about["revision"] == commit
        assert certificate.model == "me/mine"
        assert certificate.holds
    assert verify("me/mine", device="cpu", hub=hub).about["revision"] == commits["main"]
    with pytest.raises(CheckpointError):
        verify("me/mine", revision="v3", hub=hub)


def test_an_alias_is_named_with_its_repository_and_its_recurrences(tmp_path: Path) -> None:
    name, hub_id = "recurrent-llama-3.2-r4", "smcleish/Recurrent-Llama-3.2-train-recurrence-4"
    repository = tmp_path / f"models--{hub_id.replace('/', '--')}"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    copy_of("retrofit_llama", repository / "snapshots" / ("c" * 40))
    hub = HubOptions(cache_dir=tmp_path, local_files_only=True)
    certificate = verify(name, device="cpu", hub=hub)
    assert certificate.model == name
    assert certificate.about["revision"] == f"{hub_id} at {'c' * 40}"
    assert certificate.about["shape"] == "(2, 3 x 4, 2)"


# -- faults of files ------------------------------------------------------------------------------


def test_one_nan_turns_finite(tmp_path: Path) -> None:
    folder, tensors = copy_of("ouro", tmp_path / "nan"), golden_tensors("ouro")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    write_tensors(folder, tensors)
    certificate = verified(folder, tmp_path / "c", code=1)
    assert outcomes(certificate) == only("finite", "names")
    finding = next(f for f in certificate.findings if f.check == "finite")
    bad = {"numbers": 1, "of": 96 * 64, "first": [3, 4], "dtype": "float32"}
    assert finding.numbers == {"weights": {"model.layers.1.mlp.up_proj.weight": bad}}


def test_a_weight_that_the_runs_dtype_cannot_hold_turns_finite(tmp_path: Path) -> None:
    folder, tensors = copy_of("ouro", tmp_path / "large"), golden_tensors("ouro")
    tensors["model.norm.weight"][0] = 1e6
    write_tensors(folder, tensors)
    assert verified(folder, tmp_path / "a").holds
    certificate = verified(folder, tmp_path / "b", "--dtype", "float16", code=1)
    assert outcomes(certificate) == only("finite", "names")


def test_a_stream_that_overflows_in_the_files_dtype_turns_finite(tmp_path: Path) -> None:
    folder, tensors = copy_of("retrofit_llama", tmp_path / "hot"), golden_tensors("retrofit_llama")
    tensors["transformer.prelude.1.mlp.proj.weight"] *= 1e5
    write_tensors(folder, {name: tensor.half() for name, tensor in tensors.items()})
    certificate = verified(folder, tmp_path / "c", code=1)
    assert outcomes(certificate) == only("finite", "names")
    finding = next(f for f in certificate.findings if f.check == "finite")
    assert list(finding.numbers) == ["float16"]


def test_faults_of_names(tmp_path: Path) -> None:
    name = "transformer.core_block.0.mlp.fc.weight"
    for i, change in enumerate(
        (
            lambda t: t | {"transformer.core_block.0.mlp.cf.weight": t.pop(name)},
            lambda t: {k: v for k, v in t.items() if k != name},
            lambda t: t | {name: t[name][:-1]},
            lambda t: t | {"transformer.core_block.9.norm_1.weight": torch.ones(64)},
            lambda t: t | {name: t[name].to(torch.int8)},
        )
    ):
        folder = copy_of("retrofit_llama", tmp_path / str(i))
        write_tensors(folder, change(golden_tensors("retrofit_llama")))
        certificate = verified(folder, tmp_path / "c", code=1)
        assert outcomes(certificate) == only("names"), i
        problems = certificate.findings[0].numbers["problems"]
        assert any(name in p or "core_block.9" in p for p in problems), i


def test_a_tied_copy_that_differs_turns_names(tmp_path: Path) -> None:
    folder, tensors = copy_of("huginn", tmp_path / "tied"), golden_tensors("huginn")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    write_tensors(folder, tensors)
    certificate = verified(folder, tmp_path / "a")
    uses = {one["name"]: one["use"] for one in certificate.inventory["tensors"]}
    assert uses["lm_head.weight"] == "duplicate of transformer.wte.weight"
    names = certificate.findings[0]
    assert (names.numbers["copies"], names.numbers["tensors"]) == (["lm_head.weight"], 77)
    for part in ("75 of 77 tensors", "83 parameters", ": freqs_cis", ": lm_head.weight"):
        assert part in names.found
    tensors["lm_head.weight"][0, 0] += 1
    write_tensors(folder, tensors)
    assert outcomes(verified(folder, tmp_path / "b", code=1)) == only("names")


@pytest.mark.parametrize("fault", ["twice", "left over"])
def test_an_adapter_that_uses_a_tensor_twice_or_in_part_turns_names(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tl_looped.HuginnAdapter.sources

    def wrong(self: Any, cfg: Any) -> dict[str, Source]:
        out = sources(self, cfg)
        q = out["core.0.attn.q_bias"]
        out["core.0.attn.k_bias"] = q
        if fault == "left over":
            del out["core.0.attn.q_bias"]
        return out

    monkeypatch.setattr(tl_looped.HuginnAdapter, "sources", wrong)
    certificate = verified(GOLDEN / "huginn", tmp_path / "c", code=1)
    assert outcomes(certificate) == only("names")
    lines = certificate.findings[0].numbers["problems"]
    assert any(line.startswith(fault if fault == "left over" else "used twice") for line in lines)


def test_a_feedforward_model_that_is_read_wrong_turns_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is there and finite, but what is built does not compute what transformers' class does."""
    feedforward("llama").save_pretrained(tmp_path / "llama")
    looped_config = build.looped_config

    def wrong(*args: Any) -> Any:
        return replace(looped_config(*args), eps=0.1)

    monkeypatch.setattr(build, "looped_config", wrong)
    certificate = verified(tmp_path / "llama", tmp_path / "c", code=1)
    assert outcomes(certificate) == dict.fromkeys(EXACT, Outcome.NOT_APPLICABLE) | {
        "names": Outcome.EXACT
    }
    assert certificate.wrong == ("load",)


def test_an_error_of_a_measurement_leaves_the_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        yield Finding(OF_TEXT[0], Outcome.PLAUSIBLE, "found", "")
        raise InputError("no")

    monkeypatch.setattr(run, "plausibility", fail)
    certificate = verified(GOLDEN / "ouro", tmp_path / "c")
    found = {f.check: f.outcome for f in certificate.findings}
    assert outcomes(certificate) == ALL_EXACT
    assert found[OF_TEXT[0]] is Outcome.PLAUSIBLE
    assert found[OF_TEXT[1]] is Outcome.NOT_APPLICABLE


# -- what is no checkpoint ------------------------------------------------------------------------


def test_what_cannot_be_had_is_an_ordinary_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        verify(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "gpt9"}')
    write_tensors(tmp_path, {"a": torch.ones(2)})
    with pytest.raises(UnknownArchitectureError):
        verify(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 10**12})
    )
    with pytest.raises(CheckpointError):
        verify(tmp_path)
    with pytest.raises(CheckpointError):
        verify("demo", revision="main")
    for wrong in ({"seed": -1}, {"problems": -1}, {"dtype": "int8"}):
        with pytest.raises(TLLoopedError):
            verify("demo", **wrong)
    for device in ("cuda:99", "no such thing"):
        with pytest.raises(InputError):  # before anything is read
            verify("demo", device=device, problems=1, problem_set="nothing")
    for problem_set in ("nothing", f"gsm8k:{tmp_path}/none.jsonl"):
        with pytest.raises(DataError):
            verify("demo", problems=1, problem_set=problem_set)
    assert invoke(tmp_path).exit_code == 1


def test_a_tokenizer_that_fails_turns_load(tmp_path: Path) -> None:
    """Of the tokenizers library, which raises a plain Exception for an unknown token."""
    copy_of("ouro", tmp_path / "c")
    Tokenizer(WordLevel({"a": 0})).save(str(tmp_path / "c" / "tokenizer.json"))
    certificate = verified(tmp_path / "c", tmp_path / "out", code=1)
    assert certificate.wrong == ("load",)
    assert outcomes(certificate)["finite"] is Outcome.NOT_APPLICABLE


def test_a_model_beyond_the_memory_is_refused_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    n = sum(tensor.numel() for tensor in golden_tensors("ouro").values())
    monkeypatch.setattr(run, "free_bytes", lambda device: 4 * n - 1)
    with pytest.raises(InputError, match=f"{4 * n} bytes.*{4 * n - 1} bytes.*bfloat16") as caught:
        verify(GOLDEN / "ouro", device="cpu")
    assert "--device" in str(caught.value)
    monkeypatch.setattr(run, "free_bytes", lambda device: 4 * n)
    assert verify(GOLDEN / "ouro", device="cpu").holds


# -- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["new/c.v2", *(pytest.param(n, marks=pytest.mark.full) for n in ("c.json", "c.md"))]
)
def test_the_files_of_a_certificate(name: str, tmp_path: Path) -> None:
    result = invoke(GOLDEN / "retrofit_llama", "--out", str(tmp_path / name))
    assert result.exit_code == 0
    base = name.removesuffix(".json").removesuffix(".md")
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {f"{base}.json", f"{base}.md"}


def test_a_place_that_cannot_be_written_to_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_subject", lambda *args: pytest.fail("it was opened"))
    (tmp_path / "file").write_text("")
    (tmp_path / "c.md").mkdir()
    for out in (tmp_path / "file" / "c", tmp_path / "c", Path("/"), tmp_path / ".."):
        result = invoke("demo", "--out", str(out))
        assert result.exit_code == 1
        assert isinstance(result.exception, tl_looped.TLLoopedError)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    certificate = verify(GOLDEN / "retrofit_llama", device="cpu")
    assert len(certificate.to_markdown()) < 15_000 < len(certificate.to_json())
    for n_bytes in (100, 15_000):
        with files_of_at_most(n_bytes), pytest.raises(DataError):
            certificate.write(tmp_path / "new" / "c")
        assert os.listdir(tmp_path) == []


def test_a_run_that_is_stopped_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_check", stop)
    result = invoke(GOLDEN / "ouro", "--out", str(tmp_path / "c"))
    assert result.exit_code == 130
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_killed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what it has just saved, to load it again, or another process that it waits for."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    seen: list[str] = []

    def killed(self: Any, folder: Path) -> None:
        seen.extend(os.listdir(tmp_path / "temporary"))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(LoopedTransformer, "save_pretrained", killed)
    result = invoke(GOLDEN / "ouro", "--out", str(tmp_path / "c"))
    assert result.exit_code == 128 + signal.SIGTERM
    assert len(seen) == 1
    assert os.listdir(tmp_path) == ["temporary"]
    assert os.listdir(tmp_path / "temporary") == []
    assert signal.getsignal(signal.SIGTERM) == before
