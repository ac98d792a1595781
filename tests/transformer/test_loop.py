"""Recurrences, hooks, start and stop, gradients: what a looped model adds to a transformer."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_same
from conftest import VARIANTS, exact_config
from torch import Tensor

from tl_looped import HookNameError, LoopedTransformer, MissingActivationError


def spy(seen: list[str]):
    def hook(value: Tensor, hook) -> None:
        seen.append(hook.name)

    return hook


def double(value: Tensor, hook) -> Tensor:
    return 2 * value


# -- recurrences ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pre", "post-qk-norm"])
def test_the_loop_written_out_is_the_same_function(name: str, tokens: Tensor) -> None:
    """R recurrences of k layers equal one pass through R * k layers with copied weights."""
    changes = VARIANTS[name]
    looped = LoopedTransformer.from_config(exact_config(**changes))
    k, R = looped.loop.k, looped.loop.R
    config = exact_config(**changes, n_core=k * R, n_recurrences=1)
    flat = LoopedTransformer.from_config(config)
    source = dict(looped.named_parameters())
    with torch.no_grad():
        for parameter_name, parameter in flat.named_parameters():
            stage, i, rest = (*parameter_name.split(".", 2), "", "")[:3]
            if stage == "core":
                parameter_name = f"core.{int(i) % k}.{rest}"
            parameter.copy_(source[parameter_name])
    assert_same(flat(tokens), looped(tokens))


def test_effective_layers_follow_the_recurrences(variant, tokens) -> None:
    p, k, c, R = variant.loop.p, variant.loop.k, variant.loop.c, variant.loop.R
    for recurrences in (7, 1, R):
        variant.set_recurrences(recurrences)
        assert variant.cfg.n_layers == len(variant.blocks) == p + k * recurrences + c
        assert variant.cfg.n_recurrences == variant.loop.R == recurrences
        names = [name for name in variant.hook_dict if name.endswith("hook_resid_post")]
        assert names == [f"blocks.{i}.hook_resid_post" for i in range(variant.cfg.n_layers)]
        assert all(variant.hook_dict[name].name == name for name in variant.hook_dict)
        fired: list[str] = []
        variant.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, spy(fired))])
        assert fired == list(dict.fromkeys(fired))  # each once
        assert set(fired) == set(variant.hook_dict)


def test_a_call_with_recurrences_leaves_the_model_as_it_was(variant, tokens) -> None:
    before, R = variant(tokens), variant.loop.R
    more = variant(tokens, n_recurrences=R + 2)
    assert variant.loop.R == R
    assert not torch.allclose(more, before)
    with variant.with_recurrences(R + 2):
        assert torch.equal(variant(tokens), more)
    with pytest.raises(HookNameError), variant.with_recurrences(1):
        variant.run_with_hooks(tokens, fwd_hooks=[("recurrence.1.hook_state_out", double)])
    assert variant.loop.R == R
    assert torch.equal(variant(tokens), before)


def test_weights_exist_once_and_hooks_hold_none(variant) -> None:
    names = [name for name, _ in variant.named_parameters()]
    before = sum(p.numel() for p in variant.parameters())
    variant.set_recurrences(9)
    assert sum(p.numel() for p in variant.parameters()) == before
    assert [name for name, _ in variant.named_parameters()] == names
    assert not any(name.startswith(("blocks.", "recurrence.")) for name in names)
    assert set(variant.state_dict()) == set(names)


def test_training_mode_reaches_every_recurrence(variant) -> None:
    variant.set_recurrences(6)
    assert not any(module.training for module in variant.modules())
    variant.set_recurrences(2)
    variant.train()
    variant.set_recurrences(7)
    assert all(module.training for module in variant.modules())
    variant.set_recurrences(3)
    variant.eval()
    variant.set_recurrences(7)
    assert not any(module.training for module in variant.modules())


# -- hooks ------------------------------------------------------------------------------------


def test_every_spelling_is_the_same_hook_point(variant) -> None:
    loop = variant.loop
    i = loop.index(2, 1)
    point = variant.hook_dict[f"blocks.{i}.attn.hook_z"]
    assert variant.hook_dict["recurrence.2.blocks.1.attn.hook_z"] is point
    assert variant.hook_dict["blocks.(2, 1).attn.hook_z"] is point
    assert variant.hook_name(("z", (2, 1))) == point.name
    assert (point.stage, point.recurrence, point.layer_in_stage) == ("core", 2, 1)
    assert point.layer() == i
    if loop.c:
        coda = variant.hook_dict["coda.0.hook_mlp_out"]
        assert coda is variant.hook_dict[f"blocks.{loop.n_layers - 1}.hook_mlp_out"]
        assert (coda.stage, coda.recurrence, coda.layer_in_stage) == ("coda", None, 0)


def test_an_edit_at_one_recurrence_touches_that_recurrence_only(variant, tokens) -> None:
    names = [n for n in variant.hook_dict if n.endswith("hook_resid_post")]
    _, clean = variant.run_with_cache(tokens)
    with variant.hooks(fwd_hooks=[("recurrence.2.blocks.1.hook_attn_out", double)]):
        _, edited = variant.run_with_cache(tokens)
    first_changed = variant.loop.index(2, 1)
    for i, name in enumerate(names):
        assert torch.allclose(clean[name], edited[name]) == (i < first_changed)


@pytest.mark.once
def test_each_kind_of_edit_reaches_the_logits(variant, tokens) -> None:
    """No hook point is a dead end, apart from the exit gate, which only reads."""

    def shift(value: Tensor, hook) -> Tensor:  # a norm that follows cannot undo it
        return 2 * value.roll(1, 1)

    variant.set_recurrences(2)
    tokens = tokens[:1]
    clean = variant(tokens)
    for name in variant.hook_dict:
        edited = variant.run_with_hooks(tokens, fwd_hooks=[(name, shift)])
        assert torch.equal(edited, clean) == name.endswith("hook_exit_gate"), name


def test_a_hook_leaks_nothing_into_the_next_run(variant, tokens) -> None:
    clean = variant(tokens)
    for name in ("recurrence.1.hook_state_out", ("resid_mid", (3, 0)), "hook_embed"):
        assert not torch.equal(variant.run_with_hooks(tokens, fwd_hooks=[(name, double)]), clean)
        assert torch.equal(variant(tokens), clean)
    variant.hook_dict["hook_embed"].ctx["note"] = 1
    variant.add_hook("recurrence.3.blocks.0.hook_mlp_out", double)
    variant.set_recurrences(2)  # the hook sleeps now
    variant.reset_hooks()
    variant.set_recurrences(4)
    assert torch.equal(variant(tokens), clean)
    assert not variant.hook_dict["hook_embed"].ctx


def test_hooks_survive_a_change_of_recurrences(variant, tokens) -> None:
    clean = variant(tokens)
    edited = variant.run_with_hooks(tokens, fwd_hooks=[(("mlp_out", (3, 1)), double)])
    variant.add_hook(("mlp_out", (3, 1)), double)
    variant.set_recurrences(2)
    short = variant(tokens)
    variant.set_recurrences(4)
    assert torch.equal(variant(tokens), edited)
    variant.reset_hooks()
    assert torch.equal(variant(tokens), clean)
    assert torch.equal(variant(tokens, n_recurrences=2), short)  # it slept at R = 2
    if variant.loop.c:
        variant.add_hook("coda.0.hook_mlp_out", double)
        moved = variant(tokens, n_recurrences=6)
        variant.reset_hooks()
        expected = variant.run_with_hooks(
            tokens, n_recurrences=6, fwd_hooks=[("coda.0.hook_mlp_out", double)]
        )
        assert torch.equal(moved, expected)


def test_an_unknown_name_is_refused_before_anything_is_attached(variant, tokens) -> None:
    for name in (
        "recurrence.9.hook_state_out",
        "blocks.1.attn.hook_zz",
        "blocks.99.hook_resid_pre",
    ):
        with pytest.raises(HookNameError):
            variant.run_with_hooks(tokens, fwd_hooks=[("hook_embed", double), (name, double)])
        with pytest.raises(HookNameError):
            variant.run_with_cache(tokens, names_filter=["hook_embed", name])
        assert not variant.list_hooks()


def test_raw_torch_hooks_fire_too(variant, tokens) -> None:
    seen = []
    point = variant.hook_dict["recurrence.1.blocks.0.attn.hook_pattern"]
    handle = point.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    variant(tokens)
    handle.remove()
    variant(tokens)
    assert seen == [(2, 4, 9, 9)]


def test_fused_and_explicit_attention_agree(variant, tokens) -> None:
    assert_same(variant(tokens), variant.run_with_cache(tokens)[0])


# -- caches -----------------------------------------------------------------------------------


def test_old_caches_stay_right_after_a_change_of_recurrences(variant, tokens) -> None:
    _, cache = variant.run_with_cache(tokens)
    last = cache["resid_post", -1]
    stack = cache.accumulated_resid(incl_mid=True)
    middle = cache["resid_post", (2, -1)]
    variant.set_recurrences(9)
    assert cache.n_recurrences == 4
    assert torch.equal(cache["resid_post", -1], last)
    assert torch.equal(cache["resid_post", (2, -1)], middle)
    assert torch.equal(cache.accumulated_resid(incl_mid=True), stack)
    sliced = cache.apply_slice_to_batch_dim(0)
    assert torch.equal(sliced["resid_post", -1], last[0])
    assert sliced.loop == cache.loop
    assert torch.equal(
        cache.apply_slice_to_batch_dim((0, 1)).remove_batch_dim()["embed"], cache["embed"][0]
    )


def test_a_cache_of_a_longer_run_than_the_model_now_has(variant, tokens) -> None:
    _, cache = variant.run_with_cache(tokens, n_recurrences=6)
    assert cache.stack_recurrences("resid_post").shape[0] == 6
    assert cache.accumulated_resid().shape[0] == cache.loop.n_layers + 1
    assert variant.loop.R == 4


def test_missing_activations_are_named(variant, tokens) -> None:
    _, cache = variant.run_with_cache(
        tokens, names_filter=[("z", (1, 1)), "recurrence.0.hook_state_in"]
    )
    assert len(cache) == 2
    with pytest.raises(MissingActivationError, match=r"hook_resid_post.*names_filter"):
        cache["resid_post", (1, 1)]
    with pytest.raises(MissingActivationError):
        cache.stack_recurrences("z")
    assert ("z", (1, 1)) in cache
    assert ("z", (99, 1)) not in cache


def test_position_slices_follow_each_activation(variant, tokens) -> None:
    _, whole = variant.run_with_cache(tokens)
    _, part = variant.run_with_cache(tokens, pos_slice=(2, 5))
    for name, value in whole.items():
        axis = variant.hook_dict[name].pos_dim
        assert torch.equal(part[name], value.narrow(axis, 2, 3)), name


# -- start and stop ---------------------------------------------------------------------------


def test_stopping_and_starting_again_is_the_whole_run(variant, tokens) -> None:
    logits, cache = variant.run_with_cache(
        tokens, names_filter=lambda name: name.endswith(("resid_pre", "resid_post", "embed"))
    )
    e = cache["resid_post", variant.loop.p - 1] if variant.loop.p else cache["embed"]
    for i in range(variant.loop.n_layers + 1):
        resid = variant(tokens, stop_at_layer=i)
        if i < variant.loop.n_layers:
            assert_same(resid, cache["resid_pre", i])
        given = {} if i < variant.loop.p else {"prelude_output": e}
        rest = variant(resid, start_at_layer=i, **given)
        assert_same(rest, logits)


def test_layers_may_be_given_as_recurrence_and_layer(variant, tokens) -> None:
    at = variant(tokens, stop_at_layer=(2, 1))
    assert torch.equal(at, variant(tokens, stop_at_layer=variant.loop.index(2, 1)))
    assert torch.equal(
        variant(tokens, stop_at_layer=-1), variant(tokens, stop_at_layer=len(variant.blocks) - 1)
    )


def test_only_the_layers_asked_for_run(variant, tokens) -> None:
    fired: list[str] = []
    every = [(lambda name: name.endswith("resid_post"), spy(fired))]
    variant.run_with_hooks(tokens, stop_at_layer=(1, 0), fwd_hooks=every)
    assert fired == [f"blocks.{i}.hook_resid_post" for i in range(variant.loop.index(1, 0))]


# -- gradients --------------------------------------------------------------------------------


def test_tied_weights_get_the_sum_of_their_recurrences_gradients(tokens) -> None:
    looped = LoopedTransformer.from_config(exact_config())
    k, R = looped.loop.k, looped.loop.R
    flat = LoopedTransformer.from_config(exact_config(n_core=k * R, n_recurrences=1))
    source = dict(looped.named_parameters())
    for name, parameter in flat.named_parameters():
        stage, i, rest = (*name.split(".", 2), "", "")[:3]
        parameter.data = source[f"core.{int(i) % k}.{rest}" if stage == "core" else name].data
    looped(tokens, return_type="loss").backward()
    flat(tokens, return_type="loss").backward()
    written_out = dict(flat.named_parameters())
    for name, parameter in looped.named_parameters():
        stage, i, rest = (*name.split(".", 2), "", "")[:3]
        same = [f"core.{int(i) + r * k}.{rest}" for r in range(R)] if stage == "core" else [name]
        expected = sum(written_out[n].grad for n in same)
        assert_same(parameter.grad, expected)


def test_backward_hooks_see_the_gradient_of_their_recurrence(variant, tokens) -> None:
    grads: dict[str, Tensor] = {}

    def keep(grad: Tensor, hook) -> None:
        grads[hook.name] = grad.clone()

    names = [variant.hook_name(("resid_post", (r, 0))) for r in range(4)]
    with variant.hooks(bwd_hooks=[(name, keep) for name in names]):
        variant(tokens, return_type="loss").backward()
    assert set(grads) == set(names)
    # Against a finite difference in a random direction at recurrence 2.
    model = variant.double()
    direction = torch.randn(2, 9, 32, dtype=torch.float64)

    def loss_at(step: float) -> Tensor:
        edit = lambda value, hook: value + step * direction  # noqa: E731
        with torch.no_grad():
            return model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(names[2], edit)])

    slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    torch.testing.assert_close((grads[names[2]] * direction).sum(), slope, atol=1e-6, rtol=1e-3)


def test_cached_gradients(variant, tokens) -> None:
    _, cache = variant.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    name = variant.hook_name(("resid_post", (1, 0)))
    assert cache[name + "_grad"].shape == cache[name].shape
    assert cache[name + "_grad"].any()


def test_a_refused_name_attaches_nothing_even_when_hooks_are_to_stay(variant, tokens) -> None:
    with pytest.raises(HookNameError):
        variant.run_with_hooks(
            tokens, reset_hooks_end=False, fwd_hooks=[("hook_embed", double), ("nothing", double)]
        )
    assert not variant.list_hooks()
