"""What a right load makes likely: losses, text, continuations, answers, speed and memory.

Each finding is plausible, suspicious or not applicable, and says what it would look like if the
load were wrong. None decides the exit code of ``tl-looped verify``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tl_looped.progress import SILENT, Progress
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.passages import (
    Measured,
    Passage,
    levels,
    measure,
    read_passages,
    rows_of,
)
from tl_looped.verification.plausible_answers import ANSWERS, answers_by_recurrences
from tl_looped.verification.plausible_continuations import CONTINUATIONS, greedy_continuations
from tl_looped.verification.plausible_cost import (
    MEMORY,
    SPEED,
    cost_by_recurrences,
    weights_in_memory,
)
from tl_looped.verification.plausible_loss import (
    CURVE,
    LOSS,
    best_register,
    finite_losses,
    is_untrained,
    loss_by_recurrences,
    loss_on_text,
    trained_number,
)
from tl_looped.verification.plausible_settings import SETTINGS, loss_under_settings
from tl_looped.verification.plausible_text import BOS, TOKENS, bos_as_trained, text_and_tokens
from tl_looped.verification.plausible_weights import WEIGHTS, loss_under_exchanges
from tl_looped.verification.subject import Subject

OF_TEXT = (TOKENS, LOSS, CURVE, WEIGHTS, SETTINGS, BOS, CONTINUATIONS)
"""Checks that need a tokenizer, in their order."""
CHECKS = (*OF_TEXT, SPEED, MEMORY)
"""All checks but that of answers, which is asked for."""
_LARGE = 20_000_000
"""Parameters from which fewer texts are enough where many runs are compared."""
_FEW = 6


def plausibility(
    subject: Subject,
    *,
    problems: int = 0,
    problem_set: str = "bundled",
    recurrences: Sequence[int] | None = None,
    progress: Progress = SILENT,
) -> Iterator[Finding]:
    """Measure what trained weights make likely, check by check.

    Args:
        subject: The loaded checkpoint.
        problems: How many word problems are answered; none if 0.
        problem_set: ``"bundled"``, ``"gsm8k"`` (from the hub) or ``"gsm8k:FILE.jsonl"``.
        recurrences: Numbers of recurrences of the loss and the answers, in place of a handful from
            1 to twice the trained number.
        progress: What is told on the way: one step per check.

    Yields:
        The findings of :data:`CHECKS`, and that of answers if ``problems`` is not 0.

    Raises:
        DataError: problems that cannot be had.
    """
    progress.start(len(CHECKS) + (problems > 0), 0)
    for finding in _findings(subject, problems, problem_set, recurrences):
        yield finding
        progress.advance(1)


def _findings(
    subject: Subject, problems: int, problem_set: str, recurrences: Sequence[int] | None
) -> Iterator[Finding]:
    model = subject.model
    untrained: str | None = None
    if subject.texts is None:
        yield from (_not_applicable(check, "The model has no tokenizer.") for check in OF_TEXT)
    elif not (passages := read_passages(model, subject.texts)):
        why = "No bundled text is two tokens to this tokenizer."
        yield from (_not_applicable(check, why) for check in OF_TEXT)
    else:
        measured = measure(model, rows_of(model, passages))
        for check, run in _of_text(subject, passages, measured, recurrences).items():
            yield _not_applicable(check, run) if isinstance(run, str) else run()
        of = levels(passages, measured, bool(model.cfg.default_prepend_bos))
        untrained = is_untrained(model, of)
    trained = trained_number(model)
    yield cost_by_recurrences(model, subject.tokens, sorted({1, trained, 2 * trained}))
    yield weights_in_memory(model)
    if problems and subject.texts is None:
        yield _not_applicable(ANSWERS, "The model has no tokenizer.")
    elif problems:
        yield answers_by_recurrences(
            model, problems, problem_set, recurrences, subject.seed, untrained
        )


def _of_text(
    subject: Subject,
    passages: Sequence[Passage],
    measured: Sequence[Measured],
    recurrences: Sequence[int] | None,
) -> dict[str, Callable[[], Finding] | str]:
    """What finds each, or why there is nothing to find."""
    model, texts = subject.model, subject.texts
    assert texts is not None
    found: dict[str, Callable[[], Finding] | str] = {TOKENS: lambda: text_and_tokens(model, texts)}
    if not finite_losses(measured):
        why = "Losses are not finite; the exactness check of that name has more."
        return found | dict.fromkeys(OF_TEXT[1:], why)
    of = levels(passages, measured, bool(model.cfg.default_prepend_bos))
    untrained, best = is_untrained(model, of), best_register(of, passages)
    large = sum(p.numel() for p in model.parameters()) >= _LARGE
    known = [passage for passage in passages if passage.register == best]
    known = known[:_FEW] if large else known
    # Every other text: all registers, at half the price.
    some = list(passages[::2]) if large else list(passages)
    found |= {
        LOSS: lambda: loss_on_text(model, passages, measured, subject.seed),
        CURVE: lambda: loss_by_recurrences(model, passages, measured, recurrences),
        WEIGHTS: lambda: loss_under_exchanges(model, known),
        SETTINGS: lambda: loss_under_settings(model, known),
        BOS: lambda: bos_as_trained(model, some),
        CONTINUATIONS: lambda: greedy_continuations(model, untrained=untrained),
    }
    if untrained is not None:
        why = f"The model looks untrained: {untrained}."
        found |= dict.fromkeys((WEIGHTS, SETTINGS, BOS), why)
    return found


def _not_applicable(check: str, why: str) -> Finding:
    return Finding(check, Outcome.NOT_APPLICABLE, why, "")
