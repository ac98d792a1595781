"""Every notebook's code runs from top to bottom, without what needs the pretrained model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from notebookcells import NOTEBOOKS, cells_of, is_real, run, started

pytestmark = [pytest.mark.once, pytest.mark.full]

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# plt.show() has no window to show in a test, and says so.
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(path, monkeypatch) as names:
        for cell in cells_of(path):
            if cell["cell_type"] == "code" and not is_real(cell):
                assert cell["outputs"], "outputs are kept with the notebook"
                run(cell, path, names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab_and_holds_no_error(path: Path) -> None:
    cells = cells_of(path)
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_name_no_folder_of_whoever_ran_it(path: Path) -> None:
    kept = json.dumps([cell.get("outputs", []) for cell in cells_of(path)])
    assert not re.findall(r"(?<![\w/:.<])/(?:home|root|tmp|Users|mnt|var|opt)/\S*", kept)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_needs_the_pretrained_model_is_the_second_half(path: Path) -> None:
    real = [is_real(cell) for cell in cells_of(path)]
    assert not real[0]
    assert real == sorted(real)
    assert any(real) == (path.stem in ("patching", "stages"))
