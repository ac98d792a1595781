"""``setup()`` and replaced hook points, and HookedRootModule's methods about hook points."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import VARIANTS, exact_config
from refusals import refused
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_looped import InputError, LoopedTransformer
from tl_looped.model.hook_points import LoopedHookPoint

TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config(**VARIANTS[request.param]))


@pytest.fixture
def model() -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config())


def replace_at(model: LoopedTransformer, name: str, module: nn.Module) -> None:
    """As users do: an assignment to the attribute."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def double(x: Tensor, hook: Any) -> Tensor:
    return 2 * x


def test_setup_of_an_untouched_model_changes_nothing(variant: LoopedTransformer) -> None:
    names, points = list(variant.hook_dict), list(variant.hook_points())
    logits = variant(TOKENS)
    variant.add_hook("hook_embed", double)
    variant.setup()
    assert list(variant.hook_dict) == names
    assert all(a is b for a, b in zip(variant.hook_points(), points, strict=True))
    assert not torch.equal(variant(TOKENS), logits)
    variant.reset_hooks()
    assert torch.equal(variant(TOKENS), logits)


@pytest.mark.parametrize("make", [HookPoint, LoopedHookPoint])
def test_every_hook_point_can_be_replaced(variant: LoopedTransformer, make: Any) -> None:
    expected, before = variant.run_with_cache(TOKENS)
    old = dict(variant.hook_dict)
    new = {name: make() for name in old}
    for name, point in new.items():
        replace_at(variant, name, point)
    variant.setup()
    for name, point in variant.hook_dict.items():
        assert point is new[name] is variant.mod_dict[name]
        assert isinstance(point, LoopedHookPoint)
        assert (point.name, point.location) == (name, old[name].location)
        assert point.pos_dim == old[name].pos_dim
    logits, cache = variant.run_with_cache(TOKENS)
    assert torch.equal(logits, expected)
    assert list(cache) == list(before)
    assert all(torch.equal(cache[name], before[name]) for name in before)
    fired: list[str] = []
    with variant.hooks([(lambda name: True, lambda x, hook: fired.append(hook.name))]):
        variant(TOKENS)
    assert sorted(fired) == sorted(old)


REPLACED = (
    "hook_embed", "hook_initial_state", "recurrence.1.hook_state_in", "ln_final.hook_scale",
    "blocks.3.hook_resid_pre", "blocks.3.attn.hook_pattern", "blocks.3.attn.hook_z",
    "blocks.3.ln1.hook_normalized", "blocks.3.mlp.hook_post", "unembed.hook_out",
)  # fmt: skip


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_hook_point_is_hooked_like_the_one_before(
    model: LoopedTransformer, name: str
) -> None:
    clean = model(TOKENS)
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(name, double)])
    point = HookPoint()
    point.add_hook(double)  # before it is put there
    replace_at(model, name, point)
    model.setup()
    assert torch.equal(model(TOKENS), expected)
    point.remove_hooks("fwd")
    assert torch.equal(model(TOKENS), clean)
    point.add_hook(double)  # and behind that
    assert torch.equal(model(TOKENS), expected)
    model.reset_hooks()
    assert not point.fwd_hooks
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[(name, double)]), expected)


@pytest.mark.parametrize("name", [n for n in REPLACED if n.startswith(("hook_e", "b", "rec", "u"))])
def test_a_run_uses_it_before_setup_too(model: LoopedTransformer, name: str) -> None:
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(name, double)])
    point = HookPoint()
    replace_at(model, name, point)
    point.add_hook(double)
    assert torch.equal(model(TOKENS), expected)


def test_setup_reaches_views_other_recurrences_and_copies(model: LoopedTransformer) -> None:
    expected = model.run_with_hooks(
        TOKENS, fwd_hooks=[("coda.0.hook_mlp_out", double)], n_recurrences=6
    )
    _, cache = model.run_with_cache(TOKENS, n_recurrences=6)
    view = cache.model
    point = model.blocks[-1].hook_mlp_out = HookPoint()
    later = model.view_at(9).blocks[-5].hook_resid_pre = HookPoint()
    view.setup()
    assert view.is_current
    assert view.hook_dict["coda.0.hook_mlp_out"] is point
    assert model.hook_dict["coda.0.hook_mlp_out"] is point
    other = model.view_at(9)
    assert later in other.hook_dict.values()
    point.add_hook(double)
    assert torch.equal(model(TOKENS, n_recurrences=6), expected)
    assert torch.equal(copy.deepcopy(model)(TOKENS, n_recurrences=6), expected)
    point = model.blocks[0].hook_attn_out = HookPoint()
    model.setup()
    assert not view.is_current
    assert cache.model.hook_dict["blocks.0.hook_attn_out"] is point


def test_split_inputs_are_replaced_in_both_places(model: LoopedTransformer) -> None:
    model.cfg.use_split_qkv_input = True
    point = model.blocks[3].hook_q_input = HookPoint()
    model.setup()
    assert model.blocks[3].attn.hook_q_input is point
    assert model.hook_dict["blocks.3.attn.hook_q_input"] is point
    expected = model(TOKENS)
    point.add_hook(double)
    assert not torch.equal(model(TOKENS), expected)


