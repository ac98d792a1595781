"""The data of Section 5.1 on disk, and those that the package ships.

``tl_looped/data/section51`` holds everything that the notebook and the page are made of but the
weights: all curves and losses, all metrics, the statistics, and ``manifest.json``, which says how
they were made. :func:`write_data` writes such a folder, :func:`shipped` reads it.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tl_looped.errors import DataError
from tl_looped.experiments.tables import read_table
from tl_looped.files import make_folder, write_bytes, write_text
from tl_looped.metrics.bootstrap import Resampling
from tl_looped.paper.section51.statistics import (
    N_PERMUTATIONS,
    Statistics,
    statistics_of,
)
from tl_looped.paper.section51.tables import SmallModels

SHIPPED = Path(__file__).parents[2] / "data" / "section51"
MANIFEST = "manifest.json"
FORMAT = 1

_MEASURED = {
    "curves": "csv",
    "evaluation": "csv",
    "stages": "csv",
    "steps": "parquet",
    "prompts": "csv",
}
# Texts in these columns look like numbers: "0 1 2", or "0" of a single seed.
_TEXTS = ("seeds", "n_prompts", "differences", "p_seeds", "stages", "feedforward_stages")


@dataclass(frozen=True)
class Section51:
    """What was measured, and the statistics of it.

    Args:
        models: Tables of all models.
        statistics: Tables over seeds.
    """

    models: SmallModels
    statistics: Statistics


def write_data(
    models: SmallModels, folder: Path, resampling: Resampling | None = None
) -> Section51:
    """Compute the statistics and write everything; what stood there is replaced.

    Args:
        models: Tables of all models.
        folder: Gets ``curves.csv``, ``evaluation.csv``, ``stages.csv``, ``steps.parquet``,
            ``prompts.csv``, ``statistics/NAME.csv`` and ``manifest.json``, which is written last.
        resampling: Of the intervals.

    Raises:
        DataError: if a file cannot be written.
    """
    resampling = resampling or Resampling()
    statistics = statistics_of(models, resampling)
    make_folder(folder / "statistics")
    for name, kind in _MEASURED.items():
        table = getattr(models, name)
        if kind == "parquet":
            content = io.BytesIO()
            table.to_parquet(content, index=False, compression="zstd")
            write_bytes(content.getvalue(), folder / f"{name}.parquet")
        else:
            # Signature metrics keep all digits: the statistics are computed from them.
            digits = "%.17g" if name == "stages" else "%.8g"
            write_text(table.to_csv(index=False, float_format=digits), folder / f"{name}.csv")
    for name, table in statistics.tables().items():
        text = table.to_csv(index=False, float_format="%.8g")
        write_text(text, folder / "statistics" / f"{name}.csv")
    about = models.about | {
        "format": FORMAT,
        "resampling": {
            "n_resamples": resampling.n_resamples,
            "confidence": resampling.confidence,
            "seed": resampling.seed,
            "n_permutations": N_PERMUTATIONS,
        },
    }
    write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", folder / MANIFEST)
    return Section51(models, statistics)


def read_data(folder: Path) -> Section51:
    """Read what :func:`write_data` wrote.

    Raises:
        DataError: if a file is missing or damaged, or of another format.
    """
    try:
        about: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise DataError(f"{folder} is of format {about['format']}, this version reads {FORMAT}")
        measured = {
            name: (
                pd.read_parquet(folder / f"{name}.parquet")
                if kind == "parquet"
                else read_table(folder / f"{name}.csv")
            )
            for name, kind in _MEASURED.items()
        }
        names = Statistics.__dataclass_fields__
        statistics = {
            name: read_table(folder / "statistics" / f"{name}.csv", _TEXTS) for name in names
        }
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} does not hold the data of Section 5.1, or is damaged "
            f"({type(error).__name__}: {error}): write it again with tl-looped reproduce "
            "--section 5.1"
        ) from error
    return Section51(SmallModels(**measured, about=about), Statistics(**statistics))


def shipped() -> Section51:
    """The data that the package ships."""
    return read_data(SHIPPED)
