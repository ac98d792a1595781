"""What a verification found: the findings, one by one, and the certificate that holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


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


@dataclass(frozen=True)
class Certificate:
    """All that one verification found.

    Args:
        model: Name that the user gave, or the last part of a folder's path.
        about: What was loaded and with what, by heading: family, revision, dtype, versions, ...
        findings: In the order of the checks.
    """

    model: str
    about: dict[str, Any]
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether no exactness check failed."""
        return all(finding.outcome is not Outcome.WRONG for finding in self.findings)
