"""The stream of a looped model, decomposed into what was written to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from closeness import assert_same
from conftest import VARIANTS, Golden, exact_config, with_gains
from torch import Tensor, nn
from transformer_lens import ActivationCache

from tl_looped import (
    InitialState,
    Injection,
    InputError,
    InvalidDecompositionError,
    LayerIndexError,
    LoopedActivationCache,
    LoopedTransformer,
    MissingActivationError,
    NormLayout,
)

pytestmark = pytest.mark.usefixtures("without_gradients")
KINDS: dict[str, dict[str, Any]] = VARIANTS | {
    "loop-norm-and-coda": {"loop_norm": True},
    "skip-adapter": {
        "injection": Injection.LINEAR,
        "initial_state": InitialState.PRELUDE_SKIP_ADAPTER,
    },
    "injected-prelude-state": {
        "injection": Injection.LINEAR,
        "initial_state": InitialState.PRELUDE,
        "n_prelude": 0,
    },
}


def model_of(kind: str, **changes: Any) -> LoopedTransformer:
    values = {"n_prelude": 2, "n_core": 2, "n_recurrences": 3} | KINDS[kind] | changes
    return with_gains(LoopedTransformer.from_config(exact_config(**values)))


def cached(model: LoopedTransformer, tokens: Tensor, **run: Any) -> LoopedActivationCache:
    with torch.no_grad():
        return model.run_with_cache(tokens, **run)[1]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> LoopedTransformer:
    return model_of(request.param)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def places(model: LoopedTransformer) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place where the stream is read: arguments, and the hook that holds it."""
    for layer in range(model.loop.n_layers):
        yield {"layer": layer}, f"blocks.{layer}.hook_resid_pre"
        yield {"layer": layer, "mlp_input": True}, f"blocks.{layer}.hook_resid_mid"
    yield {}, f"blocks.{model.loop.n_layers - 1}.hook_resid_post"


# -- against the authors' activations -----------------------------------------------------------


def test_components_sum_to_the_stream_at_every_layer(golden: Golden) -> None:
    model = golden.load()
    cache = cached(model, golden.tokens, **golden.run)
    row = cache.apply_slice_to_batch_dim(1)
    for where, name in places(model):
        truth = cache.cache_dict[name]
        assert relative(cache.decompose_resid(**where).sum(0), truth) < 1e-4
        assert relative(cache.decompose_resid(**where, pos_slice=-2).sum(0), truth[:, -2]) < 1e-4
        part = row.decompose_resid(**where, pos_slice=(3, 7)).sum(0)
        assert relative(part, truth[1, 3:7]) < 1e-4
    for place in ((0, 0), (model.loop.R - 1, -1)):
        assert torch.equal(
            cache.decompose_resid(place), cache.decompose_resid(model.loop.index(*place))
        )


def test_the_reference_residuals_and_logits_are_reached(golden: Golden) -> None:
    model = golden.load()
    cache = cached(model, golden.tokens, **golden.run)
    last = "coda" if model.loop.c else "core"
    key = f"coda.{model.loop.c - 1}" if last == "coda" else "core.3.2"
    heads = cache.get_full_resid_decomposition(expand_neurons=False)
    neurons = cache.get_full_resid_decomposition()
    for stack in (cache.decompose_resid(), heads, neurons):
        assert relative(stack.sum(0), golden.tensors[key]) < 1e-4
        for token in (7, 55):
            attributions = cache.logit_attrs(stack, token, incorrect_tokens=20)
            logits = golden.tensors["logits"]
            assert relative(attributions.sum(0), logits[..., token] - logits[..., 20]) < 1e-4
    row = cache.apply_slice_to_batch_dim(0)
    one = row.logit_attrs(row.decompose_resid(pos_slice=4), 7, pos_slice=4, has_batch_dim=False)
    assert relative(one.sum(0), golden.tensors["logits"][0, 4, 7]) < 1e-4


# -- against the model's own forward pass -------------------------------------------------------


