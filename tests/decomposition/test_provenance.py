"""A decomposition is exact or refused, whatever hooks and interventions did to the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from conftest import VARIANTS, Golden, random_config, with_gains
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from tl_looped import (
    InitialState,
    Injection,
    InvalidDecompositionError,
    LoopedActivationCache,
    LoopedTransformer,
)
from tl_looped import interventions as iv

pytestmark = pytest.mark.usefixtures("without_gradients")
KINDS: dict[str, dict[str, Any]] = VARIANTS | {
    "no-coda": {"n_coda": 0},
    "loop-norm-and-coda": {"loop_norm": True},
    "skip-adapter": {
        "injection": Injection.LINEAR,
        "initial_state": InitialState.PRELUDE_SKIP_ADAPTER,
    },
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WRITES = ("hook_attn_out", "hook_mlp_out")
# What a write is computed from.
BEHIND_WRITES = (
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
)
STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


def model_of(kind: str, dtype: torch.dtype = torch.float64) -> LoopedTransformer:
    values = {"n_prelude": 1, "n_core": 2, "n_recurrences": 2, "d_vocab": 20} | KINDS[kind]
    return with_gains(LoopedTransformer.from_config(random_config(**values))).to(dtype)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))


def shifted(value: Tensor, hook: Any) -> Tensor:
    return value * 1.25 + 0.125


def in_place(value: Tensor, hook: Any) -> None:
    value += 0.125


def cached(model: LoopedTransformer, tokens: Tensor, **run: Any) -> LoopedActivationCache:
    return model.run_with_cache(tokens, **run)[1]


def edited(
    model: LoopedTransformer, tokens: Tensor, *names: str, edit: Any = shifted, **run: Any
) -> LoopedActivationCache:
    with model.hooks(fwd_hooks=[(name, edit) for name in names]):
        return cached(model, tokens, **run)


def no_stream(name: str) -> bool:
    """A filter that leaves out what would show that the sum is wrong."""
    return not name.endswith((*STREAM, "hook_state_in", "hook_state_out", "hook_injected"))


def off(found: Tensor, truth: Tensor) -> float:
    """Largest error, of the largest value."""
    return float((found.double() - truth.double()).abs().max() / truth.double().abs().max())


# -- whatever is edited, wherever it is read ------------------------------------------------------


Answer = tuple[str, Callable[[], float]]


def answers(cache: LoopedActivationCache, logits: Tensor) -> Iterator[Answer]:
    """Decompositions at an inner layer and at the end, each as its distance from the truth."""
    for layer in ((1, 1), None):
        stream = cache["resid_post", -1] if layer is None else cache["resid_mid", layer]
        where: dict[str, Any] = {"layer": layer, "mlp_input": layer is not None}
        onto = torch.linspace(-1, 1, 64, dtype=stream.dtype).view(32, 2)
        parts = where | {"project_output_onto": onto}
        yield f"whole {where}", lambda w=where, s=stream: off(cache.decompose_resid(**w).sum(0), s)
        yield (
            f"heads and neurons {where}",
            lambda w=parts, s=stream @ onto: off(cache.get_full_resid_decomposition(**w).sum(0), s),
        )
    yield (
        "logits",
        lambda: off(cache.logit_attrs(cache.decompose_resid(), 7).sum(0), logits[..., 7]),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_leaves_a_decomposition_exact_or_refused(kind: str, tokens: Tensor) -> None:
    model = model_of(kind)
    model.set_use_attn_result(True)
    model.set_use_hook_mlp_in(True)
    wrong = {name for name in model.hook_dict if name.startswith(("blocks.1.", "recurrence.1."))}
    wrong |= {name for name in model.hook_dict if not name.startswith(("blocks", "recurrence"))}
    last = f"blocks.{model.loop.n_layers - 1}.hook_resid_post"
    passed: dict[str, int] = {}
    for name in sorted(wrong | {last}):
        with model.hooks(fwd_hooks=[(name, shifted)]):
            logits, cache = model.run_with_cache(tokens)
        assert cache.edits is not None
        assert cache.edits.names == {name}
        for what, answer in answers(cache, logits):
            try:
                error = answer()
            except InvalidDecompositionError:
                continue
            assert error < 1e-11, (name, what)
            passed[name] = passed.get(name, 0) + 1
    harmless = (*BEHIND_WRITES, "hook_result", "hook_mlp_in")
    free = [name for name in passed if name.endswith(harmless)]
    assert len(free) == len(harmless)
    assert {passed[name] for name in (*free, "hook_embed")} == {5}
    for write in WRITES:  # whole sublayers pass, at both places, and logits
        assert passed[f"blocks.1.{write}"] >= 3
    assert passed[last] == 2  # what stands before the edit is not refused


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_edits_of_the_stream_are_refused_without_the_stream(
    kind: str, dtype: torch.dtype, tokens: Tensor
) -> None:
    model = model_of(kind, dtype)
    names = [f"blocks.1.{name}" for name in STREAM] + ["recurrence.1.hook_state_in"]
    names += [f"recurrence.{model.loop.R - 2}.hook_state_out"]
    names += [
        name
        for name in model.hook_dict
        if name.endswith(("ln_mid.hook_scale", "ln_out.hook_normalized", "0.ln_loop.hook_scale"))
        or name.startswith("ln_pre_coda")
    ]
    if model.cfg.injection is not Injection.NONE:
        names.append("recurrence.1.hook_injected")
    for i, name in enumerate(names):
        edit = in_place if i % 2 else shifted
        cache = edited(model, tokens, name, edit=edit, names_filter=no_stream)
        with pytest.raises(InvalidDecompositionError):
            cache.decompose_resid()
        assert torch.isfinite(cache.decompose_resid(raw=True)).all()
    clean = cached(model, tokens, names_filter=no_stream)
    assert clean.edits is not None
    assert clean.edits.names == frozenset()
    assert clean.decompose_resid().shape[1:] == (*tokens.shape, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_edits_of_what_is_written_pass(kind: str, dtype: torch.dtype, tokens: Tensor) -> None:
    model = model_of(kind, dtype)
    names = [f"blocks.{i}.{name}" for i in (0, 2) for name in BEHIND_WRITES]
    behind = edited(model, tokens, "hook_embed", *names)
    whole = edited(model, tokens, *(f"blocks.1.{name}" for name in WRITES))
    # A run rounds each of its ten sums, and norms and injections twice or thrice.
    bound = 30 * torch.finfo(dtype).eps + 1e-14
    bound = max(bound, 1e-5) if dtype == torch.float32 else bound
    for cache in (behind, whole):
        assert off(cache.decompose_resid().sum(0), cache["resid_post", -1]) < bound
    heads_and_neurons = behind.get_full_resid_decomposition()
    assert off(heads_and_neurons.sum(0), behind["resid_post", -1]) < bound
    with pytest.raises(InvalidDecompositionError, match="hook_attn_out"):
        whole.stack_head_results()
    with pytest.raises(InvalidDecompositionError, match="hook_mlp_out"):
        whole.get_neuron_results(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unedited_runs_of_the_families_pass(golden: Golden, dtype: torch.dtype) -> None:
    model = golden.load(dtype=dtype)
    cache = cached(model, golden.tokens, **golden.run)
    layers = (1, (1, 0), (model.loop.R - 1, -1), None)
    for layer in layers:
        stack = cache.decompose_resid(layer, pos_slice=(2, 6))
        assert torch.isfinite(stack).all()
    onto = torch.ones(model.cfg.d_model)
    parts = cache.get_full_resid_decomposition(project_output_onto=onto)
    assert torch.isfinite(parts).all()
    loose = LoopedActivationCache(cache.cache_dict, model, state_given=cache.state_given)
    assert loose.edits is None
    assert torch.equal(loose.decompose_resid(), cache.decompose_resid())


# -- the end of a run -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no-coda", "sandwich-loop-norm"])
def test_behind_the_last_recurrence(kind: str, tokens: Tensor) -> None:
    model = model_of(kind)
    name = f"recurrence.{model.loop.R - 1}.hook_state_out"
    for cache in (
        edited(model, tokens, name),
        edited(model, tokens, name, names_filter=no_stream),
    ):
        with pytest.raises(InvalidDecompositionError, match="hook_state_out"):
            cache.logit_attrs(cache.decompose_resid(), 7)
    last = edited(model, tokens, name)
    layer = model.loop.n_layers - 1  # stands before the edit
    assert off(last.decompose_resid(layer).sum(0), last["resid_pre", layer]) < 1e-12
    if kind == "no-coda":
        by_hand = LoopedActivationCache(last.cache_dict, model)
        with pytest.raises(InvalidDecompositionError, match="hook_state_out"):
            by_hand.decompose_resid()


@pytest.mark.parametrize("kind", ["pre", "sandwich-loop-norm"])
@pytest.mark.parametrize(
    "name",
    ["ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"],
)
def test_edits_between_the_stream_and_the_logits(kind: str, name: str, tokens: Tensor) -> None:
    cache = edited(model_of(kind), tokens, name)
    stack = cache.decompose_resid()
    with pytest.raises(InvalidDecompositionError, match=name.replace(".", r"\.")):
        cache.logit_attrs(stack, 7)
    if name.startswith("ln_final"):
        with pytest.raises(InvalidDecompositionError, match="ln_final"):
            cache.decompose_resid(apply_ln=True)
        assert torch.isfinite(cache.decompose_resid(apply_ln=True, raw=True)).all()
    inner = edited(model_of("pre"), tokens, "blocks.2.ln1.hook_normalized")
    assert off(inner.decompose_resid(2).sum(0), inner["resid_pre", 2]) < 1e-12
    with pytest.raises(InvalidDecompositionError, match=r"blocks\.2\.ln1"):
        inner.decompose_resid(2, apply_ln=True)


# -- what is no edit ------------------------------------------------------------------------------


def test_hooks_that_only_read_change_nothing(tokens: Tensor) -> None:
    model = model_of("residual-injection", torch.bfloat16)
    expected = cached(model, tokens).decompose_resid()
    name = "blocks.2.hook_resid_pre"
    module = model.blocks[2]
    readers: dict[str, Callable[[Tensor, Any], Tensor | None]] = {
        "None": lambda value, hook: None,
        "the same": lambda value, hook: value,
        "a copy": lambda value, hook: value.clone(),
        "in place": lambda value, hook: value.mul_(1),
    }
    for reader in readers.values():
        for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
            with mode, model.hooks(fwd_hooks=[(name, reader)]):
                cache = model.run_with_cache(tokens)[1]
            assert cache.edits is not None
            assert cache.edits.names == frozenset()
            assert torch.equal(cache.decompose_resid(), expected)
    handles = [
        module.register_forward_hook(lambda m, args, out: out),
        module.register_forward_pre_hook(lambda m, args: None),
        module.mlp.register_forward_hook(lambda m, args, out: out.clone()),
        module.ln_mid.register_forward_hook(lambda m, args, out: None),
        model.injection.register_forward_hook(lambda m, args, out: None),
        module.hook_resid_mid.register_forward_pre_hook(lambda m, args: None),
        register_module_forward_hook(lambda m, args, out: None),
    ]
    try:
        cache = cached(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    assert cache.edits is not None
    assert cache.edits.names == frozenset()
    assert torch.equal(
        cache.get_full_resid_decomposition(), cached(model, tokens).get_full_resid_decomposition()
    )
    with model.intervening(iv.AddNoise(0.0), iv.ScaleInjection(1.0), iv.SwapStates(1, [0, 1])):
        assert torch.equal(cached(model, tokens).decompose_resid(), expected)


def test_an_edit_in_inference_mode_is_noticed(tokens: Tensor) -> None:
    model = model_of("pre")
    for edit in (shifted, in_place):
        with torch.inference_mode():
            cache = edited(model, tokens, "blocks.2.hook_resid_pre", edit=edit)
        with pytest.raises(InvalidDecompositionError, match=r"blocks\.2\.hook_resid_pre"):
            cache.decompose_resid()


# -- raw torch hooks ------------------------------------------------------------------------------

Attach = Callable[[LoopedTransformer], Any]


def _before(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * 2, *args[1:])


def _before_in_place(module: Any, args: tuple[Tensor, ...]) -> None:
    args[0].mul_(2)


def _after(module: Any, args: Any, out: Tensor) -> Tensor:
    return out * 2


def _after_in_place(module: Any, args: Any, out: Tensor) -> None:
    out.mul_(2)


# Each with what is still exact: "" nothing, "whole" sublayers.
TORCH_HOOKS: dict[str, tuple[Attach, str]] = {
    "block": (lambda m: m.blocks[2].register_forward_hook(_after), ""),
    "block in place": (lambda m: m.blocks[2].register_forward_hook(_after_in_place), ""),
    "before a block": (lambda m: m.blocks[2].register_forward_pre_hook(_before), ""),
    "before it in place": (lambda m: m.blocks[2].register_forward_pre_hook(_before_in_place), ""),
    "norm": (lambda m: m.blocks[2].ln_mid.register_forward_hook(_after), ""),
    "injection": (lambda m: m.injection.register_forward_hook(_after), ""),
    "hook point": (lambda m: m.blocks[2].hook_resid_mid.register_forward_hook(_after), ""),
    "before a hook point": (
        lambda m: m.blocks[2].hook_resid_mid.register_forward_pre_hook(_before_in_place),
        "",
    ),
    "attention": (lambda m: m.blocks[2].attn.register_forward_hook(_after), "whole"),
    "mlp": (lambda m: m.blocks[2].mlp.register_forward_hook(_after_in_place), "whole"),
}


@pytest.mark.parametrize("where", TORCH_HOOKS)
def test_edits_by_torch_hooks(where: str, tokens: Tensor) -> None:
    attach, exact = TORCH_HOOKS[where]
    model = model_of("residual-injection")
    handle = attach(model)
    cache = cached(model, tokens)
    handle.remove()
    filtered = copy(cache)
    filtered.cache_dict = {n: v for n, v in cache.items() if no_stream(n) and n[-4:] != "_out"}
    filtered.cache_dict |= {n: v for n, v in cache.items() if n.endswith(("attn_out", "mlp_out"))}
    for one in (cache, filtered):
        if exact:
            assert off(one.decompose_resid().sum(0), cache["resid_post", -1]) < 1e-12
        else:
            with pytest.raises(InvalidDecompositionError):
                one.decompose_resid()
        with pytest.raises(InvalidDecompositionError):
            one.get_full_resid_decomposition()
    clean = cached(model, tokens)
    assert off(clean.get_full_resid_decomposition().sum(0), clean["resid_post", -1]) < 1e-12


def test_an_edit_in_place_before_a_norm_reaches_only_the_norm(tokens: Tensor) -> None:
    model = model_of("pre")
    clean = cached(model, tokens)
    for name, stream in (("ln1", "resid_pre"), ("ln2", "resid_mid")):
        runs = []
        for hook in (_before, _before_in_place):
            handle = getattr(model.blocks[1], name).register_forward_pre_hook(hook)
            cache = cached(model, tokens)
            assert off(model(tokens), cache["unembed.hook_out"]) < 1e-12
            handle.remove()
            assert torch.equal(cache[stream, 1], clean[stream, 1])
            cache.cache_dict = {n: v for n, v in cache.items() if no_stream(n)} | {
                "truth": cache["resid_post", -1]
            }
            assert off(cache.decompose_resid().sum(0), cache.cache_dict["truth"]) < 1e-12
            runs.append(cache)
        assert torch.equal(runs[0]["unembed.hook_out"], runs[1]["unembed.hook_out"])


# -- interventions --------------------------------------------------------------------------------


def interventions_on(model: LoopedTransformer, tokens: Tensor) -> dict[str, Any]:
    state = torch.linspace(-1, 1, 5 * 32).view(1, 5, 32)
    every = {
        "AblateHeads": iv.AblateHeads({0: [1]}, 1),
        "AblateNeurons": iv.AblateNeurons({1: [3, 4]}),
        "AblateMLP": iv.AblateMLP(1),
        "FreezeAttention": iv.FreezeAttention(0),
        "ReplaceInitialState": iv.ReplaceInitialState(state),
        "SkipLayers": iv.SkipLayers(1, 1),
        "SkipRecurrences": iv.SkipRecurrences(1),
        "RepeatRecurrence": iv.RepeatRecurrence(0, 2),
        "AddNoise": iv.AddNoise(1.0, 1),
        "SwapStates": iv.SwapStates(1),
        "FreezeLoop": iv.FreezeLoop(0),
        "SwapLayers": iv.SwapLayers(0, 1),
        "ReorderLayers": iv.ReorderLayers((1, 1)),
    }
    if model.cfg.injection is not Injection.NONE:
        every["ScaleInjection"] = iv.ScaleInjection(0.5, 1)
    return every


CARRIED = (
    "AblateHeads",
    "AblateNeurons",
    "AblateMLP",
    "FreezeAttention",
    "ReplaceInitialState",
)
ONLY_WHOLE = ("SkipLayers", "SwapLayers", "ReorderLayers")  # unless norms stand on the stream


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["pre", "no-coda", "residual-injection", "skip-adapter"])
def test_interventions_are_carried_or_refused(
    kind: str, dtype: torch.dtype, tokens: Tensor
) -> None:
    model = model_of(kind, dtype)
    bound = 1e-12 if dtype == torch.float64 else 0.1
    for name, change in interventions_on(model, tokens).items():
        with model.intervening(change):
            cache = cached(model, tokens)
            blind = cached(model, tokens, names_filter=no_stream)
        assert cache.edits is not None
        assert cache.edits.interventions == (repr(change),)
        whole = name in CARRIED or (name in ONLY_WHOLE and kind != "residual-injection")
        # Zeros in place of a layer's output are not what its heads or neurons add up to.
        parts = name in CARRIED and name != "AblateMLP"
        for passes, call in (
            (whole, LoopedActivationCache.decompose_resid),
            (parts, LoopedActivationCache.get_full_resid_decomposition),
        ):
            if passes:
                assert off(call(cache).sum(0), cache["resid_post", -1]) < bound, name
                torch.testing.assert_close(call(blind), call(cache), atol=0, rtol=0)
            else:
                for one in (cache, blind):
                    with pytest.raises(InvalidDecompositionError):
                        call(one)
        # Nothing is edited before the prelude's MLP.
        before = cache.decompose_resid(0, mlp_input=True)
        assert off(before.sum(0), cache["resid_mid", 0]) < bound, name


# -- caches ---------------------------------------------------------------------------------------


def test_copies_and_slices_keep_what_was_edited(tokens: Tensor) -> None:
    cache = edited(model_of("pre"), tokens, "blocks.2.hook_resid_pre", names_filter=no_stream)
    for other in (
        cache.apply_slice_to_batch_dim(1),
        copy(cache),
        deepcopy(cache),
        cache.to("cpu"),
    ):
        assert other.edits == cache.edits
        with pytest.raises(InvalidDecompositionError):
            other.decompose_resid()
    one = edited(model_of("pre"), tokens[:1], "blocks.2.hook_resid_pre", remove_batch_dim=True)
    with pytest.raises(InvalidDecompositionError):
        one.decompose_resid()
    assert one.decompose_resid(1).shape[1:] == (5, 32)


def test_each_run_has_its_own_record(tokens: Tensor) -> None:
    model = model_of("pre")
    name = "blocks.2.hook_resid_pre"
    model.add_hook(name, shifted)
    first = cached(model, tokens)
    model.reset_hooks()
    second = cached(model, tokens)
    assert first.edits is not None
    assert second.edits is not None
    assert first.edits.names == {name}
    assert second.edits.names == frozenset()
    assert off(second.decompose_resid().sum(0), second["resid_post", -1]) < 1e-12


@pytest.mark.parametrize("inner_caches", [False, True])
def test_a_run_within_a_hook_is_not_the_run(inner_caches: bool, tokens: Tensor) -> None:
    model = model_of("pre-injection")
    clean = cached(model, tokens)
    inside: list[Any] = []

    def run_inside(value: Tensor, hook: Any) -> Tensor | None:
        if inside:
            return value + 1  # in the inner run alone
        inside.append(None)
        if inner_caches:
            inside.append(cached(model, tokens[:1, :3], names_filter=["hook_embed", hook.name]))
        else:
            model(tokens[:1, :3])
        return None

    outer = edited(model, tokens, "blocks.2.hook_resid_pre", edit=run_inside)
    assert outer.edits is not None
    assert outer.edits.names == frozenset()
    assert list(outer) == list(clean)
    for name, value in clean.items():
        assert torch.equal(outer[name], value), name
    assert torch.equal(outer.decompose_resid(), clean.decompose_resid())
    if inner_caches:
        assert inside[1].edits.names == {"blocks.2.hook_resid_pre"}


def test_a_cache_by_hand_is_checked_by_its_numbers(tokens: Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of("residual-injection", dtype)
        clean = cached(model, tokens)
        store = model.add_caching_hooks()
        model(tokens)
        model.reset_hooks()
        by_hand = LoopedActivationCache(store, model)
        assert torch.equal(by_hand.decompose_resid(), clean.decompose_resid())
        blind = LoopedActivationCache({n: v for n, v in store.items() if no_stream(n)}, model)
        with pytest.raises(InvalidDecompositionError, match="by hand"):
            blind.decompose_resid()
        assert torch.equal(blind.decompose_resid(raw=True), clean.decompose_resid(raw=True))
        # Numbers alone see what half precision cannot explain: here another state, not a nudge.
        bad = edited(model, tokens, "blocks.4.hook_resid_pre", edit=lambda x, hook: -x.flip(-1))
        with pytest.raises(InvalidDecompositionError, match="sum to something else"):
            LoopedActivationCache(bad.cache_dict, model).decompose_resid()


def test_an_error_that_rounding_does_not_explain_is_refused(tokens: Tensor) -> None:
    model = model_of("pre", torch.float32)
    cache = cached(model, tokens)
    cache.cache_dict = dict(cache.cache_dict)
    cache.cache_dict["blocks.1.hook_attn_out"] = cache["blocks.1.hook_attn_out"] * 1.001
    with pytest.raises(InvalidDecompositionError, match="rounding"):
        cache.decompose_resid()
    for dtype in DTYPES:
        model = model_of("pre", dtype)
        cache = cached(model, tokens)
        model.core[0].attn.out.mul_(2)
        with pytest.raises(InvalidDecompositionError, match="changed since"):
            cache.stack_head_results()
        model.core[1].mlp.down.mul_(2)
        for neurons in (None, 3):
            with pytest.raises(InvalidDecompositionError, match="changed since"):
                cache.stack_neuron_results(-1, neuron_slice=neurons)
