"""The data of Section 5.1 on disk, and those that the package ships.

``tl_looped/data/section51`` holds everything that the notebook and the page are made of but the
weights: all curves and losses, all metrics, the statistics, and ``manifest.json``, which says how
they were made. :func:`write_data` writes such a folder, :func:`shipped_models` reads it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tl_looped.metrics.bootstrap import Resampling
from tl_looped.paper.data import SHIPPED, read_tables, write_tables
from tl_looped.paper.section51.statistics import N_PERMUTATIONS, Statistics, statistics_of
from tl_looped.paper.section51.tables import SmallModels

_MEASURED = ("curves.csv", "evaluation.csv", "stages.csv", "steps.parquet", "prompts.csv")
_STATISTICS = tuple(f"statistics/{field.name}.csv" for field in fields(Statistics))
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
            ``prompts.csv``, ``statistics/NAME.csv`` and ``manifest.json``.
        resampling: Number of resamples, confidence and seed of the intervals.

    Raises:
        DataError: if a file cannot be written.
    """
    resampling = resampling or Resampling()
    statistics = statistics_of(models, resampling)
    tables = {name: getattr(models, name.partition(".")[0]) for name in _MEASURED}
    tables |= dict(zip(_STATISTICS, statistics.tables().values(), strict=True))
    draws = asdict(resampling) | {"n_permutations": N_PERMUTATIONS}
    # Signature metrics keep all digits: the statistics are computed from them.
    write_tables(folder, tables, models.about | {"resampling": draws}, exact=("stages.csv",))
    return Section51(models, statistics)


def read_data(folder: Path) -> Section51:
    """Read what :func:`write_data` wrote.

    Raises:
        DataError: if a file is missing or damaged, or of another format.
    """
    files = dict.fromkeys(_MEASURED, ()) | dict.fromkeys(_STATISTICS, _TEXTS)
    tables, about = read_tables(folder, files, "5.1")
    statistics = {field.name: tables.pop(field.name) for field in fields(Statistics)}
    return Section51(SmallModels(**tables, about=about), Statistics(**statistics))


def shipped_models() -> Section51:
    """The data that the package ships."""
    return read_data(SHIPPED[51])
