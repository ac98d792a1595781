"""The verdict on each name of TransformerLens: verdicts.toml, read and completed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from snapshots import HERE, Name, names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERDICTS = ("same", "different", "refused", "missing")
_NEEDS = {"different": {"names", "why", "test"}, "refused": {"names", "why"}}
_NEEDS["missing"] = _NEEDS["refused"]


class VerdictError(Exception):
    """The table contradicts itself, or TransformerLens."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one name.

    Attributes:
        name: The name.
        verdict: One of ``VERDICTS``.
        part: Where the page lists it.
        why: The reason, of all but "same".
        test: A test id, of "different".
        listed: Whether the table names it; a keyword may follow its method.
        place: Where in the table.
    """

    name: Name
    verdict: str
    part: str
    why: str = ""
    test: str = ""
    place: int = 0
    listed: bool = True


@dataclass(frozen=True)
class _Entry:
    verdict: str
    part: str
    why: str = ""
    test: str = ""
    place: int = 0


def verdicts() -> dict[str, Verdict]:
    """All names of all snapshots, by key, each with its one verdict."""
    known, listed = names(), dict(_listed())
    unknown = sorted(set(listed) - set(known))
    if unknown:
        raise VerdictError(f"verdicts of names that TransformerLens does not have: {unknown}")
    out: dict[str, Verdict] = {}
    without: list[str] = []
    for key, name in known.items():
        entry = listed.get(key) or _of_the_method(listed.get(f"{name.area}.{name.member}"))
        if entry is None or (name.keyword is None and key not in listed):
            without.append(key)
            continue
        out[key] = Verdict(name, *vars(entry).values(), listed=key in listed)
    if without:
        raise VerdictError(f"names without a verdict in verdicts.toml: {sorted(without)}")
    return out


def _of_the_method(entry: _Entry | None) -> _Entry | None:
    """A keyword that is not listed: one of a method that works is the same."""
    if entry is None or entry.verdict != "different":
        return entry
    return _Entry("same", entry.part, place=entry.place)


def _listed() -> Iterator[tuple[str, _Entry]]:
    seen: set[str] = set()
    table = tomllib.loads((HERE / "verdicts.toml").read_text(encoding="utf-8"))
    for area, parts in table.items():
        for part, entries in parts.items():
            for verdict, one in _entries(part, entries):
                for name in one["names"]:
                    key = f"{area}.{name}"
                    if key in seen:
                        raise VerdictError(f"two verdicts of {key}")
                    seen.add(key)
                    why, test = one.get("why", ""), one.get("test", "")
                    yield key, _Entry(verdict, part, why, test, len(seen))


def _entries(part: str, entries: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for verdict, listed in entries.items():
        if verdict == "same":
            yield verdict, {"names": listed}
            continue
        if verdict not in VERDICTS:
            raise VerdictError(f"{part}: no verdict is {verdict!r}; there are {VERDICTS}")
        for one in listed:
            if set(one) != _NEEDS[verdict] or not all(one.values()):
                raise VerdictError(f"{part}, {verdict}: needs {_NEEDS[verdict]}, got {one}")
            yield verdict, one


def counted() -> dict[str, Verdict]:
    """Names that have a verdict of their own, which keywords of a refused method do not."""
    return {key: one for key, one in verdicts().items() if one.listed or one.verdict == "same"}


def counts(some: Iterable[Verdict]) -> dict[str, int]:
    """How many names have which verdict."""
    return dict(Counter(one.verdict for one in some))
