"""``make test-gpu``: what a device must compute as the CPU does, and what it costs there.

Usage: ``python tests/gpu/run.py [--device cuda] [--json FILE] [--size small|full]``. No pytest: one
process, at most ten minutes, a line for each check, all of them as JSON. Where there is no such
device, it says so and stops. A check that fails or breaks off does not stop the others.

Exit codes: 0 if every exactness check holds or there is no device, 1 if one does not hold or any
check broke off, 2 for a wrong option. What is measured (times, memory) is compared with its bound
and never decides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402

SECONDS = 600
"""The most that the script takes; checks whose turn comes too late are left out, and it says so."""
_RESERVE = 60
"""What a check that has begun may still take of it."""


@dataclass(frozen=True)
class Line:
    """What one check found.

    Args:
        name: What was compared or measured.
        measured: The number; NaN for a check that broke off.
        bound: What it is compared with.
        ok: Whether it is met.
        exact: Whether it decides the exit code.
        at_least: The bound is a lower one.
        detail: Where the number comes from.
    """

    name: str
    measured: float
    bound: float
    ok: bool
    exact: bool
    at_least: bool = False
    detail: str = ""

    def __str__(self) -> str:
        answer = "ok  " if self.ok else "FAIL" if self.exact else "more"
        sign = ">=" if self.at_least else "<="
        return (
            f"{answer} {self.name:<58} {self.measured:>10.4g} {sign} {self.bound:<9.4g} "
            f"{self.detail}"
        ).rstrip()


@dataclass
class Report:
    """All lines, printed as they come.

    Args:
        device: What the checks run on.
        size: ``"small"`` or ``"full"``.
        golden: Folder of the reference checkpoints.
    """

    device: torch.device
    size: str
    golden: Path
    lines: list[Line] = field(default_factory=list)

    def exact(self, name: str, measured: float, bound: float, detail: str = "") -> None:
        """A number that decides: it must be at most ``bound``, and not NaN."""
        self._add(Line(name, measured, bound, measured <= bound, True, detail=detail))

    def cost(
        self, name: str, measured: float, bound: float, detail: str = "", at_least: bool = False
    ) -> None:
        """A number that depends on the machine."""
        ok = measured >= bound if at_least else measured <= bound
        self._add(Line(name, measured, bound, ok, False, at_least, detail))

    def broke_off(self, name: str, error: BaseException) -> None:
        """A check that raised; what it had found before stays."""
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        self._add(Line(f"{name}: broke off", math.nan, 0.0, False, True, detail=detail))

    def _add(self, line: Line) -> None:
        self.lines.append(line)
        print(line, flush=True)


def about(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    packages = ("tl-looped", "torch", "transformers", "transformer-lens")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": str(device),
        "name": name or platform.machine(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {package: version(package) for package in packages},
    }


def missing(device: torch.device) -> str | None:
    """Why a device cannot be used; None if it can."""
    if device.type == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n == 0:
            return "there is no CUDA device"
        if (device.index or 0) >= n:
            return f"there is no {device}, the last CUDA device is cuda:{n - 1}"
        return None
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # whatever a backend raises that is not there
        return f"torch cannot use {device} ({type(error).__name__}: {error})".splitlines()[0]
    return None


def run_checks(report: Report, only: list[str], seconds: float) -> None:
    """All checks in turn, or those that are asked for, as long as there is time."""
    from checks import CHECKS

    start = time.perf_counter()
    for name, check in CHECKS.items():
        if only and name not in only:
            continue
        passed = time.perf_counter() - start
        if passed > seconds - _RESERVE:
            print(f"left out: {name}, since {passed:.0f} of {seconds:.0f} seconds have passed")
            continue
        print(f"-- {name}", flush=True)
        try:
            check(report)
        except Exception as error:
            report.broke_off(name, error)
            traceback.print_exc()
        finally:
            if report.device.type == "cuda":
                torch.cuda.empty_cache()


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="as torch names it: cuda, cuda:1, cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all lines there")
    parser.add_argument("--size", choices=("small", "full"), help="full on CUDA, else small")
    parser.add_argument("--only", nargs="+", default=[], metavar="CHECK")
    parser.add_argument("--golden", type=Path, default=HERE.parent / "golden", metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the most it takes")
    given = parser.parse_args()
    try:
        given.device = torch.device(given.device)
    except RuntimeError:
        parser.error(f"{given.device!r} is no device that torch knows")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        parser.error(f"--json: {given.json.absolute().parent} is no folder")
    if given.size is None:
        given.size = "full" if given.device.type == "cuda" else "small"
    return given


def main() -> int:
    """The exit code."""
    given = options()
    reason = missing(given.device)
    if reason is not None:
        print(f"{reason}: nothing was checked; make test-gpu DEVICE=cpu runs it on the CPU")
        return 0
    from checks import CHECKS

    unknown = sorted(set(given.only) - set(CHECKS))
    if unknown:
        print(f"there are no checks {unknown}; there are {list(CHECKS)}", file=sys.stderr)
        return 2
    # TensorFloat-32 has 10 bits where fp32 has 23: parity with the CPU is meant without it.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    machine = about(given.device)
    print(json.dumps(machine))
    report, start = Report(given.device, given.size, given.golden), time.perf_counter()
    run_checks(report, given.only, given.seconds)
    failed = [line for line in report.lines if line.exact and not line.ok]
    seconds = time.perf_counter() - start
    print(f"{len(report.lines)} lines, {len(failed)} failed, {seconds:.0f} s")
    if given.json is not None:
        # JSON has no NaN.
        lines = [
            asdict(line) | {"measured": line.measured if math.isfinite(line.measured) else None}
            for line in report.lines
        ]
        found = machine | {"size": given.size, "seconds": seconds, "lines": lines}
        aside = given.json.with_name(f".{given.json.name}.new")
        aside.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, given.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
