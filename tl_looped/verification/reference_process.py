"""The process that runs the authors' code: what it gets, what it may know, what is taken back.

It is not a sandbox: the code runs as the user, with the user's files. What can be kept from it is:
it is given no network of the Hugging Face hub (``HF_HUB_OFFLINE``; the files are there already), no
token, no environment variables but those of :data:`PASSED`, and a cache folder of its own, which is
removed afterwards with everything else that it wrote there. Its answer is data: JSON and
safetensors, never a pickle, and every tensor that was asked for is checked before it is used.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_looped.errors import InputError

SCRIPT = Path(__file__).parent / "reference_child.py"
PASSED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that the process inherits: where programs lie, and how many threads."""
_TAIL = 2000
"""Characters of the end of stderr that a message quotes."""
_MOST = {".json": 2**26, ".safetensors": 2**34}
"""Bytes of an answer: that of the largest model here, with all its activations, is far below."""
_SECONDS_FOR_VERSIONS = 120.0


class NotCompared(Exception):
    """A comparison that was asked for did not come about, and why."""


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        results: Versions, epsilons, how many tensors were loaded.
        tensors: By name, on the CPU.
    """

    results: dict[str, Any]
    tensors: dict[str, Tensor]


def versions_in(python: Path, packages: tuple[str, ...]) -> dict[str, str | None]:
    """Versions of Python and of some packages of another environment; nothing of it is imported.

    Raises:
        InputError: the interpreter does not run.
    """
    with _private_folder() as folder:
        command = [str(python), "-I", str(SCRIPT), "--versions", *packages]
        try:
            _run(command, folder, _SECONDS_FOR_VERSIONS)
            last = (folder / "stdout").read_text(encoding="utf-8", errors="replace").split("\n")[-2]
            found: dict[str, str | None] = json.loads(last)
        except (OSError, NotCompared, ValueError, IndexError) as error:
            raise InputError(
                f"--reference-python {python} does not run: {error}. It must be the interpreter of "
                "an environment, such as reference/bin/python"
            ) from error
    return found


def ask(
    python: Path, request: Mapping[str, Any], inputs: Mapping[str, Tensor], timeout: float
) -> Answer:
    """Run the authors' code in another environment.

    Args:
        python: Interpreter of the environment.
        request: What is to be run; see the script.
        inputs: Tokens, states.
        timeout: Seconds after which the process and all that it started are killed.

    Raises:
        NotCompared: it failed, took too long, or its answer cannot be read.
    """
    with _private_folder() as folder:
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        save_file(
            {k: v.contiguous().clone() for k, v in inputs.items()}, folder / "inputs.safetensors"
        )
        try:
            _run([str(python), "-I", str(SCRIPT), str(folder)], folder, timeout)
        except OSError as error:
            raise NotCompared(f"its interpreter does not run: {error.strerror}") from error
        return _read_answer(folder)


def _read_answer(folder: Path) -> Answer:
    """Without a pickle, and with everything in memory before the folder goes."""
    try:
        for name in ("results.json", "outputs.safetensors"):
            _expect_file(folder / name)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        if not isinstance(results, dict):
            raise ValueError(f"results.json holds a {type(results).__name__}")
        with safe_open(folder / "outputs.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise NotCompared(
            f"it ended without an answer that can be read ({error})" + _said(folder)
        ) from error
    return Answer(results, tensors)


def _expect_file(path: Path) -> None:
    """Refuse a link to a file elsewhere, and a pipe, which would be waited for forever.

    Raises:
        ValueError: it is one, or too large to be what was asked for.
        OSError: it is not there.
    """
    found, most = path.lstat(), _MOST[path.suffix]
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name} is no ordinary file")
    if found.st_size > most:
        raise ValueError(f"{path.name} has {found.st_size:,} bytes, more than {most:,}")


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder that no other user can read, removed with all that was written into it."""
    with tempfile.TemporaryDirectory(prefix="tl-looped-reference-") as name:
        yield Path(name)


def _environment(folder: Path) -> dict[str, str]:
    """Of the process; everything that it might write by default goes to the folder."""
    own = {name: os.environ[name] for name in PASSED if name in os.environ}
    own |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME"), str(folder))
    own["HF_MODULES_CACHE"] = str(folder / "modules")
    return own | dict.fromkeys(
        ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1"
    )


def _run(command: list[str], folder: Path, timeout: float) -> None:
    """Run to the end, with all output in files.

    Raises:
        NotCompared: another exit status than 0, or no end in time.
    """
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=_environment(folder),
            cwd=folder,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise NotCompared(
                f"it did not end within {timeout:g} s (--reference-timeout)" + _said(folder)
            ) from None
        finally:  # at its end, when time is up, and at the user's Ctrl-C
            with suppress(ProcessLookupError):  # and whatever it has started and left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        raise NotCompared(f"it {ended}" + _said(folder))


def _said(folder: Path) -> str:
    """The end of what it wrote to stderr; nothing if it has put something else in its place."""
    path = folder / "stderr"
    with suppress(OSError):
        if not stat.S_ISREG(path.lstat().st_mode):
            return "; its stderr was replaced"
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            text = file.read().decode("utf-8", "replace").strip()
        if text:
            return f"; the end of its stderr:\n{text}"
    return "; it wrote nothing to stderr"
