"""The key-value cache and generation."""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import fields
from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import TOLERANCE, VARIANTS, Golden, exact_config
from torch import Tensor

from tl_looped import InputError, LoopedKeyValueCache, LoopedTransformer, TokenizerError
from tl_looped.exits import ExitAt, ExitResult, KLDivergence
from tl_looped.transformer.generation_options import GenerationOptions

pytestmark = pytest.mark.usefixtures("without_gradients")
GREEDY: dict[str, Any] = {"do_sample": False, "verbose": False, "stop_at_eos": False}


def run_in_pieces(model: LoopedTransformer, tokens: Tensor, cuts: list[int], **run: Any) -> Tensor:
    """Logits of tokens that are fed piece by piece."""
    cache = LoopedKeyValueCache()
    pieces = tokens.tensor_split(cuts, 1)
    logits = torch.cat([model(piece, past_kv_cache=cache, **run) for piece in pieces], 1)
    assert cache.length == tokens.shape[1]
    return logits


# -- the cache changes nothing ------------------------------------------------------------------


def test_tokens_fed_in_pieces_give_the_reference_logits(golden: Golden) -> None:
    model = golden.load()
    cache = LoopedKeyValueCache()
    logits = []
    for piece, state in zip(
        golden.tokens.split(4, 1),
        golden.run.get("initial_state", golden.tokens).split(4, 1),
        strict=True,
    ):
        run = {"initial_state": state} if golden.is_raven else {}
        logits.append(model(piece, past_kv_cache=cache, **run))
    torch.testing.assert_close(torch.cat(logits, 1), golden.tensors["logits"], **TOLERANCE)


def test_greedy_tokens_of_the_reference_with_and_without_the_cache(golden: Golden) -> None:
    model = golden.load()
    state = {"initial_state": "zeros"} if golden.is_raven else {}
    expected = golden.tensors["greedy_tokens"]
    for cached in (True, False):
        out = model.generate(
            expected[:, :5], 8, use_past_kv_cache=cached, return_type="tokens", **state, **GREEDY
        )
        assert torch.equal(out, expected)
    drawn = (
        model.generate(golden.tokens, 20, use_past_kv_cache=c, **GREEDY) for c in (True, False)
    )
    assert torch.equal(*drawn)


def test_pieces_of_any_size_give_the_logits_of_one_run(
    variant: LoopedTransformer, tokens: Tensor
) -> None:
    whole = variant(tokens)
    for cuts in ([1], [4], [2, 3, 8], list(range(1, 9))):
        assert_same(run_in_pieces(variant, tokens, cuts), whole)
    zero = {"n_recurrences": variant.cfg.min_recurrences}
    assert_same(run_in_pieces(variant, tokens, [3, 7], **zero), variant(tokens, **zero))


def test_hooks_see_the_new_positions_as_in_one_run(
    variant: LoopedTransformer, tokens: Tensor
) -> None:
    _, whole = variant.run_with_cache(tokens)
    past = LoopedKeyValueCache()
    variant(tokens[:, :6], past_kv_cache=past)
    _, new = variant.run_with_cache(tokens[:, 6:], past_kv_cache=past)
    assert set(new.cache_dict) == set(whole.cache_dict)
    for name, value in new.items():
        expected = whole[name]
        expected = expected.narrow(variant.hook_dict[name].pos_dim, 6, 3)
        assert_same(value, expected)


def test_padded_rows_continue_as_they_would_alone(
    variant: LoopedTransformer, tokens: Tensor
) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    together = variant.generate(tokens, 6, attention_mask=mask, **GREEDY)
    alone = variant.generate(tokens[1:, 4:], 6, **GREEDY)
    assert torch.equal(together[1:, 4:], alone)
    first = variant.generate(tokens[:1], 6, **GREEDY)
    assert torch.equal(together[:1], first)
    past = LoopedKeyValueCache()
    right = torch.ones_like(tokens)
    right[0, -3:] = 0
    variant(tokens, attention_mask=right, past_kv_cache=past)
    after = variant(tokens[:, :2], past_kv_cache=past)
    joined = torch.cat((tokens[:1, :-3], tokens[:1, :2]), 1)
    assert_same(after[:1], variant(joined)[:, -2:])


