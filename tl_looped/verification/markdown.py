"""A certificate as Markdown, for an issue.

What stands in it comes from a checkpoint, so from anyone: texts are code or are escaped, and cannot
open a heading, a tag, a link or a cell of a table. Tensors of layers that are alike are one line,
and long values are cut, since an issue holds 65,536 characters; the JSON file holds everything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tl_looped.verification.certificate import Certificate, Outcome, plain
from tl_looped.words import count

LONGEST = 60_000
"""Characters of a certificate in Markdown."""

_SIGNS = {Outcome.WRONG: "**WRONG**", Outcome.SUSPICIOUS: "**suspicious**"}
_REFERENCE = "reference"
_OTHERS = {
    "--reference-python": "the authors' code",
    "--source": "the feedforward model that it was made of",
}
_VALUE, _ROWS = 160, 200  # characters of a value, rows of a folded table


def verdict(certificate: Certificate) -> str:
    """One line: what held and failed, what is suspicious, and whether other code was compared."""
    names: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}
    for finding in certificate.findings:
        names[finding.outcome].append(finding.check)
    held = f"{count(len(names[Outcome.EXACT]), 'exactness check')} held"
    failed = ", ".join(certificate.wrong)
    plausible, suspicious = len(names[Outcome.PLAUSIBLE]), names[Outcome.SUSPICIOUS]
    are = "measurement is" if plausible == 1 else "measurements are"
    which = f": {', '.join(suspicious)}" if suspicious else ""
    return (
        f"{certificate.model}"
        + (f" is WRONG in {failed}; {held}" if failed else f": {held}, none failed")
        + f"; {plausible} {are} plausible, {len(suspicious)} suspicious{which}"
        + _not_compared(certificate)
    )


def _not_compared(certificate: Certificate) -> str:
    """What the exactness checks cannot see is said beside them, with the option that shows it."""
    found = next((f for f in certificate.findings if f.check == _REFERENCE), None)
    if found is not None and found.outcome is not Outcome.NOT_APPLICABLE:
        return ""
    for option, other in _OTHERS.items():
        if found is not None and option in found.found:
            return f". Not compared with {other} ({option})"
    return ". Not compared with another implementation"


def markdown_of(certificate: Certificate) -> str:
    """See :meth:`Certificate.to_markdown`."""
    inventory: dict[str, Any] = plain(certificate.inventory)
    findings = [
        (_text(f.check), _SIGNS.get(f.outcome, f.outcome.value), _text(sentence(plain(f.found))))
        for f in certificate.findings
    ]
    wrong = [
        (_text(f.check), _text(sentence(plain(f.if_wrong))))
        for f in certificate.findings
        if f.if_wrong
    ]
    numbers = [
        (_text(f.check), code(json.dumps(plain(f.numbers), ensure_ascii=False), 600))
        for f in certificate.findings
        if f.numbers
    ]
    about = [(_text(k), _about(v)) for k, v in plain(certificate.about).items()]
    whole = [
        f"## Verification of {code(plain(certificate.model))}",
        _text(plain(verdict(certificate))),
        table(("", ""), about),
        table(("check", "outcome", "found"), findings),
        *_folded("What would be seen if the load were wrong", ("check", "seen"), wrong),
    ]
    parts = [
        _folded("Numbers of the checks", ("check", "numbers"), numbers),
        _files(inventory),
        _options(inventory),
        _tokens(inventory),
        _tensors(inventory),
    ]
    size = sum(map(len, whole))
    for part in parts:  # whole parts only: a table that ends in its middle would be a lie
        length = sum(map(len, part))
        if size + length > LONGEST:
            part = ["(The JSON file holds more: here is no room for it.)"]
        size += length
        whole += part
    return "\n\n".join(whole) + "\n"


def sentence(text: str) -> str:
    """With a capital and a full stop, wherever a finding is from."""
    text = text.strip()
    end = "" if not text or text[-1] in ".!?" else "."
    return text[:1].upper() + text[1:] + end


def shown(value: Any) -> str:
    """A value as a reader takes it in: whole numbers with separators, ``1,878,144``."""
    return f"{value:,}" if type(value) is int else str(value)


def printable(text: str, kept: str = "") -> str:
    """A text in which control characters are written out: they colour, move or reverse the rest.

    Args:
        text: Of any origin.
        kept: Control characters that stay.
    """
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


def code(text: str, longest: int = _VALUE) -> str:
    """A text as code on one line, whatever it holds."""
    shown = printable(text)
    if len(shown) > longest:
        shown = f"{shown[:longest]}... ({len(text)} characters)"
    shown = shown.replace("|", "\\|")  # of a table; outside one the backslash is seen, and harmless
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") or not shown else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are Markdown already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grouped(names: Iterable[str]) -> list[str]:
    """Names of which those that differ in one number alone are one: ``core.{0..3}.attn.qkv``."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if found is None else f"{name[: found.start()]}{{}}{name[found.end() :]}"
        numbers.setdefault(pattern, []).extend([] if found is None else [int(found[0])])
    return [p.replace("{}", _spans(sorted(ns)), 1) if ns else p for p, ns in numbers.items()]


