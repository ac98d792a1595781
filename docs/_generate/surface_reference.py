"""TransformerLens's names and what becomes of each, from the table that tests/surface checks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "surface"))

from verdicts import Verdict, counted, counts

AREAS = {
    "model": ("LoopedTransformer", "HookedTransformer and TransformerBridge"),
    "cache": ("LoopedActivationCache", "ActivationCache"),
    "config": ("LoopedConfig", "HookedTransformerConfig and TransformerBridgeConfig"),
}
HEADINGS = {
    "different": "Different",
    "refused": "Refused",
    "missing": "Missing",
}
_BLOB = "https://github.com/tl-looped/tl_looped/blob/main/"


def markdown() -> str:
    """The generated part of the page."""
    found = counted()
    lines = list(_summary(found))
    for area, (ours, theirs) in AREAS.items():
        here = [one for one in found.values() if one.name.area == area]
        lines += ["", f"## {ours}", "", f"In place of {theirs}."]
        for verdict, heading in HEADINGS.items():
            some = [one for one in here if one.verdict == verdict]
            if some:
                lines += ["", f"### {heading}: {ours} {{#{area}-{verdict}}}", ""]
                lines += _reasons(some)
        lines += ["", f"### The same: {ours} {{#{area}-same}}", ""]
        lines += _same([one for one in here if one.verdict == "same"])
    return "\n".join(lines)


def _summary(found: dict[str, Verdict]) -> Iterator[str]:
    """Counts by area and verdict."""
    verdicts = ["same", *HEADINGS]
    yield "| | " + " | ".join(verdicts) + " |"
    yield "|---|" + "--:|" * len(verdicts)
    for area in AREAS:
        of_area = counts(one for one in found.values() if one.name.area == area)
        yield f"| {area} | " + " | ".join(str(of_area.get(v, 0)) for v in verdicts) + " |"
    total = counts(found.values())
    yield "| all | " + " | ".join(str(total.get(v, 0)) for v in verdicts) + " |"


def _reasons(some: Iterable[Verdict]) -> Iterator[str]:
    """One item a reason, with all names that it is the reason of."""
    by_reason: dict[tuple[str, str], list[Verdict]] = {}
    for one in some:
        by_reason.setdefault((one.why, one.test), []).append(one)
    for (why, test), names in sorted(by_reason.items(), key=lambda item: item[1][0].place):
        held = f" ([test]({_BLOB}{test.split('::')[0]}))" if test else ""
        yield f"- {_names(names)}<br>{why}{held}"


def _same(some: list[Verdict]) -> Iterator[str]:
    """Folded, a part each: methods with the keywords that they take."""
    for part in dict.fromkeys(one.part for one in some):
        here = [one for one in some if one.part == part]
        yield f'??? note "{part} ({len(here)})"'
        for one in here:
            if one.name.keyword is None:
                words = [w.name.keyword for w in here if w.name.member == one.name.member]
                yield f"    - `{one.name.member}`" + _keywords([word for word in words if word])
        alone = [o for o in here if o.name.keyword and not _has_member(o, here)]
        if alone:
            yield f"    - {_names(alone)}"
        yield ""


def _has_member(word: Verdict, here: list[Verdict]) -> bool:
    return any(one.name.member == word.name.member and not one.name.keyword for one in here)


def _names(some: Iterable[Verdict]) -> str:
    """Names, keywords behind their method, and the one version that has them if only one does."""
    some = list(some)
    words: dict[str, list[str]] = {}
    for one in some:
        words.setdefault(one.name.member, []).extend([one.name.keyword] if one.name.keyword else [])
    listed = ", ".join(f"`{member}`" + _keywords(found) for member, found in words.items())
    versions = {tuple(source.release[:3] for source in one.name.sources) for one in some}
    return listed + (f" (in {versions.pop()[0]})" if {len(v) for v in versions} == {1} else "")


def _keywords(words: list[str]) -> str:
    return f" ({', '.join(f'`{word}`' for word in words)})" if words else ""
