"""Greedy continuations: shown, and suspicious where they degenerate at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.stopping import special_ids
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.words import count

CONTINUATIONS = "greedy continuations"

PROMPTS = (
    "A baker makes 12 loaves of bread every hour. He works for 5 hours. How many loaves",
    "There was once a king who could not sleep. He tried warm milk, and soft",
    "A lighthouse is a tower with a bright lamp at its top, built to guide",
    "Tom has 20 apples. He gives 5 apples to his sister. Then he buys",
)
NEW = 24
"""Tokens of each continuation."""
_PERIOD = 3
"""Tokens of the longest cycle that counts as degenerate from the start."""
_IF_WRONG = (
    "One token, or a cycle of two or three, would be repeated from the start, or the text would be "
    "mostly special or unknown tokens. Small models repeat whole sentences when the most likely "
    "token is always taken; that is no sign of a wrong load."
)


def greedy_continuations(
    model: LoopedTransformer, prompts: Sequence[str] = PROMPTS, untrained: str | None = None
) -> Finding:
    """Continue a few texts, always with the most likely token.

    Args:
        model: The model.
        prompts: Texts to go on with.
        untrained: Why the model looks untrained, if it does; nothing is judged then.
    """
    special = special_ids(model.tokenizer)
    if model.tokenizer.unk_token_id is not None:
        special.add(model.tokenizer.unk_token_id)
    replies: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for prompt in prompts:
        tokens = model.to_tokens(prompt, truncate=True)
        tokens = tokens[:, : max(1, model.cfg.n_ctx - NEW)]
        n_new = max(1, min(NEW, model.cfg.n_ctx - tokens.shape[1]))
        new = model.generate(
            tokens,
            max_new_tokens=n_new,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
        )[0, -n_new:].tolist()
        replies[prompt] = str(model.to_string(new))
        reason = degenerate(new, special)
        if reason is not None:
            reasons[prompt] = reason
    shown = "; ".join(f"{prompt!r} -> {reply!r}" for prompt, reply in replies.items())
    depth = count(model.cfg.n_recurrences, "recurrence")
    found = f"At {depth}, the most likely token each time: {shown}."
    numbers: dict[str, Any] = {"continuations": replies, "degenerate": reasons}
    if untrained is not None:
        found = f"The model looks untrained: {untrained}. {found}"
        return Finding(CONTINUATIONS, Outcome.NOT_APPLICABLE, found, _IF_WRONG, numbers)
    if not reasons:
        found += " None of them goes in circles; whether they make sense is for a reader."
    suspicious = 2 * len(reasons) > len(prompts)
    if reasons:
        found += f" {len(reasons)} of {len(prompts)} degenerate: {', '.join(reasons.values())}."
    outcome = Outcome.SUSPICIOUS if suspicious else Outcome.PLAUSIBLE
    return Finding(CONTINUATIONS, outcome, found, _IF_WRONG, numbers)


def degenerate(tokens: Sequence[int], special: set[int]) -> str | None:
    """What is wrong with a continuation, or None.

    Args:
        tokens: Its new tokens.
        special: Special and unknown tokens. One that ends the text and what follows is no fault,
            but more than half of such tokens are.
    """
    token, n = Counter(tokens).most_common(1)[0]
    if 2 * n > len(tokens):
        kind = "a special token" if token in special else "one token"
        return f"{kind} {n} times in {len(tokens)}"
    if 2 * sum(token in special for token in tokens) > len(tokens):
        return "mostly special tokens"
    for period in range(2, _PERIOD + 1):
        if list(tokens[period:]) == list(tokens[:-period]):
            return f"a cycle of {period} tokens from the start"
    return None
