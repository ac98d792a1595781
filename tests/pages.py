"""The code of the site's pages, and what they say that it prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

DOCS = Path(__file__).parents[1] / "docs"


class Block(NamedTuple):
    """Code of a page. One with a title is of another package or machine, and is only compiled."""

    title: str
    code: str
    text: str | None


def blocks(page: str) -> list[Block]:
    pattern = r'```python(?: title="(.*?)")?\n(.*?)```\n(?:\s*```text\n(.*?)\n```)?'
    found = re.findall(pattern, (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return [Block(title, code, text or None) for title, code, text in found]


def run_page(page: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run a page's code from top to bottom; what it prints is what the page says."""
    names: dict[str, Any] = {}
    for title, code, text in blocks(page):
        program = compile(code, page, "exec")
        if title:
            continue
        exec(program, names)
        assert_alike(capsys.readouterr().out.strip("\n"), text or "")
    return names


def assert_alike(found: str, shown: str) -> None:
    """Equal but for the last digits of numbers, which differ between machines."""
    number = r"-?\d+\.\d+"
    assert re.sub(number, "#", found) == re.sub(number, "#", shown)
    for a, b in zip(re.findall(number, found), re.findall(number, shown), strict=True):
        assert float(a) == pytest.approx(float(b), abs=0.02), (found, shown)
