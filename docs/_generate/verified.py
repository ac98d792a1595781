"""Parts of the page of certificates that follow from the adapters, written into the page itself.

``python docs/_generate/verified.py`` writes them anew; tests/package/test_docs.py compares them. A
certificate that was sent in is a line of :data:`CERTIFICATES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tl_looped.adapters import Adapter, get_adapter, known_adapters

PAGE = Path(__file__).parents[1] / "verified.md"
CERTIFICATES: dict[str, str] = {}
"""By hub id: a link to the issue, and what the certificate says."""
_NOBODY = "nobody has run this yet"


def parts() -> dict[str, str]:
    """What stands between the marks of each name."""
    return {
        "published": "\n".join(_published()),
        "environments": "\n".join(_environments()),
    }


def written(page: str) -> dict[str, str]:
    """What stands between the marks in the page's text."""
    found = re.findall(r"<!-- begin: (\w+) -->\n(.*?)\n<!-- end: \1 -->", page, re.DOTALL)
    return dict(found)


def _families() -> Iterator[Adapter]:
    for name in known_adapters():
        adapter = get_adapter(name)
        if adapter.aliases:
            yield adapter


def _published() -> Iterator[str]:
    yield "| checkpoint | adapter | certificate |"
    yield "|---|---|---|"
    for adapter in _families():
        for hub_id in sorted({alias.hub_id for alias in adapter.aliases.values()}, key=_by_number):
            yield f"| `{hub_id}` | {adapter.name} | {CERTIFICATES.get(hub_id, _NOBODY)} |"


def _by_number(hub_id: str) -> tuple[str, int]:
    """Recurrences as numbers: 4, 8, 16."""
    name, _, last = hub_id.rpartition("-")
    return (name, int(last)) if last.isdigit() else (hub_id, 0)


def _environments() -> Iterator[str]:
    by_line: dict[str, list[str]] = {}
    for adapter in _families():
        if adapter.reference is not None:
            by_line.setdefault(adapter.reference.environment, []).append(adapter.name)
    for line, names in by_line.items():
        yield f"For {', '.join(names)}:"
        yield ""
        yield "```"
        yield line.replace(" && ", "\n")
        yield "```"
        yield ""


def main() -> None:
    """Write the parts into the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, part in parts().items():
        marks = rf"(<!-- begin: {name} -->\n).*?(\n<!-- end: {name} -->)"
        text = re.sub(marks, lambda m, part=part: m[1] + part + m[2], text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
