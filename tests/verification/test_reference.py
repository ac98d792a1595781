"""Checkpoints against code that they bring along, run by another interpreter."""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import load_golden
from rawcheckpoints import write_checkpoint
from references import STYLES, declared, make_environment, registered, with_code
from safetensors.torch import load_file
from test_verify import EXACT, outcomes, verified

from tl_looped import CheckpointError, ConfigError, InputError, LoopedTransformer
from tl_looped.adapters import (
    Adapter,
    HuginnAdapter,
    OuroAdapter,
    Package,
    RetrofitLlamaAdapter,
)
from tl_looped.checkpoints import HubOptions, open_checkpoint
from tl_looped.verification import Finding, Outcome, ReferenceOptions
from tl_looped.verification.reference import check_reference, compare_with_reference
from tl_looped.verification.reference_process import SCRIPT
from tl_looped.verification.subject import Subject

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where private folders are made; nothing may be left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


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


def with_full_heads(folder: Path) -> Path:
    """The golden Ouro with as many key heads as query heads, so that they can be exchanged."""
    with_code("ouro", folder, num_key_value_heads=4)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            tensors[name] = torch.randn(64, 64, generator=generator) * 0.2
    return write_checkpoint(folder, json.loads((folder / "config.json").read_text()), tensors)


def exchanged(self: Any, cfg: Any) -> Any:
    """Sources in which every query matrix is the key's, and the other way round."""
    found = OuroAdapter.sources(self, cfg)
    for name in [n for n in found if n.endswith("attn.qkv")]:
        q, k, v = found[name].names
        found[name] = replace(found[name], names=(k, q, v))
    return found


def with_field(**wrong: float) -> Callable[..., Any]:
    """A reading of config.json that takes one field wrongly."""

    def config(self: Any, raw: Any) -> Any:
        return replace(OuroAdapter.config(self, raw), **wrong)

    return config


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({}, None),
        ({"sources": exchanged}, "first recurrence.0.blocks.0.hook_resid_post"),
        ({"config": with_field(eps=1.5e-6)}, "epsilon of"),
        ({"config": with_field(rotary_base=1_000_100.0)}, "rotary frequencies"),
    ],
    ids=["none", "query and key", "eps", "theta"],
)
@pytest.mark.full
def test_a_fault_of_an_adapter_turns_the_reference_red_and_nothing_else(
    fault: dict[str, Any], said: str | None, tmp_path: Path, python: Path
) -> None:
    folder = with_full_heads(tmp_path / "checkpoint")
    with registered(OuroAdapter, **fault):
        options = ("--reference-python", str(python), "--trust-remote-code")
        certificate = verified(folder, tmp_path / "c", *options, code=0 if said is None else 1)
    assert outcomes(certificate) == dict.fromkeys(EXACT, Outcome.EXACT)
    assert certificate.wrong == (() if said is None else ("reference",))
    finding = next(finding for finding in certificate.findings if finding.check == "reference")
    assert finding.outcome is (Outcome.EXACT if said is None else Outcome.WRONG)
    assert (said or "greedy tokens") in finding.found


def test_exchanged_query_and_key_biases(tmp_path: Path, python: Path) -> None:
    def sources(self: Any, cfg: Any) -> Any:
        found = HuginnAdapter.sources(self, cfg)
        for name in [n for n in found if n.endswith("q_bias")]:
            other = name.replace("q_bias", "k_bias")
            found[name], found[other] = found[other], found[name]
        return found

    folder = with_code("huginn", tmp_path / "checkpoint")
    subject = subject_of(folder, declared(HuginnAdapter, sources=sources), "huginn")
    subject.checkpoint.load_into(subject.model, torch.device("cpu"), torch.float32)
    finding = compare_with_reference(subject, ReferenceOptions(python, True))
    assert finding.outcome is Outcome.WRONG
    assert "first prelude.0.hook_resid_post" in finding.found  # where it begins
    assert "epsilon" not in finding.found
    assert "rotary" not in finding.found


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
        ("pipe", "no ordinary file"),
        ("link", "no ordinary file"),
        ("stderr", "was replaced"),
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


@pytest.mark.full
def test_what_the_code_leaves_running_is_ended(tmp_path: Path, python: Path) -> None:
    folder = with_code("retrofit_llama", tmp_path / "checkpoint", "child")
    assert compared("retrofit_llama", folder, python).outcome is Outcome.EXACT
    left = int((folder / "marker").read_text())
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(left).status() == psutil.STATUS_ZOMBIE  # ended, and nobody asked