def test_a_frozen_cache_serves_many_continuations(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))
    past = LoopedKeyValueCache()
    model(tokens[:, :5], past_kv_cache=past)
    past.freeze()
    for tail in (tokens[:, 5:], tokens[:, 5:].flip(0, 1)):
        expected = model(torch.cat((tokens[:, :5], tail), 1))[:, 5:]
        assert_same(model(tail, past_kv_cache=past), expected)
        assert past.length == 5
    with pytest.raises(InputError, match="unfreeze"):
        model.generate(tokens[:, 5:], past_kv_cache=past, verbose=False)
    past.unfreeze()
    out = model.generate(tokens[:, 5:], 4, past_kv_cache=past, **GREEDY)
    assert torch.equal(out[:, 4:], model.generate(tokens, 4, **GREEDY)[:, 9:])


def test_a_run_that_fails_leaves_the_cache_as_it_was(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config())
    past = LoopedKeyValueCache()
    model(tokens[:, :5], past_kv_cache=past)

    def fail(value: Tensor, hook: Any) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        model.run_with_hooks(
            tokens[:, 5:], past_kv_cache=past, fwd_hooks=[("blocks.5.hook_resid_post", fail)]
        )
    expected = model(tokens)[:, 5:]
    assert_same(model(tokens[:, 5:], past_kv_cache=past), expected)


def test_hooks_act_in_every_step_of_a_generation(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["residual-injection"]))
    seen = []

    def silence(z: Tensor, hook: Any) -> Tensor:
        seen.append(z.shape[1])
        return z * 0

    plain = model.generate(tokens, 5, **GREEDY)
    outs = []
    for cached in (True, False):
        with model.hooks(fwd_hooks=[("recurrence.1.blocks.0.attn.hook_z", silence)]):
            outs.append(model.generate(tokens, 5, use_past_kv_cache=cached, **GREEDY))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], plain)
    assert seen == [9, 1, 1, 1, 1, 9, 10, 11, 12, 13]


# -- fewer slots, fewer recurrences -------------------------------------------------------------


def with_past_of(
    model: LoopedTransformer, tokens: Tensor, n_past: int, source: Any, prefix: Any = None
) -> Tensor:
    """Logits of the new positions, if past keys and values at r are those of ``source(r)``.

    One plain run; hooks put the keys and values of another recurrence in the past positions, and
    those of the prefix's own run in its prelude and coda. What past positions compute from then on
    does not matter, since their keys and values are all replaced.
    """
    prefix = prefix or model.run_with_cache(tokens[:, :n_past])[1]
    ran = prefix.loop

    def swap(value: Tensor, hook: Any) -> Tensor:
        short = hook.name.rsplit(".", 1)[1].removeprefix("hook_")
        layer = hook.layer_in_stage
        if hook.stage == "core":
            place = ran.index(source(hook.recurrence), layer)
        else:
            place = layer if hook.stage == "prelude" else ran.coda_index(layer)
        value[:, :n_past] = prefix[short, place]
        return value

    names = [name for name in model.hook_dict if name.endswith(("attn.hook_rot_k", "attn.hook_v"))]
    hooks = [(name, swap) for name in names]
    return model.run_with_hooks(tokens, fwd_hooks=hooks)[:, n_past:]


