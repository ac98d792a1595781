"""Checkpoints against code that they bring along, run by another interpreter.

The code is ``by_hand.py`` beside this file, the interpreter that of a venv which borrows the
packages of the running one. The adapters are those of the package, but for the version of
transformers that they declare.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, load_golden
from rawcheckpoints import raw_config, write_checkpoint
from safetensors.torch import load_file

import tl_looped
from tl_looped import CheckpointError, InputError, LoopedTransformer
from tl_looped.adapters import (
    Adapter,
    HuginnAdapter,
    OuroAdapter,
    Package,
    RetrofitLlamaAdapter,
    RetrofitOlmoAdapter,
)
from tl_looped.checkpoints import open_checkpoint
from tl_looped.verification import Finding, Outcome
from tl_looped.verification.reference import (
    ReferenceOptions,
    check_reference,
    compare_with_reference,
)
from tl_looped.verification.reference_process import SCRIPT
from tl_looped.verification.subject import Subject

STYLES = {
    "huginn": ("huginn", HuginnAdapter),
    "retrofit_llama": ("llama", RetrofitLlamaAdapter),
    "retrofit_tinyllama": ("llama", RetrofitLlamaAdapter),
    "retrofit_olmo": ("olmo", RetrofitOlmoAdapter),
    "ouro": ("ouro", OuroAdapter),
}
INSTALLED = tuple(Package(name, version(name)) for name in ("transformers", "torch"))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of its own that finds the packages of the running one, and not tl_looped."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(str(Path(torch.__file__).parent.parent))
    return folder / "bin" / "python"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where private folders are made; nothing may be left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def declared(of: type[Adapter], **changes: Any) -> Adapter:
    """An adapter of the package that declares the installed versions."""
    assert of.reference is not None
    reference = replace(of.reference, packages=INSTALLED)
    return type(of.__name__, (of,), {"reference": reference} | changes)()


def with_code(case: str, folder: Path, fault: str | None = None, **changes: Any) -> Path:
    """A golden checkpoint with its code."""
    kind = "Ouro" if case == "ouro" else "Raven"
    own = {"style": STYLES[case][0], "fault": fault, "marker": str(folder / "marker")}
    code = {"AutoConfig": f"by_hand.{kind}Config", "AutoModelForCausalLM": f"by_hand.{kind}Model"}
    raw = raw_config(case, by_hand=own, auto_map=code, **changes)
    write_checkpoint(folder, raw, load_file(GOLDEN / case / "model.safetensors"))
    shutil.copy(Path(__file__).parent / "by_hand.py", folder)
    return folder


def subject_of(folder: Path, adapter: Adapter, case: str) -> Subject:
    checkpoint = replace(open_checkpoint(folder), adapter=adapter)
    model = LoopedTransformer.from_pretrained(folder, device="cpu")
    return Subject(checkpoint, model, None, load_golden(case).tokens)


def compared(
    case: str, folder: Path, python: Path, timeout: float = 300.0, **changes: Any
) -> Finding:
    subject = subject_of(folder, declared(STYLES[case][1], **changes), case)
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    finding = compare_with_reference(subject, ReferenceOptions(python, True, timeout))
    assert finding.check == "reference"
    for name, parameter in subject.model.named_parameters():
        assert torch.equal(parameter, before[name])
    json.dumps(finding.numbers)
    return finding


# -- what is right ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", STYLES)
def test_golden_checkpoints_compute_what_their_code_does(
    case: str, tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "not for others")
    folder = with_code(case, tmp_path / "checkpoint")
    before = {path.name for path in folder.iterdir()}
    finding = compared(case, folder, python)
    assert finding.outcome is Outcome.EXACT, finding.found
    numbers, loop = finding.numbers, LoopedTransformer.from_pretrained(folder, device="meta").loop
    assert list(numbers["logits"]) == [str(loop.R), "1", str(2 * loop.R)]
    assert numbers["activations"] == loop.p + loop.R * (loop.k + 1) + loop.c
    for entry in (*numbers["logits"].values(), numbers["rotary frequencies"]):
        assert 0 < entry["largest"] < entry["bound"] < 2e-3
    assert numbers["greedy tokens"] == 8
    assert numbers["versions"]["torch"] == version("torch")
    assert set(numbers["code"]) == {"by_hand.py"}
    assert numbers["loading"] == {}
    assert {path.name for path in folder.iterdir()} - {"marker"} == before


# -- what is wrong ----------------------------------------------------------------------------


def exchanged(one: str, other: str) -> Callable[..., Any]:
    """Sources of an adapter of the package with two parameters of every block exchanged."""

    def sources(self: Adapter, cfg: Any) -> Any:
        found = super(type(self), self).sources(cfg)
        for name in [n for n in found if n.endswith(one)]:
            other_name = name.removesuffix(one) + other
            found[name], found[other_name] = found[other_name], found[name]
        return found

    return sources


def test_exchanged_query_and_key_biases(tmp_path: Path, python: Path) -> None:
    folder = with_code("huginn", tmp_path / "checkpoint")
    adapter = declared(HuginnAdapter, sources=exchanged("q_bias", "k_bias"))
    subject = subject_of(folder, adapter, "huginn")
    subject.checkpoint.load_into(subject.model, torch.device("cpu"), torch.float32)
    finding = compare_with_reference(subject, ReferenceOptions(python, True))
    assert finding.outcome is Outcome.WRONG
    assert "prelude.0.hook_resid_post" in finding.found  # where it begins
    assert finding.numbers["rotary frequencies"]["largest"] < 1e-6


@pytest.mark.full
def test_exchanged_queries_and_keys(tmp_path: Path, python: Path) -> None:
    folder = with_code("ouro", tmp_path / "checkpoint", num_key_value_heads=4)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            tensors[name] = torch.randn(64, 64, generator=generator) * 0.2
    write_checkpoint(folder, json.loads((folder / "config.json").read_text()), tensors)
    assert compared("ouro", folder, python).outcome is Outcome.EXACT

    def sources(self: Adapter, cfg: Any) -> Any:
        found = OuroAdapter.sources(self, cfg)  # type: ignore[arg-type]
        for name in [n for n in found if n.endswith("attn.qkv")]:
            q, k, v = found[name].names
            found[name] = replace(found[name], names=(k, q, v))
        return found

    subject = subject_of(folder, declared(OuroAdapter, sources=sources), "ouro")
    subject.checkpoint.load_into(subject.model, torch.device("cpu"), torch.float32)
    finding = compare_with_reference(subject, ReferenceOptions(python, True))
    assert finding.outcome is Outcome.WRONG
    assert "recurrence.0.blocks.0" in finding.found


@pytest.mark.full
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("norm_eps", 2e-6, "epsilon of prelude.0.ln1"),
        ("rope_theta", 500_100.0, "rotary frequencies"),
    ],
)
def test_a_number_that_hardly_moves_the_logits(
    key: str, value: float, said: str, tmp_path: Path, python: Path
) -> None:
    folder = with_code("retrofit_llama", tmp_path / "checkpoint", **{key: value})
    subject = subject_of(folder, declared(RetrofitLlamaAdapter), "retrofit_llama")
    right = LoopedTransformer.from_pretrained(GOLDEN / "retrofit_llama", device="cpu")
    finding = compare_with_reference(replace(subject, model=right), ReferenceOptions(python, True))
    assert finding.outcome is Outcome.WRONG
    assert said in finding.found


# -- code that fails --------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("crash", "planted for the test"),
        ("nan", "not finite"),
        ("shape", "expected"),
        ("garbage", "without an answer"),
        ("calls", "ran 4 times, expected 5"),
    ],
)
def test_code_that_fails_is_told_and_leaves_nothing(
    fault: str, said: str, tmp_path: Path, python: Path
) -> None:
    folder = with_code("retrofit_llama", tmp_path / "checkpoint", fault)
    finding = compared("retrofit_llama", folder, python)
    assert finding.outcome is Outcome.WRONG
    assert finding.found.startswith("not compared: ")
    assert said in finding.found
    assert finding.numbers["compared"] is False
    assert finding.numbers["versions"]["transformers"] == version("transformers")


@pytest.mark.full
def test_code_that_hangs_is_killed(tmp_path: Path, python: Path) -> None:
    folder = with_code("retrofit_llama", tmp_path / "checkpoint", "hang")
    finding = compared("retrofit_llama", folder, python, timeout=5.0)
    assert finding.outcome is Outcome.WRONG
    assert "did not end within 5 s" in finding.found


# -- what is refused, before anything runs ----------------------------------------------------


def refused(folder: Path, adapter: Adapter, options: ReferenceOptions) -> str:
    """The refusal; nothing of the code has run."""
    subject = subject_of(folder, adapter, "retrofit_llama")
    with pytest.raises((InputError, CheckpointError)) as early:
        check_reference(subject.checkpoint, options)
    with pytest.raises(type(early.value)) as late:
        compare_with_reference(subject, options)
    assert str(early.value) == str(late.value)
    assert not (folder / "marker").exists()
    return str(early.value)


def test_code_that_is_not_trusted_does_not_run(tmp_path: Path, python: Path) -> None:
    folder = with_code("retrofit_llama", tmp_path / "checkpoint")
    text = refused(folder, declared(RetrofitLlamaAdapter), ReferenceOptions(python))
    assert "by_hand.py" in text
    assert "--trust-remote-code" in text


def test_another_major_version_is_refused(tmp_path: Path, python: Path) -> None:
    folder = with_code("retrofit_llama", tmp_path / "checkpoint")
    text = refused(folder, RetrofitLlamaAdapter(), ReferenceOptions(python, True))
    assert version("transformers") in text
    assert "4.51.3" in text
    assert RetrofitLlamaAdapter.reference is not None
    missing = replace(RetrofitLlamaAdapter.reference, packages=(Package("no-such-thing", "1.0"),))
    adapter = type("Missing", (RetrofitLlamaAdapter,), {"reference": missing})()
    assert "no no-such-thing" in refused(folder, adapter, ReferenceOptions(python, True))


def test_files_that_are_not_there(tmp_path: Path, python: Path) -> None:
    folder = with_code("retrofit_llama", tmp_path / "checkpoint")
    adapter, trusted = declared(RetrofitLlamaAdapter), ReferenceOptions(python, True)
    assert "no/python" in refused(folder, adapter, replace(trusted, python=Path("no/python")))
    not_python = tmp_path / "not-python"
    not_python.write_text("")
    assert "does not run" in refused(folder, adapter, replace(trusted, python=not_python))
    (folder / "by_hand.py").unlink()
    assert "by_hand.py" in refused(folder, adapter, trusted)
    raw = json.loads((folder / "config.json").read_text())
    elsewhere = {"AutoConfig": "owner/name--by_hand.Config"}
    for auto_map, said in ((elsewhere, "--"), (None, "auto_map")):
        (folder / "config.json").write_text(json.dumps(raw | {"auto_map": auto_map}))
        assert said in refused(folder, adapter, trusted)


def test_a_model_without_other_code(tmp_path: Path, python: Path) -> None:
    checkpoint = open_checkpoint("demo")
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    subject = Subject(checkpoint, model, None, torch.zeros(1, 3, dtype=torch.long))
    finding = compare_with_reference(subject, ReferenceOptions())
    assert finding.outcome is Outcome.NOT_APPLICABLE
    with pytest.raises(InputError):
        compare_with_reference(subject, ReferenceOptions(python, True))


def test_what_is_not_asked_for_is_told_how(tmp_path: Path) -> None:
    folder = with_code("ouro", tmp_path / "checkpoint")
    finding = compare_with_reference(subject_of(folder, OuroAdapter(), "ouro"), ReferenceOptions())
    assert finding.outcome is Outcome.NOT_APPLICABLE
    assert "transformers==4.55.4" in finding.found


def test_a_model_that_was_rounded_is_not_compared(tmp_path: Path, python: Path) -> None:
    folder = with_code("retrofit_llama", tmp_path / "checkpoint")
    subject = subject_of(folder, declared(RetrofitLlamaAdapter), "retrofit_llama")
    subject.model.to(torch.bfloat16)
    finding = compare_with_reference(subject, ReferenceOptions(python, True))
    assert finding.outcome is Outcome.WRONG
    assert "float32" in finding.found
    assert not (folder / "marker").exists()


def test_options_that_contradict_each_other(python: Path) -> None:
    with pytest.raises(InputError):
        ReferenceOptions(python, True, source="a model")
    with pytest.raises(InputError):
        ReferenceOptions(python, True, timeout=0.0)


def test_the_script_needs_nothing_of_the_package() -> None:
    text = SCRIPT.read_text()
    assert "tl_looped" not in text.split('"""', 2)[2]
    assert SCRIPT.is_relative_to(Path(tl_looped.__file__).parent)
    compile(text, str(SCRIPT), "exec", flags=0, dont_inherit=True)
    assert os.access(SCRIPT, os.R_OK)
