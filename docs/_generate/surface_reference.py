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
    yield "| in place of | " + " | ".join(verdicts) + " |"
    yield "|---|" + "--:|" * len(verdicts)
    for area, (_, theirs) in AREAS.items():
        of_area = counts(one for one in found.values() if one.name.area == area)
        yield f"| {theirs} | " + " | ".join(str(of_area.get(v, 0)) for v in verdicts) + " |"
    total = counts(found.values())
    yield "| together | " + " | ".join(str(total.get(v, 0)) for v in verdicts) + " |"


def _reasons(some: Iterable[Verdict]) -> Iterator[str]:
    """One item a reason, with all names that it is the reason of."""
    by_reason: dict[tuple[str, str], list[Verdict]] = {}
    for one in some:
        by_reason.setdefault((one.why, one.test), []).append(one)
    for (why, test), names in by_reason.items():
        held = f" ([test]({_BLOB}{test.split('::')[0]}))" if test else ""
        yield f"- {_names(names)}: {why}{held}"


def _same(some: list[Verdict]) -> Iterator[str]:
    """Folded, a part each: methods with the keywords that they take."""
    for part in dict.fromkeys(one.part for one in some):
        here = [one for one in some if one.part == part]
        yield f'??? note "{part} ({len(here)})"'
        for one in here:
            if one.name.keyword is None:
                words = [w for w in here if w.name.member == one.name.member and w.name.keyword]
                taken = f" ({', '.join(f'`{w.name.keyword}`' for w in words)})" if words else ""
                yield f"    - `{one.name.member}`{taken}"
        alone = [o for o in here if o.name.keyword and not _has_member(o, here)]
        if alone:
            yield f"    - {_names(alone)}"
        yield ""


def _has_member(word: Verdict, here: list[Verdict]) -> bool:
    return any(one.name.member == word.name.member and not one.name.keyword for one in here)


def _names(some: Iterable[Verdict]) -> str:
    """Names, and the one version that has them if only one does."""
    some = list(some)
    versions = {tuple(source.release[:3] for source in one.name.sources) for one in some}
    listed = ", ".join(f"`{one.name.short}`" for one in some)
    return listed + (f" ({versions.pop()[0]})" if {len(v) for v in versions} == {1} else "")
