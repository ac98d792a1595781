"""State dicts under TransformerLens's names: read exactly, or refused before a weight changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import TINY, VARIANTS, exact_config, with_gains
from refusals import refused
from torch import Tensor

from tl_looped import InputError, LayerIndexError, LoopedTransformer
from tl_looped.errors import UnsupportedMethodError
from tl_looped.transformer.transformerlens import REFUSED

pytestmark = pytest.mark.usefixtures("without_gradients")
AS_IT_IS = {"fold_ln": False, "center_unembed": False, "fold_value_biases": False}
BIASED = {"qk_bias": True, "v_bias": True, "n_key_value_heads": 2}
KINDS = {**VARIANTS, "biased": BIASED, "two-cycles": {"n_core": 4, "core_layers": (0, 1, 0, 1)}}


def made(kind: str, seed: int = 0, **changes: Any) -> LoopedTransformer:
    cfg = exact_config(**(KINDS[kind] | {"seed": seed} | changes))
    return with_gains(LoopedTransformer.from_config(cfg))


def copied(model: LoopedTransformer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.tl_parameters().items()}


def of_the_loop(model: LoopedTransformer) -> dict[str, Tensor]:
    """What TransformerLens has no name for."""
    own = model.state_dict().items()
    return {name: value for name, value in own if name.startswith(("injection", "exit_gate"))}


def as_hooked(model: LoopedTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As HookedTransformer stores it: keys and values once a group, and its buffers."""
    step = model.cfg.n_heads // model.cfg.n_kv_heads
    out = dict(state)
    for name in state:
        if step > 1 and name.endswith(("W_K", "W_V", "b_K", "b_V")):
            out[name.replace("attn.", "attn._")] = out.pop(name)[::step].clone()
    for i in range(model.loop.n_layers):
        out[f"blocks.{i}.attn.mask"] = torch.ones(4, 4, dtype=torch.bool)
        out[f"blocks.{i}.attn.IGNORE"] = torch.tensor(-torch.inf)
        out[f"blocks.{i}.attn.rotary_sin"] = torch.ones(4, 4)
    return out


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_models_weights_go_into_another_bit_for_bit(
    kind: str, hooked: bool, tokens: Tensor
) -> None:
    source, other = made(kind), made(kind, seed=1)
    state = copied(source) | of_the_loop(source)
    assert not torch.equal(other(tokens), source(tokens))
    state = as_hooked(source, state) if hooked else state
    assert other.load_and_process_state_dict(state, **AS_IT_IS) is None
    assert torch.equal(other(tokens), source(tokens))
    for (name, mine), (_, theirs) in zip(
        other.named_parameters(), source.named_parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", VARIANTS)
def test_its_own_state_dict_is_one_too(kind: str, tokens: Tensor) -> None:
    source, other = made(kind), made(kind, seed=1)
    other.load_and_process_state_dict(source.state_dict())
    expected = source(tokens)
    logits = other(tokens)
    assert_same(logits, expected - expected.mean(-1, keepdim=True), float(expected.abs().max()))
    assert (other.compatibility_mode, other.cfg.center_unembed) == (True, True)


def test_what_transformerlens_has_no_name_for_stays(tokens: Tensor) -> None:
    source, other = made("pre-injection"), made("pre-injection", seed=1)
    before = other.injection.weight.clone()
    other.load_and_process_state_dict(copied(source), **AS_IT_IS)
    assert torch.equal(other.injection.weight, before)
    assert not torch.equal(before, source.injection.weight)


def test_a_folded_state_dict_is_the_same_model(tokens: Tensor) -> None:
    source, other = made("pre"), made("pre", seed=1)
    expected = source(tokens)
    source.enable_compatibility_mode()
    folded = copied(source)
    assert not [name for name in folded if name.endswith(".w")]
    other.load_and_process_state_dict(folded, **AS_IT_IS)
    assert_same(other(tokens), expected)
    assert bool((other.blocks[3].ln2.w == 1).all())


def change(name: str, index: Any = 0) -> Callable[[dict[str, Tensor]], None]:
    def of(state: dict[str, Tensor]) -> None:
        state[name] = state[name].contiguous()
        state[name].view(-1)[index] += 1

    return of


REFUSALS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "copies differ": (
        "pre",
        change("blocks.8.attn.W_V"),
        ("blocks.2.attn.W_V", "blocks.8.attn.W_V", "core.0.attn.qkv[64:96]", "every recurrence"),
    ),
    "gains differ": ("pre", change("blocks.9.ln2.w"), ("core.1.ln2.w",)),
    "output bias": ("pre", change("blocks.0.mlp.b_out", 3), ("blocks.0.mlp.b_out", "not zero")),
    "unembedding bias": ("pre", change("unembed.b_U"), ("unembed.b_U",)),
    "value bias": ("pre", change("blocks.0.attn.b_V"), ("blocks.0.attn.b_V",)),
    "tied": ("residual-injection", change("unembed.W_U"), ("embed.W_E", "unembed.W_U", "tie")),
    "query heads of a group": (
        "post-qk-norm",
        lambda state: state["blocks.0.attn.W_K"][1].add_(1),
        ("blocks.0.attn.W_K", "2 key"),
    ),
    "missing altogether": (
        "pre",
        lambda state: [state.pop(f"blocks.{i}.mlp.W_in") for i in range(15)],
        ("blocks.0.mlp.W_in", "fill_missing_keys"),
    ),
    "some gains": ("pre", lambda state: state.pop("ln_final.w"), ("ln_final.w",)),
    "unknown": ("pre", lambda state: state.update(pos_embed=torch.zeros(3)), ("pos_embed",)),
    "a shape": (
        "pre",
        lambda state: state.update({"blocks.1.mlp.W_in": torch.zeros(32, 4)}),
        ("blocks.1.mlp.W_in", "(48, 32)"),
    ),
    "two dimensions": (
        "pre",
        lambda state: state.update({"blocks.1.attn.W_Q": torch.zeros(32, 32)}),
        ("blocks.1.attn.W_Q", "[head, in, out]"),
    ),
    "integers": (
        "pre",
        lambda state: state.update({"ln_final.w": torch.ones(32, dtype=torch.long)}),
        ("ln_final.w", "floats"),
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_does_not_fit_is_refused_and_changes_nothing(what: str, tokens: Tensor) -> None:
    kind, spoil, parts = REFUSALS[what]
    source, other = made(kind), made(kind, seed=1)
    state, before = copied(source), other(tokens)
    spoil(state)
    with refused(InputError, *parts):
        other.load_and_process_state_dict(state)
    assert torch.equal(other(tokens), before)
    assert not other.compatibility_mode


def test_one_copy_of_a_shared_weight_is_enough(tokens: Tensor) -> None:
    source, other = made("pre"), made("pre", seed=1)
    state = copied(source)
    del state["blocks.4.mlp.W_in"]
    other.load_and_process_state_dict(state, **AS_IT_IS)
    assert torch.equal(other(tokens), source(tokens))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    model = made("pre")
    state = copied(model)
    state["blocks.1.mlp.W_in"][3, 4] = value
    with refused(InputError, "blocks.1.mlp.W_in", "not finite"):
        model.load_and_process_state_dict(state)


def test_more_layers_than_there_are() -> None:
    state = copied(made("pre"))
    model = made("pre", seed=1)
    model.set_recurrences(2)
    with pytest.raises(LayerIndexError, match="9"):
        model.load_and_process_state_dict(state)
    model.set_recurrences(4)
    model.load_and_process_state_dict(state)


def test_folded_gains_of_a_norm_that_stands_in_two_places() -> None:
    model = made("sandwich-loop-norm")
    model.enable_compatibility_mode()
    with refused(InputError, "ln_final.w", "final norm"):
        made("sandwich-loop-norm", seed=1).load_and_process_state_dict(copied(model))


@pytest.mark.parametrize("strict", [True, False])
def test_pytorchs_own_loading_takes_the_models_own_names(strict: bool) -> None:
    model = made("pre")
    before = model.W_Q
    with refused(InputError, "load_and_process_state_dict", "blocks.0.attn.W_Q"):
        model.load_state_dict(
            {name: value * 2 for name, value in copied(model).items()}, strict=strict
        )
    assert torch.equal(model.W_Q, before)
    own = {name: value * 2 for name, value in model.state_dict().items()}
    assert model.load_state_dict(own, strict, assign=True).missing_keys == []
    assert torch.equal(model.W_Q, before * 2)


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = LoopedTransformer.from_config(TINY)
    with refused(InputError, "meta"):
        model.load_and_process_state_dict({})


# -- TransformerLens's processing of a state dict -------------------------------------------------


@pytest.mark.parametrize("kind", ["pre", "biased", "post-qk-norm"])
def test_a_processed_state_dict_is_what_the_processed_model_shows(kind: str) -> None:
    model = made(kind)
    state = copied(model)
    processed = model.center_unembed(model.fold_layer_norm(state))
    assert all(torch.equal(state[name], value) for name, value in model.tl_parameters().items())
    model.process_weights_()
    shown = model.tl_parameters()
    for name, value in processed.items():
        if name in shown:
            assert_same(value, shown[name])
        else:
            assert bool((value == 1).all()), name
            assert name.endswith(("ln1.w", "ln2.w", "ln_final.w"))


@pytest.mark.parametrize("part", ["loop_norm", "pre_coda_norm"])
def test_a_final_norm_with_more_behind_it_is_not_folded_into_a_state_dict(part: str) -> None:
    model = made("pre", **{part: True})
    with refused(InputError, "fold_layer_norm", "final norm", "enable_compatibility_mode"):
        model.fold_layer_norm(copied(model))


def test_folding_asks_for_transformerlenss_names() -> None:
    model = made("pre")
    with refused(InputError, "fold_layer_norm", "tl_parameters"):
        model.fold_layer_norm(model.state_dict())


@pytest.mark.parametrize("kind", ["biased", "pre"])
@pytest.mark.parametrize(
    "bad",
    [
        lambda w: w.flatten()[0],
        lambda w: w.flatten(),
        lambda w: w[None],
        lambda w: w.to_sparse(),
        lambda w: w.to("meta"),
        lambda w: w[..., :-1],
    ],
    ids=["scalar", "flat", "batched", "sparse", "meta", "narrow"],
)
def test_tensors_of_any_other_kind_are_refused(kind: str, bad: Callable[[Tensor], Tensor]) -> None:
    model = made(kind)
    state = as_hooked(model, copied(model)) | copied(model)
    for name, value in state.items():
        stored = "attn.mask" not in name and "rotary" not in name and "IGNORE" not in name
        if not stored or model.parameter_of(name) is None or bad(value).shape == value.shape:
            continue
        with refused(InputError, name):
            model.load_and_process_state_dict(state | {name: bad(value)}, **AS_IT_IS)


def test_numbers_that_the_models_dtype_cannot_hold_are_refused() -> None:
    state, model = copied(made("pre")), made("pre").to(torch.float16)
    before = model.W_out
    state["blocks.0.mlp.W_out"][0, 0] = 1e6
    with refused(InputError, "blocks.0.mlp.W_out", "torch.float16"):
        model.load_and_process_state_dict(state, **AS_IT_IS)
    assert torch.equal(model.W_out, before)


def test_value_biases_are_not_folded() -> None:
    plain, biased = made("pre"), made("biased")
    state = copied(plain)
    assert plain.fold_value_biases(state) == state
    for call in (
        lambda: biased.fold_value_biases(copied(biased)),
        lambda: biased.process_weights(),
        lambda: biased.load_and_process_state_dict(copied(biased)),
    ):
        with refused(InputError, "fold_value_biases=False"):
            call()
    biased.process_weights_()  # has no such argument
    assert biased.compatibility_mode


def test_missing_weights_are_filled_in_from_the_model(tokens: Tensor) -> None:
    source, other = made("biased"), made("biased", seed=1)
    state = as_hooked(source, copied(source))
    some = {name: value for name, value in state.items() if "mlp" not in name}
    filled = other.fill_missing_keys(some)
    assert all(filled[name] is value for name, value in some.items())
    assert {name for name in filled if name not in some} == {
        name for name in source.tl_parameters() if "mlp" in name
    }
    other.load_and_process_state_dict(filled, **AS_IT_IS)
    assert torch.equal(other.W_Q, source.W_Q)
    assert not torch.equal(other.W_in, source.W_in)


def test_centring_for_layer_norm_is_refused() -> None:
    model = made("pre")
    with refused(InputError, "center_weights=True", "RMSNorm"):
        model.fold_layer_norm(copied(model), center_weights=True)
    with refused(InputError, "unembed.W_U"):
        model.center_unembed({})


@pytest.mark.parametrize("name", REFUSED)
def test_methods_without_a_meaning_here_say_so(name: str) -> None:
    with refused(UnsupportedMethodError, name):
        getattr(made("pre"), name)("anything", of_any="kind")