@pytest.mark.parametrize("kind", ["pre-injection", "post-qk-norm", "sandwich-loop-norm"])
@pytest.mark.parametrize(("slots", "source"), [(1, [3] * 4), (2, [2, 3, 2, 3]), (3, [3, 1, 2, 3])])
def test_fewer_slots_hold_the_last_recurrence_of_each(
    kind: str, slots: int, source: list[int], tokens: Tensor
) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS[kind], n_recurrences=4))
    past = LoopedKeyValueCache(recurrence_slots=slots)
    before = model(tokens[:, :6], past_kv_cache=past)
    assert_same(before, model(tokens)[:, :6])
    expected = with_past_of(model, tokens, 6, source.__getitem__)
    assert_same(model(tokens[:, 6:], past_kv_cache=past), expected)


@pytest.mark.parametrize(("first", "then"), [(2, 4), (4, 2), (1, 4)])
def test_past_tokens_are_read_at_their_last_recurrence(
    first: int, then: int, tokens: Tensor
) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["residual-injection"]))
    past = LoopedKeyValueCache()
    model(tokens[:, :6], past_kv_cache=past, n_recurrences=first)
    _, prefix = model.run_with_cache(tokens[:, :6], n_recurrences=first)
    model.set_recurrences(then)
    expected = with_past_of(model, tokens, 6, lambda r: min(r, first - 1), prefix)
    assert_same(model(tokens[:, 6:], past_kv_cache=past), expected)
    # Back at more recurrences, the newer tokens too are read at the last that they ran.
    model(tokens[:, :1], past_kv_cache=past, n_recurrences=4)
    assert past.length == 10


def test_shared_slots_hold_what_their_last_recurrence_reads(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))
    past = LoopedKeyValueCache(recurrence_slots=2)
    _, prefix = model.run_with_cache(tokens[:, :6], n_recurrences=3)
    model(tokens[:, :6], past_kv_cache=past, n_recurrences=3)
    model.set_recurrences(6)
    # Recurrences 0 and 2 share a slot, which holds 2; from 3 on the past is read at its last, 2.
    expected = with_past_of(model, tokens, 6, lambda r: [2, 1, 2, 2, 2, 2][r], prefix)
    assert_same(model(tokens[:, 6:], past_kv_cache=past), expected)


def test_no_recurrence_leaves_no_past_for_the_loop(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))
    past = LoopedKeyValueCache()
    model(tokens, past_kv_cache=past, n_recurrences=0)
    with pytest.raises(InputError, match="no recurrence"):
        model(tokens, past_kv_cache=past)
    held = LoopedKeyValueCache()
    model(tokens, past_kv_cache=held)
    with pytest.raises(InputError, match="no recurrence"):
        model(tokens, past_kv_cache=held, n_recurrences=0)
    assert held.length == 9
    model(tokens, past_kv_cache=held)
    assert held.length == 18


def test_a_copy_of_a_cache_goes_its_own_way(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config())
    past = LoopedKeyValueCache()
    with torch.enable_grad():
        model(tokens[:, :5], past_kv_cache=past)
    other = deepcopy(past)
    model(tokens[:, 5:7], past_kv_cache=past)
    assert (past.length, other.length) == (7, 5)
    expected = model(tokens)[:, 5:]
    assert_same(model(tokens[:, 5:], past_kv_cache=other), expected)


def test_rows_may_pause_while_others_go_on(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["residual-injection"]))
    past = LoopedKeyValueCache()
    model(tokens[:, :4], past_kv_cache=past)
    pause = torch.tensor([[1, 1], [0, 0]])
    model(tokens[:, 4:6], attention_mask=pause, past_kv_cache=past)
    last = model(tokens[:, 6:], past_kv_cache=past)
    assert_same(last[:1], model(tokens[:1])[:, 6:])
    without = torch.cat((tokens[1:, :4], tokens[1:, 6:]), 1)
    assert_same(last[1:], model(without)[:, 4:])


