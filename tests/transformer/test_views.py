"""A run at another number of recurrences, and what is set of the model before, in and after it."""

from __future__ import annotations

import pytest
import torch
from conftest import exact_config
from torch import Tensor

from tl_looped import InputError, LoopedTransformer
from tl_looped.interventions import SkipRecurrences
from tl_looped.model.config import InitialState, Injection

R = 2
MORE = 4


@pytest.fixture
def model() -> LoopedTransformer:
    return LoopedTransformer.from_config(
        exact_config(
            n_recurrences=R,
            injection=Injection.LINEAR,
            initial_state=InitialState.RANDOM,
            initial_state_std=0.5,
        )
    )


FLAGS = {
    "use_attn_result": "attn.hook_result",
    "use_split_qkv_input": "hook_q_input",
    "use_attn_in": "hook_attn_in",
    "use_hook_mlp_in": "hook_mlp_in",
}


@pytest.mark.parametrize("of_the_view", [False, True])
@pytest.mark.parametrize("flag", list(FLAGS))
def test_flags_reach_blocks_that_a_run_at_another_number_made(
    model: LoopedTransformer, tokens: Tensor, flag: str, of_the_view: bool
) -> None:
    _, cache = model.run_with_cache(tokens, n_recurrences=MORE)
    n_layers = cache.model.cfg.n_layers
    getattr(cache.model if of_the_view else model, f"set_{flag}")(True)
    assert getattr(model.cfg, flag)
    assert getattr(cache.model.cfg, flag)
    for run in (lambda: model.run_with_cache(tokens, n_recurrences=MORE)[1],
                lambda: cache.model.run_with_cache(tokens)[1]):  # fmt: skip
        names = [name for name in run() if name.endswith(FLAGS[flag])]
        assert names == [f"blocks.{i}.{FLAGS[flag]}" for i in range(n_layers)]
    model.set_recurrences(MORE)
    assert sum(name.endswith(FLAGS[flag]) for name in model.run_with_cache(tokens)[1]) == n_layers


def test_folding_through_a_view_folds_blocks_that_are_made_later(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    before = model(tokens, n_recurrences=MORE)
    model.view_at(R + 1).enable_compatibility_mode()
    assert model.cfg.normalization_type == "RMSPre"
    model.set_recurrences(MORE + 2)
    assert all(block.ln1.folded for block in model.blocks)
    assert torch.equal(model(tokens, n_recurrences=MORE), before)


@pytest.mark.parametrize("inner", [R, R + 1, MORE])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("outer", [R, MORE])
def test_a_run_within_a_hook_leaves_the_hooks_of_the_outer_run(
    model: LoopedTransformer, tokens: Tensor, outer: int, cached: bool, inner: int
) -> None:
    fired: list[str | None] = []
    within: list[bool] = []

    def note(x: Tensor, hook) -> None:
        if not within:
            fired.append(hook.name)

    def run_again(x: Tensor, hook) -> None:
        if within:
            return
        within.append(True)
        if cached:
            model.run_with_cache(tokens, n_recurrences=inner)
        else:
            nothing = ("blocks.2.hook_resid_pre", lambda x, hook: None)
            model.run_with_hooks(tokens, n_recurrences=inner, fwd_hooks=[nothing])
        within.clear()

    last = model.loop.with_recurrences(outer).n_layers - 1
    names = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", f"blocks.{last}.hook_mlp_out"]
    hooks = [("blocks.1.hook_resid_pre", run_again), *((name, note) for name in names)]
    model.run_with_hooks(tokens, n_recurrences=outer, fwd_hooks=hooks)
    assert fired == names
    assert not any(point.fwd_hooks for point in model.all_hook_points())
    assert model.context_level == 0


def test_seed_and_interventions_hold_for_views_that_were_made_before(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    view = model.view_at(MORE)
    _, cache = model.run_with_cache(tokens, n_recurrences=MORE)
    skip = SkipRecurrences(1)
    plain = model(tokens, n_recurrences=MORE)
    with model.intervening(skip):
        kept = model.view_at(MORE)
        skipped = model(tokens, n_recurrences=MORE)
        assert torch.equal(view(tokens), skipped)
        assert torch.equal(cache.model(tokens), skipped)
    assert not torch.equal(skipped, plain)
    assert torch.equal(kept(tokens), plain)
    assert torch.equal(cache.model(tokens), plain)
    model.state_seed = 7
    assert torch.equal(view(tokens), model(tokens, n_recurrences=MORE))
    assert not torch.equal(view(tokens), plain)


def test_a_view_that_is_converted_converts_the_model(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    expected = model(tokens, n_recurrences=MORE)
    view = model.view_at(MORE)
    view.to(torch.float32)
    assert model.cfg.dtype == view.cfg.dtype == torch.float32
    view.to(torch.float64)
    assert model.cfg.dtype == torch.float64
    # The random state is drawn in the model's precision: what is left are the weights' own digits.
    assert (model(tokens, n_recurrences=MORE) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("n", "words"), [(1, "1 recurrence"), (3, "3 recurrences")])
def test_a_view_is_refused_another_number_by_the_one_that_it_has(
    model: LoopedTransformer, n: int, words: str
) -> None:
    with pytest.raises(InputError, match=rf"\b{words}\b"):
        model.view_at(n).set_recurrences(MORE)
