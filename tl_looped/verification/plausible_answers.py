"""Exact-match accuracy of generated answers to word problems, by recurrences.

The manner is GSM8K's: worked answers that end in ``#### 42``. A model with a chat template is asked
in it; any other goes on with a few solved problems of our own writing and the new one. Greedy.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from tl_looped.errors import DataError
from tl_looped.experiments.prompts import ON_THE_HUB, WORD_PROBLEMS, choose
from tl_looped.transformer import LoopedTransformer
from tl_looped.verification.baselines import wilson
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.plausible_loss import trained_number
from tl_looped.verification.texts import bundled_texts
from tl_looped.words import count

ANSWERS = "answers to word problems"

NEW, NEW_CHAT = 160, 320
"""Most tokens of an answer; one in a conversation is longer."""
BATCH = 8
"""Problems that are answered at once."""
SHOTS = 4
"""Solved problems before the new one, where the context holds them."""
SMALL = 500_000_000
"""Parameters below which no answer at all is no news: published accuracies begin above."""
ENOUGH = 20
"""Problems from which no right answer is suspicious in a larger model."""
_MARK = re.compile(r"####\s*\$?\s*(-?\$?[0-9][0-9.,]*)")
_NUMBER = re.compile(r"-?\$?[0-9][0-9,]*(?:\.[0-9]+)?|-?\$?\.[0-9]+")
_END = "\n\n"
"""Between a solved problem and the next."""
_ASK = "Solve this problem step by step, and end with the line '#### ' and the number.\n\n"
_IF_WRONG = (
    "Hardly any answer would be right where the authors report more, or one recurrence would "
    "answer better than the trained number. Their figures are for their own prompts, often with "
    "more examples, so that some points less are no sign of a wrong load."
)


@dataclass(frozen=True)
class Problem:
    """A word problem.

    Args:
        question: Its text.
        answer: The number, as written after ``####`` or alone.
    """

    question: str
    answer: str


def load_problems(problem_set: str, n: int, seed: int) -> tuple[list[Problem], tuple[int, ...]]:
    """A seeded subset of a set of problems, and the numbers of its rows.

    Args:
        problem_set: ``"bundled"``, ``"gsm8k"`` or ``"gsm8k:FILE.jsonl"``.
        n: How many, at most.
        seed: Of the choice, as in experiments.

    Raises:
        DataError: problems that cannot be had, or rows without question and answer.
    """
    name, colon, path = problem_set.partition(":")
    if problem_set == "bundled":
        rows = _of_file(WORD_PROBLEMS)
    elif name == "gsm8k" and colon and path:
        rows = _of_file(Path(path))
    elif problem_set == "gsm8k":
        rows = _of_hub()
    else:
        raise DataError(
            f"problems are 'bundled', 'gsm8k' or 'gsm8k:FILE.jsonl', got {problem_set!r}"
        )
    chosen = choose(len(rows), n, seed)
    return [rows[row] for row in chosen], chosen


def _of_file(path: Path) -> list[Problem]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"problems: {path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"problems: line {number} of {path} is not JSON: {error}") from error
        found.append(_problem(row, f"line {number} of {path}"))
    if not found:
        raise DataError(f"problems: {path} holds none")
    return found


def _of_hub() -> list[Problem]:
    data = ON_THE_HUB["gsm8k"]
    try:
        from datasets import load_dataset

        rows = list(load_dataset(data.hub_id, data.config, split="test"))
    except Exception as error:  # the library raises whatever its transports do
        raise DataError(
            f"problems: gsm8k cannot be had from the hub ({type(error).__name__}: {error}); it "
            "needs the package datasets and a network. Give a file instead: gsm8k:FILE.jsonl, a "
            "question and an answer in every line"
        ) from error
    return [_problem(row, f"row {i} of {data.hub_id}") for i, row in enumerate(rows)]


def _problem(row: Any, where: str) -> Problem:
    question = row.get("question") if isinstance(row, dict) else None
    answer = row.get("answer") if isinstance(row, dict) else None
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(f"problems: {where} has no question and answer, which are texts")
    if number_in(answer) is None:
        raise DataError(f"problems: the answer in {where} holds no number")
    return Problem(question, answer)


def number_in(text: str) -> Decimal | None:
    """The number that a worked answer ends with: behind the first ``####``, or else the last one.

    Commas and dollar signs within it count nothing, nor do a full stop and a unit behind it.
    """
    marked = _MARK.search(text)
    candidates = [marked.group(1)] if marked else _NUMBER.findall(text)
    if not candidates:
        return None
    try:
        return Decimal(candidates[-1].replace("$", "").replace(",", "").rstrip("."))
    except InvalidOperation:
        return None


def prompt_of(
    model: LoopedTransformer, question: str, shots: int = SHOTS
) -> str | list[dict[str, str]]:
    """What the model is given: a conversation, or solved problems and the new question."""
    if getattr(model.tokenizer, "chat_template", None) is not None:
        return [{"role": "user", "content": f"{_ASK}{question}"}]
    solved = [one.text for one in bundled_texts() if one.register == "word problem"]
    room = model.cfg.n_ctx - NEW
    for n in range(shots, -1, -1):
        text = "".join(f"{one}{_END}" for one in solved[:n]) + f"{question}\n"
        if n == 0 or model.to_tokens(text, truncate=True).shape[1] < room:
            return text
    raise AssertionError("zero examples are always given")


def answers_of(model: LoopedTransformer, questions: Sequence[str], n_recurrences: int) -> list[str]:
    """The model's greedy answers, each up to the next problem; empty where no room is left."""
    found: list[str] = []
    for i in range(0, len(questions), BATCH):
        prompts = [prompt_of(model, question) for question in questions[i : i + BATCH]]
        is_chat = not isinstance(prompts[0], str)
        tokens, mask = model.tokenize(prompts, padding_side="left", truncate=True)
        n_new = min(NEW_CHAT if is_chat else NEW, model.cfg.n_ctx - tokens.shape[1])
        if n_new <= 0:
            found += [""] * len(prompts)
            continue
        replies = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=n_new,
            do_sample=False,
            verbose=False,
            n_recurrences=n_recurrences,
            stop_strings=None if is_chat else [_END],
        )[:, tokens.shape[1] :].tolist()
        texts = (str(model.tokenizer.decode(r, skip_special_tokens=True)) for r in replies)
        found += [text if is_chat else text.lstrip().split(_END)[0] for text in texts]
    return found


