"""Figures on disk: image, record, and numbers as CSV or, where they are many, as parquet."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure

from tl_looped.errors import DataError
from tl_looped.experiments.drawing import MOST_CSV_ROWS, save_figures
from tl_looped.paper.drawing import draw_figures

pytestmark = pytest.mark.once


def drawn(rows: int, name: str = "fig63") -> SimpleNamespace:
    figure = Figure(figsize=(1, 1))
    numbers = pd.DataFrame({"at": np.arange(rows), "weight": np.arange(rows) / 3.0})
    return SimpleNamespace(
        number=63, name=name, title="Maps, toy", caption="c", figure=figure, numbers=numbers,
        settings={"band": "none"},
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "kind"), [(MOST_CSV_ROWS, "csv"), (MOST_CSV_ROWS + 1, "parquet")])
def test_many_numbers_are_parquet_and_the_record_names_the_file(
    rows: int, kind: str, tmp_path: Path
) -> None:
    one = drawn(rows)
    save_figures([one], tmp_path, "tl-looped draw")
    record = json.loads((tmp_path / "fig63.json").read_text())
    assert (record["numbers"], record["rows"]) == (f"fig63.{kind}", rows)
    assert (record["number"], record["title"], record["command"]) == (
        63, "Maps, toy", "tl-looped draw",
    )  # fmt: skip
    path = tmp_path / record["numbers"]
    if kind == "parquet":
        pd.testing.assert_frame_equal(pd.read_parquet(path), one.numbers)
    else:
        np.testing.assert_allclose(pd.read_csv(path)["weight"], one.numbers["weight"], rtol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *sorted([f"fig63.{kind}", "fig63.json", "fig63.png", "fig63.svg"])
    ]


def test_numbers_of_an_earlier_call_do_not_stay_beside_the_new_ones(tmp_path: Path) -> None:
    for rows, kind in ((MOST_CSV_ROWS + 1, "parquet"), (3, "csv"), (MOST_CSV_ROWS + 1, "parquet")):
        save_figures([drawn(rows)], tmp_path, "")
        tables = [p.name for p in tmp_path.iterdir() if p.suffix in (".csv", ".parquet")]
        assert tables == [f"fig63.{kind}"]


def test_a_name_with_a_dot_keeps_it(tmp_path: Path) -> None:
    save_figures([drawn(3, "fig08_r3.2"), drawn(3, "fig08_r3.3")], tmp_path, "")
    assert {p.name for p in tmp_path.glob("*.csv")} == {"fig08_r3.2.csv", "fig08_r3.3.csv"}


def test_numbers_that_cannot_be_written_leave_no_record_and_nothing_half_done(
    tmp_path: Path,
) -> None:
    (tmp_path / "fig63.parquet").mkdir()
    with pytest.raises(DataError, match=r"fig63\.parquet.*cannot be written"):
        save_figures([drawn(MOST_CSV_ROWS + 1)], tmp_path, "")
    assert not (tmp_path / "fig63.json").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_figures_that_do_not_apply_are_said_and_the_others_drawn(tmp_path: Path) -> None:
    attributes = {"model": "toy", "n_prelude": 0, "n_core": 1, "n_coda": 0, "n_recurrences": 2}
    values = (("effective_layer", "head", "prompt"), np.full((2, 1, 1), 0.25))
    data = xr.Dataset({"colsum_concentration": values}, attrs=attributes)
    said: list[str] = []
    images = draw_figures(data, (3, 11), tmp_path, "", said.append)
    assert [image.name for image in images] == ["fig11.svg", "fig11.png"]
    assert len(said) == 1
    assert said[0].startswith("figure 3: Fig. 3 needs successive_abs")
    np.testing.assert_array_equal(pd.read_csv(tmp_path / "fig11.csv")["mean"], [0.25, 0.25])
