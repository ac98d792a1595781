"""The README's quickstart runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_quickstart_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 25
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "(2, 4 x 4, 2) 20"
    assert printed[1].startswith("torch.Size([1, ")
    assert printed[2].startswith("torch.Size([8, 4, 1, 4, ")
    assert "Tom has 3 boxes" in printed[-1]
