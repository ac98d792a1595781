"""`make check` finds a misspelt attribute in every class of the package."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.full, pytest.mark.once]

REPOSITORY = Path(__file__).parents[2]
PLANTED = """
{0}def planted(self) -> None:
{0}    x = self.does_not_exist
{0}    self.does_not_exist(3).foo
"""


def plant(file: Path) -> list[str]:
    """Add a method that misspells an attribute to each class of a file; the classes' names."""
    source = file.read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    lines = source.splitlines()
    for node in reversed(classes):
        lines.insert(node.end_lineno or 0, PLANTED.format(" " * node.body[0].col_offset))
    file.write_text("\n".join(lines), encoding="utf-8")
    return [node.name for node in classes]


def test_a_misspelt_attribute_is_an_error_in_every_class(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "tl_looped", tmp_path / "tl_looped")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    if (REPOSITORY / ".mypy_cache").exists():  # spares reading PyTorch and TransformerLens again
        shutil.copytree(REPOSITORY / ".mypy_cache", tmp_path / ".mypy_cache")
    planted = Counter[str]()
    for file in (tmp_path / "tl_looped").rglob("*.py"):
        planted.update(plant(file))
    del planted["_GeometryView"]  # passes on every name that a model has
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir=.mypy_cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert not run.stderr
    named = Counter(re.findall(r'"(\w+)" has no attribute "does_not_exist"', run.stdout))
    assert named == Counter({name: 2 * n for name, n in planted.items()})
