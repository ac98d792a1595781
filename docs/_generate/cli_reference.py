"""The page of the command line, from the help texts of the commands themselves."""

from __future__ import annotations

import typer
from typer.cli import get_docs_for_click

from tl_looped.cli import app


def markdown() -> str:
    """Every command with its arguments and options."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command, info_name="tl-looped"), name="tl-looped"
    )
    # The page has a title and a table of contents of its own; the list of commands cuts its texts.
    head, commands = text.split("\n", 1)[1].split("**Commands**:", 1)
    return head + "## " + commands.split("\n## ", 1)[1]
