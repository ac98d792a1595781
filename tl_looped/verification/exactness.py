"""Checks that hold for any weights, trained or not: each looks at a model and gives one finding.

Two ways of running one model are compared by their logits, within what rounding explains
(:mod:`tl_looped.verification.rounding`). Where rounding explains as much as another prompt would
change, nothing can be told, and the finding says so in place of ``exact``.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.decomposition.closeness import unit
from tl_looped.errors import InvalidDecompositionError, TLLoopedError
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.cache_size import readable
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.rounding import MARGIN, Rounding, difference, rounding_of
from tl_looped.verification.subject import Subject

_DECOMPOSED = 8
"""Tokens of the decomposition: every layer is decomposed into every write before it."""
_SAVED_MOST = 2**31
"""Bytes of weights up to which a model is saved and loaded again."""


class Runs:
    """What the checks of one subject share: the whole forward pass and its rounding error.

    Args:
        subject: The checkpoint under examination.
    """

    def __init__(self, subject: Subject) -> None:
        self.model, self.tokens = subject.model, subject.tokens
        self.logits: Float[Tensor, "batch pos d_vocab"] = self.model(self.tokens)
        self.rounding: Rounding = rounding_of(self.model, self.tokens, self.logits)
        # What a wrong run looks like: every position has the logits of the one before.
        self.of_another = difference(self.logits[:, 1:], self.logits[:, :-1])

    def finding(self, check: str, apart: float, what: str, if_wrong: str) -> Finding:
        """Whether two runs are apart by no more than rounding explains.

        Args:
            check: Name of the check.
            apart: Largest difference of a logit.
            what: The two, for a sentence.
            if_wrong: What would be seen in the model's use.
        """
        rounding, numbers = self.rounding, self.rounding.numbers(apart)
        bound = f"{rounding.bound:.2g} ({MARGIN:g} times the rounding of the run, {rounding.how})"
        within = f"{apart:.2g}, bound {bound}"
        if apart > rounding.bound or rounding.size != rounding.size:
            found = f"{what} differ by {within}"
            return Finding(check, Outcome.WRONG, found, if_wrong, numbers)
        if apart > 0 and rounding.bound >= self.of_another:
            found = (
                f"{what} differ by {within}, but logits of another position differ by "
                f"{self.of_another:.2g}: rounding hides everything; take --dtype float32"
            )
            return Finding(check, Outcome.NOT_APPLICABLE, found, if_wrong, numbers)
        return Finding(check, Outcome.EXACT, f"{what} differ by {within}", if_wrong, numbers)


def cached(runs: Runs) -> Finding:
    """Half of the tokens at once, then one by one from a key-value cache; and in chunks of 3."""
    n, parts = runs.tokens.shape[1], []
    for ends in (_ends(n, n - n // 2, 1), _ends(n, 3, 3)):
        kv, start, logits = LoopedKeyValueCache(), 0, []
        for end in ends:
            logits.append(runs.model(runs.tokens[:, start:end], past_kv_cache=kv))
            start = end
        parts.append(difference(torch.cat(logits, 1), runs.logits))
    return runs.finding(
        "cached = uncached",
        max(parts),
        f"logits of {n} tokens with a key-value cache (token by token, in chunks of 3) and without",
        "generated text drifts away from what the model would say to the whole text: it repeats "
        "itself or loses the thread after some tokens",
    )


def _ends(n: int, first: int, step: int) -> Iterator[int]:
    yield min(first, n)
    for start in range(first, n, step):
        yield min(start + step, n)


def padded(runs: Runs) -> Finding:
    """Rows of different lengths, padded on the left under a mask; each beside itself alone."""
    rows, n = runs.tokens.shape
    lengths = [max(1, n - n * i // (2 * rows)) for i in range(rows)]
    tokens, mask = torch.zeros_like(runs.tokens), torch.zeros_like(runs.tokens)
    for i, length in enumerate(lengths):
        tokens[i, n - length :], mask[i, n - length :] = runs.tokens[i, :length], 1
    batch = runs.model(tokens, attention_mask=mask)
    apart = [
        difference(batch[i, n - length :], runs.model(runs.tokens[i : i + 1, :length])[0])
        for i, length in enumerate(lengths)
    ]
    return runs.finding(
        "padded = alone",
        max(apart),
        f"logits of texts of {', '.join(map(str, lengths))} tokens in one padded batch and alone",
        "answers depend on what else is in the batch: short prompts beside long ones get worse",
    )


def recurrences(runs: Runs) -> Finding:
    """A view at R, the model set to R, and R recurrences one by one: the same logits."""
    model, before = runs.model, runs.model.loop.R
    counts = sorted({1, max(before, 1), before + 1})
    steps = _step_by_step(model.view_at(before + 1), runs.tokens, counts)
    apart = [difference(steps[before], runs.logits)] if before else []
    for n in counts:
        view = model.view_at(n)(runs.tokens)
        try:
            model.set_recurrences(n)
            apart += [difference(view, model(runs.tokens)), difference(view, steps[n])]
        finally:
            model.set_recurrences(before)
    apart.append(difference(model(runs.tokens), runs.logits))  # none of it left a trace
    return runs.finding(
        "recurrences",
        max(apart),
        f"logits at {', '.join(map(str, counts))} recurrences by a view, set, and step by step",
        "curves over recurrences mix numbers of two depths, and the lens at R is not the run of R",
    )


def _step_by_step(model: LoopedTransformer, tokens: Tensor, counts: list[int]) -> dict[int, Tensor]:
    x, run = model.start_run(tokens, model.state_seed)
    states = enumerate(model.unroll(x, run), 1)
    return {n: model.read_out(state, run) for n, state in states if n in counts}


def decomposition(runs: Runs) -> Finding:
    """The writes sum to the stream at every layer; what they add to a logit sums to the logit."""
    if_wrong = (
        "direct logit attributions, logit lenses and patching name components that do not do what "
        "is said of them"
    )
    check = "decomposition"
    logits, cache = runs.model.run_with_cache(runs.tokens[:1, :_DECOMPOSED])
    loop, half = runs.model.loop, unit({runs.model.cfg.dtype})
    places: list[dict[str, Any]] = [
        {"layer": layer, "mlp_input": mid}
        for layer in range(loop.n_layers)
        for mid in (False, True)
    ]
    worst, most = 0.0, 0.0
    try:
        for where in [*places, {}]:
            apart, allowed = _of_stream(cache, where, half)
            worst, most = max(worst, apart), max(most, apart / allowed)
        token = int(logits[0, -1].argmax())
        attributed = cache.logit_attrs(cache.decompose_resid(), token)
    except InvalidDecompositionError as error:
        return Finding(check, Outcome.WRONG, str(error), if_wrong)
    # Each term of the sum is rounded, and large ones may cancel.
    size = runs.rounding.size + half * float(attributed.abs().sum(0).max())
    rest, bound = difference(attributed.sum(0), logits[..., token]), MARGIN * size
    numbers = {
        "places": len(places) + 1, "relative": worst, "of_bound": most, "token": token,
        "components": len(attributed), "difference": rest, "bound": bound,
    }  # fmt: skip
    found = (
        f"writes sum to the stream at {len(places) + 1} places, to {worst:.2g} of it "
        f"({most:.2g} of the bound, {MARGIN:g} roundings of every write); {len(attributed)} "
        f"attributions sum to the logit of a token to {rest:.2g}, bound {bound:.2g}"
    )
    right = most <= 1.0 and rest <= bound
    return Finding(check, Outcome.EXACT if right else Outcome.WRONG, found, if_wrong, numbers)


def _of_stream(cache: Any, where: dict[str, Any], half: float) -> tuple[float, float]:
    """How far the writes' sum is from the stream at a place, and how far rounding allows it to be.

    Both as parts of the stream, at the position where they are closest. Every write may be rounded
    when it is made, added and carried on, and large ones may cancel.
    """
    layer = where.get("layer", cache.loop.n_layers - 1)
    end = "post" if not where else "mid" if where["mlp_input"] else "pre"
    stream = cache[f"blocks.{layer}.hook_resid_{end}"]
    writes = cache.decompose_resid(**where)
    size = stream.norm(dim=-1)
    apart = ((writes.sum(0) - stream).norm(dim=-1) / size).nan_to_num(nan=torch.inf)
    allowed = MARGIN * half * writes.norm(dim=-1).sum(0) / size
    worst = int((apart / allowed).argmax())
    return float(apart.flatten()[worst]), float(allowed.flatten()[worst])


def saved(runs: Runs) -> Finding:
    """Saved in tl_looped's own format and loaded again: the same weights, bit by bit."""
    check, model = "saved = loaded", runs.model
    if_wrong = "a model that was saved is another one when it is loaded again"
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if needed > _SAVED_MOST:
        found = f"not tried: it would write {readable(needed)}, beyond {readable(_SAVED_MOST)}"
        return Finding(check, Outcome.NOT_APPLICABLE, found, if_wrong)
    with tempfile.TemporaryDirectory(prefix="tl-looped-verify-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 2 * needed:
            found = f"not tried: it would write {readable(needed)}, and {readable(free)} are free"
            return Finding(check, Outcome.NOT_APPLICABLE, found, if_wrong)
        model.save_pretrained(Path(folder) / "saved")
        again = LoopedTransformer.from_pretrained(
            Path(folder) / "saved", device=str(model.W_E.device), dtype=model.cfg.dtype
        )
        theirs = dict(again.named_parameters())
        differing = [
            name
            for name, parameter in model.named_parameters()
            if not torch.equal(parameter, theirs[name])
        ]
        apart = difference(again(runs.tokens), runs.logits)
    if differing:
        found = f"{len(differing)} weights differ after saving and loading, {differing[0]} first"
        return Finding(check, Outcome.WRONG, found, if_wrong, {"differing": differing})
    what = f"all {len(theirs)} weights are the same bits; logits before and after"
    return runs.finding(check, apart, what, if_wrong)


CHECKS: dict[str, Callable[[Runs], Finding]] = {
    "cached = uncached": cached,
    "padded = alone": padded,
    "decomposition": decomposition,
    "recurrences": recurrences,
    "saved = loaded": saved,
}
"""The checks of a loaded model, by name."""


def run_check(check: str, runs: Runs) -> Finding:
    """One check; an error of the package in it is what it found."""
    try:
        with torch.no_grad():
            return CHECKS[check](runs)
    except TLLoopedError as error:
        what = f"{type(error).__name__}: {error}"
        return Finding(check, Outcome.WRONG, what, "the model cannot be run in this way at all")
