"""``tl-looped verify``: whether a checkpoint was loaded right."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tl_looped.cli.console import bar, console, progress_bars, stoppable
from tl_looped.cli.runs import Dtype, Revision
from tl_looped.errors import DataError
from tl_looped.words import count

if TYPE_CHECKING:
    from tl_looped.verification import Certificate

_STYLES = {"exact": "green", "wrong": "bold red", "plausible": "green", "suspicious": "yellow"}
_CHECK, _PIECES = 16, 20  # columns for the names of checks, tokens of the text that is shown


def verify(
    model: Annotated[str, typer.Argument(help="demo, an alias, a hub id or a folder.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the certificate goes: FILE.json, which holds everything, and FILE.md, for "
            "an issue. A suffix .json or .md is cut off."
        ),
    ] = None,
    revision: Revision = None,
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the tokens that are drawn for a model without a tokenizer.")
    ] = 0,
    problems: Annotated[
        int,
        typer.Option(help="Number of word problems to answer, at several numbers of recurrences."),
    ] = 0,
    problem_set: Annotated[
        str, typer.Option(help="Of --problems: bundled, gsm8k, or gsm8k:FILE.jsonl.")
    ] = "bundled",
    reference_python: Annotated[
        Path | None,
        typer.Option(
            help="Python of another environment, which runs the authors' own code of the "
            "checkpoint to compare with; docs/verified.md has the line that makes it."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run the Python files of the checkpoint, as you. Read them."
        ),
    ] = False,
    reference_timeout: Annotated[
        float, typer.Option(help="Seconds after which the authors' code is given up.")
    ] = 3600.0,
    source: Annotated[
        str | None,
        typer.Option(
            help="Feedforward model, hub id or folder, that this one was made of, to compare with."
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Show tensors, hashes, options and tokens too, as --out does."),
    ] = False,
) -> None:
    """Was a checkpoint loaded right? Exactness checks decide the exit code, 0 or 1.

    A feedforward Llama, OLMo-2, Mistral or Qwen2/3 is examined as the loop of all its layers.
    """
    _check_out(out)
    from tl_looped import verification

    with _ended_by_kill(), stoppable("Nothing was written."), progress_bars() as bars:
        certificate = verification.verify(
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            seed=seed,
            reference=verification.ReferenceOptions(
                reference_python, trust_remote_code, reference_timeout, source
            ),
            problems=problems,
            problem_set=problem_set,
            progress=bar(bars, "checks"),
        )
        written = None if out is None else certificate.write(out)
    show(certificate, full)
    if written is not None:
        names = " and ".join(str(path.resolve()) for path in written)
        console.print(f"The certificate is in {names}", soft_wrap=True, highlight=False)
    if not certificate.holds:
        raise typer.Exit(1)


@contextmanager
def _ended_by_kill() -> Iterator[None]:
    """``kill`` ends the command as Ctrl-C does: temporary folders and processes go with it."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_out(out: Path | None) -> None:
    """Refuse a place that cannot be written to before minutes are spent for nothing."""
    if out is None:
        return
    from tl_looped.verification.certificate import paths_of

    for path in paths_of(out):
        if path.is_dir():
            raise DataError(f"--out: {path} is a folder; name another file")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise DataError(f"--out: {above} cannot be written to; name another file")


def show(certificate: Certificate, full: bool = True) -> None:
    """The certificate on the screen: what was loaded, what it holds, the checks, one verdict.

    Args:
        certificate: Of any origin.
        full: Whether each tensor, hash, version and token is shown.
    """
    from tl_looped.verification.markdown import sentence, shown, verdict

    _print(f"[bold]{_escaped(certificate.model)}[/bold]")
    for heading, value in certificate.about.items():
        if heading == "versions" and not full:
            continue
        pairs = value.items() if isinstance(value, dict) else ()
        text = ", ".join(f"{k} {shown(v)}" for k, v in pairs) or shown(value)
        _print(f"  {_escaped(heading)}: {_escaped(text)}")
    for line in (_holdings if full else _summary)(certificate.inventory):
        _print(f"  {_escaped(line)}")
    table = Table(show_lines=True)
    table.add_column("check", overflow="fold", max_width=_CHECK)
    table.add_column("found", overflow="fold")
    # What was not run for one reason is one row.
    for (outcome, found), alike in groupby(
        certificate.findings, key=lambda finding: (finding.outcome.value, finding.found)
    ):
        findings, style = list(alike), _STYLES.get(outcome, "dim")
        names = _escaped("\n".join(finding.check for finding in findings))
        text = sentence(found)
        if style in ("bold red", "yellow"):
            text += f"\nIf the load is wrong: {sentence(findings[0].if_wrong)}"
        table.add_row(f"{names}\n[{style}]{outcome}[/{style}]", _escaped(text))
    console.print(table)
    _print(_escaped(verdict(certificate)))


def _holdings(inventory: dict[str, Any]) -> list[str]:
    """What the checkpoint holds, in a few lines."""
    from tl_looped.verification.markdown import grouped_tensors

    lines = []
    options = inventory["options"]
    for name, one in inventory["files"].items():
        lines.append(f"{name}: {one['bytes']:,} bytes, SHA-256 {one['sha256']} of {one['hashed']}")
    for name, shape, dtype, use in grouped_tensors(inventory["tensors"]):
        lines.append(f"{name} {shape} {dtype}, {use}")
    ignored = [f"{one['key']}={one['value']!r}" for one in options if not one["read"]]
    lines.append(
        f"config.json: {len(options) - len(ignored)} options count; ignored: "
        f"{', '.join(ignored) or 'none'}"
    )
    lines += _special(inventory)
    for one in inventory.get("texts", [])[:1]:
        lines.append("text as tokens: " + "|".join(one["tokens"]))
    return lines


def _summary(inventory: dict[str, Any]) -> list[str]:
    """The same without tensors, hashes and values."""
    files, options = inventory["files"], inventory["options"]
    size = sum(one["bytes"] for one in files.values())
    ignored = sum(not one["read"] for one in options)
    lines = [
        f"{count(len(inventory['tensors']), 'tensor')} in {count(len(files), 'file')}, {size:,} "
        "bytes",
        f"config.json: {len(options) - ignored} options count, {ignored} are ignored",
        *_special(inventory),
    ]
    for one in inventory.get("texts", [])[:1]:
        more = "..." * (len(one["tokens"]) > _PIECES)
        lines.append("text as tokens: " + "|".join(one["tokens"][:_PIECES]) + more)
    return [*lines, "(--full shows tensors, hashes, options and versions)"]


def _special(inventory: dict[str, Any]) -> list[str]:
    lines = [
        f"{one['kind']}: {one['id']} {one['token']!r}, says the {one['from']}"
        for one in inventory["special_tokens"]
    ]
    if inventory.get("stop_tokens"):
        ends = ", ".join(repr(one["token"]) for one in inventory["stop_tokens"])
        lines.append(f"a generated text ends at {ends}")
    return lines


def _print(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _escaped(text: str) -> str:
    """What is no markup, and no control sequence of the terminal."""
    from rich.markup import escape

    from tl_looped.verification.markdown import printable

    return escape(printable(text, kept="\n"))
