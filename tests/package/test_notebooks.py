"""Every notebook's code runs from top to bottom."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot  # closed below, whether a notebook imports it or not
import pytest
import torch

pytestmark = [pytest.mark.once, pytest.mark.full]

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# plt.show() has no window to show in a test, and says so.
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("agg")
    monkeypatch.chdir(path.parent)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, object] = {}
    grad = torch.is_grad_enabled()
    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                assert cell["outputs"], "outputs are kept with the notebook"
                exec(compile("".join(cell["source"]), path.name, "exec"), namespace)
    finally:
        torch.set_grad_enabled(grad)
        matplotlib.pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab_and_holds_no_error(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = re.search(r'^Repository = "(.+)"$', PYPROJECT.read_text(), re.MULTILINE)
    assert found is not None
    repository = found[1]
    owner = repository.removeprefix("https://github.com/")
    address = f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{path.name}"
    assert f"]({address})" in "".join(cells[0]["source"])
    first_code = next(cell for cell in cells if cell["cell_type"] == "code")
    assert f"git+{repository}" in "".join(first_code["source"])
    kinds = {output["output_type"] for cell in cells for output in cell.get("outputs", [])}
    assert "error" not in kinds