def change_from_doubling(
    model: LoopedTransformer, cache: LoopedActivationCache, tokens: Tensor, name: str, edit: Any
) -> Tensor:
    """What the final stream gains if one write is doubled and all else is held as it was.

    The scales of all norms, the other writes and the run's state are set to their cached values by
    hooks, so that nothing but the path of that one write is left.
    """
    held = ("hook_scale", "hook_embed", "hook_attn_out", "hook_mlp_out", "hook_initial_state")
    if edit is not None:
        held = (*held, "attn.hook_result")

    def hold(value: Tensor, hook: Any) -> Tensor:
        if hook.name != name:
            return cache.cache_dict[hook.name]
        return 2 * cache.cache_dict[name] if edit is None else edit(cache.cache_dict[name])

    # The state goes on from the prelude's output unless it was drawn, and must then not be held.
    from_prelude = model.cfg.initial_state is not InitialState.RANDOM
    attn_out = name.replace("attn.hook_result", "hook_attn_out") if edit else None
    free = {"hook_initial_state"} if from_prelude else set()
    names = [n for n in model.hook_dict if n.endswith(held) and n not in free | {attn_out}]
    # Norms that do not stand on the stream read other values now; that must not matter.
    last = f"blocks.{model.loop.n_layers - 1}.hook_resid_post"
    out: dict[str, Tensor] = {}
    hooks = [(n, hold) for n in names]
    hooks.append((last, lambda value, hook: out.update(x=value)))
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    return out["x"] - cache.cache_dict[last]


