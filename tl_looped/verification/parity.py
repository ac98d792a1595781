"""One model run in two ways: what it computes here, and how far another computation may be from it.

The other side computes in fp32, in sums of another order. How much that rounds depends on the
weights, on their loop above all, so it is measured and not guessed: the same run here, in fp32 and
in fp64, differs by the rounding of one fp32 run. The other side may be off our fp64 by
:data:`~tl_looped.verification.rounding.MARGIN` times that, tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.adapters import Source
from tl_looped.model.config import InitialState
from tl_looped.model.norms import NormWeights
from tl_looped.model.rotary import inverse_frequencies
from tl_looped.transformer import LoopedTransformer
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.rounding import MARGIN

CHECK = "reference"
IF_WRONG = (
    "a tensor in the wrong place, an exchanged query and key, another rotary base or epsilon: "
    "residuals differ from that layer on, by far more than the bound"
)
MOST_ROWS, MOST_POSITIONS, N_GREEDY = 2, 24, 8
_SEED = 0
_STATE_SIZE = 0.8
"""Standard deviation of the state that runs start from: large enough that the loop depends on it,
which that of the published retrofits (0.009) hardly is."""


@dataclass(frozen=True)
class Runs:
    """What both sides run.

    Args:
        tokens: Few, so that every activation of a run fits into memory.
        prompt: What greedy tokens are appended to.
        n_greedy: How many of them.
        n_recurrences: Numbers of recurrences. Activations are compared at the first.
        state: State of recurrence 0 for as many positions as any run has; None where the model
            makes its own of the prompt.
    """

    tokens: Int[Tensor, "batch pos"]
    prompt: Int[Tensor, "1 prompt"]
    n_greedy: int
    n_recurrences: tuple[int, ...]
    state: Float[Tensor, "batch longest d_model"] | None


def plan_runs(model: LoopedTransformer, tokens: Int[Tensor, "batch pos"]) -> Runs:
    """Runs for a model: its own number of recurrences, one, and twice its own.

    Args:
        model: Not run here.
        tokens: Some are taken.
    """
    cfg = model.cfg
    tokens = tokens[:MOST_ROWS, : min(MOST_POSITIONS, cfg.n_ctx)].cpu()
    prompt = tokens[:1, : max(1, tokens.shape[1] // 2)]
    n_greedy = min(N_GREEDY, cfg.n_ctx - prompt.shape[1])
    own = cfg.n_recurrences
    numbers = dict.fromkeys(n for n in (own, 1, 2 * own) if n >= cfg.min_recurrences)
    state = None
    if cfg.initial_state is InitialState.RANDOM:
        longest = max(tokens.shape[1], prompt.shape[1] + n_greedy)
        generator = torch.Generator().manual_seed(_SEED)
        state = torch.randn(len(tokens), longest, cfg.d_model, generator=generator) * _STATE_SIZE
    return Runs(tokens, prompt, n_greedy, tuple(numbers), state)


@dataclass(frozen=True)
class Ours:
    """What this package computes, in two precisions.

    Args:
        logits: By number of recurrences: fp64 and fp32.
        activations: By hook name: fp64 and fp32.
        greedy: Prompt and greedy tokens, in fp32.
    """

    logits: dict[int, tuple[Tensor, Tensor]]
    activations: dict[str, tuple[Tensor, Tensor]]
    greedy: Int[Tensor, "1 longest"]


def run_ours(
    model: LoopedTransformer, runs: Runs, names: list[str], tick: Callable[[int], object]
) -> Ours:
    """Run the model in fp32 and in fp64; it is left as it was.

    Args:
        model: Its weights are cast, both ways without loss.
        runs: What to run.
        names: Hook names of the activations.
        tick: Called with 1 after each run.
    """
    logits: dict[torch.dtype, dict[int, Tensor]] = {}
    kept: dict[torch.dtype, dict[str, Tensor]] = {}
    for dtype in (torch.float64, torch.float32):
        with in_dtype(model, dtype), torch.no_grad():
            logits[dtype], kept[dtype] = _run(model, runs, names, tick)
            if dtype == torch.float32:
                greedy = _greedy(model, runs)
    wide, narrow = torch.float64, torch.float32
    return Ours(
        {n: (logits[wide][n], logits[narrow][n]) for n in runs.n_recurrences},
        {name: (kept[wide][name], kept[narrow][name]) for name in names},
        greedy,
    )


def _run(
    model: LoopedTransformer, runs: Runs, names: list[str], tick: Callable[[int], object]
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    out, kept = {}, {}
    for i, n in enumerate(runs.n_recurrences):
        tokens = runs.tokens.to(model.W_E.device)
        options = _options(model, tokens, runs.state, n)
        if i == 0:
            logits, cache = model.run_with_cache(tokens, names_filter=names, **options)
            kept = {name: cache[name].cpu() for name in names}
        else:
            logits = model(tokens, **options)
        out[n] = logits.cpu()
        tick(1)
    return out, kept


def _options(
    model: LoopedTransformer, tokens: Tensor, state: Tensor | None, n: int
) -> dict[str, Any]:
    options: dict[str, Any] = {"n_recurrences": n, "attention_mask": torch.ones_like(tokens)}
    if state is not None:
        options["initial_state"] = state[: len(tokens), : tokens.shape[1]].to(model.W_E)
    return options


def _greedy(model: LoopedTransformer, runs: Runs) -> Tensor:
    """Without a cache, which has a check of its own, and from the same state at every step."""
    tokens = runs.prompt
    for _ in range(runs.n_greedy):
        logits = next_logits(model, runs, tokens)
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    return tokens


def next_logits(
    model: LoopedTransformer, runs: Runs, tokens: Int[Tensor, "1 pos"]
) -> Float[Tensor, "1 d_vocab"]:
    """Logits after some tokens of the greedy run."""
    tokens = tokens.to(model.W_E.device)
    with torch.no_grad():
        logits: Tensor = model(tokens, **_options(model, tokens, runs.state, runs.n_recurrences[0]))
    return logits[:, -1].cpu()


@contextmanager
def in_dtype(model: LoopedTransformer, dtype: torch.dtype) -> Iterator[None]:
    """The model in a wider dtype for a while; its weights come back bit for bit."""
    before = model.cfg.dtype
    if before != dtype:
        model.to(dtype)
    try:
        yield
    finally:
        if before != dtype:
            model.to(before)


@dataclass(frozen=True)
class Difference:
    """How far two computations of one tensor are apart.

    Args:
        largest: Largest difference from our fp64.
        bound: Largest that rounding explains.
    """

    largest: float
    bound: float

    def __str__(self) -> str:
        return f"{self.largest:.2g} (bound {self.bound:.2g})"

    @property
    def holds(self) -> bool:
        """Whether it is rounding; a difference that is not a number is not."""
        return self.largest <= self.bound

    @property
    def share(self) -> float:
        """The difference as a share of its bound."""
        return self.largest / self.bound if self.bound else float(self.largest > 0)


def difference(theirs: Tensor, exact: Tensor, rounded: Tensor) -> Difference:
    """Of another side's fp32 tensor from ours.

    Args:
        theirs: Computed in fp32 elsewhere.
        exact: Computed here in fp64.
        rounded: Computed here in fp32.
    """
    floor = torch.finfo(torch.float32).eps * float(exact.abs().max())  # one rounding of the result
    rounding = max(float((rounded.double() - exact).abs().max()), floor)
    return Difference(float((theirs.double() - exact).abs().max()), MARGIN * rounding)


# -- the finding ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theirs:
    """What the other side computed in fp32, of the shapes of :class:`Ours`, and finite.

    Args:
        logits: By number of recurrences.
        activations: By our hook name.
        greedy: Prompt and greedy tokens.
        eps: Epsilon of its norms, by our module.
        frequencies: Of its rotary embeddings, ``[half]``.
    """

    logits: Mapping[int, Tensor]
    activations: Mapping[str, Tensor]
    greedy: Int[Tensor, "1 longest"]
    eps: Mapping[str, Any]
    frequencies: Float[Tensor, " half"]


def norms_of(model: LoopedTransformer, sources: Mapping[str, Source]) -> dict[str, str]:
    """Every norm with a gain of its own in a file -> the other side's module, which holds it."""
    norms = [name for name, module in model.named_modules() if isinstance(module, NormWeights)]
    return {
        name: sources[f"{name}.w"].names[0].rpartition(".")[0]
        for name in norms
        if f"{name}.w" in sources
    }


