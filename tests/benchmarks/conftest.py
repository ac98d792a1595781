"""Measuring two things in turn, and the table of all ratios with the machine they hold for."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformer_lens  # noqa: F401 - its import is part of no measurement

HEADER = """# Benchmarks

Written by `make bench`, `make bench-metrics`, `make bench-real` and `make bench-slow`, each its own
sections. Both sides of a ratio are measured in turn, in one process (loading: in one each), and the
ratio is the median over pairs of neighbouring rounds. Times are medians. One thread of PyTorch.
"""


@dataclass
class Row:
    """One line of the table."""

    what: str
    unit: str
    value: float
    bound: float
    at_least: bool
    detail: str

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def markdown(self) -> str:
        sign = "≥" if self.at_least else "≤"
        answer = "yes" if self.met else "**no**"
        value, bound = f"{self.value:.3g}{self.unit}", f"{sign} {self.bound:g}{self.unit}"
        return f"| {self.what} | {value} | {bound} | {answer} | {self.detail} |"


@dataclass
class Recorder:
    """What the benchmarks found; a bound that is not met fails the benchmark that set it."""

    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        what: str,
        value: float,
        bound: float,
        detail: str = "",
        unit: str = "",
        at_least: bool = False,
    ) -> None:
        row = Row(what, unit, value, bound, at_least, detail)
        self.rows.append(row)
        assert row.met, f"{what}: {row.markdown()}"

    def add_all(self, *rows: tuple[str, float, float, str]) -> None:
        """Several lines of one measurement: all are recorded before one that is not met fails."""
        failed: list[AssertionError] = []
        for what, value, bound, detail in rows:
            try:
                self.add(what, value, bound, detail)
            except AssertionError as error:
                failed.append(error)
        assert not failed, failed

    def ratio(
        self,
        benchmark: Any,
        what: str,
        bound: float,
        subject: Callable[[], Any],
        baseline: Callable[[], Any],
        rounds: int,
        at_least: bool = False,
        inverse: bool = False,
    ) -> None:
        """Time ``subject`` against ``baseline``, in turn, and record the median ratio.

        Args:
            benchmark: pytest-benchmark's fixture, which times ``subject``.
            what: Name of the line.
            bound: The most that subject / baseline may be (the least, if ``at_least``).
            subject, baseline: What to call.
            rounds: Pairs of calls.
            at_least: The bound is a lower one.
            inverse: Record baseline / subject, a speed-up.
        """
        times: list[float] = []

        def run_baseline() -> None:
            start = time.perf_counter()
            baseline()
            times.append(time.perf_counter() - start)

        benchmark.pedantic(subject, setup=run_baseline, rounds=rounds, warmup_rounds=1)
        own = list(benchmark.stats.stats.data)
        pairs = list(zip(own, times[-rounds:], strict=True))
        ratios = [base / mine if inverse else mine / base for mine, base in pairs]
        shown = " / ".join(f"{1000 * statistics.median(t):.4g}" for t in zip(*pairs, strict=True))
        value = statistics.median(ratios)
        benchmark.extra_info["ratio"] = value
        self.add(what, value, bound, f"{shown} ms, {rounds} rounds", at_least=at_least)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", metavar="FILE", help="write the results into this file")
    parser.addoption("--section", default="Quick", help="the section of the file to replace")


_RECORDER = pytest.StashKey[Recorder]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDER] = Recorder()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Recorder:
    return request.config.stash[_RECORDER]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_RECORDER].rows
    if not rows:
        return
    table = "\n".join(
        ["| what | measured | bound | met | details |", "|---|---|---|---|---|"]
        + [row.markdown() for row in rows]
    )
    terminalreporter.write_line("")
    terminalreporter.write_line(table)
    if config.getoption("--table"):
        _write(Path(config.getoption("--table")), config.getoption("--section"), table)


def _write(path: Path, section: str, table: str) -> None:
    """Replace one section of the file; aside first, then renamed into place."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    found[section] = f"\n{_machine()}\n\n{table}\n"
    parts = [f"## {name}\n{found[name].rstrip()}\n" for name in sorted(found)]
    aside = path.with_name(f".{path.name}.new")
    aside.write_text("\n".join([HEADER, *parts]), encoding="utf-8")
    os.replace(aside, path)


def _machine() -> str:
    versions = ", ".join(
        f"{name} {_version(name)}" for name in ("tl-looped", "torch", "transformer-lens")
    )
    memory = psutil.virtual_memory().total / 2**30
    load = os.getloadavg()[0]
    return (
        f"{date.today().isoformat()}. {_cpu()}, {os.cpu_count()} logical cores, {memory:.0f} GiB "
        f"of memory, {platform.system()} {platform.release()}. Python {platform.python_version()}, "
        f"{versions}. Load of the last minute, this run included: {load:.1f}."
    )


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def _cpu() -> str:
    """The processor's name; Linux tells it only in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
