"""What must not reach what: models, runs, caches, in-place edits, padding, flags."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from closeness import SAME, assert_same
from conftest import VARIANTS, exact_config
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tl_looped import GatedHookError, HookNameError, InputError, LoopedTransformer


def edit_in_place(value: Tensor, hook) -> Tensor:
    value[:, :, 0] *= 3
    return value


def edit_a_copy(value: Tensor, hook) -> Tensor:
    value = value.clone()
    value[:, :, 0] *= 3
    return value


def test_two_models_of_one_configuration_are_independent(tokens: Tensor) -> None:
    config = exact_config(**VARIANTS["pre-injection"])
    one, other = LoopedTransformer.from_config(config), LoopedTransformer.from_config(config)
    before = other(tokens)
    one.set_recurrences(7)
    one.set_use_attn_result(True)
    one.half()
    assert (other.cfg.n_layers, other.cfg.n_recurrences) == (15, 4)
    assert not other.cfg.use_attn_result
    assert other.cfg.dtype == torch.float64
    assert torch.equal(other(tokens), before)
    assert config.n_recurrences == 4


@pytest.mark.once
@pytest.mark.parametrize("grad", [False, True])
def test_an_edit_in_place_is_an_edit_of_a_copy_everywhere(variant, tokens, grad: bool) -> None:
    """Same logits, same gradients, and nothing else in the cache of the run has changed."""
    variant.set_recurrences(2)
    tokens = tokens[:1, :5]
    with torch.set_grad_enabled(grad):
        _, clean = variant.run_with_cache(tokens)
        order = list(clean)
        block = f"blocks.{variant.loop.index(1, 0)}."  # one block, and all hooks outside blocks
        for name in order:
            if name.startswith("blocks.") and not name.startswith(block):
                continue
            logits, gradients = [], []
            for edit in (edit_in_place, edit_a_copy):
                with variant.hooks(fwd_hooks=[(name, edit)]):
                    out, cache = variant.run_with_cache(tokens)
                logits.append(out.detach())
                for earlier in order[: order.index(name)]:
                    assert torch.equal(cache[earlier], clean[earlier]), (name, earlier)
                if grad:
                    variant.zero_grad()
                    out.square().sum().backward()
                    gradients.append(variant.W_E.grad.clone())
            assert torch.equal(*logits), name
            assert not grad or torch.equal(*gradients), name


def test_an_edit_in_place_does_not_reach_the_callers_stream(variant, tokens) -> None:
    with torch.no_grad():
        _, cache = variant.run_with_cache(tokens)
        i = variant.loop.n_layers - 1
        stream = cache["resid_pre", i]
        kept = stream.clone()
        variant.run_with_hooks(
            stream, start_at_layer=i, fwd_hooks=[(("resid_pre", i), edit_in_place)]
        )
        assert torch.equal(cache["resid_pre", i], kept)


def test_gradients_are_cached_beside_an_edit_in_place(variant, tokens) -> None:
    name = variant.hook_name(("z", (1, 1)))
    with variant.hooks(fwd_hooks=[(name, edit_in_place)]):
        _, cache = variant.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert cache[name + "_grad"].any()


@pytest.mark.once
@pytest.mark.parametrize("reset_hooks_end", [True, False])
@pytest.mark.parametrize("part", ["block", "attn", "mlp", "ln2", "lens"])
def test_a_part_that_a_hook_calls_is_not_in_the_cache(
    part: str, reset_hooks_end: bool, tokens: Tensor
) -> None:
    """An earlier layer's activations are those of the run, not those of the call within it."""
    model = LoopedTransformer.from_config(exact_config())
    block = model.blocks[3]
    calls = {
        "block": lambda x: block(x),
        "attn": lambda x: block.attn(x, x, x),
        "mlp": lambda x: block.mlp(x),
        "ln2": lambda x: block.ln2(x),
        "lens": lambda x: model.unembed(model.ln_final(x)),
    }
    fired = []

    def hook(x: Tensor, hook) -> None:
        fired.append(calls[part](2 * x))

    edit = ("blocks.3.mlp.hook_post", edit_a_copy)
    for edits in ([], [edit]):
        with model.hooks(fwd_hooks=edits):
            _, expected = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[*edits, ("blocks.7.hook_resid_post", hook)]):
            _, cache = model.run_with_cache(tokens, reset_hooks_end=reset_hooks_end)
        model.reset_hooks()
        if reset_hooks_end:
            assert cache.edits.names == {name for name, _ in edits}
        for name in expected:
            assert torch.equal(cache[name], expected[name]), name
    assert len(fired) == 2


