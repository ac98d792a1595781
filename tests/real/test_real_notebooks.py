"""Notebooks with a second half on the pretrained model run as a whole, and print what they keep."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from notebookcells import NOTEBOOKS, cells_of, is_real, printed, run, started

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def assert_same_words_and_numbers(found: str, kept: str) -> None:
    """Numbers may differ by one in their last digit, as another processor rounds them.

    White space may as well: a column is as wide as its numbers are long.
    """
    words, expected = ("".join(NUMBER.sub("#", text).split()) for text in (found, kept))
    assert words == expected
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


def says_what_the_text_says_of_stages(names: dict[str, Any]) -> None:
    """The massive activation and what comes with it; attention that repeats behind it alone."""
    curve, depth, erased = (names[name] for name in ("curve", "depth", "erased"))
    sinks, bits = curve(depth, "sink_rate"), curve(depth, "entropy_bits")
    assert (sinks[[10, 11]] == 0).all()
    assert (sinks[12:] > 0.5).all()
    assert (curve(erased, "sink_rate")[17:] < 0.2).all()
    assert bits[11:28].max() < 0.25 * curve(erased, "entropy_bits")[11:28].min()
    assert max(names["left_out"][layer] for layer in (0, 1, 11)) < min(names["left_out"][12:24])
    assert max(names["lens"][:20]) < 0.25
    near, _, all_of_them = names["cores"]
    like_first = [
        np.corrcoef(names["profile"](names["loops"][core][0], "sink_score"))[0, 1:]
        for core in (near, all_of_them)
    ]
    assert like_first[0].min() > like_first[1].max()


CLAIMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "patching": says_what_the_text_says_of_patching,
    "stages": says_what_the_text_says_of_stages,
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
