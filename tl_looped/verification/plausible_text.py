"""Whether text is read as the model was trained to read it: BOS, unknown tokens, and back again."""

from __future__ import annotations

from collections.abc import Sequence

from tl_looped.transformer import LoopedTransformer
from tl_looped.verification.baselines import mean_and_error, sign_test
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.passages import Passage, measure, rows_of

BOS, TOKENS = "BOS as trained", "text and tokens"

WORSE = 0.02
"""Nats per token by which the model's own setting must be worse."""
CHANCE = 0.01
"""Of a sign test over texts."""
_SHOWN = 12
_BOS_IF_WRONG = (
    "Beyond the first token, texts would be easier to predict with the other setting: a model that "
    "was trained behind BOS misses it at every text's beginning, and one that never saw BOS is led "
    "astray by it."
)
_TOKENS_IF_WRONG = (
    "English text would hold unknown tokens, or come back changed from encoding and decoding: the "
    "tokenizer of another model, or one rebuilt without its settings."
)


def bos_as_trained(model: LoopedTransformer, passages: Sequence[Passage]) -> Finding:
    """The loss with and without BOS, of the tokens that are predicted in both cases.

    Args:
        model: The model.
        passages: Texts.
    """
    bos, own = model.tokenizer.bos_token_id, bool(model.cfg.default_prepend_bos)
    if bos is None:
        return Finding(
            BOS,
            Outcome.NOT_APPLICABLE,
            "The tokenizer has no BOS token, so there is nothing to choose.",
            _BOS_IF_WRONG,
        )
    losses = {}
    for setting in (True, False):
        measured = measure(model, rows_of(model, passages, setting))
        # With BOS the first token of the text is predicted too.
        losses[setting] = [float(one.losses[int(setting) :].mean()) for one in measured]
    worse = [a - b for a, b in zip(losses[own], losses[not own], strict=True)]
    mean, error = mean_and_error(worse)
    chance = sign_test(worse)
    suspicious = mean > WORSE and chance < CHANCE
    means = {setting: sum(each) / len(each) for setting, each in losses.items()}
    n_worse = sum(difference > 0 for difference in worse)
    found = (
        f"Now {model.describe_bos()}. Loss beyond the first token, mean over "
        f"{len(passages)} texts: {means[True]:.3f} nats with BOS, {means[False]:.3f} without; the "
        f"model's own setting differs by {mean:+.3f} (standard error {error:.3f}) and is worse in "
        f"{n_worse} texts. It would be suspicious from {WORSE:+} on, with a sign test below "
        f"{CHANCE} ({chance:.2g} here)."
    )
    numbers = {
        "with_bos": means[True],
        "without_bos": means[False],
        "own_is_with": own,
        "own_minus_other": mean,
        "standard_error": error,
        "texts_where_own_is_worse": n_worse,
        "sign_test": chance,
    }
    outcome = Outcome.SUSPICIOUS if suspicious else Outcome.PLAUSIBLE
    return Finding(BOS, outcome, found, _BOS_IF_WRONG, numbers)


def text_and_tokens(model: LoopedTransformer, texts: Sequence[str]) -> Finding:
    """Text that goes through the tokenizer and back, and the tokens that it becomes.

    Args:
        model: The model.
        texts: English texts.
    """
    unknown_id, n_unknown, n_tokens, n_bytes = model.tokenizer.unk_token_id, 0, 0, 0
    changed: list[str] = []
    for text in texts:
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        n_tokens, n_bytes = n_tokens + len(ids), n_bytes + len(text.encode())
        n_unknown += 0 if unknown_id is None else ids.count(unknown_id)
        if str(model.to_string(ids)).strip() != text.strip():
            changed.append(text)
    first = model.tokenizer.encode(texts[0], add_special_tokens=False)[:_SHOWN]
    shown = [str(model.to_string(token)) for token in first]
    found = (
        f"{len(texts)} texts are {n_tokens:,} tokens of {n_bytes / max(1, n_tokens):.2f} bytes on "
        f"average; {n_unknown} are unknown, and {len(texts) - len(changed)} texts come back as "
        f"they were. The first one begins {'|'.join(shown)!r}."
    )
    if changed:
        back = str(model.to_string(model.tokenizer.encode(changed[0], add_special_tokens=False)))
        found += f" {changed[0][:40]!r} comes back as {back[:40]!r}."
    numbers = {
        "texts": len(texts),
        "tokens": n_tokens,
        "bytes": n_bytes,
        "unknown": n_unknown,
        "changed": len(changed),
        "first_tokens": shown,
    }
    outcome = Outcome.SUSPICIOUS if changed or n_unknown else Outcome.PLAUSIBLE
    return Finding(TOKENS, outcome, found, _TOKENS_IF_WRONG, numbers)
