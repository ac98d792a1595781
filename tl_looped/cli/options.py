"""Options of a command that are the fields of a dataclass: their names, types, defaults and help.

What an option means, and which value it has if it is left out, is then said once, at the dataclass.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import typer

Command = TypeVar("Command", bound=Callable[..., Any])


def described_fields(of: type) -> dict[str, str]:
    """The first sentence on every field in a dataclass's docstring, without marks of code."""
    arguments = inspect.cleandoc(of.__doc__ or "").partition("Args:\n")[2].split("\n\n")[0]
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return {
        name: re.split(r"(?<=\.)\s", re.sub(r"``|\"", "", " ".join(text.split())))[0]
        for names, text in entries
        for name in names.split(", ")
    }


def options_of(
    of: type,
    *names: str,
    defaults: Mapping[str, Any] | None = None,
    shown: Mapping[str, str] | None = None,
) -> list[inspect.Parameter]:
    """Parameters that typer reads as options, one per field.

    Args:
        of: A dataclass that describes its fields under ``Args:``.
        names: Fields that become options; all of them if none is named.
        defaults: Defaults of the command, where they are not the dataclass's.
        shown: Texts that the help shows as defaults, where they are not the values. If it is given,
            be it empty, an option that is left out is None, which tells it from one that was given.
    """
    hints, described, options = get_type_hints(of), described_fields(of), []
    for one in fields(of):
        if names and one.name not in names:
            continue
        kind, default = hints[one.name], (defaults or {}).get(one.name, one.default)
        option = typer.Option(help=described[one.name])
        if shown is not None:
            switch = one.name if default else f"no-{one.name}"
            value = switch if isinstance(default, bool) else str(default)
            option.show_default = shown.get(one.name, value)
            kind, default = kind | None, None
        options.append(_parameter(one.name, Annotated[kind, option], default))
    return options


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def with_options(**groups: list[inspect.Parameter]) -> Callable[[Command], Command]:
    """Give a command options in place of parameters: each gets a dict of its options' values."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**values: Any) -> Any:
            given = {
                group: {option.name: values.pop(option.name) for option in options}
                for group, options in groups.items()
            }
            return command(**values, **given)

        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [
            one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for one in own
            if one.name not in groups
        ]
        parameters = [*kept, *(option for options in groups.values() for option in options)]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in parameters}
        return cast(Command, call)

    return decorate
