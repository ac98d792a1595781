"""Bad input: every refusal is a TLLoopedError that names the thing and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import CASES, Golden, exact_config, load_golden
from refusals import FAMILY, refused
from torch import Tensor

import tl_looped
from tl_looped import (
    ConfigError,
    GatedHookError,
    HookNameError,
    InitialState,
    Injection,
    InputError,
    LayerIndexError,
    LoopedConfig,
    LoopedTransformer,
    MissingActivationError,
    RecurrenceCountError,
    TLLoopedError,
    TokenizerError,
)

pytestmark = pytest.mark.once


def test_every_error_is_of_one_family_and_a_fitting_built_in() -> None:
    errors = {name for name in tl_looped.__all__ if name.endswith("Error")}
    assert errors == {"TLLoopedError", *FAMILY}
    for name, built_in in FAMILY.items():
        error = getattr(tl_looped, name)
        assert issubclass(error, TLLoopedError)
        assert issubclass(error, built_in)
        assert str(error("two\nlines")) == "two\nlines"


@pytest.fixture(scope="module")
def injected() -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config(injection=Injection.LINEAR))


# -- recurrences ------------------------------------------------------------------------------


def test_too_few_recurrences_are_refused(golden: Golden, golden_model: LoopedTransformer) -> None:
    low = -1 if golden.is_raven else 0
    fewest = f"at least {low + 1}"
    before = golden_model.loop.R
    with refused(RecurrenceCountError, fewest, f"got {low}"):
        golden.load(n_recurrences=low)
    with refused(RecurrenceCountError, fewest, f"got {low}"):
        golden_model.set_recurrences(low)
    with refused(RecurrenceCountError, fewest):
        golden_model(golden.tokens, n_recurrences=low)
    assert before == golden_model.loop.R


@pytest.mark.parametrize("case", [case for case in CASES if case != "ouro"])
def test_zero_recurrences_are_the_coda_on_the_initial_state(case: str) -> None:
    golden = load_golden(case)
    model, state = golden.load(), golden.tensors["initial_state"]
    none = model(golden.tokens, n_recurrences=0, initial_state=state)
    patch = [("recurrence.0.hook_state_out", lambda x, hook: state)]
    by_hand = model.run_with_hooks(golden.tokens, n_recurrences=1, fwd_hooks=patch, **golden.run)
    assert torch.equal(none, by_hand)
    assert torch.equal(golden.load(n_recurrences=0)(golden.tokens, initial_state=state), none)
    assert (none - golden.tensors["logits_r1"]).abs().max() > 0.1


@pytest.mark.parametrize("wrong", [(), 1.5, "text"])
@pytest.mark.parametrize("place", ["blocks.3.hook_resid_pre", "blocks.3.attn.hook_z"])
def test_a_hook_that_returns_no_tensor_is_refused_where_it_did(
    injected: LoopedTransformer, place: str, wrong: Any
) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    with refused(InputError, place, type(wrong).__name__):
        injected.run_with_hooks(tokens, fwd_hooks=[(place, lambda x, hook: wrong)])


# -- hook names and layers --------------------------------------------------------------------

OUT_OF_RANGE = {  # of (2, 3 x 4, 1): 15 effective layers
    "blocks.(4, 0).hook_resid_post": (LayerIndexError, "recurrence 4", "0..3"),
    "blocks.(0, 3).hook_resid_post": (LayerIndexError, "core layer 3", "0..2"),
    "recurrence.4.blocks.0.hook_resid_post": (LayerIndexError, "recurrence 4", "0..3"),
    "recurrence.0.blocks.3.attn.hook_z": (LayerIndexError, "core layer 3", "0..2"),
    "prelude.2.hook_resid_post": (LayerIndexError, "prelude layer 2", "0..1"),
    "coda.1.hook_resid_post": (LayerIndexError, "coda layer 1", "0..0"),
    "blocks.15.hook_resid_post": (HookNameError, "effective layer 15", "0..14"),
    "blocks.-1.hook_resid_post": (HookNameError, "effective layer -1", "0..14"),
    "recurrence.4.hook_state_out": (HookNameError, "recurrence 4", "0..3"),
}
UNKNOWN = {
    "blocks.3.hook_resid_pots": "blocks.3.hook_resid_post",
    "blocks.(1, 2).attn.hook_zz": "blocks.7.attn.hook_z",
    "recurrence.2.hook_stat_out": "recurrence.2.hook_state_out",
    "hook_embedd": "hook_embed",
}
TUPLES = {
    ("resid_post", (4, 0)): "0..3",
    ("resid_post", (0, 3)): "0..2",
    ("resid_post", (-5, 0)): "0..3",
    ("resid_post", 15): "0..14",
}


def attached(model: LoopedTransformer) -> int:
    return sum(len(hook.fwd_hooks) + len(hook.bwd_hooks) for hook in model.all_hook_points())


BAD_NAMES = [(name, *expected) for name, expected in OUT_OF_RANGE.items()]
BAD_NAMES += [(name, HookNameError, repr(name), near) for name, near in UNKNOWN.items()]
BAD_NAMES += [(name, LayerIndexError, "out of range", valid) for name, valid in TUPLES.items()]


@pytest.mark.parametrize(("name", "kind", "what", "valid"), BAD_NAMES)
def test_bad_hook_name_is_refused_before_the_run(
    plain: LoopedTransformer, name: Any, kind: type[TLLoopedError], what: str, valid: str
) -> None:
    ran: list[str] = []

    def hook(x: Tensor, hook: Any) -> None:
        ran.append(hook.name)

    tokens = torch.tensor([[1, 2, 3]])
    good = "hook_embed"
    for attempt in (
        lambda: plain.run_with_hooks(tokens, fwd_hooks=[(good, hook), (name, hook)]),
        lambda: plain.run_with_hooks(tokens, bwd_hooks=[(name, hook)], reset_hooks_end=False),
        lambda: plain.run_with_cache(tokens, names_filter=[good, name]),
        lambda: plain.add_hook(name, hook),
        lambda: plain.hook_name(name),
    ):
        with refused(kind, what, valid):
            attempt()
    assert ran == []
    assert attached(plain) == 0
    plain(tokens)
    assert ran == []


def test_names_are_read_at_the_recurrences_of_the_run(plain: LoopedTransformer) -> None:
    tokens, name = torch.tensor([[1, 2, 3]]), "blocks.(4, 0).hook_resid_post"
    _, cache = plain.run_with_cache(tokens, names_filter=name, n_recurrences=5)
    assert list(cache) == ["blocks.14.hook_resid_post"]
    with refused(LayerIndexError, "0..1"):
        plain.run_with_cache(tokens, names_filter="blocks.(2, 0).hook_z", n_recurrences=2)
    assert plain.loop.R == 4


@pytest.mark.parametrize("key", [*TUPLES, "blocks.(4, 0).hook_resid_post"])
def test_bad_cache_key_is_refused(plain: LoopedTransformer, key: Any) -> None:
    _, cache = plain.run_with_cache(torch.tensor([[1, 2]]))
    with refused(LayerIndexError, TUPLES.get(key, "0..3")):
        cache[key]
    assert key not in cache
    with refused(MissingActivationError, "'blocks.0.hook_nothing'", "(2, 3 x 4, 1)"):
        cache["blocks.0.hook_nothing"]


@pytest.mark.parametrize(
    ("pair", "valid"), [((4, 0), "0..3"), ((-5, 0), "0..3"), ((0, 3), "0..2"), ((0, -4), "0..2")]
)
def test_loop_index_out_of_range_is_refused(
    plain: LoopedTransformer, pair: tuple[int, int], valid: str
) -> None:
    with refused(LayerIndexError, valid, "15 effective layers"):
        plain.loop.index(*pair)
    with refused(LayerIndexError, valid):
        plain(torch.tensor([[1, 2]]), stop_at_layer=pair)


GATED = {
    "attn.hook_result": ("use_attn_result", (2, 3, 4, 32)),
    "hook_q_input": ("use_split_qkv_input", (2, 3, 4, 32)),
    "hook_k_input": ("use_split_qkv_input", (2, 3, 4, 32)),
    "hook_v_input": ("use_split_qkv_input", (2, 3, 4, 32)),
    "hook_attn_in": ("use_attn_in", (2, 3, 4, 32)),
    "hook_mlp_in": ("use_hook_mlp_in", (2, 3, 32)),
}


@pytest.mark.parametrize(("suffix", "flag", "shape"), [(k, *v) for k, v in GATED.items()])
def test_gated_hook_needs_its_flag(suffix: str, flag: str, shape: tuple[int, ...]) -> None:
    model = LoopedTransformer.from_config(exact_config())
    tokens, name = torch.tensor([[1, 2, 3], [4, 5, 6]]), f"blocks.(1, 2).{suffix}"
    with refused(GatedHookError, repr(name), f"set_{flag}(True)"):
        model.run_with_cache(tokens, names_filter=name)
    plain_logits = model(tokens)
    getattr(model, f"set_{flag}")(True)
    logits, cache = model.run_with_cache(tokens, names_filter=name)
    assert {key: tuple(value.shape) for key, value in cache.items()} == {
        f"blocks.7.{suffix}": shape
    }
    assert_same(logits, plain_logits)


# -- tokens, masks, states --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        (torch.tensor([[0, 50]]), ["0..49", "got 50"]),
        (torch.tensor([[-1, 3]]), ["0..49", "got -1"]),
        (torch.tensor([[0.0, 1.0]]), ["integers", "torch.float32", "start_at_layer"]),
        (torch.tensor([[True]]), ["integers", "torch.bool"]),
        (torch.zeros(1, 2, 3, dtype=torch.long), ["[batch, pos]", "(1, 2, 3)"]),
        (torch.zeros(1, 0, dtype=torch.long), ["no token", "(1, 0)"]),
        (torch.zeros(0, 3, dtype=torch.long), ["no token", "(0, 3)"]),
        (torch.zeros(1, 65, dtype=torch.long), ["65 tokens", "context of 64"]),
    ],
)
def test_bad_tokens_are_refused(plain: LoopedTransformer, tokens: Tensor, parts: list[str]) -> None:
    for run in (plain, plain.run_with_cache, plain.run_with_hooks):
        with refused(InputError, *parts):
            run(tokens)


def test_a_sequence_as_long_as_the_context_is_taken(plain: LoopedTransformer) -> None:
    assert plain(torch.zeros(1, 64, dtype=torch.long)).shape == (1, 64, 50)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"initial_state": torch.zeros(3, 3, 32)}, ["initial_state", "(2, 3, 32)", "(3, 3, 32)"]),
        ({"initial_state": torch.zeros(2, 3, 31)}, ["initial_state", "(2, 3, 31)"]),
        ({"initial_state": "ones"}, ["initial_state", "'zeros'", "'ones'"]),
        ({"prelude_output": torch.zeros(2, 3, 32)}, ["prelude_output", "computes its own"]),
        ({"state_seed": 3, "stop_at_layer": 1}, ["state_seed", "does not enter the loop"]),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, ["attention_mask", "rows [1]"]),
        ({"start_at_layer": 3}, ["start_at_layer", "[batch, pos, 32]"]),
        ({"start_at_layer": 4, "stop_at_layer": 3}, ["start_at_layer=4", "stop_at_layer=3"]),
        ({"return_type": "logit"}, ["return_type", "'both'", "'logit'"]),
    ],
)
def test_bad_argument_is_refused(
    injected: LoopedTransformer, arguments: dict[str, Any], parts: list[str]
) -> None:
    with refused(InputError, *parts):
        injected(torch.tensor([[1, 2, 3], [4, 5, 6]]), **arguments)


@pytest.mark.parametrize("shape", [(2, 4), (3,)])
def test_a_mask_of_another_shape_is_refused(
    injected: LoopedTransformer, shape: tuple[int, ...]
) -> None:
    with refused(InputError, "attention_mask", "(2, 3)", str(shape)):
        injected(torch.tensor([[1, 2, 3], [4, 5, 6]]), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("argument", ["start_at_layer", "stop_at_layer"])
@pytest.mark.parametrize("layer", [16, -16, (4, 0), (0, -4)])
def test_layer_out_of_range_is_refused(
    plain: LoopedTransformer, argument: str, layer: int | tuple[int, int]
) -> None:
    with refused(LayerIndexError, "out of range", "(2, 3 x 4, 1)"):
        plain(torch.zeros(1, 3, 32), **{argument: layer})


def test_starting_in_the_loop_needs_the_prelude_output(injected: LoopedTransformer) -> None:
    x = torch.zeros(1, 3, 32)
    with refused(InputError, "recurrence 1 injects", "prelude_output="):
        injected(x, start_at_layer=3)
    assert injected(x, start_at_layer=3, prelude_output=x).shape == (1, 3, 50)


def test_text_without_a_tokenizer_is_refused(plain: LoopedTransformer) -> None:
    with refused(TokenizerError, "no tokenizer", "model.tokenizer"):
        plain("text")


# -- configurations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        *(
            ({name: 0}, [f"{name} must be an integer of at least 1", "got 0"])
            for name in ("d_model", "d_head", "n_heads", "n_ctx", "d_vocab", "d_mlp", "n_core")
        ),
        ({"n_prelude": -1}, ["n_prelude", "at least 0", "-1"]),
        ({"n_coda": -1}, ["n_coda", "at least 0", "-1"]),
        ({"n_recurrences": 0}, ["n_recurrences", "at least 1", "got 0"]),
        ({"n_recurrences": -1, "injection": Injection.LINEAR}, ["at least 0", "got -1"]),
        ({"d_head": 7}, ["even d_head", "7"]),
        ({"n_key_value_heads": 3}, ["multiple", "(4)", "(3)"]),
        ({"n_key_value_heads": -2}, ["n_key_value_heads", "-2"]),
        ({"n_key_value_heads": 0}, ["n_key_value_heads", "0"]),
        ({"n_heads": -1, "d_model": 30}, ["d_model", "30", "d_head", "8"]),
        ({"initial_state": InitialState.RANDOM}, ["'random'", "initial_state='prelude'"]),
        ({"initial_state": InitialState.PRELUDE_SKIP_ADAPTER}, ["needs an injection"]),
        ({"pre_coda_norm": True, "n_coda": 0}, ["pre_coda_norm", "coda"]),
        ({"pre_coda_norm": True, "loop_norm": True}, ["pre_coda_norm", "loop_norm"]),
        ({"init_mode": "xavier"}, ["init_mode", "'normal', 'fan_in'", "'xavier'"]),
        ({"act_fn": "gelu"}, ["act_fn", "'silu'", "'gelu'"]),
        ({"gated_mlp": False}, ["gated_mlp", "True"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["'yarn'", "'llama3'"]),
        ({"rope_scaling": {"type": "linear"}}, ["'linear'", "'llama3'"]),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["rope_scaling", "factor"]),
    ],
)
def test_bad_config_is_refused(changes: dict[str, Any], parts: list[str]) -> None:
    with refused(ConfigError, *parts):
        exact_config(**changes)


@pytest.mark.parametrize("name", ["norm_layout", "injection", "rotary_style", "initial_state"])
def test_unknown_choice_in_a_config_lists_the_known_ones(name: str) -> None:
    good = exact_config().to_json()
    with refused(ConfigError, name, repr(good[name]), "'bogus'"):
        LoopedConfig.from_json(good | {name: "bogus"})
