"""A looped model at one recurrence has HookedTransformer's hooks, values, gradients and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hooked import CASES, CLOSE, LAYERS, LOOPS, Pair, make_pair, some_tokens
from torch import Tensor

# HookedTransformer lists hooks that fire only behind a flag; a looped model lists those that fire.
GATED = {
    "hook_attn_in": "set_use_attn_in",
    "hook_q_input": "set_use_split_qkv_input",
    "hook_k_input": "set_use_split_qkv_input",
    "hook_v_input": "set_use_split_qkv_input",
    "hook_mlp_in": "set_use_hook_mlp_in",
    "attn.hook_result": "set_use_attn_result",
}
NORM_HOOKS = ("hook_scale", "hook_normalized")
SHARED = 1 + 20 * LAYERS + 4  # the embedding's, the blocks', the final norm's, the unembedding's
OF_THE_LOOP = {"hook_initial_state", "recurrence.0.hook_state_in", "recurrence.0.hook_state_out"}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(*request.param, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def tokens() -> Tensor:
    return some_tokens()


def of_the_loop(pair: Pair) -> set[str]:
    injected = pair.looped.cfg.injection.value == "linear"
    return OF_THE_LOOP | ({"recurrence.0.hook_injected"} if injected else set())


def assert_same_values(pair: Pair, theirs: Any, ours: Any, n: int) -> None:
    """Compare two caches on the ``n`` keys that both must have."""
    suffix = "_grad" if any(name.endswith("_grad") for name in theirs) else ""
    extra = of_the_loop(pair) | {name + suffix for name in of_the_loop(pair)}
    assert set(theirs.keys()) == set(ours.keys()) - extra
    shared = set(theirs.keys()) & set(ours.keys())
    assert len(shared) == n
    for name in shared:
        report = f"{name}: {{}}".format
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE, msg=report)


def test_hook_names_are_the_same_but_for_the_loop(pair: Pair) -> None:
    gated = {f"blocks.{i}.{name}" for i in range(LAYERS) for name in GATED}
    theirs, ours = set(pair.hooked.hook_dict), set(pair.looped.hook_dict)
    assert theirs - ours == gated
    assert ours - theirs == of_the_loop(pair)


def test_every_cached_activation_is_the_same(pair: Pair, tokens: Tensor) -> None:
    expected, theirs = pair.hooked.run_with_cache(tokens)
    logits, ours = pair.looped.run_with_cache(tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert_same_values(pair, theirs, ours, SHARED)
    assert theirs["z", 3].std() > 0.05
    for key in (("resid_post", -1), ("pattern", 2), "k1", ("scale", 1, "ln1"), "embed"):
        torch.testing.assert_close(ours[key], theirs[key], **CLOSE)


def test_the_order_in_which_hooks_fire_is_the_same(pair: Pair, tokens: Tensor) -> None:
    theirs = list(pair.hooked.run_with_cache(tokens)[1])
    ours = pair.looped.run_with_cache(tokens)[1]
    assert [name for name in ours if name not in of_the_loop(pair)] == theirs


def test_losses_are_the_same(pair: Pair, tokens: Tensor) -> None:
    for options in ({"return_type": "loss"}, {"return_type": "loss", "loss_per_token": True}):
        ours, theirs = pair.looped(tokens, **options), pair.hooked(tokens, **options)
        torch.testing.assert_close(ours, theirs, **CLOSE)
    logits, loss = pair.looped(tokens, return_type="both")
    torch.testing.assert_close(loss, pair.hooked(tokens, return_type="loss"), **CLOSE)
    assert pair.looped(tokens, return_type=None) is None
    torch.testing.assert_close(pair.looped.loss_fn(logits, tokens), loss)


# HookedTransformer calls ln1 once each for queries, keys and values. A "_grad" cached there is
# the share of the last one; a looped model's is the gradient.
CALLED_THRICE = {f"blocks.{i}.ln1.{name}" for i in range(LAYERS) for name in NORM_HOOKS}


def test_every_gradient_at_a_hook_is_the_same(pair: Pair, tokens: Tensor) -> None:
    total: dict[str, Tensor] = {}

    def add_up(grad: Tensor, hook: Any) -> None:
        total[hook.name] = total.get(hook.name, 0.0) + grad

    run = {"incl_bwd": True, "return_type": "loss"}
    with pair.hooked.hooks(bwd_hooks=[(name, add_up) for name in CALLED_THRICE]):
        theirs = dict(pair.hooked.run_with_cache(tokens, **run)[1])
    theirs |= {f"{name}_grad": grad for name, grad in total.items()}
    ours = pair.looped.run_with_cache(tokens, **run)[1]
    assert max(theirs[name].abs().max() for name in theirs if name.endswith("z_grad")) > 0.01
    assert_same_values(pair, theirs, ours, 2 * SHARED)
    for model in (pair.hooked, pair.looped):
        model.zero_grad()


def test_gradients_of_weights_with_the_same_layout_are_the_same(pair: Pair, tokens: Tensor) -> None:
    for model in (pair.hooked, pair.looped):
        model(tokens, return_type="loss").backward()
    names = ["embed.W_E", "ln_final.w"]
    names += [f"blocks.{i}.{ln}.w" for i in range(LAYERS) for ln in ("ln1", "ln2")]
    for name in names:
        module, _, weight = name.rpartition(".")
        ours, theirs = (
            getattr(m.get_submodule(module), weight).grad for m in (pair.looped, pair.hooked)
        )
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, **CLOSE)
    for model in (pair.hooked, pair.looped):
        model.zero_grad()


def test_gradients_of_all_weights_are_the_same_by_name(pair: Pair, tokens: Tensor) -> None:
    for model in (pair.hooked, pair.looped):
        model.zero_grad()
        model(tokens, return_type="loss").backward()
    repeats = pair.looped.cfg.n_heads // pair.looped.cfg.n_kv_heads
    for ours, theirs in zip(pair.looped.blocks, pair.hooked.blocks, strict=True):
        stored = "" if repeats == 1 else "_"
        for name in ("W_Q", "W_O", f"{stored}W_K", f"{stored}W_V"):
            found, expected = getattr(ours.attn, name).grad, getattr(theirs.attn, name).grad
            assert expected.abs().max() > 0
            torch.testing.assert_close(found, expected, **CLOSE)
        for name in ("W_K", "W_V"):
            every, once = getattr(ours.attn, name).grad, getattr(ours.attn, f"_{name}").grad
            assert torch.equal(every, once.repeat_interleave(repeats, 0))
        for name in ("W_in", "W_gate", "W_out"):
            found, expected = getattr(ours.mlp, name).grad, getattr(theirs.mlp, name).grad
            torch.testing.assert_close(found, expected, **CLOSE)
    for model in (pair.hooked, pair.looped):
        model.zero_grad()


def assert_same_behind_flag(pair: Pair, tokens: Tensor, flag: str) -> None:
    plain, caches = pair.hooked(tokens), []
    for model in (pair.hooked, pair.looped):
        getattr(model, flag)(True)
        logits, cache = model.run_with_cache(tokens)
        getattr(model, flag)(False)
        torch.testing.assert_close(logits, plain, **CLOSE)
        caches.append(cache)
    theirs, ours = caches
    for name in (name for name in GATED if GATED[name] == flag):
        for i in range(LAYERS):
            key = f"blocks.{i}.{name}"
            assert key in ours.cache_dict
            torch.testing.assert_close(ours[key], theirs[key], **CLOSE)


@pytest.mark.parametrize("flag", sorted(set(GATED.values()) - {"set_use_attn_in"}))
def test_hooks_behind_a_flag_have_the_same_values(pair: Pair, tokens: Tensor, flag: str) -> None:
    assert_same_behind_flag(pair, tokens, flag)


# HookedTransformer refuses hook_attn_in for grouped heads.
@pytest.mark.parametrize("pair", [("full", loop) for loop in LOOPS], ids="-".join, indirect=True)
def test_the_common_input_of_a_head_has_the_same_values(pair: Pair, tokens: Tensor) -> None:
    assert_same_behind_flag(pair, tokens, "set_use_attn_in")


EDITED = ["hook_resid_pre", "attn.hook_q", "attn.hook_rot_k", "attn.hook_attn_scores"]
EDITED += ["attn.hook_pattern", "attn.hook_z", "hook_attn_out", "ln2.hook_scale"]
EDITED += ["ln1.hook_normalized", "hook_resid_mid", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out"]


@pytest.mark.parametrize("pair", CASES[:3], ids="-".join, indirect=True)
@pytest.mark.parametrize("name", EDITED)
def test_an_edit_at_a_hook_has_the_same_effect(pair: Pair, tokens: Tensor, name: str) -> None:
    def edit(value: Tensor, hook: Any) -> Tensor:
        value[:, 1:3] *= 0.5  # in place: rows, or heads
        return value

    for layer in (0, 3, LAYERS - 1):
        hooks = [(f"blocks.{layer}.{name}", edit)]
        with torch.no_grad():
            theirs, ours = (
                model.run_with_hooks(tokens, fwd_hooks=hooks)
                for model in (pair.hooked, pair.looped)
            )
            assert (theirs - pair.hooked(tokens)).abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_starting_and_stopping_at_a_layer_is_the_same(pair: Pair, tokens: Tensor) -> None:
    stream = pair.hooked(tokens, stop_at_layer=4)
    torch.testing.assert_close(pair.looped(tokens, stop_at_layer=4), stream, **CLOSE)
    ours, theirs = (m(stream, start_at_layer=4) for m in (pair.looped, pair.hooked))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_stacked_weights_are_the_same(pair: Pair) -> None:
    names = ("W_E", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
    for name in names:
        assert torch.equal(getattr(pair.looped, name), getattr(pair.hooked, name)), name
    for name in ("QK", "OV"):
        ours, theirs = getattr(pair.looped, name), getattr(pair.hooked, name)
        torch.testing.assert_close(ours.AB, theirs.AB, **CLOSE)
        torch.testing.assert_close(ours.svd()[1], theirs.svd()[1], **CLOSE)


def test_weights_of_a_block_are_the_same(pair: Pair) -> None:
    for ours, theirs in zip(pair.looped.blocks, pair.hooked.blocks, strict=True):
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            assert torch.equal(getattr(ours.attn, name), getattr(theirs.attn, name)), name
        for name in ("W_in", "W_gate", "W_out", "b_in", "b_out"):
            assert torch.equal(getattr(ours.mlp, name), getattr(theirs.mlp, name)), name
        assert torch.equal(ours.ln1.w, theirs.ln1.w)
        assert torch.equal(ours.ln2.w, theirs.ln2.w)
    assert torch.equal(pair.looped.ln_final.w, pair.hooked.ln_final.w)


def test_tl_parameters_are_hooked_transformers_named_parameters(pair: Pair) -> None:
    theirs = {name.replace("attn._", "attn."): w for name, w in pair.hooked.named_parameters()}
    ours = pair.looped.tl_parameters()
    assert set(ours) == set(theirs)
    heads = pair.looped.cfg.n_heads
    for name, weight in theirs.items():
        if name.endswith(("W_K", "W_V", "b_K", "b_V")):
            weight = weight.repeat_interleave(heads // weight.shape[0], 0)
        assert torch.equal(ours[name], weight), name


# Not the same: how random weights would have been drawn, whether a text gets a first token (None:
# as the tokenizer does), and a switch of TransformerBridge's that
# HookedTransformer, whose norm goes by normalization_type, does not set.
CFG_DIFFERS = {"init_mode", "initializer_range", "seed", "uses_rms_norm", "model_name"}
CFG_DIFFERS |= {"default_prepend_bos"}


def test_configuration_fields_of_both_have_the_same_values(pair: Pair) -> None:
    theirs, ours = vars(pair.hooked.cfg), vars(pair.looped.cfg)
    shared = (set(theirs) & set(ours)) - CFG_DIFFERS
    assert {"n_layers", "n_heads", "d_head", "d_vocab", "n_ctx", "rotary_base", "act_fn"} <= shared
    different = {n: (ours[n], theirs[n]) for n in shared if ours[n] != theirs[n]}
    assert not different


def test_greedy_generation_gives_the_same_tokens(pair: Pair, tokens: Tensor) -> None:
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False}
    theirs = pair.hooked.generate(tokens, max_new_tokens=20, **options)
    assert len(theirs[0].unique()) > 8, "not one token over and over"
    assert torch.equal(pair.looped.generate(tokens, max_new_tokens=20, **options), theirs)