def test_a_component_is_what_doubling_its_write_adds_to_the_stream(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    cache = cached(model, tokens)
    stack, labels = cache.decompose_resid(return_labels=True)
    names = ["hook_embed"]
    for layer in range(model.loop.n_layers):
        if layer == model.loop.p and model.cfg.initial_state is InitialState.RANDOM:
            names.append("hook_initial_state")
        names += [f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"]
    assert len(names) == len(labels) == len(set(labels))
    for component, label, name in zip(stack, labels, names, strict=True):
        if name.startswith("blocks"):
            place = model.loop.locate(int(name.split(".")[1])).label
            assert label == f"{place}.{name.split('hook_')[1]}"
        change = change_from_doubling(model, cache, tokens, name, None)
        assert_same(component, change)


def test_a_head_is_what_doubling_its_result_adds_to_the_stream(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    model.set_use_attn_result(True)
    cache = cached(model, tokens)
    stack, labels = cache.stack_head_results(return_labels=True)
    for layer, head in ((0, 1), (model.loop.index(1, 1), 2), (model.loop.index(2, 0), 0)):

        def double(result: Tensor, head: int = head) -> Tensor:
            result = result.clone()
            result[:, :, head] *= 2
            return result

        name = f"blocks.{layer}.attn.hook_result"
        change = change_from_doubling(model, cache, tokens, name, double)
        row = labels.index(f"{model.loop.locate(layer).label}h{head}")
        assert row == layer * 4 + head
        assert_same(stack[row], change)


def test_parts_sum_to_their_sublayers_and_groups_to_their_members(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    cache = cached(model, tokens)
    for where in ({"layer": None}, {"layer": (1, 1)}, {"layer": (2, 0)}):
        whole, labels = cache.decompose_resid(**where, return_labels=True)
        by_label = dict(zip(labels, whole, strict=True))
        for stack, kind in (
            (cache.stack_head_results(**where, by="effective_layer", return_labels=True), "attn"),
            (cache.stack_neuron_results(**where, by="effective_layer", return_labels=True), "mlp"),
        ):
            for row, label in zip(*stack, strict=True):
                assert_same(row, by_label[f"{label}.{kind}_out"])
        for by in ("recurrence", "layer", "effective_layer", "head"):
            grouped = cache.decompose_resid(**where, by=by)
            assert_same(grouped.sum(0), whole.sum(0))


def test_groups_are_named_and_hold_their_members(tokens: Tensor) -> None:
    model = model_of("pre-injection")
    cache = cached(model, tokens)
    whole, labels = cache.decompose_resid(return_labels=True)
    expected = {
        "recurrence": ["embed", "prelude", "initial_state", "r0", "r1", "r2", "coda"],
        "layer": ["embed", "prelude.0", "prelude.1", "initial_state", "l0", "l1", "coda.0"],
    }
    for by, names in expected.items():
        stack, found = cache.decompose_resid(by=by, return_labels=True)
        assert found == names
        for row, name in zip(stack, found, strict=True):
            mine = [name in (label, *label.split(".")) for label in labels]
            if name.startswith(("prelude.", "coda.")):
                mine = [label.startswith(name) for label in labels]
            assert_same(row, whole[torch.tensor(mine)].sum(0))
    heads, names = cache.stack_head_results(by="head", return_labels=True)
    assert names[8:12] == ["l0h0", "l0h1", "l0h2", "l0h3"]
    every, labels = cache.stack_head_results(return_labels=True)
    mine = torch.tensor([label.endswith(".l0h2") for label in labels])
    assert int(mine.sum()) == 3
    assert_same(heads[10], every[mine].sum(0))
    with pytest.raises(InputError, match="recurrence"):
        cache.decompose_resid(by="recurrences")


# -- against TransformerLens --------------------------------------------------------------------


def test_a_plain_stream_decomposes_as_in_transformerlens(tokens: Tensor) -> None:
    model = model_of("pre", n_key_value_heads=2, embed_scale=3.0)
    with torch.no_grad():
        cache = cached(model, tokens)
        theirs = ActivationCache(cache.cache_dict, model)
        for method, arguments in (
            ("decompose_resid", {"layer": 4, "mlp_input": True, "apply_ln": True}),
            ("decompose_resid", {"mode": "mlp", "pos_slice": (1, 6, 2), "incl_embeds": False}),
            ("stack_head_results", {"incl_remainder": True, "pos_slice": [0, -1]}),
            ("stack_head_results", {"layer": 5, "apply_ln": True}),
            ("stack_neuron_results", {"layer": 3, "incl_remainder": True, "pos_slice": -1}),
            ("stack_neuron_results", {"layer": 4, "neuron_slice": (0, 9, 4), "apply_ln": True}),
            ("get_full_resid_decomposition", {"apply_ln": True}),
            ("get_full_resid_decomposition", {"layer": 3, "expand_neurons": False}),
            ("get_full_resid_decomposition", {"project_output_onto": model.W_U[:, :3]}),
        ):
            mine = getattr(cache, method)(**arguments)
            assert_same(mine, getattr(theirs, method)(**arguments))


def test_raw_writes_are_the_cached_ones(model: LoopedTransformer, tokens: Tensor) -> None:
    cache = cached(model, tokens)
    stack = cache.decompose_resid(mode="attn", incl_embeds=False, raw=True)
    for layer in range(model.loop.n_layers):
        assert torch.equal(stack[layer], cache["attn_out", layer])
    heads = cache.stack_head_results(raw=True, by="effective_layer")
    assert_same(heads, stack)
    for layer in ((0, 1), (2, 0)):
        neurons = cache.get_neuron_results(layer)
        assert_same(neurons.sum(-2), cache["mlp_out", layer])
        direction = torch.arange(32.0, dtype=torch.float64)
        projected = cache.get_neuron_results(layer, (3, 9), -1, project_output_onto=direction)
        assert_same(projected, neurons[:, -1, 3:9] @ direction)
        two = torch.stack((direction, direction.flip(0)), 1)
        one_neuron = cache.get_neuron_results(layer, 5, project_output_onto=two)
        assert_same(one_neuron, neurons[..., 5, :] @ two)


# -- projections, norms, remainders -------------------------------------------------------------


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Wrapped(nn.Module):
    """In place of a linear map, as an adapter's layer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight = inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("change", ["parametrised", "pruned", "wrapped"])
def test_an_injection_counts_with_the_weights_that_it_uses(tokens: Tensor, change: str) -> None:
    model = model_of("pre-injection")
    before = model(tokens)
    if change == "parametrised":
        nn.utils.parametrize.register_parametrization(model.injection, "weight", Twice())
    elif change == "pruned":
        nn.utils.prune.l1_unstructured(model.injection, "weight", amount=0.3)
    else:
        model.injection = Wrapped(model.injection)
    assert torch.allclose(model(tokens), before) == (change == "wrapped")
    cache = cached(model, tokens)
    assert_same(cache.decompose_resid().sum(0), cache["resid_post", -1])


@pytest.mark.parametrize("wanted", [slice(1, 3), (1, None), (None, 3), (None, None, 2)])
def test_positions_are_sliced_as_in_transformerlens(tokens: Tensor, wanted: Any) -> None:
    """With a Python slice, and with open ends."""
    cache = cached(model_of("pre-injection"), tokens)
    here = wanted if isinstance(wanted, slice) else slice(*wanted)
    assert torch.equal(cache.decompose_resid(pos_slice=wanted), cache.decompose_resid()[:, :, here])
    accumulated = cache.accumulated_resid(pos_slice=wanted)
    assert torch.equal(accumulated, cache.accumulated_resid()[:, :, here])
    neurons = cache.stack_neuron_results(2, neuron_slice=wanted)
    per_layer = cache.model.cfg.d_mlp
    everything = cache.stack_neuron_results(2).unflatten(0, (-1, per_layer))
    assert_same(neurons, everything[:, here].flatten(0, 1))
    assert cache.apply_slice_to_batch_dim(wanted)["embed"].ndim == 3


@pytest.mark.parametrize("apply_ln", [False, True])
def test_pulling_a_direction_back_equals_projecting_the_components(
    model: LoopedTransformer, tokens: Tensor, apply_ln: bool
) -> None:
    cache = cached(model, tokens)
    onto = model.W_U[:, :4].detach()
    everywhere: tuple[Any, ...] = (None, -1, (2, 8, 3))
    for pos_slice in everywhere:
        common: dict[str, Any] = {"apply_ln": apply_ln, "pos_slice": pos_slice}
        full = cache.get_full_resid_decomposition(**common)
        assert_same(
            cache.get_full_resid_decomposition(**common, project_output_onto=onto), full @ onto
        )
        neurons = cache.stack_neuron_results(-1, incl_remainder=True, neuron_slice=5, **common)
        found = cache.stack_neuron_results(
            -1, incl_remainder=True, neuron_slice=5, **common, project_output_onto=onto[:, 0]
        )
        assert_same(found, neurons @ onto[:, 0])
    row = cache.apply_slice_to_batch_dim(0)
    assert_same(
        row.get_full_resid_decomposition(apply_ln=apply_ln, project_output_onto=onto),
        cache.get_full_resid_decomposition(apply_ln=apply_ln, project_output_onto=onto)[:, 0],
    )


def test_the_remainder_fills_heads_up_to_the_stream(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    cache = cached(model, tokens)
    for layer, name in ((None, "resid_post"), ((1, 0), "resid_pre"), (0, "resid_pre")):
        stack, labels = cache.stack_head_results(layer, return_labels=True, incl_remainder=True)
        truth = cache[name, -1 if layer is None else layer]
        assert labels[-1] == "remainder"
        assert_same(stack.sum(0), truth)
    assert cache.stack_head_results(0).shape == (0, *tokens.shape, 32)


# -- runs that differ ---------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["zeros", "given"])
def test_a_given_state_is_a_component_of_its_own(
    model: LoopedTransformer, tokens: Tensor, state: str
) -> None:
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(2, 9, 32, generator=generator)
    given = torch.zeros_like(random) if state == "zeros" else random
    cache = cached(model, tokens, initial_state=given)
    stack, labels = cache.decompose_resid(return_labels=True)
    assert "initial_state" in labels
    assert_same(stack.sum(0), cache["resid_post", -1])
    if model.cfg.injection is Injection.NONE:
        # Nothing of the prompt reaches the end but through attention.
        before = [row for row, label in zip(stack, labels, strict=True) if "prelude" in label]
        assert all(bool((row == 0).all()) for row in [stack[labels.index("embed")], *before])


def test_an_older_cache_decomposes_by_its_own_geometry(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    cache = cached(model, tokens)
    expected = cache.decompose_resid()
    model.set_recurrences(1)
    assert torch.equal(cache.decompose_resid(), expected)
    assert torch.equal(cache.decompose_resid((2, 1)), cache.decompose_resid(model.loop.p + 5))


def test_no_recurrence_at_all(tokens: Tensor) -> None:
    model = model_of("residual-injection")
    cache = cached(model, tokens, n_recurrences=0)
    stack, labels = cache.decompose_resid(return_labels=True)
    assert labels[-3:] == ["initial_state", "coda.0.attn_out", "coda.0.mlp_out"]
    assert_same(stack.sum(0), cache["resid_post", -1])


def test_padding_and_half_precision(tokens: Tensor) -> None:
    model = model_of("residual-injection")
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    cache = cached(model, tokens, attention_mask=mask)
    assert_same(cache.decompose_resid().sum(0), cache["resid_post", -1])
    half = cached(model.to(torch.bfloat16), tokens)
    stack = half.decompose_resid()
    assert stack.dtype == torch.float32
    assert relative(stack.sum(0), half["resid_post", -1].float()) < 0.05


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("residual-injection", "blocks.2.ln_mid.hook_scale"),
        ("residual-injection", "ln_pre_coda.hook_scale"),
        ("loop-norm-and-coda", "recurrence.1.ln_loop.hook_scale"),
    ],
)
def test_a_scale_that_was_not_cached_is_named(kind: str, norm: str, tokens: Tensor) -> None:
    cache = cached(model_of(kind), tokens, names_filter=lambda name: name != norm)
    with pytest.raises(MissingActivationError, match=norm.replace(".", r"\.")):
        cache.decompose_resid()
    assert cache.decompose_resid(raw=True).shape[1:] == (*tokens.shape, 32)


def test_heads_behind_a_post_norm_need_its_scale(tokens: Tensor) -> None:
    wanted = lambda name: not name.endswith("ln1_post.hook_scale")  # noqa: E731
    cache = cached(model_of("post-qk-norm"), tokens, names_filter=wanted)
    with pytest.raises(MissingActivationError, match=r"blocks\.0\.ln1_post\.hook_scale"):
        cache.stack_head_results()


def test_a_stream_that_a_hook_edited_is_no_sum_of_writes(tokens: Tensor) -> None:
    model = model_of("pre-injection")

    def shift(value: Tensor, hook: Any) -> Tensor:
        return value + 1.0

    for name in ("blocks.4.hook_resid_pre", "recurrence.1.hook_injected", "hook_initial_state"):
        with model.hooks(fwd_hooks=[(name, shift)]):
            cache = cached(model, tokens)
        if name == "hook_initial_state":  # a drawn state is a component, edited or not
            assert_same(cache.decompose_resid().sum(0), cache["resid_post", -1])
            continue
        with pytest.raises(InvalidDecompositionError, match="edited"):
            cache.decompose_resid()
        assert torch.isfinite(cache.decompose_resid(raw=True)).all()


def test_an_edit_is_noticed_whatever_part_is_asked_for(tokens: Tensor) -> None:
    model = model_of("pre")
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1)).double()
    noise = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    hooks = [("recurrence.1.hook_state_in", lambda value, hook: value + noise)]
    with model.hooks(fwd_hooks=hooks):
        edited = cached(model, tokens)
    loud_position = [
        ("hook_embed", lambda value, hook: torch.cat((value[:, :1] + 2000, value[:, 1:]), 1)),
        ("blocks.5.hook_resid_pre", lambda value, hook: torch.cat((value[:, :1], noise[:, 1:]), 1)),
    ]
    with model.hooks(fwd_hooks=loud_position):
        loud = cached(model, tokens)
    for cache in (edited, loud):
        for call in (
            lambda c: c.decompose_resid(),
            lambda c: c.decompose_resid(incl_embeds=False),
            lambda c: c.stack_head_results(),
            lambda c: c.stack_neuron_results(-1, neuron_slice=3),
            lambda c: c.get_full_resid_decomposition(project_output_onto=direction),
            lambda c: c.decompose_resid(pos_slice=5),
        ):
            with pytest.raises(InvalidDecompositionError, match="edited"):
                call(cache)
        before = cache.decompose_resid((0, 1))  # what stands before the edit is as it was
        assert_same(before.sum(0), cache["resid_pre", (0, 1)])


def test_heads_and_neurons_that_are_not_what_was_written(tokens: Tensor) -> None:
    model = model_of("post-qk-norm")
    ablated = ["blocks.3.hook_attn_out", "blocks.3.hook_mlp_out"]
    with model.hooks(fwd_hooks=[(name, lambda value, hook: value * 0) for name in ablated]):
        cache = cached(model, tokens)
    assert_same(cache.decompose_resid().sum(0), cache["resid_post", -1])
    direction = torch.ones(32)
    for call in (
        lambda: cache.stack_head_results(),
        lambda: cache.stack_neuron_results(-1),
        lambda: cache.stack_neuron_results(-1, project_output_onto=direction),
    ):
        with pytest.raises(InvalidDecompositionError, match=r"blocks\.3\.hook_"):
            call()
    assert cache.stack_head_results(3).shape[0] == 3 * 4
    clean = cached(model, tokens)
    model.core[0].attn.out.mul_(2)
    with pytest.raises(InvalidDecompositionError, match="changed since"):
        clean.stack_head_results()


@pytest.mark.parametrize("flag", ["attn_in", "split_qkv_input"])
def test_a_norm_for_each_head_is_one_norm_unless_a_hook_parts_them(
    flag: str, tokens: Tensor
) -> None:
    model = model_of("pre")
    tokens = tokens[:1, :4]
    wanted = {"apply_ln": True, "pos_slice": -1}
    expected = cached(model, tokens).decompose_resid(5, **wanted)
    streams = cached(model, tokens).accumulated_resid(5, apply_ln=True)
    getattr(model, f"set_use_{flag}")(True)
    cache = cached(model, tokens)
    assert_same(cache.decompose_resid(5, **wanted), expected)
    assert_same(cache.accumulated_resid(5, apply_ln=True), streams)
    if flag == "attn_in":

        def part(value: Tensor, hook: Any) -> Tensor:
            value[:, :, 1] *= 3
            return value

        with model.hooks(fwd_hooks=[("blocks.5.hook_attn_in", part)]):
            parted = cached(model, tokens)
        with pytest.raises(InvalidDecompositionError, match="different scales"):
            parted.decompose_resid(5, **wanted)


def test_layers_and_modes_out_of_range(tokens: Tensor) -> None:
    cache = cached(model_of("pre"), tokens)
    with pytest.raises(LayerIndexError, match=r"0\.\.8"):
        cache.decompose_resid(10)
    with pytest.raises(LayerIndexError, match=r"0\.\.8"):
        cache.decompose_resid(mlp_input=True)
    with pytest.raises(LayerIndexError, match=r"recurrence 3"):
        cache.stack_head_results((3, 0))
    with pytest.raises(InputError, match="mode"):
        cache.decompose_resid(mode="heads")


def test_the_final_gain_counts_in_attributions(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(norm_layout=NormLayout.PRE))
    with torch.no_grad():
        model.final_norm.w.copy_(torch.linspace(-2, 2, 32))
        logits, cache = model.run_with_cache(tokens)
    attributions = cache.logit_attrs(cache.decompose_resid(), tokens.roll(-1, 1))
    expected = logits.gather(-1, tokens.roll(-1, 1)[..., None])[..., 0]
    assert_same(attributions.sum(0), expected)