def answers_by_recurrences(
    model: LoopedTransformer,
    n: int,
    problem_set: str = "bundled",
    recurrences: Sequence[int] | None = None,
    seed: int = 0,
    untrained: str | None = None,
) -> Finding:
    """How many answers are right at 1, half, once and twice the trained number of recurrences.

    Args:
        model: The model.
        n: How many problems.
        problem_set, seed: See :func:`load_problems`.
        recurrences: Other numbers of recurrences.
        untrained: Why the model looks untrained, if it does.

    Raises:
        DataError: problems that cannot be had.
    """
    problems, chosen = load_problems(problem_set, n, seed)
    trained = trained_number(model)
    wanted = recurrences or [1, max(1, trained // 2), trained, 2 * trained]
    numbers_of = sorted({trained, *wanted})
    right: dict[int, int] = {}
    parsed: dict[int, int] = {}
    example = ""
    for r in numbers_of:
        given = answers_of(model, [one.question for one in problems], r)
        found = [number_in(text) for text in given]
        right[r] = sum(
            value is not None and value == number_in(one.answer)
            for value, one in zip(found, problems, strict=True)
        )
        parsed[r] = sum(value is not None for value in found)
        example = given[0] if r == trained else example
    return _finding(
        model, len(problems), problem_set, seed, chosen, trained, right, parsed, example, untrained
    )


def _finding(
    model: LoopedTransformer,
    n: int,
    problem_set: str,
    seed: int,
    chosen: Sequence[int],
    trained: int,
    right: dict[int, int],
    parsed: dict[int, int],
    example: str,
    untrained: str | None,
) -> Finding:
    intervals = {r: wilson(k, n) for r, k in right.items()}
    each = ", ".join(
        f"{k} at {r} ({100 * k / n:.0f} %, 95 % interval {100 * intervals[r][0]:.0f} to "
        f"{100 * intervals[r][1]:.0f})"
        for r, k in right.items()
    )
    found = (
        f"Right of {count(n, 'problem')} of {problem_set.partition(':')[0]}, by recurrences: "
        f"{each}. A number was found in {parsed[trained]} answers at {trained}; the first answer "
        f"there begins {example[:80]!r}."
    )
    numbers: dict[str, Any] = {
        "problems": n,
        "rows_sha256": hashlib.sha256(json.dumps(list(chosen)).encode()).hexdigest(),
        "rows": list(chosen[:100]),
        "seed": seed,
        "right": right,
        "with_a_number": parsed,
        "wilson_95": intervals,
    }
    if untrained is not None:
        found = f"The model looks untrained: {untrained}. {found}"
        return Finding(ANSWERS, Outcome.NOT_APPLICABLE, found, _IF_WRONG, numbers)
    outcome, why = judged(right, n, trained, sum(p.numel() for p in model.parameters()))
    return Finding(ANSWERS, outcome, found + why, _IF_WRONG, numbers)


def judged(right: dict[int, int], n: int, trained: int, n_parameters: int) -> tuple[Outcome, str]:
    """What numbers of right answers say of a trained model, and a sentence on it.

    Args:
        right: Right answers by number of recurrences.
        n: Problems.
        trained: The number of recurrences of the training.
        n_parameters: Of the model.
    """
    if 1 in right and wilson(right[1], n)[0] > wilson(right[trained], n)[1]:
        return Outcome.SUSPICIOUS, f" One recurrence answers better than {trained}."
    if right[trained]:
        return Outcome.PLAUSIBLE, ""
    if n_parameters < SMALL:
        return (
            Outcome.NOT_APPLICABLE,
            f" None at all says nothing of a model of {n_parameters:,} parameters.",
        )
    if n < ENOUGH:
        return Outcome.NOT_APPLICABLE, f" None at all of fewer than {ENOUGH} says nothing."
    return Outcome.SUSPICIOUS, " None at all: a wrong load of a model of this size looks so."
