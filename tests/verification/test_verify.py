"""``tl-looped verify`` end to end: right checkpoints pass, and each fault turns its own check."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import GOLDEN
from typer.testing import CliRunner

from tl_looped.cli import app
from tl_looped.verification import Certificate, Outcome

EXACT = [
    "names",
    "finite",
    "cached = uncached",
    "padded = alone",
    "decomposition",
    "recurrences",
    "saved = loaded",
]


def verified(name: str | Path, out: Path, *options: str, code: int = 0) -> Certificate:
    """What the command wrote of a checkpoint, with the exit code that it must have."""
    command = ["verify", str(name), "--device", "cpu", "--out", str(out), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == code, result.output
    return Certificate.from_json(out.with_suffix(".json").read_text(encoding="utf-8"))


def outcomes(certificate: Certificate, of: list[str] = EXACT) -> dict[str, Outcome]:
    return {f.check: f.outcome for f in certificate.findings if f.check in of}


@pytest.mark.parametrize(
    "case", ["huginn", "retrofit_llama", "retrofit_tinyllama", "retrofit_olmo", "ouro"]
)
def test_the_authors_checkpoints_are_exact(case: str, tmp_path: Path) -> None:
    certificate = verified(GOLDEN / case, tmp_path / "c")
    assert outcomes(certificate) == dict.fromkeys(EXACT, Outcome.EXACT)
    assert certificate.model == case
    assert certificate.inventory["special_tokens"] == []
    assert "texts" not in certificate.inventory


def test_the_bundled_model_is_exact_and_shows_its_tokens(tmp_path: Path) -> None:
    certificate = verified("demo", tmp_path / "c")
    assert outcomes(certificate) == dict.fromkeys(EXACT, Outcome.EXACT)
    first = certificate.inventory["texts"][0]
    assert "".join(first["tokens"]) == "<|bos|>" + first["text"]
