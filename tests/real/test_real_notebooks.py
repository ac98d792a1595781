"""Notebooks with a second half on the pretrained model run as a whole, and print what they keep."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from notebookcells import NOTEBOOKS, cells_of, is_real, printed, run, started

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def assert_same_words_and_numbers(found: str, kept: str) -> None:
    """Numbers may differ by one in their last digit, as another processor rounds them."""
    assert NUMBER.sub("#", found).split() == NUMBER.sub("#", kept).split()
    pairs = zip(NUMBER.findall(found), NUMBER.findall(kept), strict=True)
    for ours, theirs in pairs:
        unit = 10.0 ** -len(theirs.partition(".")[2])
        assert math.isclose(float(ours), float(theirs), rel_tol=0.0, abs_tol=1.001 * unit), (
            f"{ours} in place of {theirs} in:\n{found}"
        )


def says_what_the_text_says_of_patching(names: dict[str, Any]) -> None:
    """The six heads, out of all 270, and that their circuit works once in a loop."""
    assert names["effects"].shape == (30, 9)
    assert set(names["six"]) == {(17, 4), (20, 0), (23, 3), (24, 4), (29, 0), (29, 1)}
    assert (names["table"].drop(index=["L24H4", "L29H0"]) > 0).all(axis=None)
    assert (names["table"].loc[["L24H4", "L29H0"]] < 0).all(axis=None)
    for grid in names["grids"].values():
        assert abs(grid[0, 0]) > 2 * max(abs(grid[1, 1]), abs(grid[2, 2]))


CLAIMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "patching": says_what_the_text_says_of_patching,
}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_notebook_runs_as_a_whole(
    name: str, real_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TL_LOOPED_REAL_MODEL", str(real_folder.resolve()))
    [path] = [path for path in NOTEBOOKS if path.stem == name]
    with started(path, monkeypatch) as names:
        for cell in cells_of(path):
            if cell["cell_type"] == "code":
                output = run(cell, path, names)
                if is_real(cell):
                    assert_same_words_and_numbers(output, printed(cell))
        CLAIMS[name](names)
