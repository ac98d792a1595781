"""Measurements of plausibility: closed forms, a right load, and planted faults."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from torch import Tensor

from tl_looped import LoopedTransformer
from tl_looped.checkpoints import open_checkpoint
from tl_looped.model.config import Injection, RotaryStyle
from tl_looped.verification.certificate import Finding, Outcome
from tl_looped.verification.exchanges import (
    Exchange,
    between_layers,
    everywhere,
    layers_of,
    made,
    most_promising,
    slopes_between,
    within_layers,
)
from tl_looped.verification.passages import Passage, levels, measure, read_passages, rows_of
from tl_looped.verification.plausibility import CHECKS, OF_TEXT, plausibility
from tl_looped.verification.plausible_answers import (
    ENOUGH,
    SMALL,
    answers_by_recurrences,
    answers_of,
    judged,
    load_problems,
    prompt_of,
)
from tl_looped.verification.plausible_continuations import greedy_continuations
from tl_looped.verification.plausible_cost import (
    MEMORY,
    SPEED,
    cost_by_recurrences,
    least,
    weights_in_memory,
)
from tl_looped.verification.plausible_loss import (
    CURVE,
    LOSS,
    curve_numbers,
    is_untrained,
    loss_by_recurrences,
    loss_on_text,
    shuffled_rows,
)
from tl_looped.verification.plausible_settings import (
    SETTINGS,
    loss_under_settings,
    other_settings,
    with_settings,
)
from tl_looped.verification.plausible_text import BOS, TOKENS, bos_as_trained
from tl_looped.verification.plausible_weights import WEIGHTS, loss_under_exchanges
from tl_looped.verification.subject import Subject
from tl_looped.verification.texts import bundled_texts

pytestmark = pytest.mark.once

TEXTS = tuple(one.text for one in bundled_texts())


def load(name: str = "demo", **options: Any) -> LoopedTransformer:
    return LoopedTransformer.from_pretrained(name, device="cpu", **options)


def subject_of(model: LoopedTransformer, texts: tuple[str, ...] | None = TEXTS) -> Subject:
    tokens = torch.arange(48).reshape(2, 24) % model.cfg.d_vocab
    return Subject(open_checkpoint("demo"), model, texts, tokens)


def known(model: LoopedTransformer) -> list[Passage]:
    return [one for one in read_passages(model, TEXTS) if one.register == "word problem"]


def exchange_named(model: LoopedTransformer, name: str) -> Exchange:
    all_of_them = [*between_layers(model), *within_layers(model), *everywhere(model)]
    return next(one for one in all_of_them if one.name == name)


# -- losses, against closed forms -----------------------------------------------------------------


def bigram(dtype: torch.dtype = torch.float64) -> LoopedTransformer:
    """A model whose layers write nothing: what follows depends on the present token alone."""
    model = load("demo-bare", dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("attn.out", "mlp.down")):
                p.zero_()
    return model


def test_a_model_without_weights_has_exactly_the_loss_of_no_knowledge() -> None:
    model = load()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    passages = read_passages(model, TEXTS)
    measured = measure(model, rows_of(model, passages))
    uniform = math.log(model.cfg.d_vocab)
    for one in measured:
        assert torch.equal(one.losses, torch.full_like(one.losses, one.losses[0].item()))
        assert one.loss == pytest.approx(uniform, rel=1e-6)
        assert one.entropy == pytest.approx(uniform, rel=1e-5)
    of = levels(passages, measured, bos=True)
    for register, level in of.items():
        here = [one for one in passages if one.register == register]
        n_tokens = sum(len(one.ids) for one in here)
        n_bytes = sum(len(one.text.encode()) for one in here)
        bits = math.log2(model.cfg.d_vocab) * n_tokens / n_bytes
        assert level.bits_per_byte == pytest.approx(bits, rel=1e-5)
    found = loss_on_text(model, passages, measured)
    assert found.outcome is Outcome.NOT_APPLICABLE
    assert loss_by_recurrences(model, passages, measured).outcome is Outcome.NOT_APPLICABLE


def test_losses_of_a_bigram_model_are_those_of_its_matrices() -> None:
    model = bigram()
    passages = read_passages(model, TEXTS[:3])
    rows = rows_of(model, passages)
    x = model.W_E
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.cfg.eps) * model.final_norm.w
    table = (normed @ model.W_U).log_softmax(-1)
    for one, row in zip(measure(model, rows), rows, strict=True):
        ids = torch.tensor(row)
        expected = -table[ids[:-1], ids[1:]]
        torch.testing.assert_close(one.losses, expected, atol=1e-12, rtol=1e-12)
        p = table[ids[:-1]]
        assert one.entropy == pytest.approx(-(p.exp() * p).sum(-1).mean().item(), rel=1e-12)


def test_a_text_in_a_batch_has_the_losses_that_it_has_alone() -> None:
    model = load(dtype="float64")
    rows = rows_of(model, read_passages(model, TEXTS[:6]))
    together = measure(model, rows, 2)
    for row, one in zip(rows, together, strict=True):
        alone = model(torch.tensor([row]), return_type="loss", loss_per_token=True, n_recurrences=2)
        torch.testing.assert_close(one.losses, alone[0], atol=1e-11, rtol=1e-11)


def test_bits_without_bos_leave_out_the_first_token() -> None:
    model = load(default_prepend_bos=False)
    passages = read_passages(model, TEXTS[:1])
    (one,) = measure(model, rows_of(model, passages))
    (level,) = levels(passages, [one], bos=False).values()
    n_bytes = len(TEXTS[0].encode()) - len(passages[0].first.encode())
    expected = one.losses.sum().item() / math.log(2) / n_bytes
    assert level.bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert len(one.losses) == len(passages[0].ids) - 1


def test_texts_are_cut_to_the_context() -> None:
    model = load(n_ctx=20)
    for one in read_passages(model, TEXTS):
        assert len(one.ids) == 19
        assert (
            TEXTS[0].startswith(one.text)
            or one.register != "encyclopaedia"
            or one.text in (text[: len(one.text)] for text in TEXTS)
        )
    assert all(len(row) == 20 for row in rows_of(model, read_passages(model, TEXTS)))


def test_shuffled_rows_hold_the_same_tokens_behind_the_same_bos() -> None:
    model = load()
    passages = read_passages(model, TEXTS[:4])
    for row, before in zip(
        shuffled_rows(model, passages, 0), rows_of(model, passages), strict=True
    ):
        assert row[0] == before[0] == model.tokenizer.bos_token_id
        assert sorted(row) == sorted(before)
        assert row != before
    assert shuffled_rows(model, passages, 0) != shuffled_rows(model, passages, 1)


@pytest.mark.parametrize("init_mode", ["normal", "fan_in"])
def test_an_untrained_model_is_not_judged(init_mode: str) -> None:
    cfg = replace(load().cfg, init_mode=init_mode)
    model = LoopedTransformer.from_config(cfg, load().tokenizer)
    passages = read_passages(model, TEXTS)
    found = loss_on_text(model, passages, measure(model, rows_of(model, passages)))
    assert found.outcome is Outcome.NOT_APPLICABLE
    assert found.numbers["untrained"]


def test_a_model_that_was_cut_or_looped_without_training_is_not_judged() -> None:
    """The layers are trained, and what they are put to is not."""
    demo, layers = load(), {"prelude": [0, 1], "core": [2, 3, 4, 5], "coda": [6, 7]}
    passages = read_passages(demo, TEXTS)
    measured = measure(demo, rows_of(demo, passages))
    of = levels(passages, measured, bool(demo.cfg.default_prepend_bos))
    for core, injection, trained, judged_so in (
        ([2, 3, 4, 5], Injection.LINEAR, None, True),  # all of them: [0 | I] changes nothing
        ([2, 3, 4, 5], Injection.NONE, None, False),
        ([2, 3, 4, 7], Injection.LINEAR, None, False),
        ([2, 3, 4, 7], Injection.LINEAR, 4, True),
    ):
        made_of = layers | {"core": core, "coda": [core[-1] + 1, core[-1] + 2]}
        cfg = demo.cfg
        cfg.note(injection=injection, source_layers=made_of, trained_recurrences=trained)
        assert (is_untrained(demo, of) is None) == judged_so, (core, injection, trained)


def test_a_model_that_is_confident_and_wrong_is_suspicious() -> None:
    model = load()
    with torch.no_grad():
        model.embed.W_E.copy_(model.embed.W_E.roll(1, 0))  # every token is its neighbour
    passages = read_passages(model, TEXTS)
    found = loss_on_text(model, passages, measure(model, rows_of(model, passages)))
    assert found.outcome is Outcome.SUSPICIOUS
    assert len(found.numbers["suspicious_because"]) >= 3


# -- recurrences ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "numbers"), [(1, [1, 2]), (4, [1, 2, 4, 6, 8]), (32, [1, 16, 32, 48, 64])]
)
def test_recurrences_go_from_one_to_twice_the_trained_number(
    trained: int, numbers: list[int]
) -> None:
    assert curve_numbers(load(), trained) == numbers


def test_a_loop_that_is_better_at_one_recurrence_is_suspicious() -> None:
    control = load("demo-control")  # trained to run its layers once
    passages = read_passages(control, TEXTS)

    def curve() -> Finding:
        measured = measure(control, rows_of(control, passages))
        return loss_by_recurrences(control, passages, measured)

    assert curve().outcome is Outcome.NOT_APPLICABLE  # it is no loop
    control.set_recurrences(2)
    control.cfg.trained_recurrences = 2
    found = curve()
    assert found.outcome is Outcome.SUSPICIOUS
    assert found.numbers["loss"][1] < found.numbers["loss"][2]


@pytest.mark.full
@pytest.mark.parametrize("name", ["demo", "demo-base", "demo-bare"])
def test_right_loops_have_plausible_curves(name: str) -> None:
    model = load(name)
    passages = read_passages(model, TEXTS)
    measured = measure(model, rows_of(model, passages))
    found = loss_by_recurrences(model, passages, measured)
    assert found.outcome is Outcome.PLAUSIBLE
    means = found.numbers["loss"]
    assert min(means, key=means.get) == 4
    assert loss_on_text(model, passages, measured).outcome is Outcome.PLAUSIBLE


# -- exchanges ------------------------------------------------------------------------------------


def test_every_exchange_is_undone_bit_by_bit(every: Callable[[LoopedTransformer], Any]) -> None:
    model = load(dtype="bfloat16")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for exchange in every(model):
        with made(model, exchange):
            changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
        touched = {part.parameter for pair in exchange.pairs for part in pair}
        assert changed == touched
        assert all(p.equal(before[name]) for name, p in model.named_parameters())


@pytest.fixture(params=[within_layers, everywhere])
def every(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_parts_are_the_weights_of_those_names() -> None:
    model = load(dtype="float64")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    parts = layers_of(model)["core.1"]
    attention, mlp = model.blocks[model.loop.index(0, 1)].attn, model.blocks[3].mlp
    for name, shown in (("q", attention.W_Q), ("k", attention.W_K), ("v", attention.W_V)):
        stored = parts[name].of(weights).unflatten(0, (model.cfg.n_heads, -1))
        assert torch.equal(stored.mT, shown)
    assert torch.equal(parts["gate"].of(weights).T, mlp.W_gate)
    assert torch.equal(parts["up"].of(weights).T, mlp.W_in)
    assert torch.equal(parts["down"].of(weights).T, mlp.W_out)


@pytest.mark.parametrize(
    "name", ["q of core.0 and core.1", "gate and up of coda.0", "out transposed of prelude.1"]
)
def test_a_slope_is_the_derivative_of_the_loss_along_the_exchange(name: str) -> None:
    model = load(dtype="float64")
    exchange = exchange_named(model, name)
    tokens = torch.tensor(rows_of(model, known(model))[:1])
    weights = dict(model.named_parameters())
    loss = model(tokens, return_type="loss")
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    plain = {key: p.detach() for key, p in weights.items()}
    start = {key: p.clone() for key, p in plain.items()}
    with made(model, exchange):
        end = {key: p.detach().clone() for key, p in model.named_parameters()}

    def at(share: float) -> float:
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.copy_(start[key] + share * (end[key] - start[key]))
            return float(model(tokens, return_type="loss"))

    step = 1e-5
    measured = (at(step) - at(-step)) / (2 * step)
    at(0.0)
    assert exchange.slope(plain, gradients) == pytest.approx(measured, rel=1e-6)


def test_slopes_by_matrix_products_are_those_one_by_one() -> None:
    model = load(dtype="float64")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    gradients = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in weights.items()
    }
    slopes = slopes_between(model, weights, gradients)
    assert list(slopes) == between_layers(model)
    for exchange in list(slopes)[::17]:
        assert slopes[exchange] == pytest.approx(exchange.slope(weights, gradients), rel=1e-9)
    best = most_promising(slopes, 2)
    for kind in {one.kind for one in slopes}:
        of_kind = sorted(value for one, value in slopes.items() if one.kind == kind)
        chosen = [slopes[one] for one in best if one.kind == kind]
        assert chosen == [value for value in of_kind[:2] if value < 0]


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "v of prelude.0 and prelude.1",
        "q of prelude.0 and prelude.1",
        "gate_up of prelude.1 and coda.0",
        "ln1 of prelude.0 and core.2",
        "q and k of core.3",
        "out transposed of coda.1",
        "gate and up of every layer",
        "state and prelude's output of the injection",
    ],
)
def test_an_exchange_that_was_made_is_found_by_name(name: str) -> None:
    model = load()
    with made(model, exchange_named(model, name)):
        found = loss_under_exchanges(model, known(model))
    assert found.outcome is Outcome.SUSPICIOUS
    assert name in found.numbers["better"]


# -- settings -------------------------------------------------------------------------------------


def test_a_model_with_other_settings_has_the_same_weights() -> None:
    model = load()
    tokens = torch.tensor([[1, 2, 3, 4]])
    same, other = with_settings(model, {}), with_settings(model, {"rotary_base": 5.0})
    with torch.no_grad():
        assert torch.equal(same(tokens), model(tokens))
        assert not torch.equal(other(tokens), model(tokens))
    for name, p in other.named_parameters():
        assert p is dict(model.named_parameters())[name]
    assert model.cfg.rotary_base == 10000.0


def test_other_settings_are_other_ones() -> None:
    for model in (load(), load("demo-bare")):
        for changes in other_settings(model.cfg).values():
            assert all(getattr(model.cfg, key) != value for key, value in changes.items())


@pytest.mark.full
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"rotary_base": 1e5}, "rotary theta 10000"),
        ({"rotary_base": 1e3}, "rotary theta 10000"),
        ({"rotary_style": RotaryStyle.INTERLEAVED}, "rotary pairs half"),
        ({"embed_scale": math.sqrt(128)}, "embedding scale 1"),
        ({"eps": 1e-1}, "eps 0.001"),
        ({"pre_coda_norm": True}, "no norm before the coda"),
    ],
)
def test_a_wrong_setting_is_found_by_name(wrong: dict[str, Any], right: str) -> None:
    model = with_settings(load(), wrong)
    model.set_tokenizer(load().tokenizer)
    found = loss_under_settings(model, known(model))
    assert found.outcome is Outcome.SUSPICIOUS
    assert right in found.numbers["better"]


# -- text -----------------------------------------------------------------------------------------


def test_bos_is_measured_beyond_the_first_token_in_both_settings() -> None:
    model = load()
    passages = read_passages(model, TEXTS[:2])
    found = bos_as_trained(model, passages)
    for setting, key in ((True, "with_bos"), (False, "without_bos")):
        means = []
        for one in passages:
            tokens = torch.tensor([[model.tokenizer.bos_token_id] * setting + list(one.ids)])
            with torch.no_grad():
                losses = model(tokens, return_type="loss", loss_per_token=True)[0]
            assert len(losses) == len(one.ids) - (not setting)
            means.append(losses[-(len(one.ids) - 1) :].mean().item())
        assert found.numbers[key] == pytest.approx(sum(means) / 2, rel=1e-5)


def test_a_model_without_a_bos_token_has_nothing_to_choose() -> None:
    model = load(default_prepend_bos=False)
    model.tokenizer.bos_token = None
    found = bos_as_trained(model, read_passages(model, TEXTS[:2]))
    assert found.outcome is Outcome.NOT_APPLICABLE


# -- continuations, cost, memory ------------------------------------------------------------------


def test_a_model_that_says_one_token_forever_is_suspicious() -> None:
    model = bigram(torch.float32)  # tied: the likeliest token is the present one
    found = greedy_continuations(model)
    assert found.outcome is Outcome.SUSPICIOUS
    assert len(found.numbers["degenerate"]) == len(found.numbers["continuations"])
    assert greedy_continuations(load()).outcome is Outcome.PLAUSIBLE


def test_a_cost_that_does_not_grow_is_suspicious() -> None:
    model, tokens = load(), torch.arange(48).reshape(2, 24)
    assert cost_by_recurrences(model, tokens, [1, 4, 8]).outcome is Outcome.PLAUSIBLE

    def slow(x: Tensor, hook: Any) -> None:
        if x.shape[1] > 4:  # the forward passes
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass

    with model.hooks(fwd_hooks=[("hook_embed", slow)]):
        found = cost_by_recurrences(model, tokens, [1, 16])
    assert found.outcome is Outcome.SUSPICIOUS
    assert cost_by_recurrences(model, tokens, [4]).outcome is Outcome.NOT_APPLICABLE


def test_a_growth_that_overhead_hides_in_part_is_none_to_suspect() -> None:
    assert 1 < least(117.0) < 38
    assert 1.5 > least(3.75) > 1


def test_a_process_that_waits_for_others_is_not_slow() -> None:
    """As on a busy machine, where a long run is interrupted, and a short one is not."""
    model, tokens = load(), torch.arange(48).reshape(2, 24)

    def wait(module: Any, args: Any, options: dict[str, Any]) -> None:
        if options["n_recurrences"] > 1:
            time.sleep(0.5)

    handle = model.register_forward_pre_hook(wait, with_kwargs=True)
    try:
        found = cost_by_recurrences(model, tokens, [1, 8])
    finally:
        handle.remove()
    assert found.outcome is Outcome.PLAUSIBLE
    clock = found.numbers["tokens_per_second"]["forward"]
    assert clock[8] < 200 < clock[1]


def test_weights_that_are_held_twice_are_suspicious() -> None:
    model = load()
    n_bytes = sum(p.nbytes for p in model.parameters())
    found = weights_in_memory(model)
    assert found.outcome is Outcome.PLAUSIBLE
    assert found.numbers["parameters"] == found.numbers["held"] == n_bytes
    model.kept = {"a": [p.detach().clone() for p in model.parameters()]}
    found = weights_in_memory(model)
    assert found.outcome is Outcome.SUSPICIOUS
    assert found.numbers["held"] == 2 * n_bytes


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "n_parameters", "outcome"),
    [
        ({1: 0, 4: 8}, 20, 10**9, Outcome.PLAUSIBLE),
        ({1: 0, 4: 1}, 20, 10**6, Outcome.PLAUSIBLE),
        ({1: 0, 4: 0}, 100, SMALL - 1, Outcome.NOT_APPLICABLE),
        ({1: 0, 4: 0}, ENOUGH - 1, SMALL, Outcome.NOT_APPLICABLE),
        ({1: 0, 4: 0}, ENOUGH, SMALL, Outcome.SUSPICIOUS),
        ({1: 15, 4: 2}, 20, 10**9, Outcome.SUSPICIOUS),
        ({1: 4, 4: 2}, 20, 10**9, Outcome.PLAUSIBLE),  # within the intervals
        ({4: 3}, 20, 10**9, Outcome.PLAUSIBLE),
    ],
)
def test_what_numbers_of_right_answers_say(
    right: dict[int, int], n: int, n_parameters: int, outcome: Outcome
) -> None:
    assert judged(right, n, 4, n_parameters)[0] is outcome


def test_prompts_fit_and_answers_are_those_of_generation() -> None:
    model = load()
    (problem, other), _ = load_problems("bundled", 2, 0)
    prompt = prompt_of(model, problem.question)
    assert isinstance(prompt, str)
    assert prompt.endswith(f"{problem.question}\n")
    model.cfg.n_ctx = 4096
    assert prompt_of(model, problem.question).count("####") == 4
    answers = answers_of(model, [problem.question, other.question], 1)
    for one, answer in zip((problem, other), answers, strict=True):
        alone = answers_of(model, [one.question], 1)
        assert alone == [answer]
        assert "\n\n" not in answer


@pytest.mark.full
def test_answers_of_the_demo_are_counted_at_each_number() -> None:
    found = answers_by_recurrences(load(), 3)
    assert found.outcome in (Outcome.NOT_APPLICABLE, Outcome.PLAUSIBLE)
    assert list(found.numbers["right"]) == [1, 2, 4, 8]
    assert found.numbers["rows"] == list(load_problems("bundled", 3, 0)[1])
    assert all(
        low <= k / 3 <= high
        for k, (low, high) in zip(
            found.numbers["right"].values(), found.numbers["wilson_95"].values(), strict=True
        )
    )


# -- all of them ----------------------------------------------------------------------------------


def outcomes(model: LoopedTransformer) -> dict[str, Outcome]:
    return {one.check: one.outcome for one in plausibility(subject_of(model))}


PLAUSIBLE = dict.fromkeys(CHECKS, Outcome.PLAUSIBLE)


@pytest.mark.full
@pytest.mark.parametrize("name", ["demo", "demo-base", "demo-bare", "demo-control"])
def test_right_loads_raise_no_suspicion(name: str) -> None:
    no_loop = {CURVE: Outcome.NOT_APPLICABLE} if name == "demo-control" else {}
    assert outcomes(load(name)) == PLAUSIBLE | no_loop


def test_without_a_tokenizer_the_cost_is_measured_alone() -> None:
    model = load()
    model.tokenizer = None
    found = {one.check: one.outcome for one in plausibility(subject_of(model, None))}
    measured = {SPEED: Outcome.PLAUSIBLE, MEMORY: Outcome.PLAUSIBLE}
    assert found == dict.fromkeys(OF_TEXT, Outcome.NOT_APPLICABLE) | measured


@pytest.mark.full
@pytest.mark.parametrize("n_ctx", [1, 2, 12])
def test_a_short_context_is_no_error(n_ctx: int) -> None:
    found = outcomes(load(n_ctx=n_ctx, dtype="bfloat16"))
    assert tuple(found) == CHECKS
    if n_ctx == 1:
        assert all(found[check] is Outcome.NOT_APPLICABLE for check in OF_TEXT)


def exchanged(model: LoopedTransformer) -> LoopedTransformer:
    a, b = model.core[0].attn.out.data, model.core[1].attn.out.data
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
    return model


def shifted(model: LoopedTransformer) -> LoopedTransformer:
    model.embed.W_E.data.copy_(model.embed.W_E.data.roll(1, 0))
    return model


def other_theta(model: LoopedTransformer) -> LoopedTransformer:
    return _of(model, rotary_base=1e5)


def without_bos(model: LoopedTransformer) -> LoopedTransformer:
    return load(default_prepend_bos=False)


def lower_case(model: LoopedTransformer) -> LoopedTransformer:
    backend = model.tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    return model


def twice(model: LoopedTransformer) -> LoopedTransformer:
    model.kept = [p.detach().clone() for p in model.parameters()]
    return model


def _of(model: LoopedTransformer, **changes: Any) -> LoopedTransformer:
    other = with_settings(model, changes)
    other.set_tokenizer(model.tokenizer)
    return other


FAULTS: dict[str, Callable[[LoopedTransformer], LoopedTransformer]] = {
    WEIGHTS: exchanged,
    SETTINGS: other_theta,
    BOS: without_bos,
    TOKENS: lower_case,
    MEMORY: twice,
}


@pytest.mark.full
@pytest.mark.parametrize("check", FAULTS)
def test_a_fault_makes_its_own_finding_suspicious_and_no_other(check: str) -> None:
    assert outcomes(FAULTS[check](load())) == PLAUSIBLE | {check: Outcome.SUSPICIOUS}


@pytest.mark.full
def test_a_model_that_reads_other_tokens_is_suspicious_wherever_its_loss_is_looked_at() -> None:
    """What is compared with a loss that is lost may look better than it, by chance."""
    found = outcomes(shifted(load()))
    assert found[LOSS] is Outcome.SUSPICIOUS
    of_no_loss = (TOKENS, SPEED, MEMORY)
    assert {check: found[check] for check in of_no_loss} == dict.fromkeys(
        of_no_loss, Outcome.PLAUSIBLE
    )
