"""`make check` finds a misspelt name: an attribute of every class, of a model, and a variable."""

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
IN_CLASS = """
{0}def planted(self) -> None:
{0}    x = self.does_not_exist
{0}    self.does_not_exist(3).foo
"""
OF_MODEL = '''"""Attributes that a looped model and its parts do not have."""

from tl_looped import LoopedTransformer


def planted(model: LoopedTransformer) -> None:
    """Nothing of this exists."""
    model.does_not_exist
    model.blocks[0].does_not_exist
    model.blocks[0].attn.does_not_exist
    model.embed.does_not_exist
    model.ln_final.hook_scale.does_not_exist
    for block in model.blocks:
        block.mlp.does_not_exist(3).foo
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package with the settings of its checks."""
    shutil.copytree(REPOSITORY / "tl_looped", tmp_path / "tl_looped")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def checked(tree: Path, *command: str) -> str:
    """What a checker prints."""
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=tree, capture_output=True, text=True, check=False
    )
    assert not run.stderr
    return run.stdout


def plant(file: Path) -> list[str]:
    """Add a method that misspells an attribute to each class of a file; the classes' names."""
    source = file.read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    lines = source.splitlines()
    for node in reversed(classes):
        lines.insert(node.end_lineno or 0, IN_CLASS.format(" " * node.body[0].col_offset))
    file.write_text("\n".join(lines), encoding="utf-8")
    return [node.name for node in classes]


def test_a_misspelt_attribute_is_an_error_in_every_class_and_of_a_model(tree: Path) -> None:
    if (REPOSITORY / ".mypy_cache").exists():  # spares reading PyTorch and TransformerLens again
        shutil.copytree(REPOSITORY / ".mypy_cache", tree / ".mypy_cache")
    planted = Counter[str]()
    for file in (tree / "tl_looped").rglob("*.py"):
        planted.update(plant(file))

    expected = Counter({name: 2 * n for name, n in planted.items()})
    (tree / "tl_looped" / "cli" / "planted.py").write_text(OF_MODEL, encoding="utf-8")
    expected.update(("LoopedTransformer", "Block", "Attention", "Embed", "LoopedHookPoint", "MLP"))
    found = checked(tree, "mypy", "--cache-dir=.mypy_cache")
    assert Counter(re.findall(r'"(\w+)" has no attribute "does_not_exist"', found)) == expected


def test_an_undefined_name_is_an_error(tree: Path) -> None:
    with (tree / "tl_looped" / "words.py").open("a", encoding="utf-8") as file:
        file.write("\n\nplanted = does_not_exist\n")
    found = checked(tree, "ruff", "check", "--no-cache", "--output-format", "concise", "tl_looped")
    assert re.findall(r"(\w+\.py):\d+:\d+: (\w+) .*`(\w+)`", found) == [
        ("words.py", "F821", "does_not_exist")
    ]