def test_a_declaration_of_what_is_not_there_says_what_is(tmp_path: Path, python: Path) -> None:
    folder, ours = with_code("ouro", tmp_path / "checkpoint"), "recurrence.{r}.blocks.{l}.hook"
    adapter = declared(OuroAdapter)
    assert adapter.reference is not None
    wrong = replace(
        adapter.reference,
        activations={ours: "model.layer.{l}", "recurrence.{r}.hook_state_out": "model.norm"},
        rotary="model.rotary.inv_freq",
        norm_eps="variance",
    )
    finding = compared("ouro", folder, python, reference=wrong)
    assert finding.outcome is Outcome.WRONG
    has_no = "the authors' model has no"
    for said in (
        f"activations[{ours!r}]: {has_no} module model.layer.0; it has model.layers.0, ",
        f"rotary: {has_no} buffer model.rotary.inv_freq; it has model.rotary_emb.inv_freq",
        f"norm_eps: {has_no} attribute model.",
    ):
        assert said in finding.found
    assert ".variance_epsilon" in finding.found
    assert "model.norm;" not in finding.found
    assert "Traceback" not in finding.found


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


def test_an_interpreter_of_a_relative_path_and_of_home(
    tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_code("retrofit_llama", tmp_path / "checkpoint")
    checkpoint = replace(open_checkpoint(folder), adapter=declared(RetrofitLlamaAdapter))
    assert python.is_symlink()
    environment = python.parent.parent
    monkeypatch.setenv("HOME", str(environment.parent))
    monkeypatch.chdir(environment.parent)
    for given in (Path(environment.name), Path("~", environment.name)):
        options = ReferenceOptions(given / "bin" / "python", True)
        assert options.python == python  # and not where the link leads
        check_reference(checkpoint, options)  # runs it in another folder
    with pytest.raises(InputError):
        ReferenceOptions(Path("~no-such-user-here/python"), True)


def test_files_that_are_not_there(tmp_path: Path, python: Path) -> None:
    folder = with_code("retrofit_llama", tmp_path / "checkpoint")
    adapter, trusted = declared(RetrofitLlamaAdapter), ReferenceOptions(python, True)
    assert "no/python" in refused(folder, adapter, replace(trusted, python=Path("no/python")))
    not_python = tmp_path / "not-python"
    not_python.write_text("")
    assert "does not run" in refused(folder, adapter, replace(trusted, python=not_python))
    (folder / "by_hand.py").unlink()
    assert f"{folder} lacks by_hand.py, which" in refused(folder, adapter, trusted)
    assert "holds none" in refused(folder, adapter, replace(trusted, trust_remote_code=False))
    raw = json.loads((folder / "config.json").read_text())
    elsewhere = {"AutoConfig": "owner/name--by_hand.Config"}
    others = {"AutoTokenizer": ["by_hand.T", None], "AutoModel": "by_hand.RavenModel"}
    for auto_map, said in ((elsewhere, "--"), (others, "auto_map"), (None, "auto_map")):
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
        ReferenceOptions(trust_remote_code=True)
    for timeout in (0.0, -1.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(InputError):
            ReferenceOptions(python, True, timeout)


def test_code_of_the_hub_is_that_of_the_commit(
    tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, repo = "c" * 40, tmp_path / "cache" / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    folder = with_code("retrofit_llama", repo / "snapshots" / commit)
    hub = HubOptions(cache_dir=tmp_path / "cache", local_files_only=True)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    adapter = declared(RetrofitLlamaAdapter)
    checkpoint = replace(open_checkpoint("owner/name", None, hub), adapter=adapter)
    assert checkpoint.folder == folder
    with pytest.raises(InputError, match=f"by_hand.py of owner/name at the commit {commit}"):
        check_reference(checkpoint, ReferenceOptions(python, hub=hub))
    monkeypatch.chdir(tmp_path)  # where a folder is called like the model
    check_reference(checkpoint, ReferenceOptions(python, True, hub=hub))
    (folder / "by_hand.py").unlink()
    with pytest.raises(CheckpointError, match=r"by_hand\.py"):
        check_reference(checkpoint, ReferenceOptions(python, True, hub=hub))
    assert not (folder / "marker").exists()


def test_the_script_needs_nothing_of_the_package() -> None:
    text = SCRIPT.read_text()
    assert "tl_looped" not in text.split('"""', 2)[2]
    ast.parse(text, feature_version=(3, 8))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("blocks.{l}.hook_resid_post", "layers.{l}"), ("prelude.{r}.{l}.hook", "layers.{l}"),
     ("coda.{l}.hook_resid_post", "layers"), ("coda.0.hook_resid_post", "layers.{l}")],
)  # fmt: skip
def test_a_declaration_names_activations_that_there_are(ours: str, theirs: str) -> None:
    assert OuroAdapter.reference is not None
    with pytest.raises(ConfigError):
        replace(OuroAdapter.reference, activations={ours: theirs})