def parity(
    model: LoopedTransformer,
    norms: Mapping[str, str],
    runs: Runs,
    ours: Ours,
    theirs: Theirs,
    how: str,
    about: Mapping[str, Any],
) -> Finding:
    """The finding on two computations of the same runs.

    Args:
        model: Ours.
        norms: Its norms whose epsilon is compared.
        runs: What both ran.
        ours: What it computed.
        theirs: What the other side computed.
        how: What the other side is, for the sentence.
        about: The same, for the numbers.
    """
    logits = {n: difference(theirs.logits[n], *pair) for n, pair in ours.logits.items()}
    inner = {
        name: difference(theirs.activations[name], *pair) for name, pair in ours.activations.items()
    }
    rotary = _rotary_difference(model, theirs.frequencies)
    wrong = [f"logits at R = {n} differ by {d}" for n, d in logits.items() if not d.holds]
    wrong += _first_wrong(inner)
    wrong += _wrong_greedy(model, runs, ours, theirs.greedy, logits[runs.n_recurrences[0]])
    wrong += _wrong_eps(model, norms, theirs.eps)
    if not rotary.holds:
        wrong.append(f"rotary frequencies differ by {rotary} of their size")
    worst = max(inner, key=lambda name: inner[name].share, default=None)
    numbers = {
        **about,
        "compared": True,
        "tokens": list(runs.tokens.shape),
        "logits": {str(n): vars(d) for n, d in logits.items()},
        "activations": len(inner),
        "worst activation": None if worst is None else {"name": worst} | vars(inner[worst]),
        "greedy tokens": runs.n_greedy,
        "norms": len(norms),
        "rotary frequencies": vars(rotary),
    }
    if wrong:
        return Finding(CHECK, Outcome.WRONG, f"{'; '.join(wrong)} ({how})", IF_WRONG, numbers)
    most = max(logits.values(), key=lambda d: d.share)
    found = (
        f"logits at R = {', '.join(map(str, logits))} differ by at most {most}, and the bound is "
        f"{MARGIN:g} x the rounding of our own fp32; {len(inner)} activations, at most "
        f"{max((d.share for d in inner.values()), default=0.0):.0%} of their bounds; "
        f"{runs.n_greedy} greedy tokens, epsilon of {len(norms)} norms and the rotary frequencies "
        f"are the same ({how})"
    )
    return Finding(CHECK, Outcome.EXACT, found, IF_WRONG, numbers)


