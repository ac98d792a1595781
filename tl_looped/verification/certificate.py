"""What a verification found: the findings, one by one, and the certificate that holds them.

A certificate is JSON, which holds everything and is read back, and Markdown
(:mod:`tl_looped.verification.markdown`), which can be pasted into an issue. Neither says where
files lie, who asked, or on which machine: paths are cut out of every text, also out of the values
of a ``config.json`` and of messages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from tl_looped.checks import checked
from tl_looped.errors import DataError
from tl_looped.files import make_folder, write_text

SCHEMA = 1
"""Version of the JSON file's structure."""

_DEEPEST = 64
_REST = r"[^\s'\"`<>|:,;()]*"
_KEYS = ("schema", "model", "holds", "about", "findings", "inventory")
_A_PATH = re.compile(
    # In quotes a path may hold spaces: "/home/me/my models", 'C:\\Users\\a friend', '~/x y'.
    r"""(?<=(["'`]))(?:file:/+|~?/(?!/)(?=[^"'`\n]*/)|~/|[A-Za-z]:[\\/]|\\\\)[^"'`\n]+(?=\1)"""
    r"|file:/+[^\s'\"`<>|,;()]*"  # file:///home/me
    r"|(?<![\w/.~-])~?/(?!/)(?:[^\s/'\"`<>|:,;()]+/)+[^\s/'\"`<>|:,;()]*"  # /home/me/models
    r"|(?<!\w)[A-Za-z]:[\\/][^\s'\"`<>|:,;()]*"  # C:\Users\me
    r"|\\{2,}[\w.$-]+\\+[^\s'\"`<>|:,;()]+"  # \\server\me
    r"|(?<![\w/.~-])~(?:[A-Za-z][\w.-]*)?/[^\s'\"`<>|:,;()]+"  # ~/models, ~me/models
)


class Outcome(str, Enum):
    """What became of a check.

    - ``EXACT``, ``WRONG``: of an exactness check; it holds but for rounding, or it does not.
    - ``PLAUSIBLE``, ``SUSPICIOUS``: of a measurement; as a right load would give it, or not.
    - ``NOT_APPLICABLE``: of either; there is nothing to check, and the finding says why.
    """

    EXACT = "exact"
    WRONG = "wrong"
    PLAUSIBLE = "plausible"
    SUSPICIOUS = "suspicious"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Finding:
    """One check and what it found.

    Args:
        check: Name of the check, such as ``"cached = uncached"``; unique in a certificate.
        outcome: See :class:`Outcome`.
        found: Sentence with the numbers that were measured, and the bound they were held against.
        if_wrong: Sentence on what would be seen if the load were wrong.
        numbers: Numbers behind the sentence, as JSON holds them.
    """

    check: str
    outcome: Outcome
    found: str
    if_wrong: str
    numbers: dict[str, Any] = field(default_factory=dict)


@checked
@dataclass(frozen=True)
class Certificate:
    """All that one verification found.

    Args:
        model: Name that the user gave, or the last part of a folder's path.
        about: What was loaded and with what, by heading: family, revision, dtype, versions, ...
        findings: In the order of the checks.
        inventory: What the checkpoint holds: files with their hashes, tensors, options of its
            ``config.json``, special tokens, texts as tokens.
    """

    model: str
    about: dict[str, Any]
    findings: tuple[Finding, ...]
    inventory: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether no exactness check failed."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[str, ...]:
        """Names of the exactness checks that failed."""
        return tuple(f.check for f in self.findings if f.outcome is Outcome.WRONG)

    def to_json(self) -> str:
        """The certificate as JSON text; :meth:`from_json` is the inverse.

        NaN and infinities are texts in it, since JSON has no numbers for them.
        """
        findings = [
            asdict(finding) | {"outcome": finding.outcome.value} for finding in self.findings
        ]
        values = plain(
            {
                "schema": SCHEMA,
                "model": self.model,
                "holds": self.holds,
                "about": self.about,
                "findings": findings,
                "inventory": self.inventory,
            }
        )
        return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read a certificate; the text may come from anyone.

        Raises:
            DataError: it is not JSON, not a certificate, or one of a newer version.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the certificate is not JSON: {error}") from error
        schema = values.get("schema") if isinstance(values, dict) else None
        if type(schema) is not int or schema != SCHEMA:
            raise DataError(f"not a certificate of schema {SCHEMA}, but {str(values)[:40]!r}...")
        if set(values) != set(_KEYS):
            raise DataError(f"a certificate has the keys {list(_KEYS)}, this one {sorted(values)}")
        _expect(values, model=str, holds=bool, about=dict, findings=list, inventory=dict)
        findings = tuple(_finding(value) for value in values["findings"])
        names = [finding.check for finding in findings]
        if len(set(names)) < len(names):
            raise DataError(f"a certificate has each check once, this one {names}")
        read = cls(values["model"], values["about"], findings, values["inventory"])
        if read.holds != values["holds"]:
            raise DataError(
                f"the certificate says holds={values['holds']}, but its findings say {read.holds}"
            )
        return read

    def to_markdown(self) -> str:
        """The certificate for an issue: a table of the checks, the rest folded up.

        Raises:
            DataError: the inventory of a certificate that was read is not one.
        """
        from tl_looped.verification.markdown import markdown_of

        try:
            return markdown_of(self)
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise DataError(f"the inventory of this certificate is none: {error!r}") from error

    def write(self, path: str | Path) -> tuple[Path, Path]:
        """Write ``path.json`` and ``path.md``; a suffix ``.json`` or ``.md`` is cut off before.

        Args:
            path: Where to; its folder is made.

        Returns:
            Both paths.

        Raises:
            DataError: they cannot be written; then neither is there unless it was before.
        """
        as_json, as_markdown = paths_of(path)
        folder, was_there = as_json.parent, as_markdown.exists()
        is_new = not folder.exists()
        make_folder(folder)
        try:
            write_text(self.to_markdown(), as_markdown)
            write_text(self.to_json(), as_json)
        except BaseException:
            with suppress(OSError):
                if not was_there:
                    as_markdown.unlink(missing_ok=True)
                if is_new:
                    folder.rmdir()
            raise
        return as_json, as_markdown


