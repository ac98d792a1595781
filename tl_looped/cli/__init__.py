"""The command line, ``tl-looped`` or ``python -m tl_looped``.

Commands import what they need when they run, so that ``--help`` and a mistyped option wait for
no more than the package itself.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tl_looped._version import __version__
from tl_looped.cli.console import DISK_ERRORS, console, errors
from tl_looped.cli.demo import demo
from tl_looped.cli.look import compare, info, models, report
from tl_looped.cli.retrofit import retrofit
from tl_looped.cli.runs import analyze, reproduce, run
from tl_looped.cli.spectrum import spectrum
from tl_looped.cli.train import train_command, train_demo_command, train_section51_command
from tl_looped.cli.verify import verify
from tl_looped.errors import TLLoopedError

app = typer.Typer(
    help="Looped language models in TransformerLens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool | None) -> None:
    if wanted:
        console.print(f"tl-looped {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = None,
) -> None:
    """Looped language models in TransformerLens."""


VERBS = (demo, analyze, run, reproduce, report, compare, spectrum, models, info, retrofit, verify)
for command in VERBS:
    app.command()(command)
app.command("train")(train_command)
app.command("train-demo")(train_demo_command)
app.command("train-section51")(train_section51_command)


def main() -> None:
    """Entry point: errors of the package, and of the disk, are one message, not a traceback."""
    try:
        app()
    except (TLLoopedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        errors.print("[bold red]Error:[/bold red]", end=" ")
        errors.print(str(error), soft_wrap=True, markup=False, highlight=False)
        sys.exit(1)
