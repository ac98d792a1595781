"""A looped model as a TransformerBridge: the same numbers from the same weights."""

from __future__ import annotations

import copy
import importlib.metadata
from functools import cache
from typing import Any

import pytest
import torch
from closeness import SAMPLES, assert_same
from conftest import CASES, TOLERANCE, VARIANTS, exact_config, load_golden, with_gains
from refusals import refused
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tl_looped import (
    ConfigError,
    InitialState,
    InputError,
    LoopedTransformer,
    NormLayout,
    RecurrenceCountError,
)

pytestmark = pytest.mark.usefixtures("exact_bridges")

KINDS: dict[str, dict[str, Any]] = VARIANTS | {
    "starts from the prelude": {
        **VARIANTS["pre-injection"],
        "initial_state": InitialState.PRELUDE,
    },
    "skips the first adapter": {
        **VARIANTS["pre-injection"],
        "initial_state": InitialState.PRELUDE_SKIP_ADAPTER,
    },
    "injects the embedding": {**VARIANTS["pre-injection"], "n_prelude": 0, "n_coda": 0},
    "loop norm and coda": {"loop_norm": True},
    "norm before the coda": {"pre_coda_norm": True, "norm_layout": NormLayout.SANDWICH},
    "scaled and tied": {
        **VARIANTS["pre-injection"],
        "embed_scale": 3.0,
        "tie_embeddings": True,
        "n_key_value_heads": 1,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    },
}
# The looped model's hooks that a bridge has under no name, or as a block's `boundary`.
OWN_NAMES = (
    "hook_initial_state",
    "recurrence.",
    "ln_pre_coda.",
)
OWN_SUFFIXES = ("hook_resid_mid_sum", "hook_resid_post_sum")


def make(kind: str, **changes: Any) -> LoopedTransformer:
    config = exact_config(**(KINDS[kind] | changes))
    return with_gains(LoopedTransformer.from_config(config))


@cache
def pair(kind: str) -> tuple[LoopedTransformer, TransformerBridge]:
    """A model and its bridge, made once for all tests that change neither."""
    model = make(kind)
    return model, model.to_bridge()


def in_fp32(value: Tensor, hook: Any) -> Tensor:
    return value.float().double()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_models_for_every_family_and_number_of_recurrences(case: str) -> None:
    golden = load_golden(case)
    model = golden.load(dtype=torch.float64)
    for n in (None, 1, 2, 9, 0)[: 5 if model.cfg.min_recurrences == 0 else 4]:
        bridge = model.to_bridge(n)
        assert isinstance(bridge, TransformerBridge)
        loop = model.loop.with_recurrences(model.loop.R if n is None else n)
        assert len(bridge.blocks) == bridge.cfg.n_layers == loop.n_layers
        with torch.no_grad():
            expected = model(golden.tokens, n_recurrences=n)
            assert_same(bridge(golden.tokens), expected)