def paths_of(path: str | Path) -> tuple[Path, Path]:
    """Where a certificate is written: the JSON file and the Markdown file."""
    base = Path(path)
    if base.suffix in (".json", ".md"):
        base = base.with_suffix("")
    if base.name in ("", "..") or "\n" in base.name or "\0" in base.name:
        raise DataError(f"{str(path)!r} names no file; give FILE, for FILE.json and FILE.md")
    return base.with_name(base.name + ".json"), base.with_name(base.name + ".md")


def plain(value: Any, known: Sequence[str] = (), deepest: int = _DEEPEST) -> Any:
    """A value as JSON holds it, without paths and without NaN.

    Args:
        value: Whatever stands in a certificate.
        known: See :func:`without_paths`.
        deepest: Levels of values within values that are kept; a config.json can have hundreds.
    """
    if isinstance(value, Enum):
        return plain(value.value, known, deepest)
    if isinstance(value, str):
        # Half of a surrogate pair, which a hostile config.json can hold, is in no file.
        return without_paths(value.encode("utf-8", "backslashreplace").decode("utf-8"), known)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Iterable) and not deepest:
        return "(deeper)"
    if isinstance(value, Mapping):
        pairs = value.items()
        return {plain(str(key), known): plain(each, known, deepest - 1) for key, each in pairs}
    if isinstance(value, Iterable):
        return [plain(each, known, deepest - 1) for each in value]
    return plain(str(value), known)


def without_paths(text: str, known: Sequence[str] = ()) -> str:
    """A text in which ``(path)`` stands for every absolute path.

    Args:
        text: Of any origin.
        known: Paths that are known, relative ones and such with spaces among them, which nothing
            in a text tells from other words.
    """
    for path in sorted(filter(_is_telling, known), key=len, reverse=True):
        text = re.sub(rf"(?<![\w/.~-]){re.escape(path)}{_REST}", "(path)", text)
    return _A_PATH.sub("(path)", text)


def _is_telling(path: str) -> bool:
    """Whether a path is more than a word, ``.`` or the root."""
    return len(path.strip("./\\")) > 1 and any(mark in path for mark in "/\\")


def _finding(value: Any) -> Finding:
    if not isinstance(value, dict):
        raise DataError(f"a finding is an object, got {type(value).__name__}")
    _expect(value, check=str, outcome=str, found=str, if_wrong=str, numbers=dict)
    try:
        outcome = Outcome(value["outcome"])
    except ValueError:
        known = [outcome.value for outcome in Outcome]
        raise DataError(f"an outcome is one of {known}, got {value['outcome'][:40]!r}") from None
    return Finding(value["check"], outcome, value["found"], value["if_wrong"], value["numbers"])


def _expect(values: dict[str, Any], **kinds: type) -> None:
    for key, kind in kinds.items():
        if type(values.get(key)) is not kind:
            raise DataError(
                f"{key} of a certificate is a {kind.__name__}, got {type(values.get(key)).__name__}"
            )