def _first_wrong(inner: Mapping[str, Difference]) -> list[str]:
    """Activations are in the order of the run: the first that differs is where to look."""
    wrong = [name for name, d in inner.items() if not d.holds]
    if not wrong:
        return []
    first = wrong[0]
    return [f"{len(wrong)} of {len(inner)} activations, the first {first}, by {inner[first]}"]


def _wrong_greedy(
    model: LoopedTransformer, runs: Runs, ours: Ours, theirs: Tensor, logits: Difference
) -> list[str]:
    """The first token that differs, unless the two were equally likely but for rounding."""
    differs = (ours.greedy != theirs)[0].nonzero()
    if not len(differs):
        return []
    at = int(differs[0])
    one, other = int(ours.greedy[0, at]), int(theirs[0, at])
    if at >= runs.prompt.shape[1] and 0 <= other < model.cfg.d_vocab:
        with in_dtype(model, torch.float64):
            exact = next_logits(model, runs, ours.greedy[:, :at])[0]
        if float((exact[one] - exact[other]).abs()) <= 2 * logits.bound:
            return []  # what follows may differ
    return [f"greedy token {at} is {other} there and {one} here"]


def _wrong_eps(
    model: LoopedTransformer, norms: Mapping[str, str], theirs: Mapping[str, Any]
) -> list[str]:
    """The first norms whose epsilon differs."""
    modules = dict(model.named_modules())
    wrong = []
    for name in norms:
        eps, found = modules[name].eps, theirs.get(name)
        # Both are of one config.json; the other side may hold it in fp32.
        if not isinstance(found, float) or not math.isclose(eps, found, rel_tol=1e-6):
            wrong.append(f"epsilon of {name} is {found} there and {eps} here")
    more = [f"and {len(wrong) - 2} more"] if len(wrong) > 2 else []
    return wrong[:2] + more


def _rotary_difference(model: LoopedTransformer, theirs: Tensor) -> Difference:
    """Of the frequencies, as shares of them."""
    exact = inverse_frequencies(model.cfg, torch.float64)
    if theirs.shape != exact.shape:
        return Difference(math.inf, 0.0)
    rounded = inverse_frequencies(model.cfg, torch.float32)
    return difference(theirs / exact, torch.ones_like(exact), rounded / exact)