def test_text_behind_a_prefix_is_no_beginning() -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu", dtype=torch.float64)
    past = LoopedKeyValueCache()
    model("Tom has 3", past_kv_cache=past)
    before = past.length
    found = model(" boxes", past_kv_cache=past)
    together = torch.cat((model.to_tokens("Tom has 3"), model.to_tokens(" boxes", False)), 1)
    assert_same(found, model(together)[:, before:])
    prefix = LoopedKeyValueCache()
    model("Tom has 3", past_kv_cache=prefix)
    told = model.generate(" boxes", 3, past_kv_cache=prefix, **GREEDY)
    assert model.generate(together, 3, return_type="str", **GREEDY).endswith(told)


def tensors(past: LoopedKeyValueCache) -> list[Tensor]:
    return [tensor for entry in past.entries.values() for tensor in entry]


def test_memory_is_counted(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(n_key_value_heads=2))
    for slots, layers in ((None, 2 + 3 * 4 + 1), (1, 2 + 3 + 1), (2, 2 + 3 * 2 + 1)):
        past = LoopedKeyValueCache(recurrence_slots=slots)
        model(tokens, past_kv_cache=past)
        # keys and values of 2 rows, 9 positions, 2 heads of 8 in fp64
        assert past.nbytes == layers * 2 * (2 * 9 * 2 * 8 * 8)
        assert f"{layers} slots" in repr(past)
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(past)}
        assert sum(held.values()) == past.nbytes


# -- generate -----------------------------------------------------------------------------------


def test_the_demo_model_writes_the_same_with_and_without_the_cache() -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    prompts = ["Tom has 3 boxes with 12 pens each.", "A farmer sells eggs. How many", "She"]
    for n in (None, 9):
        run = {"max_new_tokens": 12, "n_recurrences": n, **GREEDY}
        cached = model.generate(prompts, **run)
        assert cached == model.generate(prompts, use_past_kv_cache=False, **run)
        assert cached == [model.generate(prompt, **run) for prompt in prompts]
    sample = {"max_new_tokens": 15, "seed": 4, "verbose": False, "top_p": 0.9}
    assert model.generate(prompts[0], **sample) == model.generate(
        prompts[0], use_past_kv_cache=False, **sample
    )


def test_a_stream_takes_the_options_of_generate() -> None:
    parameters = list(inspect.signature(LoopedTransformer.generate).parameters.values())[3:-1]
    streamed = [(option.name, option.default) for option in fields(GenerationOptions)]
    assert streamed == [(option.name, option.default) for option in parameters]


def test_a_stream_gives_the_tokens_of_generate(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))
    options = {"verbose": False, "stop_at_eos": False, "seed": 3, "n_recurrences": 2}
    whole = model.generate(tokens, 7, **options)
    pieces = []
    for piece in model.generate_stream(tokens, 7, max_tokens_per_yield=3, **options):
        pieces.append(piece)
        model.set_recurrences(4)
        # The caller may use the model and the generator in between.
        assert model.loop.R == 4
        torch.rand(3)
        model(tokens)
    # The prompt's tokens count in the first piece, as in TransformerLens.
    assert [piece.shape[1] for piece in pieces] == [9 + 1, 3, 3]
    assert torch.equal(torch.cat(pieces, 1), whole)
    with pytest.raises(InputError, match="max_tokens_per_yield"):
        model.generate_stream(tokens, 7, max_tokens_per_yield=0)
    with pytest.raises(TypeError, match="max_tokens"):
        model.generate_stream(tokens, 7, max_tokens=3)


def test_penalties_do_not_count_padding(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config())
    padded = tokens.clone()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    padded[1, :5] = int(model(tokens[1:, 5:])[0, -1].argmax())  # the token that should come next
    run = {"repetition_penalty": 5.0, **GREEDY}
    together = model.generate(padded, 5, attention_mask=mask, **run)
    assert torch.equal(together[1:, 9:], model.generate(tokens[1:, 5:], 5, **run)[:, 4:])
    assert len(set(together[1, 5:].tolist())) > len(
        set(model.generate(tokens[1:, 5:], 5, **GREEDY)[0].tolist())
    )


