"""Leaving the loop early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import TOLERANCE, VARIANTS, exact_config, load_golden
from torch import Tensor

from tl_looped import (
    InputError,
    InvalidDecompositionError,
    LoopedKeyValueCache,
    LoopedTransformer,
    MissingActivationError,
)
from tl_looped.exits import (
    Acceleration,
    ArgmaxStability,
    EntropyDifference,
    ExitAt,
    ExitReadout,
    ExitResult,
    ExitRule,
    GateExit,
    KLDivergence,
    LatentDifference,
)

pytestmark = pytest.mark.usefixtures("without_gradients")


def model_of(kind: str, **changes: Any) -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config(**(VARIANTS[kind] | changes)))


def recurrences_run(model: LoopedTransformer, tokens: Tensor, **run: Any) -> int:
    """How many recurrences a run really computes."""
    count = []
    hooks = [
        (f"recurrence.{r}.hook_state_out", lambda value, hook: count.append(hook.recurrence))
        for r in range(model.loop.R)
    ]
    model.run_with_hooks(tokens, fwd_hooks=hooks, **run)
    assert count == list(range(len(count)))
    return len(count)


# -- the reference ------------------------------------------------------------------------------


def test_the_gate_rule_of_the_reference() -> None:
    golden = load_golden("ouro")
    model = golden.load()
    found = model(golden.tokens, exit_rule=GateExit(0.5))
    assert torch.equal(found.recurrence, golden.tensors["exit_steps_threshold_0.5"])
    torch.testing.assert_close(
        found.output, golden.tensors["logits_exit_threshold_0.5"], **TOLERANCE
    )
    # At threshold 1 all take the last step; it is the model's ordinary run.
    last = model(golden.tokens, exit_rule=GateExit(1.0))
    assert bool((last.recurrence == 3).all())
    torch.testing.assert_close(last.output, golden.tensors["logits"], **TOLERANCE)


def test_leaving_at_a_recurrence_gives_the_references_exit_logits() -> None:
    golden = load_golden("ouro")
    model = golden.load()
    for t in range(4):
        found = model(golden.tokens, exit_rule=ExitAt(t))
        torch.testing.assert_close(found.output, golden.tensors[f"exit_logits.{t}"], **TOLERANCE)
        assert bool((found.recurrence == t).all())
        assert recurrences_run(model, golden.tokens, exit_rule=ExitAt(t)) == t + 1


@pytest.mark.parametrize(
    "name", ["huginn", "retrofit_llama", "retrofit_tinyllama", "retrofit_olmo"]
)
def test_leaving_at_a_recurrence_is_a_run_of_that_many(name: str) -> None:
    golden = load_golden(name)
    model = golden.load()
    for n in (1, 2):
        found = model(golden.tokens, exit_rule=ExitAt(n - 1), **golden.run)
        torch.testing.assert_close(found.output, golden.tensors[f"logits_r{n}"], **TOLERANCE)
    late = model(golden.tokens, exit_rule=ExitAt(30), **golden.run)
    torch.testing.assert_close(late.output, golden.tensors["logits"], **TOLERANCE)
    assert bool((late.recurrence == model.loop.R - 1).all())


def test_bf16_leaves_earlier_at_threshold_one_as_the_reference_does() -> None:
    golden = load_golden("ouro")
    model = golden.load(dtype="bfloat16")
    model.exit_gate.bias.add_(3.0)
    reference, exact = (
        model(golden.tokens, exit_rule=GateExit(1.0, in_fp32=fp32)).recurrence
        for fp32 in (False, True)
    )
    readout = model.exits(golden.tokens)
    # 1 - sigmoid is rounded in bf16: where the product of what is left is 0, all mass has gone.
    left = (1 - readout.gate_logits.sigmoid()).cumprod(-1)
    assert int(reference.min()) < 3
    assert bool((exact == 3).all())
    assert torch.equal(reference, readout.recurrence())
    assert torch.equal(exact, readout.float().recurrence())
    assert bool((left[reference < 3].min(-1).values < 0.004).all())


def test_readouts_in_fp32() -> None:
    readout = ExitReadout(torch.zeros(1, 1, 3).bfloat16(), torch.ones(3, 1, 1, 2).bfloat16())
    full = readout.float()
    assert full.distribution.tolist() == [[[0.5, 0.25, 0.25]]]
    assert full.expected_logits.dtype == full.gate_logits.dtype == torch.float32


# -- every rule, from the states of a whole run ---------------------------------------------------


def quantities(model: LoopedTransformer, tokens: Tensor) -> dict[str, Tensor]:
    """What the rules look at, ``[recurrence, batch, pos]``, NaN where there is too little of it."""
    _, cache = model.run_with_cache(tokens)
    x = cache.stack_recurrences("state_out").double()
    log_p = model.coda_lens(x.float(), after_loop_norm=True).double().log_softmax(-1)
    p, step = log_p.exp(), x.diff(dim=0)
    size = x.pow(2).sum(-1).sqrt()
    entropy = -(p * log_p).sum(-1)
    found = {
        "latent": step.pow(2).sum(-1).sqrt() / size[1:],
        "acceleration": step.diff(dim=0).pow(2).sum(-1).sqrt() / size[2:],
        "kl": (p[1:] * (log_p[1:] - log_p[:-1])).sum(-1),
        "entropy": entropy.diff(dim=0).abs(),
        "argmax": (p.argmax(-1)[1:] != p.argmax(-1)[:-1]).double(),
    }
    missing = torch.full((2, *tokens.shape), torch.nan).double()
    return {
        name: torch.cat((missing[: len(x) - len(value)], value)) for name, value in found.items()
    }


def first_time(below: Tensor, in_a_row: int) -> Tensor:
    """First recurrence that ends so many true ones in a row, else the last."""
    n = len(below)
    out = torch.full(below.shape[1:], n - 1)
    for r in reversed(range(in_a_row - 1, n)):
        out[below[r - in_a_row + 1 : r + 1].all(0)] = r
    return out


RULES: list[tuple[str, Any, int]] = [
    ("latent", LatentDifference, 1),
    ("latent", LatentDifference, 3),
    ("acceleration", Acceleration, 2),
    ("kl", KLDivergence, 1),
    ("kl", KLDivergence, 2),
    ("entropy", EntropyDifference, 1),
]


@pytest.mark.parametrize("kind", ["pre-injection", "residual-injection", "sandwich-loop-norm"])
@pytest.mark.parametrize(("name", "rule", "patience"), RULES)
def test_a_token_leaves_when_its_quantity_falls_below_the_threshold(
    kind: str, name: str, rule: Any, patience: int, tokens: Tensor
) -> None:
    model = model_of(kind, n_recurrences=8)
    values = quantities(model, tokens)[name]
    known = values[~values.isnan()].sort().values
    seen = set()
    for share in (0.1, 0.4, 0.7, 0.95):
        # Between two values that occur, so that rounding decides nothing.
        at = int(share * len(known))
        threshold = float((known[at] + known[at + 1]) / 2)
        found = model(tokens, exit_rule=rule(threshold, patience))
        expected = first_time(values < threshold, patience)
        assert torch.equal(found.recurrence, expected)
        seen |= set(expected.flatten().tolist())
        ran = recurrences_run(model, tokens, exit_rule=rule(threshold, patience))
        assert ran == int(expected.max()) + 1
    assert len(seen) > 1


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_a_token_leaves_when_its_likeliest_token_is_stable(patience: int, tokens: Tensor) -> None:
    model = model_of("pre-injection", n_recurrences=8)
    changed = quantities(model, tokens)["argmax"]
    found = model(tokens, exit_rule=ArgmaxStability(patience))
    assert torch.equal(found.recurrence, first_time(changed == 0, patience))
    assert int(found.recurrence.max()) > int(found.recurrence.min())


def test_each_token_reaches_the_coda_with_the_state_it_left_with(tokens: Tensor) -> None:
    model = model_of("residual-injection", n_recurrences=8)
    values = quantities(model, tokens)["latent"]
    rule = LatentDifference(float(values[~values.isnan()].median()))
    states, seen = [], {}
    hooks = [
        (f"recurrence.{r}.hook_state_out", lambda value, hook: states.append(value))
        for r in range(8)
    ]
    hooks.append(("coda.0.hook_resid_pre", lambda value, hook: seen.update(x=value)))
    found = model.run_with_hooks(tokens, fwd_hooks=hooks, exit_rule=rule)
    assert len(set(found.recurrence.flatten().tolist())) > 2
    chosen = torch.stack(states).take_along_dim(found.recurrence[None, ..., None], 0)[0]
    scale = (chosen.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    assert_same(seen["x"], chosen / scale * model.final_norm.w)


# -- around it ------------------------------------------------------------------------------------


def test_what_a_run_returns_with_a_rule(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    logits = model(tokens, n_recurrences=2)
    for return_type in ("logits", "loss", "both", None):
        found = model(tokens, return_type=return_type, exit_rule=ExitAt(1))
        assert isinstance(found, ExitResult)
        assert found.recurrence.shape == tokens.shape
        expected = model(tokens, return_type=return_type, n_recurrences=2)
        if return_type is None:
            assert found.output is expected is None
            continue
        one = (found.output, expected) if return_type == "both" else ((found.output,), (expected,))
        for output, wanted in zip(*one, strict=True):
            assert_same(output, wanted)
    assert_same(model(tokens, exit_rule=ExitAt(1)).output, logits)


def test_padding_waits_for_nobody(tokens: Tensor) -> None:
    model = model_of("pre-injection", n_recurrences=6)
    values = quantities(model, tokens[:, 3:])["latent"]
    rule = LatentDifference(float(values[~values.isnan()].quantile(0.6)))
    alone = model(tokens[:, 3:], exit_rule=rule)
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    padded = model(tokens, attention_mask=mask, exit_rule=rule)
    assert torch.equal(padded.recurrence[:, 3:], alone.recurrence)
    assert bool((padded.recurrence[:, :3] == -1).all())
    assert_same(padded.output[:, 3:], alone.output)


def test_the_cache_of_a_run_that_left_early_says_so(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    _, cache = model.run_with_cache(tokens, exit_rule=ExitAt(1))
    assert cache["resid_post", (1, 2)].shape == (2, 9, 32)
    with pytest.raises(MissingActivationError, match="early"):
        cache["resid_post", (2, 0)]
    with pytest.raises(InvalidDecompositionError, match="exit_rule"):
        cache.stack_head_results()
    inside = cache.decompose_resid((1, 2)).sum(0)
    assert_same(inside, cache["resid_pre", (1, 2)])


def test_without_a_coda_the_final_norm_of_an_early_exit_is_not_in_the_cache(
    tokens: Tensor,
) -> None:
    model = model_of("pre", n_coda=0)
    steps = quantities(model, tokens)["latent"]
    rule = LatentDifference(float(steps[~steps.isnan()].quantile(0.4)))  # some stay to the end
    found, cache = model.run_with_cache(tokens, exit_rule=rule)
    assert {3} < set(found.recurrence.flatten().tolist())
    for call in (
        lambda: cache.logit_attrs(cache["resid_post", -1][None], 5),
        lambda: cache.accumulated_resid(apply_ln=True),
        lambda: cache.decompose_resid(),
    ):
        with pytest.raises(InvalidDecompositionError, match="exit_rule"):
            call()


def test_a_row_leaves_by_its_last_real_position(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    with pytest.raises(InputError, match="pad on the left"):
        model(
            tokens,
            attention_mask=mask,
            past_kv_cache=LoopedKeyValueCache(),
            exit_rule=LatentDifference(0.1),
        )


def test_a_hook_on_the_gate_decides_who_leaves(tokens: Tensor) -> None:
    model = model_of("sandwich-loop-norm")

    def open_gate(gate: Tensor, hook: Any) -> Tensor:
        gate[:, :4] = 50.0
        return gate

    found = model.run_with_hooks(
        tokens,
        fwd_hooks=[("recurrence.1.hook_exit_gate", open_gate)],
        exit_rule=GateExit(0.999999),
    )
    assert bool((found.recurrence[:, :4] == 1).all())
    assert bool((found.recurrence[:, 4:] == 3).all())


class Never(ExitRule):
    """A rule of a user's own."""

    def wants(self, history: Any) -> Tensor:
        return torch.zeros(history.states[-1].shape[:2], dtype=torch.bool)


def test_a_rule_of_ones_own(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    found = model(tokens, exit_rule=Never())
    assert bool((found.recurrence == 3).all())
    assert_same(found.output, model(tokens))


def test_rules_that_make_no_sense(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    with pytest.raises(InputError, match="exit gate"):
        model(tokens, exit_rule=GateExit(0.5))
    with pytest.raises(InputError, match="one recurrence"):
        model(tokens, exit_rule=ExitAt(0), n_recurrences=0)
    with pytest.raises(InputError, match="stop_at_layer"):
        model(tokens, exit_rule=ExitAt(0), stop_at_layer=2)
    with pytest.raises(InputError, match="threshold"):
        LatentDifference(-0.1)
    with pytest.raises(InputError, match="patience"):
        KLDivergence(0.1, patience=0)
    with pytest.raises(InputError, match="threshold"):
        GateExit(-3.0)
    with pytest.raises(InputError, match="recurrence"):
        ExitAt(-1)
