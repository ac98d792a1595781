"""Edits of weights under TransformerLens's names reach the stored parameter, or are refused."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_same
from conftest import VARIANTS, Golden, exact_config, random_config, with_gains
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tl_looped import InputError, LoopedTransformer
from tl_looped._compat import FactoredMatrix
from tl_looped.model.attention_weights import NamedAttention
from tl_looped.model.shown import ShownWeight

ATTN = ("W_Q", "W_K", "W_V", "W_O")
MATRICES = (*(f"attn.{name}" for name in ATTN), "mlp.W_gate", "mlp.W_in", "mlp.W_out")
NO_BIAS = ("attn.b_V", "attn.b_O", "mlp.b_in", "mlp.b_out")
NAN = float("nan")
TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def make(kind: str, folded: bool = False) -> LoopedTransformer:
    config = exact_config(**(VARIANTS[kind] | {"n_recurrences": 3}))
    model = with_gains(LoopedTransformer.from_config(config))
    model.enable_compatibility_mode(fold_ln=folded)
    return model


@pytest.fixture(params=VARIANTS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[False, True], ids=["plain", "folded"])
def model(kind: str, request: pytest.FixtureRequest) -> LoopedTransformer:
    return make(kind, request.param)


def shown(model: LoopedTransformer, name: str) -> ShownWeight:
    if name.startswith("blocks."):
        _, i, rest = name.split(".", 2)
        found: ShownWeight = attrgetter(rest)(model.blocks[int(i)])
        return found
    return attrgetter(name)(model)  # type: ignore[no-any-return]


def gain_of(model: LoopedTransformer, name: str) -> Tensor | None:
    """The gain that a folded weight has, by the definition of compatibility mode."""
    weight = name.rpartition(".")[2].removeprefix("_")
    if model.cfg.normalization_type == "RMS":
        return None
    if weight == "W_U":
        return model.final_norm.w.detach()
    stored = model.parameter_of(name)
    assert stored is not None
    norm = {"W_gate": "ln2", "W_in": "ln2", "W_Q": "ln1", "W_K": "ln1", "W_V": "ln1"}.get(weight)
    layer = model.get_submodule(".".join(stored.name.split(".")[:2]))
    return getattr(layer, norm).w.detach() if norm and hasattr(layer, norm) else None


State = dict[str, Tensor]


def state(model: LoopedTransformer) -> State:
    """Copies of what is stored."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def rebuilt(model: LoopedTransformer, name: str, value: Tensor, before: State) -> State:
    """What is stored if a weight, in TransformerLens's shape, has a value: made anew by hand."""
    gain, weight, at = gain_of(model, name), name.rpartition(".")[2], model.parameter_of(name)
    assert at is not None
    value = plain(value)
    if gain is not None:
        value = value / gain[:, None]
    if weight in ("W_K", "W_V"):
        value = value[:: model.cfg.n_heads // model.cfg.n_kv_heads]
    if weight[-1] in "QKV":
        rows = torch.cat([head.T for head in value])
    else:
        rows = torch.cat(list(value)).T if weight == "W_O" else value.T
    matrix = before[at.name].clone()
    matrix[at.rows] = rows
    return before | {at.name: matrix}


def assert_stored(model: LoopedTransformer, expected: State) -> None:
    for name, value in model.named_parameters():
        found, wanted = value.detach(), expected[name]
        if not torch.equal(found, wanted):
            assert_same(found.nan_to_num(7.0, 8.0), wanted.nan_to_num(7.0, 8.0))


def assert_unchanged(model: LoopedTransformer, before: State) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@torch.no_grad()
def restore(model: LoopedTransformer, before: State) -> None:
    for name, value in model.named_parameters():
        value.copy_(before[name])


def plain(weight: Tensor) -> Tensor:
    """The numbers alone."""
    return weight.detach().clone().as_subclass(Tensor)


# -- edits ----------------------------------------------------------------------------------------


def foreach(w: Tensor) -> None:
    torch._foreach_mul_([w], 2.0)


def by_data(w: Any) -> None:
    w.data = w.detach() * 3


EDITS: dict[str, Callable[[Any], Any]] = {
    "setitem": lambda w: w.__setitem__(slice(None), 0.25),
    "row of a view": lambda w: w.transpose(-1, -2)[..., 1, :].fill_(0.5),
    "iadd": lambda w: w.__iadd__(1.0),
    "imul of a view": lambda w: w[..., :2].__imul__(2.0),
    "copy_": lambda w: w.copy_(torch.linspace(-1, 1, w[0].numel()).view(w[0].shape)),
    "out": lambda w: torch.add(w, 1.0, out=w),
    "out of another": lambda w: torch.neg(torch.ones_like(w), out=w),
    "foreach": foreach,
    "init": lambda w: nn.init.constant_(w, 0.125),
    "init of a view": lambda w: nn.init.zeros_(w[..., 0]),
    "dropout": lambda w: nn.functional.dropout(w, 1.0, True, True),
    "relu": lambda w: nn.functional.relu_(w),
    "data": by_data,
    "data of it": lambda w: w.data.mul_(0.5),
    "detached": lambda w: w.detach().add_(1.0),
    "masked": lambda w: w.masked_fill_(w > 0, 0.0),
    "a part": lambda w: w.unbind(-1)[1].sub_(1.0),
    "same type": lambda w: w.to(w.dtype).add_(0.5),
}
AUTOGRAD = r"leaf Variable that requires grad|out=\.\.\.|view and is being modified"
NEEDS_NO_GRAD = sorted(EDITS.keys() - {"data", "data of it", "detached"})


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_an_edit_of_what_is_stored(model: LoopedTransformer, edit: str) -> None:
    before = state(model)
    for within in MATRICES:
        name = f"blocks.{model.loop.index(2, 1)}.{within}"
        weight = shown(model, name)
        old, expected = plain(weight), plain(weight)
        with torch.no_grad():
            EDITS[edit](weight)
            EDITS[edit](expected)
        assert not torch.equal(expected, old)
        assert_same(plain(weight), expected)
        assert_same(plain(shown(model, name)), expected)
        assert_stored(model, rebuilt(model, name, expected, before))
        restore(model, before)


@pytest.mark.parametrize("folded", [False, True])
@torch.no_grad()
def test_edits_of_a_published_format_have_their_effect(golden: Golden, folded: bool) -> None:
    model = golden.load(dtype=torch.float64)
    model.enable_compatibility_mode(fold_ln=folded)
    run = {name: value.double() for name, value in golden.run.items()} | {"n_recurrences": 2}
    before, logits, i = state(model), model(golden.tokens, **run), model.loop.index(0, 0)
    for within in MATRICES:
        name = f"blocks.{i}.{within}"
        weight = shown(model, name)
        weight[..., ::2] = 0.25
        changed = model(golden.tokens, **run)
        restore(model, rebuilt(model, name, plain(weight), before))
        assert (changed - logits).abs().max() > 1e-6, name
        assert_same(changed, model(golden.tokens, **run))
        restore(model, before)
    for name in NO_BIAS:
        if model.parameter_of(f"blocks.{i}.{name}") is None:
            with pytest.raises(InputError, match="no such bias"):
                shown(model, f"blocks.{i}.{name}").add_(1.0)


@torch.no_grad()
def test_the_model_runs_with_an_edit_and_every_recurrence_has_it(model: LoopedTransformer) -> None:
    before, logits = state(model), model(TOKENS)
    for name in (f"blocks.{model.loop.index(1, 0)}.attn.W_V", "unembed.W_U"):
        weight = shown(model, name)
        weight[:] *= torch.linspace(0.5, 1.5, weight.shape[-1], dtype=weight.dtype)
        changed, value = model(TOKENS), plain(weight)
        for other in weight.shared_by:
            if other.startswith("blocks"):
                assert torch.equal(shown(model, other), value)
        assert (changed - logits).abs().max() > 1e-3
        restore(model, rebuilt(model, name, value, before))
        assert_same(changed, model(TOKENS))
        restore(model, before)


@pytest.mark.parametrize("edit", NEEDS_NO_GRAD)
def test_an_edit_that_autograd_would_see_is_pytorchs_error(kind: str, edit: str) -> None:
    for folded in (False, True):
        model = make(kind, folded)
        if edit.startswith("init"):  # torch.nn.init is without gradients by itself
            EDITS[edit](model.blocks[0].attn.W_K)
            value = 0.0 if edit == "init of a view" else 0.125
            assert_same(plain(model.blocks[0].attn.W_K[0, 0, 0]), torch.tensor(value).double())
            continue
        before = state(model)
        for name in MATRICES:
            with pytest.raises(RuntimeError, match=AUTOGRAD):
                EDITS[edit](shown(model, f"blocks.0.{name}"))
        assert_unchanged(model, before)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_edit_is_stored_whole_or_refused_whole(data: st.DataObject) -> None:
    model = make(data.draw(st.sampled_from([*VARIANTS])), data.draw(st.booleans()))
    within = data.draw(st.sampled_from([*MATRICES, *NO_BIAS, "attn._W_K", "attn._W_V"]))
    name = f"blocks.{data.draw(st.integers(0, model.loop.n_layers - 1))}.{within}"
    before, weight = state(model), shown(model, name)
    old, expected = plain(weight), plain(weight)
    index = tuple(data.draw(st.integers(0, size - 1)) for size in weight.shape)
    index = index[: data.draw(st.integers(0, len(index)))]
    expected[index] = value = data.draw(st.sampled_from([0.0, -0.5, 3.0, NAN, float("inf")]))
    try:
        with torch.no_grad():
            weight[index] = value
    except InputError:
        assert_unchanged(model, before)
        assert torch.equal(plain(weight), old)
        repeated = within in ("attn.W_K", "attn.W_V") and model.cfg.n_kv_heads != 4
        assert within in NO_BIAS or repeated
        return
    found = plain(shown(model, name))
    assert_same(found.nan_to_num(7.0, 8.0), expected.nan_to_num(7.0, 8.0))
    if within in MATRICES:
        assert_stored(model, rebuilt(model, name, expected, before))


def test_what_is_not_changed_keeps_its_bits_in_a_folded_weight() -> None:
    model = make("pre", folded=True)
    before = state(model)
    with torch.no_grad():
        model.blocks[0].mlp.W_in[3, 5] = 2.0
    after = model.prelude[0].mlp.gate_up
    different = (after != before["prelude.0.mlp.gate_up"]).nonzero()
    assert different.tolist() == [[48 + 5, 3]]
    assert_same(after[53, 3] * model.prelude[0].ln2.w[3], after.new_tensor(2.0))


def test_a_copy_is_edited_as_it_is_stored_now() -> None:
    model = make("pre", folded=True)
    first, second = model.blocks[0].attn.W_V, model.blocks[0].attn.W_V
    with torch.no_grad():
        first[0] = 1.0
        second[1] = 2.0  # does not bring head 0 back
    wanted = torch.tensor([1.0, 2.0]).double()[:, None, None].expand(2, 32, 8)
    for weight in (second, model.blocks[0].attn.W_V):
        assert_same(plain(weight[:2]), wanted)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda w: w.reshape(-1),
    "flat view": lambda w: w.view(-1)[3:40],
    "flattened part": lambda w: torch.flatten(w[0])[::3],
    "flattened twice": lambda w: w.ravel().reshape(4, -1).contiguous()[1],
    "heads together": lambda w: w.flatten(0, 1).unsqueeze(0),
    "detached": lambda w: w.detach().reshape_as(w.data).view(len(w), -1),
    "itself": lambda w: w.contiguous(),
    "unflattened": lambda w: w.unflatten(-1, (2, -1))[..., 1, :],
    # Copies, of which an edit is none of the weight.
    "turned": lambda w: w.mT.contiguous(),
    "turned and flat": lambda w: w.transpose(0, -1).reshape(-1),
    "columns": lambda w: w[..., 1:].flatten(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_reshaped_weight_is_the_weight_where_a_contiguous_one_is(
    model: LoopedTransformer, layout: str
) -> None:
    before, make_view = state(model), LAYOUTS[layout]
    for within in (*MATRICES, "attn._W_V"):
        if within in ("attn.W_K", "attn.W_V") and model.cfg.n_kv_heads != 4:
            continue  # query heads of a group change together or not at all
        weight = shown(model, f"blocks.{model.loop.index(2, 1)}.{within}")
        old = plain(weight).contiguous()
        expected = old.clone(memory_format=torch.contiguous_format)
        mine, theirs = make_view(weight), make_view(expected)
        for one in (mine, theirs):
            one += 1.0
            one[..., :2] = 0.125
        assert torch.equal(expected, old) == (layout in ("turned", "turned and flat", "columns"))
        assert_same(plain(mine), theirs)
        assert_same(plain(weight), expected)
        assert_same(plain(shown(model, f"blocks.{model.loop.index(0, 1)}.{within}")), expected)
        restore(model, before)


def test_a_reshaped_weight_is_edited_as_it_is_stored_now() -> None:
    for folded in (False, True):
        model = make("pre", folded)
        flat, weight = model.blocks[2].mlp.W_in.reshape(-1), model.blocks[2].mlp.W_in
        with pytest.raises(RuntimeError, match=AUTOGRAD):
            flat[0] = 2.0
        with torch.no_grad():
            weight[1] = 1.0
            flat[0] = 2.0  # does not bring row 1 back
        assert_same(plain(model.blocks[2].mlp.W_in[1]), torch.ones(48).double())
        assert_same(plain(model.blocks[2].mlp.W_in[0, 0]), torch.tensor(2.0).double())
        model.to(torch.float32)
        with torch.no_grad(), pytest.raises(InputError, match="moved"):
            flat[0] = 3.0


# -- refusals -------------------------------------------------------------------------------------


def test_biases_that_there_are_not_can_be_written_to_with_zeros_alone(
    model: LoopedTransformer,
) -> None:
    owner, names = model.blocks[1], [*NO_BIAS]
    names += [] if model.cfg.qk_bias else ["attn.b_Q", "attn.b_K"]
    biases = [attrgetter(name)(owner) for name in names] + [model.unembed.b_U, model.b_U]
    for bias in biases:
        bias.zero_()
        bias.mul_(3.0)
        for edit in (lambda b: b.__iadd__(5.0), lambda b: b[1:].fill_(1.0), nn.init.ones_):
            with pytest.raises(InputError, match="no such bias"):
                edit(bias)
            assert not bias.any(), "what is refused is not done either"
        assert bias.grad is None
        assert bias.stored_in is None
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.b_out is zero"):
        owner.mlp.b_out = nn.Parameter(torch.ones(32, dtype=torch.float64))
    owner.mlp.b_out = torch.zeros(32)


def test_query_heads_of_a_group_change_together_or_not_at_all() -> None:
    for folded in (False, True):
        model = LoopedTransformer.from_config(exact_config(n_key_value_heads=2))
        with_gains(model).enable_compatibility_mode(fold_ln=folded)
        attn, before = model.blocks[3].attn, state(model)
        with torch.no_grad():
            for head in range(4):
                with pytest.raises(InputError, match=f"{head & 2} and {head | 1}"):
                    attn.W_K[head] = 0.0
            assert_unchanged(model, before)
            attn.W_K[2:] = 0.5
            assert_same(plain(attn._W_K[1]), torch.full((32, 8), 0.5).double())
            attn._W_V[0] = 0.25
            assert_same(plain(attn.W_V[1]), torch.full((32, 8), 0.25).double())
        assert attn._W_K.shape == (2, 32, 8)


def test_stacks_over_layers_say_which_weight_to_edit(model: LoopedTransformer) -> None:
    before = state(model)
    stacks = [model.W_Q, model.W_in, model.b_out, model.unique_weights("W_V")]
    stacks += [model.stack_weights("W_O"), model.OV.A, model.QK.B]
    with torch.no_grad():
        for stack in stacks:
            with pytest.raises(InputError, match=r"blocks\[0\]\.(attn|mlp)\.[Wb]_"):
                stack[1] += 1.0
    assert_unchanged(model, before)
    own = model.W_Q.clone()
    with torch.no_grad():
        own[0] = 0.0
    assert type(own) is Tensor
    for name in ("W_Q", "b_out", "W_E", "W_U"):
        with pytest.raises(InputError, match=r"blocks\[i\]"):
            setattr(model, name, nn.Parameter(own))
        with pytest.raises(AttributeError):
            setattr(model, name, own)


def test_a_gain_of_zero_refuses_what_cannot_be_shown() -> None:
    model = make("pre", folded=True)
    with torch.no_grad():
        model.prelude[0].ln1.w[3] = 0.0
        weight = model.blocks[0].attn.W_Q
        before = state(model)
        with pytest.raises(InputError, match="row 3"):
            weight += 1.0
        assert_unchanged(model, before)
        weight[:, 4] = 1.0
    model(TOKENS, return_type="loss").backward()
    with pytest.raises(InputError, match="gain of 0"):
        weight.grad  # noqa: B018


@pytest.mark.parametrize("fold", [False, True])
def test_a_centred_unembedding_is_edited_as_it_is_stored(kind: str, fold: bool) -> None:
    model = make(kind)
    model.enable_compatibility_mode(fold_ln=fold, center_unembed=True)
    assert_same(plain(model.W_U).mean(-1), torch.zeros(32).double(), scale=1.0)
    before = state(model)
    with torch.no_grad(), pytest.raises(InputError, match="center_unembed=False"):
        model.W_U[:, 3] = 0.0
    assert_unchanged(model, before)
    model(TOKENS, return_type="loss").backward()
    assert model.W_U.grad.shape == (32, 50)
    if not model.cfg.tie_embeddings:  # else there is the embedding's gradient in it
        largest = float(plain(model.W_U.grad).abs().max())
        mean = plain(model.W_U.grad).mean(-1)
        assert_same(mean, torch.zeros(32).double(), scale=largest)
    model.enable_compatibility_mode(fold_ln=fold, center_unembed=False)
    with torch.no_grad():
        model.W_U[:, 3] = 0.0
    assert not model.W_U[:, 3].any()


def test_folded_norms_and_final_norms_keep_their_ones() -> None:
    model = make("pre", folded=True)
    for norm in (model.blocks[0].ln1, model.ln_final):
        with torch.no_grad(), pytest.raises(InputError, match="folded"):
            norm.w[0] = 2.0
        with pytest.raises(InputError, match="folded"):
            norm.w = nn.Parameter(torch.full((32,), 2.0))
        assert bool((norm.w == 1).all())
    model.enable_compatibility_mode(fold_ln=False)
    assert model.blocks[0].ln1.w is model.prelude[0].ln1.w
    model.blocks[0].ln1.w = torch.full((32,), 2.0)
    assert bool((model.prelude[0].ln1.w == 2).all())


def test_what_would_change_the_tensor_alone_is_refused(model: LoopedTransformer) -> None:
    weight: Any = model.blocks[2].attn.W_Q
    whole: list[Callable[[], Any]] = [
        lambda: weight.requires_grad_(False),
        lambda: setattr(weight, "requires_grad", False),
        lambda: weight.register_hook(print),
        lambda: weight.register_post_accumulate_grad_hook(print),
        lambda: weight.transpose_(0, 1),
        lambda: weight.swapaxes_(0, 1),
        lambda: weight.swapdims_(0, 1),
        lambda: weight[0].t_(),
        lambda: weight.unsqueeze_(0),
        lambda: weight[:1].squeeze_(0),
        lambda: weight.resize_(3),
        lambda: weight.resize_as_(torch.zeros(3)),
        lambda: weight.as_strided_((3,), (1,)),
        lambda: weight.set_(torch.zeros(3).double()),
        lambda: weight.set_(source=torch.zeros(3).double()),
        lambda: weight.share_memory_(),
        lambda: weight.detach_(),
        lambda: setattr(weight, "grad", torch.zeros(4, 32, 8)),
        lambda: setattr(weight, "data", torch.zeros(4, 32)),
        lambda: setattr(weight, "data", torch.ones(4, 32, 8) * 1j),
        lambda: setattr(weight[0], "data", torch.zeros(32, 8)),
        lambda: setattr(model.blocks[2].attn, "W_Q", torch.zeros(3)),
        lambda: setattr(model.blocks[2].attn, "W_Q", None),
    ]
    before = state(model)
    for call in whole:
        with pytest.raises(InputError, match=r"attn\.W_Q"):
            call()
    assert_unchanged(model, before)
    assert weight.requires_grad_(True) is weight


def test_pruned_and_parametrised_weights_say_what_to_edit(kind: str) -> None:
    for folded in (False, True):
        model = make(kind, folded)
        prune.l1_unstructured(model.core[0].attn, "qkv", amount=0.5)
        parametrize.register_parametrization(model.core[0].mlp, "down", nn.Identity())
        block = model.blocks[model.loop.index(1, 0)]
        assert (block.attn.W_Q == 0).double().mean() > 0.2
        before = state(model)
        logits = model(TOKENS)
        for weight in (block.attn.W_Q, block.attn.W_V, block.mlp.W_out):
            with torch.no_grad(), pytest.raises(InputError, match="pruned or parametrised"):
                weight[:] = 1.0
        with pytest.raises(InputError, match="pruned or parametrised"):
            torch.autograd.grad(model(TOKENS).sum(), block.attn.W_Q)
        assert_unchanged(model, before)
        assert torch.equal(model(TOKENS), logits)
        prune.remove(model.core[0].attn, "qkv")
        with torch.no_grad():
            block.attn.W_Q[:] = 1.0
        assert_same(plain(block.attn.W_Q), torch.ones(4, 32, 8).double())


def test_pruning_under_transformerlenss_name_says_what_to_prune(kind: str) -> None:
    model = make(kind)
    before = state(model)
    with pytest.raises(InputError, match=r"W_Q: .* core\.0\.attn\.qkv"):
        prune.l1_unstructured(model.blocks[model.loop.index(1, 0)].attn, "W_Q", amount=0.5)
    assert state(model).keys() == before.keys()
    assert_unchanged(model, before)


def test_a_weight_read_before_the_model_moved_is_refused(model: LoopedTransformer) -> None:
    weight = model.blocks[0].attn.W_Q
    model.to(torch.float32)
    with torch.no_grad(), pytest.raises(InputError, match="read it again"):
        weight[:] = 0.0
    again = model.blocks[0].attn.W_Q
    assert again.dtype == torch.float32
    with torch.no_grad():
        again[:] = 0.0
    assert not model.blocks[0].attn.W_Q.any()


# -- assignment -----------------------------------------------------------------------------------


def test_assignment_copies_into_what_is_stored(model: LoopedTransformer) -> None:
    block, before = model.blocks[model.loop.index(2, 2)], state(model)
    places: list[tuple[Any, str, str]] = [(block, name, shown_as(block, name)) for name in MATRICES]
    for owner, name, called in [*places, (model, "unembed.W_U", "unembed.W_U")]:
        for wrap in (nn.Parameter, Tensor.clone):
            path, _, weight = name.rpartition(".")
            module, old = attrgetter(path)(owner), attrgetter(name)(owner)
            value = torch.linspace(-1, 1, old[0].numel()).double().view_as(old[0]).expand_as(old)
            setattr(module, weight, wrap(value.clone()))
            assert_same(plain(getattr(module, weight)), value)
            assert list(state(model)) == list(before), "no parameter was added"
            assert_stored(model, rebuilt(model, called, value, before))
            restore(model, before)


def shown_as(block: Any, name: str) -> str:
    called: str = attrgetter(name)(block).shown_as
    return called


@pytest.mark.parametrize("value", ["tensor", "parameter", "traced"])
@pytest.mark.parametrize(
    "name", ["blocks.2.attn.W_Q", "blocks.2.attn._W_K", "unembed.W_U", "ln_final.w"]
)
def test_functional_calls_take_the_names_of_what_is_stored(name: str, value: str) -> None:
    for folded in (False, True):
        model = make("pre", folded)
        before, own = state(model), "core.0.attn.qkv"
        weight = plain(shown(model, name)) * 2
        given = nn.Parameter(weight) if value == "parameter" else weight
        stored = {own: before[own] * 2}

        def call(given: Tensor, model: LoopedTransformer, stored: State) -> Tensor:
            loans = (model, {**stored, name: given}, (TOKENS,))
            loss: Tensor = torch.func.functional_call(*loans).sum()
            return loss

        run = torch.func.grad(call) if value == "traced" else call
        with pytest.raises(InputError, match="functional_call"):
            run(given, model, stored)
        assert_unchanged(model, before)


def test_what_has_a_gradient_is_not_assigned(model: LoopedTransformer) -> None:
    attn = model.blocks[2].attn
    before, twice = state(model), attn.W_Q * 2
    assert twice.requires_grad
    with pytest.raises(InputError, match=r"blocks\.2\.attn\.W_Q: .*detach"):
        attn.W_Q = twice
    assert_unchanged(model, before)
    attn.W_Q = twice.detach()
    assert_same(plain(attn.W_Q), plain(twice))
    attn.W_Q.data = twice * 2
    assert_same(plain(attn.W_Q), plain(twice) * 2)


def test_values_that_the_dtype_cannot_hold_are_refused() -> None:
    model = LoopedTransformer.from_config(random_config(dtype=torch.bfloat16))
    attn = model.blocks[0].attn
    with pytest.raises(InputError, match="bfloat16"):
        attn.W_Q = torch.full((4, 32, 8), 0.1)
    attn.W_Q = torch.full((4, 32, 8), 0.5)
    assert attn.W_Q.dtype == torch.bfloat16
    assert bool((attn.W_Q == 0.5).all())
    with torch.no_grad():
        attn.W_Q[:] = 0.1  # as PyTorch does: rounded
    assert bool((torch.tensor(0.1).bfloat16() == attn.W_Q).all())


# -- gradients ------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_loss_by_the_weight(model: LoopedTransformer) -> None:
    model(TOKENS, return_type="loss").backward()
    i = model.loop.index(1, 1)
    names = [f"blocks.{i}.{within}" for within in MATRICES] + ["unembed.W_U", "blocks.0.attn._W_V"]
    for name in names:
        weight, at, gain = shown(model, name), model.parameter_of(name), gain_of(model, name)
        assert at is not None
        # The same weight as a leaf of its own: stored rows plus what a step of it adds to them.
        heads = model.cfg.n_kv_heads if name[-3:] in ("W_K", "W_V") else len(weight)
        step = torch.zeros(heads, *weight.shape[1:], dtype=weight.dtype, requires_grad=True)
        rows = step if gain is None else step / gain[:, None]
        turned = rows.transpose(1, 2).flatten(0, 1) if name[-1] in "QKV" else rows.flatten(0, -2).T
        whole = dict(model.named_parameters())[at.name].detach()
        added = torch.zeros_like(whole).index_add(0, torch.arange(len(whole))[at.rows], turned)
        stored = {at.name: whole + added}
        loss = torch.func.functional_call(model, stored, (TOKENS,), {"return_type": "loss"})
        (expected,) = torch.autograd.grad(loss, step)
        assert expected.abs().max() > 1e-6
        found = weight.grad
        assert found is not None
        assert found.shape == weight.shape
        assert_same(found.as_subclass(Tensor)[:: len(weight) // heads], expected)
        with pytest.warns(UserWarning, match="not a leaf"):  # PyTorch's own, of any view
            assert weight[0].grad is None
    stack = model.W_K.grad
    assert stack is not None
    assert torch.equal(stack[i], model.blocks[i].attn.W_K.grad)
    model.zero_grad()
    assert model.blocks[i].attn.W_K.grad is None
    assert model.W_K.grad is None


def test_autograd_differentiates_by_a_weight_as_backward_does(model: LoopedTransformer) -> None:
    i = model.loop.index(1, 1)
    names = [f"blocks.{i}.{within}" for within in MATRICES] + ["unembed.W_U", "blocks.0.attn._W_V"]
    weights = {name: shown(model, name) for name in names}
    found = torch.autograd.grad(model(TOKENS, return_type="loss"), weights)
    rows = model(TOKENS, return_type="loss", loss_per_token=True).flatten()
    eye = torch.eye(len(rows), dtype=torch.float64) / len(rows)
    each = torch.autograd.grad(rows, weights, grad_outputs=[eye], is_grads_batched=True)
    model(TOKENS, return_type="loss").backward()
    for name, weight in weights.items():
        expected = plain(weight.grad)
        assert expected.abs().max() > 1e-6
        assert_same(found[name], expected)
        assert_same(each[name].sum(0), expected)
        # Through the tensor itself, to the bit, and through both.
        (own,) = torch.autograd.grad((weight**3).sum(), weight)
        assert torch.equal(own, 3 * plain(weight) ** 2)
        again = shown(model, name)
        loss = model(TOKENS, return_type="loss") + (again**3).sum()
        assert_same(torch.autograd.grad(loss, again)[0], own + expected)


def test_what_a_loss_does_not_depend_on_has_no_gradient() -> None:
    model = make("pre")
    weight, embed = model.blocks[3].mlp.W_out, model.W_E
    with pytest.raises(InputError, match=r"blocks\.3\.mlp\.W_out.*allow_unused"):
        torch.autograd.grad(embed.sum(), weight)
    assert torch.autograd.grad(embed.sum(), [weight], allow_unused=True) == (None,)
    ones, zeros = torch.autograd.grad(embed.sum(), [embed, weight], materialize_grads=True)
    assert bool((ones == 1).all())
    assert zeros.shape == weight.shape
    assert not zeros.any()


def test_a_gradient_is_the_stored_one_or_refuses_edits() -> None:
    model = make("post-qk-norm")
    model(TOKENS, return_type="loss").backward()
    attn = model.blocks[0].attn
    grad = attn.W_Q.grad
    grad.zero_()
    assert not model.prelude[0].attn.qkv.grad[:32].any()
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.W_K\.grad is computed"):
        attn.W_K.grad.zero_()
    attn._W_K.grad.zero_()
    assert not attn.W_K.grad.any()


# -- tensors as any other -------------------------------------------------------------------------


def test_results_are_plain_and_views_are_shown(model: LoopedTransformer) -> None:
    weight = model.blocks[2].attn.W_V
    plain = weight.as_subclass(Tensor)
    assert type(plain) is Tensor
    results = [weight * 2, weight.clone(), weight @ weight.mT, weight.sum(), torch.cat([weight])]
    results += [torch.einsum("hdk,hek->de", weight, weight), torch.linalg.svd(weight).S]
    results += [weight.float(), weight[[0, 1]], torch.zeros_like(weight), weight.max(0).values]
    assert {type(x) for x in results} == {Tensor}
    assert torch.equal(results[0], plain * 2)
    views = [weight[0], weight.mT, weight.detach(), weight.data, weight.unbind()[0]]
    views += [weight.view(-1) if weight.is_contiguous() else weight[None], weight.cpu()]
    assert {type(x) for x in views} == {ShownWeight}
    assert views[0].shown_as == "blocks.2.attn.W_V"
    assert isinstance(weight, Tensor)
    assert weight.requires_grad
    assert (weight * 2).sum().backward() is None
    stored = model.parameter_of("blocks.2.attn.W_V")
    assert stored is not None
    assert model.get_parameter(stored.name).grad[stored.rows].abs().min() > 0


def test_what_is_made_like_a_weight_is_laid_out_like_transformerlenss() -> None:
    model = make("pre", folded=True)
    for weight in (model.blocks[2].attn.W_Q, model.W_U, model.blocks[0].mlp.W_out[:3]):
        made = [weight.clone(), torch.zeros_like(weight), torch.full_like(weight, 2.0)]
        assert all(x.is_contiguous() for x in made)
        assert_same(weight.clone().view(-1), plain(weight).reshape(-1))
        torch.manual_seed(0)
        drawn = torch.randn_like(weight)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.randn(weight.shape, dtype=torch.float64))


def test_numbers_are_formatted(model: LoopedTransformer) -> None:
    weight = model.blocks[2].attn.W_K
    assert f"{weight[0, 0, 0]:+.3f}" == f"{weight[0, 0, 0].item():+.3f}"
    assert "blocks.2.attn.W_K" in f"{weight}"


def test_a_parameter_of_another_module_moves_with_it(model: LoopedTransformer) -> None:
    for weight in (model.W_U, model.blocks[2].attn.W_K, model.blocks[2].attn.b_O, model.W_V):
        before, probe = state(model), nn.Module()
        probe.W = nn.Parameter(weight.detach())
        probe.to(torch.float32)
        assert type(probe.W) is nn.Parameter
        assert torch.equal(probe.W, plain(weight).float())
        with torch.no_grad():
            probe.W.zero_()
        assert_unchanged(model, before)


def test_copies_by_python_and_files_are_plain(model: LoopedTransformer) -> None:
    weight = model.blocks[2].attn.W_O
    file = io.BytesIO()
    torch.save({"W": weight}, file)
    assert len(file.getvalue()) < 2 * weight.nbytes, "not the whole matrix with it"
    file.seek(0)
    copies = [deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(file)["W"]]
    for copy in copies:
        assert type(copy) is Tensor
        assert torch.equal(copy, weight)
        assert copy.requires_grad
        with torch.no_grad():
            copy.zero_()
    assert weight.abs().max() > 0
    parameter = nn.Parameter(model.blocks[2].mlp.W_out)
    assert isinstance(parameter, nn.Parameter)
    assert isinstance(deepcopy(parameter), nn.Parameter)


def test_numpy_arrays_of_copies_cannot_be_written_to() -> None:
    for folded in (False, True):
        model = make("pre", folded).requires_grad_(False)
        weight = model.blocks[0].mlp.W_in
        array = np.asarray(weight)
        assert np.array_equal(array, weight.tolist())
        if folded:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1.0
        else:
            array[0] = 1.0
            assert bool((model.blocks[0].mlp.W_in[0] == 1).all())


def test_factored_matrices_take_shown_weights(model: LoopedTransformer) -> None:
    attn = model.blocks[1].attn
    plain = FactoredMatrix(attn.W_V.clone(), attn.W_O.clone())
    assert type(attn.OV.AB) is Tensor
    assert torch.equal(attn.OV.AB, plain.AB)
    assert torch.equal(attn.OV.svd()[1], plain.svd()[1])
    assert torch.equal(attn.OV.T.AB, plain.T.AB)
    assert torch.equal(attn.QK[0].AB, (attn.W_Q @ attn.W_K.mT)[0])
    assert_same(attn.OV.norm(), plain.AB.norm(dim=(-2, -1)))


def test_without_gradients_and_in_inference_mode(model: LoopedTransformer) -> None:
    expected = model.blocks[0].attn.W_Q.clone()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            weight = model.blocks[0].attn.W_Q
            assert not (weight * 1).requires_grad
            weight *= 2.0
        expected = expected.detach() * 2
        assert_same(plain(model.blocks[0].attn.W_Q), expected)


def test_parameters_of_other_classes_of_tensors_are_shown_as_they_are() -> None:
    class Other(Tensor):
        pass

    for folded in (False, True):
        model = make("pre", folded)
        expected = plain(model.blocks[2].attn.W_Q)
        values = model.core[0].attn.qkv.detach().clone().as_subclass(Other)
        model.core[0].attn.qkv = nn.Parameter(values)
        weight = model.blocks[2].attn.W_Q
        assert type(weight) is Other
        assert torch.equal(weight.detach().as_subclass(Tensor), expected)


def test_on_the_meta_device_there_are_shapes() -> None:
    model = LoopedTransformer.from_config(random_config(device="meta", n_key_value_heads=2))
    model.enable_compatibility_mode()
    weight = model.blocks[0].attn.W_K
    with torch.no_grad():
        weight[:] = 0.0
    assert weight.shape == (4, 32, 8)
    assert weight.is_meta
    assert model.W_U.shape == (32, 50)


def test_under_function_transforms(model: LoopedTransformer) -> None:
    own = dict(model.named_parameters())

    def norm(parameters: dict[str, Tensor]) -> Tensor:
        seen: list[Tensor] = []

        def look(x: Tensor, hook: Any) -> None:
            block = model.blocks[0]
            seen.append((block.attn.W_Q**2).sum() + (block.attn.W_O**2).sum())

        with model.hooks([("hook_embed", look)]):
            torch.func.functional_call(model, parameters, (TOKENS,))
        return seen[0]

    found = torch.func.grad(norm)({name: p.detach() for name, p in own.items()})
    ((model.blocks[0].attn.W_Q ** 2).sum() + (model.blocks[0].attn.W_O ** 2).sum()).backward()
    for name, value in found.items():
        grad = own[name].grad
        assert_same(value, torch.zeros_like(value) if grad is None else grad)


@pytest.mark.skipif(
    hasattr(NamedAttention.source, "__wrapped__"), reason="checks of annotations are not compiled"
)
def test_compiled_code_reads_weights(model: LoopedTransformer) -> None:
    def inside() -> Tensor:
        return (model.blocks[0].attn.W_Q * 2).sum() + model.W_U.sum()

    torch._dynamo.reset()
    compiled = torch.compile(inside, backend="eager", fullgraph=True)
    assert_same(compiled(), inside())


def test_names_say_who_shares_a_weight(model: LoopedTransformer) -> None:
    i = model.loop.index(1, 2)
    weight = model.blocks[i].mlp.W_in
    assert weight.shown_as == f"blocks.{i}.mlp.W_in"
    assert weight.stored_in == "core.2.mlp.gate_up"
    assert list(weight.shared_by) == [
        name for name in model.transformer_lens_names("core.2.mlp.gate_up") if name.endswith("W_in")
    ]
    text = repr(weight)
    assert repr(weight.as_subclass(Tensor)) in text
    for other in weight.shared_by:
        assert other.split(".")[1] in text.rpartition("shared by")[2]
    tied = ("embed.W_E", "unembed.W_U")
    assert model.W_U.shared_by == (tied if model.cfg.tie_embeddings else tied[1:])
    for layer in range(model.loop.p):
        assert model.blocks[layer].attn.W_O.shared_by == (f"blocks.{layer}.attn.W_O",)
    model.set_recurrences(2)
    assert len(weight.shared_by) == 2


def test_layers_that_share_weights_within_a_recurrence_are_named() -> None:
    model = LoopedTransformer.from_config(random_config(core_layers=(0, 1, 0)))
    p, k = model.loop.p, model.loop.k
    wanted = [p + r * k + layer for r in range(model.loop.R) for layer in (0, 2)]
    assert model.blocks[p].attn.W_Q.shared_by == tuple(f"blocks.{i}.attn.W_Q" for i in wanted)
    assert model.blocks[p + 1].attn.W_Q.stored_in == "core.1.attn.qkv"