def test_several_stop_tokens(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config())
    free = model.generate(tokens[:1], 8, **GREEDY)[0, 9:].tolist()
    stops = [free[4], free[2]]
    run = GREEDY | {"stop_at_eos": True, "eos_token_id": stops}
    out = model.generate(tokens[:1], 8, **run)[0, 9:].tolist()
    assert out == free[: min(free.index(stop) for stop in stops) + 1]


def test_a_conversation_goes_through_the_chat_template() -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    chat = [{"role": "user", "content": "How many pens?"}]
    with pytest.raises(TokenizerError, match="chat template"):
        model.generate(chat, verbose=False)
    model.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}"
    )
    written = "[user] How many pens?\n[model]"
    assert model.chat_text(chat) == written
    tokens = model.to_tokens(written, prepend_bos=False)
    expected = model.generate(tokens, 6, **GREEDY)[0, tokens.shape[1] :]
    reply = model.generate(chat, 6, **GREEDY)
    assert reply == model.tokenizer.decode(expected.tolist(), skip_special_tokens=True)
    assert model.generate([chat, chat], 6, **GREEDY) == [reply, reply]
    assert "".join(model.generate_stream(chat, 6, max_tokens_per_yield=6, **GREEDY)) == reply


def test_bad_arguments_of_generate(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config())
    past = LoopedKeyValueCache()
    model(tokens[:1], past_kv_cache=past)
    for options, message in (
        ({"top_k": 3, "top_p": 0.5}, "exclude"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 60}, "68 tokens"),
        ({"past_kv_cache": past}, "1 rows"),
        ({"past_kv_cache": past, "use_past_kv_cache": False}, "use_past_kv_cache"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(tokens, verbose=False, **options)
    for slots in (0, -1):
        with pytest.raises(InputError, match="recurrence_slots"):
            LoopedKeyValueCache(recurrence_slots=slots)
    with pytest.raises(InputError, match="start_at_layer"):
        model(torch.zeros(2, 9, 32), start_at_layer=1, past_kv_cache=past)


# -- leaving early while generating -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pre-injection", "sandwich-loop-norm"])
def test_later_tokens_read_a_token_at_the_recurrence_where_it_left(
    kind: str, tokens: Tensor
) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS[kind]))
    past = LoopedKeyValueCache()
    model(tokens[:, :6], past_kv_cache=past, exit_rule=ExitAt(1))
    # With nothing kept of later recurrences, the run is the one of two recurrences.
    _, prefix = model.run_with_cache(tokens[:, :6], n_recurrences=2)
    expected = with_past_of(model, tokens, 6, lambda r: min(r, 1), prefix)
    assert_same(model(tokens[:, 6:], past_kv_cache=past), expected)


@pytest.mark.parametrize("slots", [None, 1, 3])
@pytest.mark.parametrize("kind", ["residual-injection", "sandwich-loop-norm", "post-qk-norm"])
def test_rows_that_leave_at_different_recurrences_go_on_as_they_would_alone(
    kind: str, slots: int | None, tokens: Tensor
) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS[kind], n_recurrences=8))

    def generate(prompts: Tensor, rule: KLDivergence) -> ExitResult:
        past = LoopedKeyValueCache(recurrence_slots=slots)
        return model.generate(prompts, 6, exit_rule=rule, past_kv_cache=past, **GREEDY)

    both = None
    for threshold in (3.0 ** (1 - n) for n in range(10)):
        rule = KLDivergence(threshold)
        both = generate(tokens, rule)
        if not torch.equal(both.recurrence[0], both.recurrence[1]):
            break
    assert isinstance(both, ExitResult)
    assert both.recurrence.shape == (2, 6)
    assert not torch.equal(both.recurrence[0], both.recurrence[1])
    assert int(both.recurrence.min()) < 7
    for row in range(2):
        alone = generate(tokens[row : row + 1], rule)
        assert torch.equal(alone.output[0], both.output[row])
        assert torch.equal(alone.recurrence[0], both.recurrence[row])