def test_logits_are_those_of_ouros_authors() -> None:
    golden = load_golden("ouro")
    model = golden.load()
    for n in (None, 1, 2, 9):
        expected = golden.tensors["logits" if n is None else f"logits_r{n}"]
        torch.testing.assert_close(model.to_bridge(n)(golden.tokens), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models_for_every_layout_and_loop(kind: str, tokens: Tensor) -> None:
    model, bridge = pair(kind)
    assert_same(bridge(tokens), model(tokens))


@pytest.mark.parametrize("kind", VARIANTS)
def test_in_other_precisions_a_bridge_is_as_exact_as_the_model(
    kind: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # TransformerLens's own softmax and rotation, in fp32 whatever the model is
    model = make(kind, dtype=torch.bfloat16)
    bridge = model.to_bridge()
    rounded, rounded_by_model = bridge(tokens), model(tokens)
    assert rounded.dtype == torch.bfloat16
    model.to(torch.float64)
    exact = model(tokens)
    # Norms over all logits, which depend little on the single roundings.
    assert (rounded - exact).norm() < 2 * (rounded_by_model - exact).norm()
    theirs = ("hook_attn_scores", "hook_pattern", "hook_rot_q", "hook_rot_k")
    hooks = [(lambda name: name.endswith(theirs), in_fp32)]
    as_theirs = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert 0 < distance(bridge(tokens), exact) < SAMPLES * distance(as_theirs, exact)


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_activation_of_a_block_is_the_models(kind: str, tokens: Tensor) -> None:
    model, bridge = pair(kind)
    _, expected = model.run_with_cache(tokens)
    _, found = bridge.run_with_cache(tokens)
    for name in expected:
        if name.startswith(OWN_NAMES) or name.endswith(OWN_SUFFIXES):
            continue
        value, reference = found[name], expected[name]
        if name.endswith("attn_scores"):  # TransformerLens masks with a large negative number
            masked = torch.isneginf(reference)
            assert bool((value[masked] < -1e30).all())
            value, reference = value.masked_fill(masked, 0.0), reference.masked_fill(masked, 0.0)
        assert_same(value, reference)


def test_a_blocks_boundary_shows_what_happens_between_recurrences(tokens: Tensor) -> None:
    model, bridge = pair("residual-injection")
    loop = model.loop
    _, expected = model.run_with_cache(tokens)
    _, found = bridge.run_with_cache(tokens)
    for r in range(loop.R):
        at = f"blocks.{loop.index(r, 0)}.boundary"
        came = expected["resid_post", loop.index(r, 0) - 1]
        assert_same(found[f"{at}.hook_in"], came)
        injected = expected[f"recurrence.{r}.hook_injected"]
        assert_same(found[f"{at}.hook_out"], injected)
    at, gain = f"blocks.{loop.coda_index(0)}.boundary", model.ln_final.w
    normed = expected["ln_pre_coda.hook_normalized"] * gain
    assert_same(found[f"{at}.hook_out"], normed)


EDITED = ("hook_resid_pre", "attn.hook_q", "attn.hook_attn_scores", "attn.hook_pattern")
EDITED += ("attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_mlp_out")


@pytest.mark.parametrize("kind", VARIANTS)
def test_an_edit_at_one_recurrence_has_the_effect_it_has_in_the_model(
    kind: str, tokens: Tensor
) -> None:
    model, bridge = pair(kind)
    logits = model(tokens)

    def shift(value: Tensor, hook: Any) -> Tensor:
        return value.roll(1, -1)

    for suffix in (*EDITED, "hook_resid_post"):
        hooks = [(f"blocks.{model.loop.index(1, 2)}.{suffix}", shift)]
        expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
        found = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        assert_same(found, expected)
        assert distance(expected, logits) > 1e-2, suffix


def test_split_inputs_and_head_results_are_the_models(tokens: Tensor) -> None:
    model = make("residual-injection")
    bridge = model.to_bridge()
    for one in (model, bridge):
        one.set_use_attn_result(True)
        one.set_use_split_qkv_input(True)
        one.set_use_hook_mlp_in(True)
    (logits, expected), (same, found) = model.run_with_cache(tokens), bridge.run_with_cache(tokens)
    assert_same(same, logits)
    for name in ("attn.hook_result", "attn.hook_k_input", "hook_mlp_in"):
        value, reference = (cache[f"blocks.7.{name}"] for cache in (found, expected))
        assert_same(value, reference)


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("kind", VARIANTS)
def test_parameters_are_the_models_own_and_registered_once(kind: str) -> None:
    model = make(kind)
    bridge = model.to_bridge(9)
    assert [id(p) for p in bridge.parameters()] == [id(p) for p in model.parameters()]
    assert bridge.n_params_total == sum(p.numel() for p in model.parameters())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for block in bridge.blocks:
        for linear in (*(getattr(block.attn, n) for n in "qkvo"), block.mlp.gate, block.mlp.out):
            assert linear.weight.untyped_storage().data_ptr() in own
    first, later = (bridge.blocks[model.loop.p + r * model.loop.k].attn for r in (0, 3))
    assert first.k.weight.data_ptr() == later.k.weight.data_ptr()
    assert first.k.weight.data_ptr() != first.q.weight.data_ptr()


@pytest.mark.parametrize("kind", VARIANTS)
def test_weights_by_transformerlens_name_are_the_models(kind: str) -> None:
    model, bridge = pair(kind)
    found, expected = bridge.tl_parameters(), model.tl_parameters()
    assert {n for n in expected if n not in found} <= {n for n in expected if "_post.w" in n} | {
        n for n in expected if n.rsplit(".", 2)[-2] in ("ln_mid", "ln_out", "q_norm", "k_norm")
    }
    for name in expected.keys() & found.keys():
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_backward_pass_gives_the_shared_parameters_the_models_gradients(
    kind: str, tokens: Tensor
) -> None:
    model, bridge = pair(kind)
    gradients = []
    for one in (model, bridge):
        model.zero_grad()
        one(tokens, return_type="loss").backward()
        gradients.append([p.grad for p in model.parameters()])
    model.zero_grad()
    assert sum(g is not None for g in gradients[0]) > 10
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert_same(found, expected)


def test_a_changed_weight_changes_both_and_a_saved_state_comes_back(tokens: Tensor) -> None:
    model = make("pre-injection")
    bridge, before = model.to_bridge(), model(tokens)
    saved = {name: value.clone() for name, value in bridge.state_dict().items()}
    with torch.no_grad():
        model.core[1].mlp.down.mul_(2.0)
    assert_same(bridge(tokens), model(tokens))
    assert distance(model(tokens), before) > 1e-2
    bridge.load_state_dict(saved)
    assert torch.equal(model(tokens), before)
    bridge.to(torch.float32)
    assert bridge(tokens).dtype == model(tokens).dtype == torch.float32


# -- what is fixed, and what is refused -----------------------------------------------------------


def test_recurrences_and_seed_stay_those_of_the_bridges_making(tokens: Tensor) -> None:
    model = make("pre-injection")
    model.state_seed = 5
    bridge, other = model.to_bridge(), model.to_bridge(2, state_seed=6)
    expected, expected_other = model(tokens), model(tokens, n_recurrences=2, state_seed=6)
    assert model.loop.R == 4
    model.set_recurrences(7)
    model.state_seed = 8
    assert_same(bridge(tokens), expected)
    assert_same(other(tokens), expected_other)
    assert distance(other(tokens), model.to_bridge(2)(tokens)) > 1e-2
    assert bridge.run_with_cache(tokens)[1].state_seed == 5


def test_hooks_of_the_model_and_of_its_bridge_are_apart(tokens: Tensor) -> None:
    model = make("pre-injection")
    bridge, seen = model.to_bridge(), []

    def note(value: Tensor, hook: Any) -> None:
        seen.append(hook.name)

    model.add_hook("blocks.3.hook_resid_pre", note)
    bridge(tokens)
    assert seen == []
    bridge.add_hook("blocks.3.hook_in", note)
    model(tokens)
    assert seen == ["blocks.3.hook_resid_pre"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["pre-injection", "post-qk-norm"])
def test_a_padded_row_gives_what_it_gives_alone(kind: str, side: str, tokens: Tensor) -> None:
    (_, bridge), real = pair(kind), slice(3, None) if side == "left" else slice(0, 6)
    mask = torch.ones_like(tokens)
    mask[0] = 0
    mask[0, real] = 1
    batch = bridge(tokens, attention_mask=mask)
    assert_same(batch[:1, real], bridge(tokens[:1, real]))
    assert_same(batch[1:], bridge(tokens[1:]))


@pytest.mark.parametrize("kind", VARIANTS)
def test_stop_and_start_at_layer_compose_to_the_whole_run(kind: str, tokens: Tensor) -> None:
    model, bridge = pair(kind)
    loop = model.loop
    e = model.run_with_cache(tokens)[1]["resid_post", loop.p - 1] if loop.p else None
    for layer in (0, loop.index(1, 0), loop.index(2, 1), loop.n_layers - 1):
        stream = bridge(tokens, stop_at_layer=layer)
        expected = model(tokens, stop_at_layer=layer)
        assert_same(stream, expected)
        injected = {"prelude_output": e} if layer >= loop.p and loop.p else {}
        whole = bridge(stream, start_at_layer=layer, **injected)
        assert_same(whole, model(tokens))


def test_a_start_in_the_loop_without_anything_to_inject_is_refused(tokens: Tensor) -> None:
    model, bridge = pair("pre-injection")
    loop = model.loop
    stream = bridge(tokens, stop_at_layer=loop.index(1, 1))
    with refused(InputError, f"start_at_layer={loop.index(1, 1)}", "prelude_output="):
        bridge(stream, start_at_layer=loop.index(1, 1))
    last = bridge(tokens, stop_at_layer=loop.index(3, 1))
    assert_same(bridge(last, start_at_layer=loop.index(3, 1)), model(tokens))
    with refused(InputError, "computes its own"):
        bridge(tokens, prelude_output=stream)


def test_bad_arguments_are_refused(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bridge = pair("pre")
    with refused(RecurrenceCountError, "0"):
        model.to_bridge(0)
    with refused(InputError, "65 tokens", "64"):
        bridge(torch.zeros(1, 65, dtype=torch.long))
    with refused(InputError, "attention_mask", "(2, 9)", "(2, 8)"):
        bridge(tokens, attention_mask=torch.ones(2, 8))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    with refused(ConfigError, "3.5.1", "TransformerLens 4", "pip install"):
        model.to_bridge()


def test_a_bridges_configuration_is_the_models() -> None:
    model = load_golden("retrofit_llama").load()
    cfg = model.to_bridge(2).cfg
    sizes = ("d_model", "d_head", "n_heads", "n_key_value_heads", "d_mlp", "d_vocab", "n_ctx")
    for name in (*sizes, "eps", "act_fn", "rotary_base", "model_name", "dtype"):
        assert getattr(cfg, name) == getattr(model.cfg, name), name
    assert (cfg.eps, cfg.rotary_base, cfg.d_vocab_out) == (1e-5, 500000.0, 97)
    # TransformerLens refuses models whose block hooks fire more than once a run.
    assert getattr(cfg, "total_ut_steps", 1) == 1
    assert (cfg.attn_scale, cfg.normalization_type) == (model.cfg.d_head**0.5, "RMS")
    assert cfg.n_params == model.view_at(2).cfg.n_params
    assert cfg.n_layers == model.view_at(2).cfg.n_layers


KEPT = {"window_size": 128, "attn_scale": 1.0, "eps": 1e-3, "n_layers": 3, "d_model": 8}
KEPT |= {"parallel_attn_mlp": True, "rotary_base": 1, "use_normalization_before_and_after": True}


@pytest.mark.parametrize("name", KEPT)
def test_a_bridges_configuration_refuses_what_no_run_would_honour(name: str) -> None:
    bridge = make("pre").to_bridge(2)
    before = getattr(bridge.cfg, name)
    with refused(ConfigError, name, repr(KEPT[name]), repr(before)):
        setattr(bridge.cfg, name, KEPT[name])
    setattr(bridge.cfg, name, before)
    assert getattr(bridge.cfg, name) == before
    alone = copy.copy(bridge.cfg)
    setattr(alone, name, KEPT[name])
    assert (getattr(alone, name), getattr(bridge.cfg, name)) == (KEPT[name], before)
    bridge.cfg.use_attn_result = True
    assert "blocks.0.attn.hook_result" in bridge.run_with_cache(torch.tensor([[1, 2]]))[1]