def test_a_run_inside_a_hook_does_not_change_the_record(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))

    def run_again(value: Tensor, hook) -> None:
        if hook.ctx.setdefault("runs", 0) == 0:
            hook.ctx["runs"] = 1
            model(tokens, state_seed=99)

    with model.hooks(fwd_hooks=[("hook_embed", run_again)], clear_contexts=True):
        _, cache = model.run_with_cache(tokens, state_seed=7)
    assert cache.state_seed == 7


def test_an_old_caches_model_counts_in_its_own_geometry(variant, tokens) -> None:
    _, cache = variant.run_with_cache(tokens)
    rows = [variant.unique_layer(i) for i in range(variant.loop.n_layers)]
    bias = variant.accumulated_bias(variant.loop.n_layers - 1)
    variant.set_recurrences(1)
    view = cache.model
    assert view is cache.model
    assert [view.unique_layer(i) for i in range(view.loop.n_layers)] == rows
    assert torch.equal(view.accumulated_bias(len(rows) - 1), bias)
    assert f"blocks.{len(rows) - 1}.attn.W_Q" in view.tl_parameters()
    assert copy.deepcopy(view).cfg.n_layers == len(rows)
    assert pickle.loads(pickle.dumps(view)).cfg.n_layers == len(rows)


def test_flags_change_shapes_of_the_first_norm_and_nothing_of_the_logits(variant, tokens) -> None:
    expected = variant.run_with_cache(tokens)[0]
    for switch in (variant.set_use_split_qkv_input, variant.set_use_attn_in):
        switch(True)
        logits, cache = variant.run_with_cache(tokens, pos_slice=(1, 3))
        assert_same(logits, expected)
        if "ln1" in dict(variant.blocks[0].named_children()):
            assert cache["scale", (1, 0), "ln1"].shape[:2] == (2, 2)
            assert cache["scale", (1, 0), "ln1"].ndim == 4
        switch(False)
    assert variant.run_with_cache(tokens, pos_slice=(1, 3))[1]["resid_pre", 0].shape == (2, 2, 32)


def test_a_flag_stays_on_while_its_hooks_are_attached(variant) -> None:
    variant.set_use_attn_result(True)
    variant.add_hook("blocks.0.attn.hook_result", edit_a_copy)
    with pytest.raises(GatedHookError, match="reset_hooks"):
        variant.set_use_attn_result(False)
    variant.reset_hooks()
    variant.set_use_attn_result(False)


def test_filters_that_select_nothing_are_an_error(variant, tokens) -> None:
    for use in (
        lambda: variant.run_with_cache(tokens, names_filter=lambda name: name.startswith("coda.")),
        lambda: variant.add_hook(lambda name: "nonsense" in name, edit_a_copy),
        lambda: variant.add_caching_hooks("nonsense"),
    ):
        with pytest.raises(HookNameError, match=r"canonical|near matches"):
            use()
    store = variant.add_caching_hooks("recurrence.1.blocks.0.hook_resid_post")
    variant(tokens)
    variant.reset_hooks()
    assert list(store) == [f"blocks.{variant.loop.index(1, 0)}.hook_resid_post"]


