"""This package's side of the surface: its classes, and how a signature of theirs fits ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from snapshots import Member, Parameter, parameters_of

from tl_looped import LoopedActivationCache, LoopedConfig, LoopedTransformer

CLASSES: dict[str, type] = {
    "model": LoopedTransformer,
    "cache": LoopedActivationCache,
    "config": LoopedConfig,
}
_VARIADIC = ("var_positional", "var_keyword")
_EMPTY = ("()", "[]")


def faults(theirs: Member, function: Any) -> Iterator[tuple[str, str]]:
    """Keywords of a method that ours does not take as theirs does, and how."""
    ours = parameters_of(function)
    by_name = {one.name: (place, one) for place, one in enumerate(ours)}
    kinds = {one.kind for one in ours}
    known = {one.name for one in theirs.parameters}
    for place, one in enumerate(theirs.parameters):
        if one.kind in _VARIADIC:
            if one.kind not in kinds:
                yield one.name, f"no {one.kind}"
            continue
        if one.name not in by_name:
            # What TransformerLens takes by keyword may be handed on; a call is compared for each.
            if "var_keyword" not in kinds:
                yield one.name, "not taken"
            elif one.kind != "keyword_only":
                yield one.name, "only in **kwargs"
            continue
        ours_at, our = by_name[one.name]
        yield from ((one.name, fault) for fault in _unlike(one, place, our, ours_at))
    for our in ours:
        if our.name not in known and our.default is None and our.kind not in _VARIADIC:
            yield our.name, "has no default"


def _unlike(theirs: Parameter, place: int, ours: Parameter, ours_at: int) -> Iterator[str]:
    if theirs.kind == "positional_or_keyword":
        if ours.kind != theirs.kind:
            yield f"is {ours.kind}"
        elif ours_at != place:
            yield f"stands at {ours_at}, not at {place}"
    alike = ours.default == theirs.default or {ours.default, theirs.default} <= set(_EMPTY)
    if theirs.default is not None and not alike:  # what they need, ours may leave out
        yield f"default {ours.default}, not {theirs.default}"
