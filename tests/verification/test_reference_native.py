"""Models against transformers' own class: a feedforward folder, and loops that were made of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from feedforwards import KINDS, N_LAYERS, feedforward, random_tokens
from safetensors.torch import load_file, save_file
from test_verify import EXACT, outcomes, verified

from tl_looped import CheckpointError, ConfigError, InputError, LoopedTransformer, retrofit
from tl_looped.checkpoints import open_checkpoint, without_bars
from tl_looped.progress import SILENT
from tl_looped.verification import Certificate, Finding, Outcome, ReferenceOptions
from tl_looped.verification.native import compare_with_source
from tl_looped.verification.reference import check_reference

STAGES: dict[str, Any] = {"prelude": [0, 1], "core": [3, 4], "coda": [6]}  # 2 and 5 are dropped


def source_folder(kind: str, folder: Path) -> Path:
    with without_bars():
        feedforward(kind).save_pretrained(folder)
    return folder


def reference_of(certificate: Certificate) -> Finding:
    return next(finding for finding in certificate.findings if finding.check == "reference")


def compared(model: LoopedTransformer, source: Path) -> Finding:
    return compare_with_source(model, str(source), random_tokens(), None, SILENT)


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(k, marks=pytest.mark.full) for k in list(KINDS)[1:])]
)
def test_a_feedforward_folder_is_compared_with_its_own_class(kind: str, tmp_path: Path) -> None:
    folder = source_folder(kind, tmp_path / "source")
    certificate = verified(folder, tmp_path / "c")
    assert outcomes(certificate) == dict.fromkeys(EXACT, Outcome.EXACT)
    finding = reference_of(certificate)
    assert finding.outcome is Outcome.EXACT, finding.found
    assert finding.numbers["layers"] == list(range(N_LAYERS))
    assert finding.numbers["activations"] == N_LAYERS
    entry = finding.numbers["logits"]["1"]
    assert 0 < entry["largest"] < entry["bound"] < 1e-3


@pytest.mark.parametrize("mode", ["retrofit", "virtual-loop"])
def test_a_loop_is_compared_with_what_it_was_made_of(mode: str, tmp_path: Path) -> None:
    source = source_folder("olmo2-grouped", tmp_path / "source")
    finding = compared(retrofit(source, **STAGES, mode=mode, device="cpu"), source)
    assert finding.outcome is Outcome.EXACT, finding.found
    assert finding.numbers["layers"] == [0, 1, 3, 4, 6]
    assert finding.numbers["norms"] == 5 * 4 + 1
    assert finding.numbers["source"] == "source"


@pytest.mark.full
def test_the_command_compares_with_a_source_that_is_named(tmp_path: Path) -> None:
    source = source_folder("llama", tmp_path / "source")
    retrofit(source, **STAGES, device="cpu").save_pretrained(tmp_path / "looped")
    certificate = verified(tmp_path / "looped", tmp_path / "c", "--source", str(source))
    assert reference_of(certificate).outcome is Outcome.EXACT
    finding = reference_of(verified(tmp_path / "looped", tmp_path / "c"))
    assert finding.outcome is Outcome.NOT_APPLICABLE
    assert "--source" in finding.found


def exchange_queries_and_keys(model: LoopedTransformer) -> None:
    n = model.cfg.n_heads * model.cfg.d_head
    with torch.no_grad():
        qkv = model.core[0].attn.qkv  # type: ignore[attr-defined]
        qkv[: 2 * n] = torch.cat((qkv[n : 2 * n], qkv[:n]))


def another_eps(model: LoopedTransformer) -> None:
    model.core[1].ln2.eps *= 1.001  # type: ignore[attr-defined]


def another_theta(model: LoopedTransformer) -> None:
    model.cfg.rotary_base *= 1.0001


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (exchange_queries_and_keys, "first blocks.2.hook_resid_post"),
        (another_eps, "epsilon of core.1.ln2"),
        (another_theta, "rotary frequencies"),
    ],
)
def test_a_fault_of_a_loop_is_seen(fault: Any, said: str, tmp_path: Path) -> None:
    source = source_folder("llama", tmp_path / "source")
    model = retrofit(source, **STAGES, device="cpu")
    assert compared(model, source).outcome is Outcome.EXACT
    fault(model)
    finding = compared(model, source)
    assert finding.outcome is Outcome.WRONG
    assert said in finding.found


def test_a_greedy_token_that_differs_is_told(tmp_path: Path) -> None:
    source = source_folder("llama", tmp_path / "source")
    model = retrofit(source, **STAGES, device="cpu")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    finding = compared(model, source)
    assert finding.outcome is Outcome.WRONG
    assert "greedy token" in finding.found
    assert "activations" not in finding.found


def test_models_that_do_not_compute_what_the_source_does_are_refused(tmp_path: Path) -> None:
    source = source_folder("llama", tmp_path / "source")
    model = retrofit(source, **STAGES, device="cpu")
    model.save_pretrained(tmp_path / "looped")
    config = tmp_path / "looped" / "config.json"
    raw = json.loads(config.read_text())
    asked = ReferenceOptions(source=str(source))
    check_reference(open_checkpoint(tmp_path / "looped"), asked)
    config.write_text(json.dumps(raw | {"trained_recurrences": 4}))
    with pytest.raises(InputError, match="trained since"):
        check_reference(open_checkpoint(tmp_path / "looped"), asked)
    with pytest.raises(InputError, match="source_layers"):
        check_reference(open_checkpoint(GOLDEN / "huginn"), asked)
    small = tmp_path / "small"
    with without_bars():
        feedforward("llama", num_hidden_layers=4).save_pretrained(small)
    with pytest.raises(InputError, match="layer 6"):
        compared(model, small)
    with pytest.raises(ConfigError):
        compared(model, GOLDEN / "huginn")
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        compared(model, source)
