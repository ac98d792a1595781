"""What is skipped while nobody listens is back as soon as anybody does: one test a short cut."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import VARIANTS, exact_config
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from tl_looped import LoopedHookPoint, LoopedTransformer
from tl_looped.model.block import Block

Register = Callable[[nn.Module, Callable[..., None]], Any]

# Every kind of hook that PyTorch attaches to one module.
OWN: dict[str, Register] = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward with keywords": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "forward always": lambda m, f: m.register_forward_hook(f, always_call=True),
    "before forward": lambda m, f: m.register_forward_pre_hook(f),
    "before forward with keywords": lambda m, f: m.register_forward_pre_hook(f, with_kwargs=True),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "before backward": lambda m, f: m.register_full_backward_pre_hook(f),
}
# And to all modules.
GLOBAL: dict[str, Callable[[Callable[..., None]], Any]] = {
    "forward": torch_modules.register_module_forward_hook,
    "before forward": torch_modules.register_module_forward_pre_hook,
    "backward": torch_modules.register_module_full_backward_hook,
    "before backward": torch_modules.register_module_full_backward_pre_hook,
}
MODULES = (
    "blocks.3.hook_resid_mid",
    "blocks.3.attn.hook_z",
    "blocks.3.attn.hook_pattern",
    "blocks.3.ln1.hook_scale",
    "recurrence.1.hook_state_in",
    "blocks.3",
    "blocks.3.attn",
    "blocks.3.mlp",
    "blocks.3.ln2",
)


@pytest.fixture
def model() -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config())


@pytest.mark.once
@pytest.mark.parametrize("kind", list(OWN))
@pytest.mark.parametrize("name", MODULES)
def test_raw_hooks_fire_until_they_are_removed(
    model: LoopedTransformer, tokens: Tensor, name: str, kind: str
) -> None:
    fired: list[str] = []
    handle = OWN[kind](model.get_submodule(name), lambda *args: fired.append(name))
    model(tokens, return_type="loss").backward()
    assert fired == [name]
    handle.remove()
    model(tokens, return_type="loss").backward()
    assert fired == [name]


# PyTorch's remark on modules whose input needs no gradient, such as the embedding.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", list(GLOBAL))
def test_hooks_on_all_modules_fire(model: LoopedTransformer, tokens: Tensor, kind: str) -> None:
    seen: list[nn.Module] = []

    def hook(module: nn.Module, *args: Any) -> None:
        seen.append(module)

    handle = GLOBAL[kind](hook)
    try:
        model(tokens, return_type="loss").backward()
    finally:
        handle.remove()
    for name in MODULES:
        assert any(module is model.get_submodule(name) for module in seen), name


def test_a_pattern_that_is_listened_to_changes_nothing_else(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    fused = model(tokens)
    shapes: list[torch.Size] = []
    model.blocks[3].attn.hook_pattern.register_forward_hook(
        lambda module, args, out: shapes.append(out.shape)
    )
    torch.testing.assert_close(model(tokens), fused)
    assert shapes == [(2, 4, 9, 9)]


def test_a_module_that_is_put_in_place_of_another_is_used(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    replaced = Zero()
    model.blocks[3].mlp = replaced
    _, cache = model.run_with_cache(tokens)
    assert model.blocks[3].mlp is replaced
    assert not cache["blocks.3.hook_mlp_out"].any()
    assert cache["blocks.4.hook_mlp_out"].any()


def test_a_parameter_that_is_put_in_place_of_another_is_used(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    model(tokens)
    model.core[1].mlp.down = nn.Parameter(torch.zeros(32, 48, dtype=torch.float64))
    _, cache = model.run_with_cache(tokens)
    for layer in range(3):
        assert bool(cache["mlp_out", (2, layer)].any()) == (layer != 1)


def test_a_copy_has_modules_of_its_own(model: LoopedTransformer, tokens: Tensor) -> None:
    twin = deepcopy(model)
    before = model(tokens)
    twin.add_hook("blocks.3.hook_mlp_out", lambda tensor, hook: 0 * tensor)
    assert torch.equal(model(tokens), before)
    assert not torch.allclose(twin(tokens), before)


@pytest.mark.parametrize("training", [True, False])
def test_new_blocks_have_the_mode_of_the_model(model: LoopedTransformer, training: bool) -> None:
    model.train(training).set_recurrences(9)
    assert {module.training for module in model.modules()} == {training}


def test_garbage_collection_goes_on_after_growing_and_caching(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    assert gc.isenabled()
    model.set_recurrences(6)
    assert gc.isenabled()
    during: list[bool] = []
    model.add_hook("hook_embed", lambda tensor, hook: during.append(gc.isenabled()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.run_with_cache(tokens)
    assert during == [False]
    assert gc.isenabled()


def test_every_way_to_attach_a_torch_hook_is_noticed() -> None:
    ways = {
        name
        for name in dir(torch.nn.Module)
        if name.startswith("register_") and "hook" in name and "state_dict" not in name
    }
    assert {"register_forward_hook", "register_full_backward_pre_hook"} <= ways
    # A way that PyTorch adds one day must be added there: an idle hook point looks nowhere else.
    for module in (LoopedHookPoint, Block):
        for way in ways:
            assert getattr(module, way) is not getattr(nn.Module, way)


def test_a_cache_sees_what_the_hooks_of_its_run_left(
    plain: LoopedTransformer, tokens: Tensor
) -> None:
    name = "blocks.3.hook_mlp_out"
    seen = []

    def look_then_add(value: Tensor, hook: LoopedHookPoint) -> Tensor:
        seen.append(value.clone())
        # A run with a cache of its own, within a run with a cache.
        plain.run_with_cache(tokens[:1, :3], names_filter=name) if len(seen) == 1 else None
        return value + 1

    with plain.hooks(fwd_hooks=[(name, look_then_add)]):
        _, cache = plain.run_with_cache(tokens)
    _, clean = plain.run_with_cache(tokens)
    torch.testing.assert_close(cache[name], clean[name] + 1)
    assert len(seen) == 2
    assert all(hook.reader is None for hook in plain.hook_dict.values())


def test_a_run_that_fails_leaves_no_reader(plain: LoopedTransformer, tokens: Tensor) -> None:
    def fail(value: Tensor, hook: LoopedHookPoint) -> None:
        raise ArithmeticError

    with plain.hooks(fwd_hooks=[("blocks.3.hook_mlp_out", fail)]), pytest.raises(ArithmeticError):
        plain.run_with_cache(tokens)
    assert all(hook.reader is None for hook in plain.hook_dict.values())
    # Caching hooks that are to stay are ordinary hooks.
    store = {}
    _, fwd, _ = plain.get_caching_hooks("hook_embed", cache=store)
    with plain.hooks(fwd_hooks=fwd, reset_hooks_end=False):
        pass
    plain(tokens)
    assert store["hook_embed"].shape == (2, 9, 32)
    plain.reset_hooks()


def test_caching_hooks_of_a_user_keep_their_place_among_the_others(
    plain: LoopedTransformer, tokens: Tensor
) -> None:
    def silence(value: Tensor, hook: LoopedHookPoint) -> Tensor:
        return value * 0

    first, before, _ = plain.get_caching_hooks("hook_embed")
    second, after, _ = plain.get_caching_hooks("hook_embed")
    plain.run_with_hooks(tokens, fwd_hooks=[*before, ("hook_embed", silence), *after])
    assert torch.equal(first["hook_embed"], plain.embed(tokens))
    assert bool((second["hook_embed"] == 0).all())
    outer, hooks, _ = plain.get_caching_hooks("hook_embed")
    with plain.hooks(fwd_hooks=hooks):
        _, inner = plain.run_with_cache(tokens)
    assert torch.equal(outer["hook_embed"], inner["hook_embed"])


# -- the end of a hooked run looks at hooked points alone ---------------------------------------


def copies(model: LoopedTransformer) -> dict[str, LoopedTransformer]:
    return {
        "itself": model,
        "deep copy": deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
        "view": model.view_at(6),
    }


@pytest.mark.once
@pytest.mark.parametrize("name", list(VARIANTS))
def test_reset_hooks_reaches_every_hook_point(name: str) -> None:
    made = LoopedTransformer.from_config(exact_config(**VARIANTS[name]))
    made.set_recurrences(6)
    made.set_recurrences(2)  # some are beyond the present recurrences, some a flag keeps unnamed
    for kind, model in copies(made).items():
        points = list(model.all_hook_points())
        for point in points:
            point.add_hook(lambda x, hook: None, level=3)
            point.add_hook(lambda x, hook: None, dir="bwd")
            point.add_hook(lambda x, hook: None, is_permanent=True)
        for level, left in ((3, (1, 1)), (None, (1, 0))):
            model.remove_all_hook_fns(level=level)
            assert {(len(p.fwd_hooks), len(p.bwd_hooks)) for p in points} == {left}, kind
        model.reset_hooks(including_permanent=True)
        assert not any(p.fwd_hooks or p._forward_hooks for p in points), kind


@pytest.mark.once
def test_what_is_hooked_is_forgotten_when_it_is_not(model: LoopedTransformer) -> None:
    hooked, tokens = model._watch.hooked, torch.tensor([[1, 2]])
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.3.hook_resid_mid", lambda x, hook: None)])
    assert not hooked
    point = model.hook_dict["blocks.3.hook_resid_mid"]
    point.add_hook(lambda x, hook: None)
    assert hooked == {point}
    point.fwd_hooks[0].hook.remove()
    model.reset_hooks()
    assert not hooked
