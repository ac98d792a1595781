"""Interventions: what they compute, by hand on golden checkpoints; nothing of them stays behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jaxtyping
import pytest
import torch
from byhand import ByHand
from closeness import SAME, assert_same
from conftest import CASES, TOLERANCE, VARIANTS, exact_config, load_golden
from refusals import refused
from torch import Tensor

from tl_looped import (
    ArgumentTypeError,
    InitialState,
    Injection,
    InputError,
    InvalidDecompositionError,
    LayerIndexError,
    LoopedTransformer,
    metrics,
)
from tl_looped import interventions as iv
from tl_looped.exits import KLDivergence

pytestmark = pytest.mark.usefixtures("without_gradients")


class Case:
    """A golden checkpoint, its reference run, and the same run by hand."""

    def __init__(self, name: str) -> None:
        golden = load_golden(name)
        self.model = golden.load(dtype=torch.float64)
        self.tokens, self.run = golden.tokens, golden.run
        self.state = None if not self.run else self.run["initial_state"].double()
        self.hand = ByHand(self.model, self.tokens)
        self.plain = golden.tensors["logits"].double()

    def logits(self, *interventions: iv.Intervention, **run: Any) -> Tensor:
        with self.model.intervening(*interventions):
            found = self.model(self.tokens, **(self.run | run))
        assert isinstance(found, Tensor)
        return found

    def same(self, found: Tensor, by_hand: Tensor) -> None:
        """Equal, and not by doing nothing."""
        assert_same(found, by_hand)
        assert (found - self.plain).abs().max() > 1e-3


@pytest.fixture(scope="module")
def llama() -> Case:
    return Case("retrofit_tinyllama")


@pytest.fixture(scope="module", params=["retrofit_tinyllama", "ouro"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_by_hand_is_the_reference_run(case: Case) -> None:
    torch.testing.assert_close(case.hand.run(case.state), case.plain, **TOLERANCE)


# -- recurrences and layers ---------------------------------------------------------------------


def test_skipped_recurrences_pass_the_state_on(case: Case) -> None:
    hand = case.hand

    def step(r: int, x: Tensor, e: Tensor) -> Tensor:
        return x if r in (1, 3) else hand.recurrence(r, x, e)

    case.same(case.logits(iv.SkipRecurrences([1, -2 if hand.cfg.n_recurrences == 5 else 3])),
              hand.run(case.state, step))  # fmt: skip


def test_a_repeated_recurrence_runs_again(case: Case) -> None:
    hand = case.hand

    def step(r: int, x: Tensor, e: Tensor) -> Tensor:
        for _ in range(3 if r == 1 else 1):
            x = hand.recurrence(r, x, e)
        return x

    case.same(case.logits(iv.RepeatRecurrence(1, times=2)), hand.run(case.state, step))
    nested = case.logits(iv.RepeatRecurrence(1), iv.RepeatRecurrence(1))
    assert_same(nested, hand.run(case.state, step))


@pytest.mark.parametrize("name", CASES)
def test_skipping_and_repeating_count_recurrences(name: str) -> None:
    golden = load_golden(name)
    model, run = golden.load(dtype=torch.float64), golden.run
    for change, n in ((iv.SkipRecurrences(2), 3), (iv.RepeatRecurrence(0, 2), 6)):
        with model.intervening(change):
            found = model(golden.tokens, n_recurrences=4, **run)
        assert_same(found, model(golden.tokens, n_recurrences=n, **run))


def test_an_edit_at_a_repeated_recurrence_is_made_in_every_pass(llama: Case) -> None:
    fired: list[int | None] = []
    hooks = [("recurrence.2.hook_state_out", lambda x, hook: fired.append(hook.recurrence))]
    with llama.model.intervening(iv.RepeatRecurrence(2, times=3)):
        llama.model.run_with_hooks(llama.tokens, fwd_hooks=hooks, **llama.run)
    assert fired == [2, 2, 2, 2]


def test_skipped_layers_write_nothing(case: Case) -> None:
    hand = case.hand

    def step(r: int, x: Tensor, e: Tensor) -> Tensor:
        layers = [layer for i, layer in enumerate(hand.core) if i != 1 or r not in (0, 3)]
        return hand.recurrence(r, x, e, layers)

    case.same(case.logits(iv.SkipLayers(1, [0, 3])), hand.run(case.state, step))


@pytest.mark.parametrize("name", CASES)
def test_a_skipped_layer_returns_what_it_received(name: str) -> None:
    golden = load_golden(name)
    model = golden.load()
    with model.intervening(iv.SkipLayers([0, 2], slice(2, None))):
        _, cache = model.run_with_cache(golden.tokens, **golden.run)
    for r in range(cache.n_recurrences):
        for layer in range(3):
            before, after = cache["resid_pre", (r, layer)], cache["resid_post", (r, layer)]
            assert torch.equal(before, after) == (r >= 2 and layer in (0, 2))


def test_the_decomposition_of_skipped_layers_stays_exact(llama: Case) -> None:
    with llama.model.intervening(iv.SkipLayers(1)):
        _, cache = llama.model.run_with_cache(llama.tokens, **llama.run)
    parts = cache.decompose_resid()
    assert_same(parts.sum(0), cache["resid_post", -1])


def test_layers_in_another_order(case: Case) -> None:
    hand = case.hand
    order = [2, 0, 0, 1][: len(hand.core)]

    def step(r: int, x: Tensor, e: Tensor) -> Tensor:
        layers = [hand.core[i] for i in order] if r in (1, 2) else None
        return hand.recurrence(r, x, e, layers)

    found = case.logits(iv.ReorderLayers(order, slice(1, 3)))
    case.same(found, hand.run(case.state, step))


def test_swapped_layers_and_swapped_back(case: Case) -> None:
    hand = case.hand
    swapped = [hand.core[1], hand.core[0], *hand.core[2:]]

    def step(r: int, x: Tensor, e: Tensor) -> Tensor:
        return hand.recurrence(r, x, e, swapped)

    case.same(case.logits(iv.SwapLayers(0, 1)), hand.run(case.state, step))
    twice = case.logits(iv.SwapLayers(0, 1), iv.SwapLayers(1, 0))
    assert torch.equal(twice, case.logits())


def test_all_weights_of_a_layer_move(variant: LoopedTransformer) -> None:
    """Of every norm layout, biases and norms of queries included: a layer alone is its weights."""
    model, tokens = variant, torch.tensor([[3, 1, 4, 1, 5]])
    gains = torch.Generator().manual_seed(1)
    for parameter in model.core.parameters():
        if parameter.ndim < 2 or parameter.shape[-1] == 8:
            parameter.copy_(torch.rand(parameter.shape, generator=gains) + 0.5)
    with model.intervening(iv.ReorderLayers([2, 2, 2])):
        found = model(tokens, n_recurrences=2)
    last = {n: p.clone() for n, p in model.core[2].named_parameters()}
    for i in (0, 1):
        model.core[i].load_state_dict(last)
    assert torch.equal(found, model(tokens, n_recurrences=2))


# -- attention and fixed points -----------------------------------------------------------------


def test_frozen_attention(llama: Case) -> None:
    hand, kept = llama.hand, {}

    def step(r: int, x: Tensor, e: Tensor) -> Tensor:
        x = hand.inject(x, e)
        for i, layer in enumerate(hand.core):
            pattern, values = hand.pieces(x, layer)
            if r == 1:
                kept[i] = pattern
            if r > 1 and i in (0, 2):
                pattern[:, [1, 3]] = kept[i][:, [1, 3]]
            x = hand.after_attention(x, layer, torch.einsum("bhqk,bkhd->bqhd", pattern, values))
            x = hand.after_mlp(x, layer, hand.neurons(x, layer))
        return x

    frozen = iv.FreezeAttention(1, layers=[0, 2], heads=[1, 3])
    llama.same(llama.logits(frozen), hand.run(llama.state, step))


def test_frozen_attention_holds_what_an_edit_left(llama: Case) -> None:
    def last_head_looks_at_the_first_token(pattern: Tensor, hook: Any) -> Tensor:
        pattern[:, -1] = 0.0
        pattern[:, -1, :, 0] = 1.0
        return pattern

    name = "recurrence.0.blocks.1.attn.hook_pattern"
    with llama.model.intervening(iv.FreezeAttention(0)):
        _, cache = llama.model.run_with_cache(llama.tokens, **llama.run)
        with llama.model.hooks([(name, last_head_looks_at_the_first_token)]):
            _, edited = llama.model.run_with_cache(llama.tokens, **llama.run)
    patterns = cache.stack_recurrences("pattern")
    assert (patterns == patterns[:1]).all()
    assert (edited["pattern", (4, 1)][:, -1, :, 0] == 1.0).all()
    assert torch.equal(edited["pattern", (4, 1)][:, :-1], edited["pattern", (0, 1)][:, :-1])


def test_a_frozen_loop_ends_where_it_froze(case: Case) -> None:
    case.same(case.logits(iv.FreezeLoop(1)), case.hand.run(case.state, n_recurrences=2))
    with case.model.intervening(iv.FreezeLoop(1)):
        _, cache = case.model.run_with_cache(case.tokens, **case.run)
    states = cache.stack_recurrences("resid_post")
    assert (states[1:] == states[1]).all()
    assert not torch.equal(states[0], states[1])


def contracting() -> LoopedTransformer:
    """Injection, and a loop that reaches its fixed point in fp64 to the last bits."""
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))
    of_state = model.injection.weight.detach()[:, : model.cfg.d_model]
    of_state *= 0.1 / of_state.norm(2)
    return model


def test_at_its_fixed_point_nothing_changes() -> None:
    model, tokens = contracting(), torch.tensor([[7, 8, 9, 3]])
    point = iv.fixed_point(model, tokens)
    assert point.step < 1e-14
    start = {"initial_state": point.state}
    plain = model(tokens, **start)
    for unchanged in (
        iv.FreezeLoop(0, at=point),
        iv.FreezeLoop(1),
        iv.FreezeAttention(0),
        iv.SkipRecurrences(2),
        iv.RepeatRecurrence(3),
    ):
        with model.intervening(unchanged):
            assert_same(model(tokens, **start), plain)
    with model.intervening(iv.ReplaceInitialState(point.state)):
        assert torch.equal(model(tokens), plain)
    with model.intervening(iv.FreezeLoop(0, at=point)):  # from any start
        assert_same(model(tokens, state_seed=9), plain)


def test_no_fixed_point_is_an_error(llama: Case) -> None:
    with refused(InputError, "after 3 recurrences", "tolerance=math.inf"):
        iv.fixed_point(llama.model, llama.tokens, 3, **llama.run)
    taken = iv.fixed_point(llama.model, llama.tokens, 3, math.inf, **llama.run)
    _, cache = llama.model.run_with_cache(llama.tokens, n_recurrences=3, **llama.run)
    assert_same(taken.state, cache["recurrence.2.hook_state_out"])
    assert_same(taken.layers, cache.stack_recurrences("resid_post")[-1])
    before, after = (cache[f"recurrence.{r}.hook_state_out"] for r in (1, 2))
    step = ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean(-1).max()
    assert taken.step == pytest.approx(float(step), rel=SAME)


# -- states and injection -----------------------------------------------------------------------


def test_the_initial_state_is_replaced(case: Case) -> None:
    hand, model = case.hand, case.model
    zeros = torch.zeros(1, case.tokens.shape[1], hand.cfg.d_model, dtype=torch.float64)
    other = torch.randn(
        zeros.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    # Without injection the word is refused: zeros would leave nothing of the prompt.
    word = "zeros" if hand.cfg.injection is not Injection.NONE else zeros
    for given, state in ((word, zeros), (other, other)):
        with model.intervening(iv.ReplaceInitialState(given)):
            _, cache = model.run_with_cache(case.tokens)
        case.same(cache["unembed.hook_out"], hand.run(state))
        assert cache.state_given


def test_the_seed_of_the_initial_state_is_replaced_and_recorded(llama: Case) -> None:
    model, tokens = llama.model, llama.tokens
    with model.intervening(iv.ReplaceInitialState(5)):
        logits, cache = model.run_with_cache(tokens)
    assert_same(logits, model(tokens, state_seed=5))
    assert cache.state_seed == 5


def test_another_prompts_fixed_point_as_the_start() -> None:
    model = contracting()
    donor = iv.fixed_point(model, torch.tensor([[1, 2, 3, 4]]))
    with model.intervening(iv.ReplaceInitialState(donor.state)):
        _, cache = model.run_with_cache(torch.tensor([[7, 8, 9, 3]] * 2), n_recurrences=64)
    assert torch.equal(cache["hook_initial_state"], donor.state.expand(2, -1, -1))
    reached = iv.fixed_point(model, torch.tensor([[7, 8, 9, 3]])).state
    assert_same(cache["recurrence.63.hook_state_out"], reached.expand(2, -1, -1))


def test_scaled_injection(llama: Case) -> None:
    hand = llama.hand
    for factor in (0.0, -0.5):

        def step(r: int, x: Tensor, e: Tensor, factor: float = factor) -> Tensor:
            return hand.recurrence(r, x, e * factor if r >= 2 else e)

        found = llama.logits(iv.ScaleInjection(factor, slice(2, None)))
        llama.same(found, hand.run(llama.state, step))
    half = iv.ScaleInjection(0.5)
    assert torch.equal(llama.logits(half, half), llama.logits(iv.ScaleInjection(0.25)))


def test_noise_is_of_the_size_that_is_asked_for(llama: Case) -> None:
    model, hand = llama.model, llama.hand
    _, plain = model.run_with_cache(llama.tokens, **llama.run)
    with model.intervening(iv.AddNoise(0.3, 1, seed=4)):
        logits, noisy = model.run_with_cache(llama.tokens, **llama.run)
    name = "recurrence.1.hook_state_in"
    added = noisy[name] - plain[name]
    relative = added / plain[name].square().mean(-1, keepdim=True).sqrt()
    # A normal that is cut at three standard deviations has 0.98658 of their square root.
    assert relative.std() == pytest.approx(0.3 * 0.98658, rel=0.05)
    assert relative.abs().max() <= 0.9 + 1e-4
    assert torch.equal(noisy["recurrence.0.hook_state_out"], plain["recurrence.0.hook_state_out"])

    def step(r: int, x: Tensor, e: Tensor) -> Tensor:
        return hand.recurrence(r, x + added if r == 1 else x, e)

    llama.same(logits, hand.run(llama.state, step))


def test_noise_depends_on_seed_recurrence_and_position_alone(llama: Case) -> None:
    model = llama.model

    def noise(tokens: Tensor, seed: int = 4, std: float = 1.0, **run: Any) -> Tensor:
        with model.intervening(iv.AddNoise(std, seed=seed, relative=False)):
            _, cache = model.run_with_cache(tokens, initial_state="zeros", **run)
        return cache["recurrence.0.hook_state_in"]

    rows = torch.tensor([[5, 6, 7], [8, 9, 10]])
    found = noise(rows)
    assert torch.equal(found[0], found[1])
    assert torch.equal(noise(rows[:1, :2])[0], found[0, :2])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(noise(rows, attention_mask=mask)[0, 1:], found[0, :2])
    assert not torch.equal(noise(rows, seed=5), found)
    assert_same(noise(rows, std=2.0), 2.0 * found)
    with model.intervening(iv.AddNoise(0.0)):
        assert torch.equal(model(rows), model(rows))


def test_prompts_exchange_their_states(llama: Case) -> None:
    model = llama.model
    tokens = torch.tensor([[5, 6, 7, 8], [30, 20, 10, 9], [1, 2, 3, 4]])
    state = torch.randn(3, 4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hand = ByHand(model, tokens)
    for rows, expected in (([1, 2, 0], [1, 2, 0]), (None, [2, 1, 0])):

        def step(r: int, x: Tensor, e: Tensor, to: list[int] = expected) -> Tensor:
            return hand.recurrence(r, x[to] if r == 2 else x, e)

        with model.intervening(iv.SwapStates(2, rows)):
            found = model(tokens, initial_state=state)
        assert_same(found, hand.run(state, step))
        assert not torch.allclose(found, model(tokens, initial_state=state), atol=1e-3)


# -- ablations ----------------------------------------------------------------------------------


def heads_by_hand(case: Case, put: Callable[[Tensor, int], None]) -> Tensor:
    """Logits where ``put(z, r)`` changes the heads of core layer 1 in recurrences 1 and 4."""
    hand = case.hand

    def step(r: int, x: Tensor, e: Tensor) -> Tensor:
        x = hand.inject(x, e)
        for i, layer in enumerate(hand.core):
            pattern, values = hand.pieces(x, layer)
            z = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
            if i == 1 and r in (1, 4):
                put(z, r)
            x = hand.after_attention(x, layer, z)
            x = hand.after_mlp(x, layer, hand.neurons(x, layer))
        return x

    return hand.run(case.state, step)


def test_heads_are_zeroed(llama: Case) -> None:
    def put(z: Tensor, r: int) -> None:
        z[:, :, [0, 2]] = 0.0

    llama.same(llama.logits(iv.AblateHeads({1: [0, 2]}, [1, 4])), heads_by_hand(llama, put))


def test_heads_get_their_mean_over_real_tokens(llama: Case) -> None:
    model = llama.model
    rows = torch.tensor([[5, 6, 7, 8], [30, 20, 10, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    _, cache = model.run_with_cache(rows, attention_mask=mask)

    def put(z: Tensor, r: int) -> None:
        of = cache["z", (r, 1)]
        z[:, :, 3] = (of[0, :, 3].sum(0) + of[1, 2:, 3].sum(0)) / 6

    found = llama.logits(iv.AblateHeads({1: 3}, [1, 4], "mean", cache))
    llama.same(found, heads_by_hand(llama, put))


def test_heads_get_another_prompts_output(llama: Case) -> None:
    model, n = llama.model, llama.tokens.shape[1]
    _, cache = model.run_with_cache(torch.arange(3 * n).reshape(3, n))
    found = {
        seed: llama.logits(iv.AblateHeads({1: None}, [1, 4], "resample", cache, seed))
        for seed in range(8)
    }

    def of_row(row: int) -> Tensor:
        def put(z: Tensor, r: int) -> None:
            z[:] = cache["z", (r, 1)][row]

        return heads_by_hand(llama, put)

    by_row = [of_row(row) for row in range(3)]
    drawn = set()
    for logits in found.values():
        for b in range(len(logits)):
            fits = [float((logits[b] - x[b]).abs().max() / x.abs().max()) < SAME for x in by_row]
            assert sum(fits) == 1
            drawn.add(fits.index(True))
    assert drawn == {0, 1, 2}
    again = iv.AblateHeads({1: None}, [1, 4], "resample", cache, 3)
    assert torch.equal(llama.logits(again), found[3])


def test_neurons_are_zeroed(llama: Case) -> None:
    hand = llama.hand

    def step(r: int, x: Tensor, e: Tensor) -> Tensor:
        x = hand.inject(x, e)
        for i, layer in enumerate(hand.core):
            pattern, values = hand.pieces(x, layer)
            x = hand.after_attention(x, layer, torch.einsum("bhqk,bkhd->bqhd", pattern, values))
            neurons = hand.neurons(x, layer)
            if i in (0, 3) and r == 4:
                neurons[..., 5:40] = 0.0
            x = hand.after_mlp(x, layer, neurons)
        return x

    some = iv.AblateNeurons({0: range(5, 40), -1: slice(5, 40)}, -1)
    llama.same(llama.logits(some), hand.run(llama.state, step))


def test_an_mlp_writes_nothing_in_chosen_recurrences(llama: Case) -> None:
    hand = llama.hand

    def step(r: int, x: Tensor, e: Tensor) -> Tensor:
        x = hand.inject(x, e)
        for i, layer in enumerate(hand.core):
            pattern, values = hand.pieces(x, layer)
            x = hand.after_attention(x, layer, torch.einsum("bhqk,bkhd->bqhd", pattern, values))
            neurons = hand.neurons(x, layer)
            if i == 2 and r >= 3:
                neurons[:] = 0.0
            x = hand.after_mlp(x, layer, neurons)
        return x

    wanted = hand.run(llama.state, step)
    llama.same(llama.logits(iv.AblateMLP(2, slice(3, None))), wanted)
    llama.same(llama.logits(iv.AblateMLP("core.2", [3, 4])), wanted)


def test_the_massive_activations_layer_writes_attention_only() -> None:
    golden = load_golden("retrofit_llama")
    model = golden.load()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with model.intervening(iv.AblateMLP("prelude.1")):
        logits, cache = model.run_with_cache(golden.tokens, **golden.run)
    attended = cache["resid_pre", 1] + cache["attn_out", 1]
    assert torch.equal(cache["prelude.1.hook_resid_post"], attended)
    assert not torch.allclose(logits, golden.tensors["logits"], atol=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# -- contexts -----------------------------------------------------------------------------------


EVERY: list[iv.Intervention] = [
    iv.SkipRecurrences(1),
    iv.RepeatRecurrence(2),
    iv.SkipLayers(0, 2),
    iv.SwapLayers(0, 2),
    iv.FreezeAttention(1),
    iv.FreezeLoop(2),
    iv.ReplaceInitialState("zeros"),
    iv.AddNoise(0.2, 1),
    iv.ScaleInjection(0.5),
    iv.AblateHeads({1: 0}),
    iv.AblateNeurons({1: [3]}),
    iv.AblateMLP("prelude.0"),
]


@pytest.mark.parametrize("change", EVERY, ids=lambda change: type(change).__name__)
def test_nothing_is_left_behind(change: iv.Intervention, llama: Case) -> None:
    model, tokens = llama.model, llama.tokens
    plain = model(tokens)

    def fail(x: Tensor, hook: Any) -> None:
        raise RuntimeError("on purpose")

    with model.intervening(change):
        changed = model(tokens)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(tokens), changed), "reset_hooks removes hooks, not interventions"
        with pytest.raises(RuntimeError, match="on purpose"):
            model.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_in", fail)])
        assert torch.equal(model(tokens), changed)
        assert not any(hook.is_active for hook in model.all_hook_points())
    assert not torch.equal(changed, plain)
    assert torch.equal(model(tokens), plain)
    assert model.interventions == ()


def test_contexts_nest_in_any_order_of_leaving(llama: Case) -> None:
    model, tokens = llama.model, llama.tokens
    skip, noise = iv.SkipRecurrences(1), iv.AddNoise(0.1)
    first, second = model.intervening(skip), model.intervening(noise, skip)
    first.__enter__()
    second.__enter__()
    assert model.interventions == (skip, noise, skip)
    first.__exit__(None, None, None)
    assert model.interventions == (skip, noise)  # of the same object, the last one goes
    second.__exit__(None, None, None)
    with pytest.raises(ZeroDivisionError), model.intervening(skip):
        raise ZeroDivisionError
    assert model.interventions == ()
    assert torch.equal(model(tokens), model(tokens))


def test_the_outer_acts_first_and_hooks_come_last(llama: Case) -> None:
    model, seen = llama.model, []

    class Add(iv.Intervention):
        def __init__(self, number: float) -> None:
            self.number = number

        def changes(self, model: Any, run: Any) -> iv.Changes:
            return iv.Changes(edits=[("hook_embed", lambda x, hook: x * 2 + self.number)])

    def look(x: Tensor, hook: Any) -> None:
        seen.append(x)

    zero = {"hook_embed": lambda x, hook: x * 0}
    with (
        model.hooks([("hook_embed", look)]),
        model.intervening(Add(1.0)),
        model.intervening(Add(10.0)),
    ):
        _, cache = model.run_with_cache(llama.tokens, names_filter="hook_embed")
        model.run_with_hooks(llama.tokens, fwd_hooks=list(zero.items()))
    expected = model.embed(llama.tokens) * 4 + 12.0
    assert_same(cache["embed"], expected)
    assert_same(seen[0], expected)


def test_they_fit_every_number_of_recurrences(llama: Case) -> None:
    model, tokens = llama.model, llama.tokens
    with model.intervening(iv.SkipRecurrences(slice(-2, None))):
        for n in (3, 9):
            found = model(tokens, n_recurrences=n)
            assert_same(found, model_without(model, tokens, n - 2))


def model_without(model: LoopedTransformer, tokens: Tensor, n: int) -> Tensor:
    """A run of the same weights that knows nothing of active interventions."""
    twin = LoopedTransformer(model.cfg)  # in the same dtype
    twin.load_state_dict(model.state_dict())
    found = twin.eval()(tokens, n_recurrences=n)
    assert isinstance(found, Tensor)
    return found


def test_generation_with_a_cache_and_without_agree_under_interventions(llama: Case) -> None:
    model = llama.model
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    greedy = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    for change in (iv.SkipRecurrences(1), iv.FreezeAttention(0), iv.SwapLayers(0, 2),
                   iv.AddNoise(0.2), iv.ScaleInjection(0.5, slice(2, None))):  # fmt: skip
        with model.intervening(change):
            fast = model.generate(tokens, **greedy)
            slow = model.generate(tokens, use_past_kv_cache=False, **greedy)
        assert torch.equal(fast, slow)


def test_exit_rules_run_under_interventions(llama: Case) -> None:
    model, tokens = llama.model, llama.tokens
    with model.intervening(iv.SkipRecurrences(1)):
        found = model(tokens, exit_rule=KLDivergence(0.0))
        assert_same(found.output, model(tokens))


def test_an_edited_stream_is_not_decomposed(llama: Case) -> None:
    with llama.model.intervening(iv.SkipRecurrences(1)):
        _, cache = llama.model.run_with_cache(llama.tokens)
    with pytest.raises(InvalidDecompositionError):
        cache.decompose_resid()


# -- refusals -----------------------------------------------------------------------------------


REFUSED: list[tuple[Callable[[], iv.Intervention], type[Any], str]] = [
    (lambda: iv.SkipRecurrences(5), LayerIndexError, "0..4"),
    (lambda: iv.SkipRecurrences([0, -6]), LayerIndexError, "-6"),
    (lambda: iv.SkipRecurrences(slice(7, None)), LayerIndexError, "selects no recurrence"),
    (lambda: iv.SkipRecurrences([]), InputError, "None means all"),
    (lambda: iv.RepeatRecurrence(0, times=0), InputError, "times"),
    (lambda: iv.SkipLayers(4), LayerIndexError, "core layer 4"),
    (lambda: iv.ReorderLayers([0, 1]), InputError, "4 places"),
    (lambda: iv.SwapLayers(0, 4), LayerIndexError, "core layer 4"),
    (lambda: iv.FreezeAttention(4), LayerIndexError, "nothing behind 4"),
    (lambda: iv.FreezeAttention(0, heads=4), LayerIndexError, "head 4"),
    (lambda: iv.FreezeLoop(-1), LayerIndexError, "behind 4"),
    (lambda: iv.ReplaceInitialState("ones"), InputError, "zeros"),
    (lambda: iv.ReplaceInitialState(torch.zeros(1, 2, 64)), InputError, "[batch, "),
    (lambda: iv.AddNoise(-1.0), InputError, "std"),
    (lambda: iv.AddNoise(math.nan), InputError, "std"),
    (lambda: iv.AddNoise(0.1, seed=-1), InputError, "seed"),
    (lambda: iv.SwapStates(0, [0]), InputError, "one entry"),
    (lambda: iv.ScaleInjection(math.inf), InputError, "factor"),
    (lambda: iv.AblateHeads({}), InputError, "heads"),
    (lambda: iv.AblateHeads({1: 4}), LayerIndexError, "head 4"),
    (lambda: iv.AblateHeads({1: 0}, by="mean"), InputError, "reference"),
    (lambda: iv.AblateNeurons({1: 10_000}), LayerIndexError, "neuron 10000"),
    (lambda: iv.AblateMLP(99), LayerIndexError, "core layer 99"),
    (lambda: iv.AblateMLP("coda.99"), LayerIndexError, "coda layer 99"),
    (lambda: iv.AblateMLP("blocks.1"), InputError, "prelude.1"),
    (lambda: iv.AblateMLP("prelude.0", 1), InputError, "leave recurrences out"),
]


@pytest.mark.parametrize(("make", "kind", "part"), REFUSED)
def test_what_cannot_be_done_is_said(
    make: Callable[[], iv.Intervention], kind: type[Any], part: str, llama: Case
) -> None:
    with refused(kind, part), llama.model.intervening(make()):
        llama.model(llama.tokens)
    assert llama.model.interventions == ()


def test_what_a_run_cannot_take_is_said(llama: Case) -> None:
    model, tokens = llama.model, llama.tokens
    with model.intervening(iv.ReplaceInitialState("zeros")), refused(InputError, "leave one out"):
        model(tokens, initial_state="zeros")
    with model.intervening(iv.RepeatRecurrence(1)), refused(InputError, "use_past_kv_cache=False"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, verbose=False)
    with model.intervening(iv.FreezeAttention(0)), refused(InputError, "starts behind"):
        x = model(tokens, stop_at_layer=(2, 0))
        e = model(tokens, stop_at_layer=0)
        model(x, start_at_layer=(2, 0), prelude_output=e)
    with model.intervening(iv.SwapStates(1)), refused(InputError, "padding"):
        model(torch.tensor([[5, 6], [7, 8]]), attention_mask=torch.tensor([[0, 1], [1, 1]]))
    with model.intervening(iv.SkipRecurrences(1)):
        for refuse in (model.loop_map, model.start_run):
            with refused(InputError, "leave their contexts first"):
                refuse(tokens, 0) if refuse == model.start_run else refuse(tokens)


WRONG_TYPES: list[tuple[Callable[[], Any], type[InputError], str]] = [
    (lambda: iv.SkipRecurrences("all"), ArgumentTypeError, "recurrences"),  # type: ignore[arg-type]
    (lambda: iv.SkipRecurrences(1.5), ArgumentTypeError, "recurrences"),  # type: ignore[arg-type]
    (lambda: iv.AblateHeads({1: 0}, by="half"), ArgumentTypeError, "by"),  # type: ignore[arg-type]
    (lambda: iv.SkipRecurrences, ArgumentTypeError, "SkipRecurrences"),
    (lambda: iv.FreezeAttention(None), ArgumentTypeError, "recurrence"),  # type: ignore[arg-type]
    (lambda: iv.RepeatRecurrence([0, 1]), ArgumentTypeError, "recurrence"),  # type: ignore[arg-type]
    (lambda: iv.ReorderLayers([None, 1, 2, 3]), ArgumentTypeError, "order"),  # type: ignore[list-item]
    (lambda: iv.ReorderLayers(2), ArgumentTypeError, "order"),  # type: ignore[arg-type]
    (lambda: iv.AblateHeads({(0, 1): 0}), ArgumentTypeError, "heads"),  # type: ignore[dict-item]
    (lambda: iv.ReplaceInitialState(1.5), ArgumentTypeError, "state"),  # type: ignore[arg-type]
    (lambda: iv.ReplaceInitialState(True), InputError, "got True"),
    (lambda: iv.FreezeLoop(0, at=torch.zeros(1)), ArgumentTypeError, "at"),  # type: ignore[arg-type]
    (lambda: iv.AddNoise("a"), ArgumentTypeError, "std"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "kind", "part"), WRONG_TYPES)
def test_wrong_types_are_said(
    make: Callable[[], Any],
    kind: type[InputError],
    part: str,
    llama: Case,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As a user has it, without the checks of types that these tests switch on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with refused(kind, part), llama.model.intervening(make()):
        llama.model(llama.tokens)


def test_models_without_injection_or_random_state_refuse_them() -> None:
    ouro = Case("ouro")
    for change, part in (
        (iv.ScaleInjection(0.5), "no injection"),
        (iv.ReplaceInitialState(3), "random"),
    ):
        with ouro.model.intervening(change), refused(InputError, part):
            ouro.model(ouro.tokens)


# -- what later hooks, rows and runs must not see -------------------------------------------------


def test_a_later_edit_in_place_reaches_nothing_that_is_kept(llama: Case) -> None:
    model, tokens = llama.model, llama.tokens
    point = iv.fixed_point(model, tokens, 3, math.inf)
    before = point.state.clone()

    def wipe(x: Tensor, hook: Any) -> Tensor:
        return x.zero_()

    for change in (iv.FreezeLoop(1, at=point), iv.FreezeLoop(0), iv.SkipRecurrences(2)):
        with model.intervening(change):
            _, plain = model.run_with_cache(tokens)
            with model.hooks([("recurrence.2.hook_state_out", wipe)]):
                _, wiped = model.run_with_cache(tokens)
        assert not wiped["recurrence.2.hook_state_out"].any()
        for name in ("recurrence.1.hook_state_out", "recurrence.0.blocks.3.hook_resid_post"):
            assert_same(wiped[name], plain[name])
    assert torch.equal(point.state, before)


def test_what_tells_rows_apart_is_not_streamed(llama: Case) -> None:
    _, cache = llama.model.run_with_cache(llama.tokens)
    resampled = iv.AblateHeads({1: 0}, by="resample", reference=cache)
    for change in (iv.SwapStates(1), resampled):
        with llama.model.intervening(change), refused(InputError, "from_cache"):
            metrics.stream(llama.model, llama.tokens, ["signature"], progress=False)


def test_a_run_within_an_intervened_run_is_refused(llama: Case) -> None:
    within: list[bool] = []

    def run_again(x: Tensor, hook: Any) -> None:
        if not within:  # the inner run has the hook too
            within.append(True)
            llama.model(llama.tokens)

    hooks = [("hook_embed", run_again)]
    llama.model.run_with_hooks(llama.tokens, fwd_hooks=hooks)
    within.clear()
    with llama.model.intervening(iv.AddNoise(0.1)), refused(InputError, "within a run"):
        llama.model.run_with_hooks(llama.tokens, fwd_hooks=hooks)
    with llama.model.intervening(iv.AddNoise(0.1)):
        llama.model(llama.tokens)


def skipping_model() -> LoopedTransformer:
    """Injection, and a first recurrence that does not pass through the adapter."""
    changes = {
        "injection": Injection.LINEAR,
        "initial_state": InitialState.PRELUDE_SKIP_ADAPTER,
        "dtype": torch.float64,
    }
    return LoopedTransformer.from_config(exact_config(**changes))


def test_scaled_injection_where_the_first_recurrence_skips_the_adapter() -> None:
    model, tokens = skipping_model(), torch.tensor([[3, 1, 4, 1]])
    d = model.cfg.d_model
    off, zeros = iv.ScaleInjection(0.0), iv.ReplaceInitialState("zeros")
    for changes in ((off,), (off, zeros), (zeros, off), (off, iv.RepeatRecurrence(0))):
        with model.intervening(*changes):
            found = model(tokens)
        twin = LoopedTransformer(model.cfg)
        twin.load_state_dict(model.state_dict())
        twin.injection.weight[:, d:] = 0.0
        with twin.intervening(*changes[1:]) if zeros not in changes else nullcontext():
            start = {"initial_state": "zeros"} if zeros in changes else {}
            assert_same(found, twin.eval()(tokens, **start))
    with model.intervening(iv.ScaleInjection(0.0, 0)), refused(InputError, "skips the adapter"):
        model(tokens)


def test_runs_that_start_in_the_loop(llama: Case) -> None:
    model, tokens = llama.model, llama.tokens
    x, e = model(tokens, stop_at_layer=(2, 0)), model(tokens, stop_at_layer=0)
    inside = {"start_at_layer": (2, 0), "prelude_output": e}
    for change in (iv.SkipRecurrences(2), iv.ReplaceInitialState("zeros"), iv.FreezeLoop(1)):
        with model.intervening(change), refused(InputError, "the run starts"):
            model(x, **inside)


def test_references_of_other_runs_are_refused(llama: Case) -> None:
    model, tokens = llama.model, llama.tokens
    _, last = model.run_with_cache(tokens, pos_slice=-1)
    _, other = LoopedTransformer.from_config(
        exact_config(n_core=4, n_recurrences=5, n_heads=2)
    ).run_with_cache(torch.tensor([[1, 2]]))
    for cache, part in ((last, "pos_slice="), (other, "another model")):
        change = iv.AblateHeads({1: 0}, by="mean", reference=cache)
        with refused(InputError, part), model.intervening(change):
            model(tokens)
    with refused(InputError, "takes no pos_slice"):
        iv.fixed_point(model, tokens, pos_slice=-1)
