"""The README's code runs as printed, in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.once

README = Path(__file__).parents[2] / "README.md"


def test_the_code_runs_and_prints_what_it_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    printed = []
    for code in blocks:
        assert len(code.splitlines()) <= 25
        exec(compile(code, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    quickstart = printed[0].splitlines()
    assert quickstart[0] == "(2, 4 x 4, 2) 20"
    assert quickstart[1].startswith("torch.Size([1, ")
    assert quickstart[2].startswith("torch.Size([8, 4, 1, 4, ")
    assert "Tom has 3 boxes" in quickstart[-1]
    assert "r2.l1h2" in names["labels"]
    assert len(names["by_loop"]) == 1 + 1 + 1 + 4 + 1
    assert names["grid"]["effect"].shape == (4, 4, 4, 4)
    assert names["estimate"].attrs["method"].startswith("attribution")
    assert (tmp_path / "views" / "head.html").stat().st_size > 100_000
    assert "Tom has" in printed[4]
    assert printed[5].strip() in names["metrics"].Verdict.__members__
    assert "CONVERGED" in printed[6] or "ORBIT" in printed[6] or "DRIFT" in printed[6]
    assert names["depth"].sizes["effective_layer"] == 2 + 4 * 32 + 2
    assert names["found"].recurrence.shape == names["found"].output.shape[:2]
    assert "(4, 6 x 4, 4) [6, 7, 8, 9, 10, 11]" in printed[-2]
    assert len(names["bridge"].blocks) == 2 + 4 * 8 + 2
