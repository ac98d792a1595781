"""Fields of the configuration and TransformerLens's flags, against HookedTransformer itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hooked import CASES, CLOSE, LAYERS, Pair, make_pair, metric, some_tokens
from torch import Tensor

GROUPED = [case for case in CASES if case[0] != "full"]
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
UNGROUP = "ungroup_grouped_query_attention"


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(*request.param, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def flags(pair: Pair) -> Iterator[None]:
    """Flags that a test sets are off again behind it."""
    yield
    for model in (pair.hooked, pair.looped):
        model.reset_hooks()
        for flag in (*FLAGS, UNGROUP):
            getattr(model, f"set_{flag}")(False)


def of_the_loop(name: str) -> bool:
    return name.startswith("recurrence.") or name == "hook_initial_state"


# How random weights would have been drawn, whether a text gets a first token (None: as the
# tokenizer does), a switch of TransformerBridge's that HookedTransformer, whose norm goes by
# normalization_type, does not set, and the names.
DIFFER = {"init_mode", "initializer_range", "seed", "uses_rms_norm", "model_name"}
DIFFER |= {"default_prepend_bos", "original_architecture"}


def test_every_field_of_a_hooked_transformers_configuration_has_its_value(pair: Pair) -> None:
    theirs = vars(pair.hooked.cfg)
    assert len(theirs) > 70
    ours = {name: getattr(pair.looped.cfg, name) for name in theirs}
    differ = {name: (ours[name], theirs[name]) for name in theirs if ours[name] != theirs[name]}
    assert set(differ) <= DIFFER, differ
    of_type = {type(value) for name, value in ours.items() if name not in DIFFER}
    assert of_type <= {int, float, str, bool, torch.dtype, type(None)}
    assert pair.looped.cfg.is_layer_norm_activation() is pair.hooked.cfg.is_layer_norm_activation()


def test_with_all_flags_on_the_hooks_have_the_same_names(pair: Pair, flags: None) -> None:
    for flag in FLAGS:
        setattr(pair.looped.cfg, flag, True)
    # The two exclude each other here; HookedTransformer fires the one and ignores what it gives.
    exclusive = {f"blocks.{i}.hook_attn_in" for i in range(LAYERS)}
    ours = set(pair.looped.hook_dict.canonical)
    assert set(pair.hooked.hook_dict) - ours == exclusive
    assert all(map(of_the_loop, ours - set(pair.hooked.hook_dict)))
    pair.looped.cfg.use_split_qkv_input = False
    pair.looped.cfg.use_attn_in = True
    assert exclusive <= set(pair.looped.hook_dict)
    pair.looped.cfg.use_attn_in = False


@pytest.mark.parametrize("split", [False, True])
def test_ungrouped_keys_and_values_are_the_same(pair: Pair, flags: None, split: bool) -> None:
    tokens = some_tokens()
    plain, caches = pair.hooked(tokens), []
    for model in (pair.hooked, pair.looped):
        model.set_ungroup_grouped_query_attention(True)
        model.cfg.use_split_qkv_input = split
        _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
        model.zero_grad()
        torch.testing.assert_close(model(tokens), plain, **CLOSE)
        caches.append(cache)
    theirs, ours = caches
    heads = pair.looped.cfg.n_heads
    assert ours["k", 1].shape[2] == ours["v", 1].shape[2] == ours["rot_k", 1].shape[2] == heads
    names = {name for name in theirs if ".ln1." not in name}  # whose "_grad" there is a part
    assert sum("hook_k_input" in name for name in names) == 2 * LAYERS * split
    assert names <= set(ours)
    for name in names:
        report = f"{name}: {{}}".format
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE, msg=report)


@pytest.mark.parametrize("pair", GROUPED, ids="-".join, indirect=True)
@pytest.mark.parametrize("suffix", ["attn.hook_k", "attn.hook_v", "hook_k_input", "hook_v_input"])
def test_an_edit_reaches_one_query_head_alone(pair: Pair, flags: None, suffix: str) -> None:
    tokens, found = some_tokens(), []

    def edit(value: Tensor, hook: Any) -> Tensor:
        value[:, :, 1] *= 0.5
        return value

    for model in (pair.hooked, pair.looped):
        model.set_ungroup_grouped_query_attention(True)
        model.set_use_split_qkv_input("input" in suffix)
        with torch.no_grad(), model.hooks([(f"blocks.2.{suffix}", edit)]):
            logits, cache = model.run_with_cache(tokens, names_filter="blocks.2.attn.hook_z")
        with torch.no_grad():
            clean = model.run_with_cache(tokens, names_filter="blocks.2.attn.hook_z")[1]
        moved = (cache["z", 2] - clean["z", 2]).abs().amax((0, 1, 3)) > 0
        assert moved.tolist() == [head == 1 for head in range(4)]
        found.append(logits)
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("pair", GROUPED, ids="-".join, indirect=True)
def test_ungrouped_generation_needs_no_giving_up_of_the_key_value_cache(
    pair: Pair, flags: None
) -> None:
    tokens = some_tokens()
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "max_new_tokens": 6}
    expected = pair.hooked.generate(tokens, **options)
    for model in (pair.hooked, pair.looped):
        model.set_ungroup_grouped_query_attention(True)
    with pytest.raises(RuntimeError, match="Sizes of tensors"):
        pair.hooked.generate(tokens, **options)
    assert torch.equal(pair.looped.generate(tokens, **options), expected)
    options["use_past_kv_cache"] = False
    assert torch.equal(pair.looped.generate(tokens, **options), expected)


def test_the_gradient_of_the_weights_is_the_same_ungrouped(pair: Pair, flags: None) -> None:
    tokens, grads = some_tokens(), []
    for on in (False, True):
        pair.looped.cfg.ungroup_grouped_query_attention = on
        metric(pair.looped(tokens)).backward()
        grads.append([p.grad.clone() for p in pair.looped.parameters() if p.grad is not None])
        pair.looped.zero_grad()
    assert max(grad.abs().max() for grad in grads[0]) > 0
    for before, now in zip(*grads, strict=True):
        torch.testing.assert_close(now, before, **CLOSE)


@pytest.mark.parametrize("padded", [False, True])
def test_a_block_and_its_attention_called_alone_give_the_same(pair: Pair, padded: bool) -> None:
    tokens = some_tokens()
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :3] = 0
    _, cache = pair.hooked.run_with_cache(tokens)
    for layer in (0, 3, LAYERS - 1):
        pre = cache["resid_pre", layer]
        theirs, ours = (model.blocks[layer] for model in (pair.hooked, pair.looped))
        real = mask.bool()
        with torch.no_grad():
            expected = theirs(pre, attention_mask=mask if padded else None)
            found = ours(pre, attention_mask=mask if padded else None)
            torch.testing.assert_close(found[real], expected[real], **CLOSE)
            x = ours.ln1(pre)
            torch.testing.assert_close(x, theirs.ln1(pre), **CLOSE)
            inputs = (x, x.flip(-1), x * 2)
            torch.testing.assert_close(ours.attn(*inputs), theirs.attn(*inputs), **CLOSE)
            torch.testing.assert_close(ours.mlp(x), theirs.mlp(x), **CLOSE)
    assert (found - cache["resid_pre", 0]).abs().max() > 0.1