def _spans(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return "{" + ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in spans) + "}"


def grouped_tensors(tensors: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Name, shape, dtype and use of tensors; those of like layers are one row."""
    alike: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for one in tensors:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", one["name"])
        key = (pattern, str(one["shape"]), one["dtype"], one["use"])
        alike.setdefault(key, []).append(one)
    rows = []
    for (_, shape, dtype, use), ones in alike.items():
        to = ", ".join(grouped(dict.fromkeys(p for one in ones for p in one["parameters"])))
        for name in grouped(one["name"] for one in ones):
            rows.append((name, shape, dtype, f"{use}: {to}" if to else use))
    return rows


def _about(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_text(k)} {_text(shown(v))}" for k, v in value.items())
    return _text(shown(value))


def _text(text: str) -> str:
    """Plain text, in which nothing is markup."""
    line = printable(" ".join(text.split()))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A zero-width space: `@name` would call somebody, `#1` link an issue.
    # `https://` and `www.` are links without any mark.
    line = re.sub(r"([@#])(?=\w)|\b(https?|ftp|mailto|xmpp|www)(?=[:.])", "\\g<0>\u200b", line)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)


def _folded(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    more = f"(and {len(rows) - _ROWS} more, which the JSON file holds)"
    left = [more] if len(rows) > _ROWS else []
    summary = f"<details><summary>{_text(title)}</summary>"
    return [summary, table(heads, rows[:_ROWS]), *left, "</details>"]


def _files(inventory: dict[str, Any]) -> list[str]:
    rows = [
        (code(name), _text(shown(one["bytes"])), code(one["sha256"]), _text(one["hashed"]))
        for name, one in inventory.get("files", {}).items()
    ]
    return _folded("Files", ("file", "bytes", "SHA-256", "of"), rows)


def _options(inventory: dict[str, Any]) -> list[str]:
    options = inventory.get("options", [])

    def rows(read: bool) -> list[Sequence[str]]:
        return [
            (
                code(one["key"]),
                code(json.dumps(one["value"], ensure_ascii=False)),
                ", ".join(map(code, one["fields"])) or "*checked*" * read,
            )
            for one in options
            if one["read"] is read
        ]

    heads = ("option", "value", "field")
    ignored, used = rows(False), rows(True)
    return [
        *_folded(f"Options of config.json that count ({len(used)})", heads, used),
        *_folded(
            f"Options of config.json that are ignored ({len(ignored)})",
            heads[:2],
            [row[:2] for row in ignored],
        ),
    ]


def _tokens(inventory: dict[str, Any]) -> list[str]:
    special = [
        (_text(one["kind"]), _text(str(one["id"])), code(one["token"]), _text(one["from"]))
        for one in inventory.get("special_tokens", [])
    ]
    texts = [
        (code(one["text"], 400), " ".join(code(piece, 40) for piece in one["tokens"][:120]))
        for one in inventory.get("texts", [])[:2]
    ]
    return [
        *_folded("Special tokens", ("kind", "id", "token", "from"), special),
        *_folded("Texts as tokens", ("text", "tokens"), texts),
    ]


def _tensors(inventory: dict[str, Any]) -> list[str]:
    tensors = inventory.get("tensors", [])
    rows = [
        (code(name), _text(shape.strip("[]")), _text(dtype), code(use, 400))
        for name, shape, dtype, use in grouped_tensors(tensors)
    ]
    return _folded(f"Tensors ({len(tensors)})", ("tensor", "shape", "dtype", "becomes"), rows)
