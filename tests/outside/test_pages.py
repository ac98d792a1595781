"""The pages about outside code run with that code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pages import DOCS, run_page

pytestmark = pytest.mark.once

PAGES = sorted(f"howto/outside/{page.name}" for page in DOCS.glob("howto/outside/*.md"))


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    grad = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(grad)


@pytest.mark.filterwarnings("default")  # of other people's libraries
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_it_says(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_page(page, capsys)