class Own(HookPoint):
    """A hook point with a forward of its own."""


@pytest.mark.parametrize("name", ["blocks.3.hook_resid_pre", "recurrence.1.hook_state_in"])
def test_what_is_no_hook_point_is_refused(model: LoopedTransformer, name: str) -> None:
    replace_at(model, name, nn.Linear(32, 32))
    with refused(InputError, name, "Linear", "Splice"):
        model.setup()


def test_a_hook_point_of_another_class_is_refused(model: LoopedTransformer) -> None:
    with refused(InputError, "hook_resid_pre", "Own"):
        model.blocks[3].hook_resid_pre = Own()  # type: ignore[assignment]
    model.hook_embed = Own()  # type: ignore[assignment]
    with refused(InputError, "hook_embed", "Own"):
        model.setup()


@pytest.mark.parametrize("name", ["blocks.3.hook_resid_pre", "recurrence.1.hook_state_in"])
def test_a_hook_point_can_come_in_the_place_of_what_is_none(
    model: LoopedTransformer, name: str
) -> None:
    expected = model(TOKENS)
    replace_at(model, name, nn.Linear(32, 32))
    replace_at(model, name, HookPoint())
    model.setup()
    assert torch.equal(model(TOKENS), expected)
    assert name in model.run_with_cache(TOKENS)[1].cache_dict
    replace_at(model, name, model.hook_dict[name])  # where it is already
    model.add_hook(name, double)
    assert not torch.equal(model(TOKENS), expected)


def test_a_hook_point_has_one_place(model: LoopedTransformer) -> None:
    """In two it would have the later name in both, and one of them would be in no cache."""
    block, point = model.blocks[3], HookPoint()
    block.hook_resid_pre = point  # type: ignore[assignment]
    for other in (point, model.blocks[5].hook_resid_pre, model.blocks[3].hook_resid_post):
        with refused(InputError, "hook_resid_pre", "one place"):
            model.blocks[4].hook_resid_pre = other  # type: ignore[assignment]
    coda = model.blocks[-1]
    before = coda.hook_resid_pre
    coda.hook_resid_pre = HookPoint()  # type: ignore[assignment]
    model.set_recurrences(2)
    coda.hook_resid_pre = before  # its own place again, under another name
    model.setup()
    assert model.hook_dict[f"blocks.{model.cfg.n_layers - 1}.hook_resid_pre"] is before


def test_a_replaced_block_is_refused(model: LoopedTransformer) -> None:
    model.blocks[3] = nn.Identity()  # type: ignore[assignment]
    with refused(InputError, "blocks.3", "intervening"):
        model.setup()


# -- HookedRootModule's and TransformerBridge's methods -------------------------------------------


def test_hook_points_are_listed_once(model: LoopedTransformer) -> None:
    model.cfg.use_split_qkv_input = True
    points = list(model.hook_points())
    assert len({id(point) for point in points}) == len(points)
    assert {point.name for point in points} == set(model.run_with_cache(TOKENS)[1])


def test_hooks_of_a_block(model: LoopedTransformer) -> None:
    names = model.block_hooks(3)
    assert names == sorted(names) == model.block_hooks((0, 1))
    assert {f"blocks.3.{name}" for name in names} == {
        name for name in model.hook_dict if name.startswith("blocks.3.")
    }
    assert model.get_hook_point("blocks.3.attn.hook_z") is model.blocks[3].attn.hook_z
    assert model.get_hook_point("prelude.0.hook_resid_pre") is model.blocks[0].hook_resid_pre
    for name in ("blocks.3.hook_nothing", "blocks.3.attn.hook_result", "blocks.99.hook_z", "x"):
        assert model.get_hook_point(name) is None


def test_the_old_ways_to_cache(model: LoopedTransformer) -> None:
    _, expected = model.run_with_cache(TOKENS)
    everything: dict[str, Tensor] = {}
    model.cache_all(everything)
    assert model.is_caching
    model(TOKENS)
    model.reset_hooks()
    assert not model.is_caching
    assert {name: x.shape for name, x in everything.items()} == {
        name: x.shape for name, x in expected.items()
    }
    some: dict[str, Tensor] = {}
    model.cache_some(some, lambda name: name.endswith("hook_z"))
    model(TOKENS)
    model.reset_hooks()
    assert set(some) == {name for name in expected if name.endswith("hook_z")}
    _, same = model.run_with_cache(TOKENS, names_filter=list(some))
    assert all(torch.equal(some[name], same[name]) for name in some)


def test_a_check_of_hooks_may_be_added(model: LoopedTransformer) -> None:
    class Checking(LoopedTransformer):
        def check_hooks_to_add(self, hook_point: Any, hook_point_name: str, *a: Any, **k: Any):
            raise RuntimeError(hook_point_name)

    model.__class__ = Checking
    with pytest.raises(RuntimeError, match=r"blocks\.3\.hook_resid_pre"):
        model.add_hook(("resid_pre", 3), double)