def test_short_names_of_attention_inputs(variant) -> None:
    variant.set_use_split_qkv_input(True)
    assert variant.hook_name(("q_input", (1, 0))) == (
        f"blocks.{variant.loop.index(1, 0)}.hook_q_input"
    )


def test_exits_of_a_padded_batch_with_a_coda(tokens: Tensor) -> None:
    config = exact_config(exit_gate=True, loop_norm=True)
    model = LoopedTransformer.from_config(config)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    readout = model.exits(tokens, attention_mask=mask)
    expected = model(tokens, attention_mask=mask)
    assert_same(readout.exit_logits[-1], expected)
    assert torch.equal(readout.recurrence(), readout.recurrence(1.0))


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = {str(i): i for i in range(50)}
    backend = Tokenizer(models.WordLevel(words, unk_token="1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


KINDS = {
    "own pad": {"pad_token": "0", "bos_token": "1", "eos_token": "2"},
    "no pad": {"bos_token": "1", "eos_token": "2"},
    "pad is eos": {"pad_token": "2", "bos_token": "1", "eos_token": "2"},
    "pad is bos": {"pad_token": "1", "bos_token": "1", "eos_token": "2"},
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prepend_bos", [False, True])
def test_padded_tokens_of_the_models_own_making_are_recognised(kind, side, prepend_bos) -> None:
    model = LoopedTransformer.from_config(
        exact_config(**VARIANTS["pre-injection"]), tokenizer(**KINDS[kind])
    )
    texts = ["5 6 7", "3 4 5 6 7 8"]
    batch = model.to_tokens(texts, prepend_bos=prepend_bos, padding_side=side)
    logits = model(batch, prepend_bos=prepend_bos)
    for row, text in zip(logits, texts, strict=True):
        alone = model(text, prepend_bos=prepend_bos)[0]
        where = slice(-len(alone), None) if side == "left" else slice(0, len(alone))
        assert_same(row[where], alone)
    if kind == "own pad":
        loss = model(batch, return_type="loss", prepend_bos=prepend_bos)
        assert loss.item() == pytest.approx(
            model(texts, return_type="loss", prepend_bos=prepend_bos).item(), abs=SAME
        )
        single = model(batch[:1], prepend_bos=prepend_bos)[0]
        assert_same(single, logits[0])
        resid = model(batch, stop_at_layer=5, prepend_bos=prepend_bos)
        e = model(batch, stop_at_layer=2, initial_state="zeros", prepend_bos=prepend_bos)
        assert e.shape == resid.shape


def test_tokens_of_a_residual_input_bring_their_padding() -> None:
    model = LoopedTransformer.from_config(exact_config(), tokenizer(**KINDS["own pad"]))
    batch = model.to_tokens(["5 6 7", "3 4 5 6 7 8"], padding_side="left")
    resid = model(batch, stop_at_layer=(2, 0))
    rest = model(resid, start_at_layer=(2, 0), tokens=batch)
    assert_same(rest[:, 3:], model(batch)[:, 3:])


def test_generation_checks_its_length_first() -> None:
    model = LoopedTransformer.from_config(exact_config())
    with pytest.raises(InputError, match=r"would run the model on 65 tokens.* 64"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), max_new_tokens=63, verbose=False)


def test_saved_models_do_not_keep_hook_flags(tmp_path) -> None:
    model = LoopedTransformer.from_config(exact_config())
    model.set_use_attn_result(True)
    model.save_pretrained(tmp_path)
    assert not LoopedTransformer.from_pretrained(tmp_path, device="cpu").cfg.use_attn_result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_small_integers_and_arrays_are_tokens_too(plain, tokens, dtype) -> None:
    assert torch.equal(plain(tokens.to(dtype)), plain(tokens))
    assert torch.equal(plain(tokens.numpy()), plain(tokens))
    assert torch.equal(plain(tokens[0].tolist()), plain(tokens[:1]))
