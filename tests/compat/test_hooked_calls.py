"""HookedTransformer's calls on a looped model: generation, its key-value cache, embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_same
from plain import KINDS, N_LAYERS, Twins, make_twins
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from tl_looped import InputError

pytestmark = pytest.mark.usefixtures("without_gradients")
TOKENS = torch.tensor([[0, 5, 9, 4, 12, 7, 20, 3], [0, 11, 11, 6, 30, 2, 8, 19]])
GREEDY: dict[str, Any] = {"do_sample": False, "verbose": False, "stop_at_eos": False}
TEXT = "the mat"


@pytest.fixture(scope="module", params=KINDS)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return make_twins(request.param, tmp_path_factory.mktemp("letters"))


def cache_of(model: Any) -> TransformerLensKeyValueCache:
    return TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(TOKENS))


def assert_same_caches(
    ours: TransformerLensKeyValueCache, theirs: TransformerLensKeyValueCache, n_positions: int
) -> None:
    assert torch.equal(ours.previous_attention_mask, theirs.previous_attention_mask)
    assert ours.previous_attention_mask.dtype is theirs.previous_attention_mask.dtype
    assert len(ours.entries) == len(theirs.entries) == N_LAYERS
    for our, their in zip(ours.entries, theirs.entries, strict=True):
        assert our.past_keys.shape[1] == n_positions
        assert_same(our.past_keys, their.past_keys)
        assert_same(our.past_values, their.past_values)


# Where a whole row of a piece is padding, HookedTransformer gives NaN.
@pytest.mark.parametrize(("cuts", "padded"), [([3], False), ([1, 2, 6], False), ([3], True)])
def test_transformerlenss_cache_is_filled_as_by_hooked_transformer(
    twins: Twins, cuts: list[int], padded: bool
) -> None:
    caches = cache_of(twins.hooked), cache_of(twins.looped)
    mask = torch.ones_like(TOKENS)
    mask[1, :2] = 0 if padded else 1
    for piece, real in zip(TOKENS.tensor_split(cuts, 1), mask.tensor_split(cuts, 1), strict=True):
        theirs, ours = (
            model(piece, attention_mask=real, past_kv_cache=cache)
            for model, cache in zip((twins.hooked, twins.looped), caches, strict=True)
        )
        assert_same(ours[real.bool()], theirs[real.bool()])
    assert_same_caches(caches[1], caches[0], TOKENS.shape[1])


def test_either_model_goes_on_from_what_the_other_has_cached(twins: Twins) -> None:
    both = (twins.hooked, twins.looped)
    whole = twins.hooked(TOKENS)[:, 5:]
    for first, then in (both, both[::-1]):
        cache = cache_of(twins.hooked)
        first(TOKENS[:, :5], past_kv_cache=cache)
        assert_same(then(TOKENS[:, 5:], past_kv_cache=cache), whole)


def test_a_frozen_cache_and_one_that_is_edited(twins: Twins) -> None:
    found = []
    for model in (twins.hooked, twins.looped):
        cache = cache_of(model)
        model(TOKENS[:, :5], past_kv_cache=cache)
        cache.freeze()
        plain = model(TOKENS[:, 5:], past_kv_cache=cache)
        assert cache.previous_attention_mask.shape == (2, 5)
        assert cache[0].past_keys.shape[1] == 5
        cache.unfreeze()
        cache.entries[1].past_keys[:, 2] = 0.5
        cache.entries[2].past_values = cache.entries[2].past_values * 2
        edited = model(TOKENS[:, 5:], past_kv_cache=cache)
        assert cache.previous_attention_mask.shape == (2, 8)
        found.append((plain, edited))
    (plain, edited), (our_plain, our_edited) = found
    assert_same(our_plain, plain)
    assert_same(our_edited, edited)
    assert not torch.allclose(plain, edited)


def test_a_run_from_its_embedding_goes_on_from_a_cache(twins: Twins) -> None:
    found = []
    for model in (twins.hooked, twins.looped):
        cache = cache_of(model)
        model(TOKENS[:, :5], past_kv_cache=cache)
        resid, tokens, none, mask = model.input_to_embed(TOKENS[:, 5:], past_kv_cache=cache)
        assert torch.equal(tokens, TOKENS[:, 5:])
        assert none is None
        assert mask.shape == (2, 8)
        found.append((mask, resid))
        if model is twins.looped:
            found.append(model(resid, start_at_layer=0, attention_mask=mask, past_kv_cache=cache))
        # A run extends the cache; this was the first of two runs with HookedTransformer.
        assert model.get_pos_offset(cache, 2) == (5 if model is twins.hooked else 8)
        assert model.get_pos_offset(None, 2) == 0
        with pytest.raises(AssertionError):
            model.get_pos_offset(cache, 3)
        assert model.get_residual(resid, 5) == (resid, None)
        assert model.get_residual(resid, 5, return_shortformer_pos_embed=False) is resid
    (their_mask, their_resid), (mask, resid), logits = found
    assert torch.equal(mask, their_mask)
    assert torch.equal(resid, their_resid)
    assert_same(logits, twins.hooked(TOKENS)[:, 5:])


def test_the_embedding_of_padded_texts_and_their_mask(twins: Twins) -> None:
    for padding_side in ("left", "right"):
        for model in (twins.hooked, twins.looped):
            model.tokenizer.padding_side = padding_side
        theirs = twins.hooked.input_to_embed(["the mat", "a"])
        ours = twins.looped.input_to_embed(["the mat", "a"])
        for model in (twins.hooked, twins.looped):
            model.tokenizer.padding_side = "right"
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[0], theirs[0])
        if padding_side == "left":
            assert torch.equal(ours[3], theirs[3])
            assert ours[3].dtype is theirs[3].dtype


def test_generation_from_an_embedding(twins: Twins) -> None:
    embeds = twins.hooked.embed(TOKENS)
    for options in (GREEDY, GREEDY | {"use_past_kv_cache": False}):
        for return_type in ("input", "embeds", "tokens", "str"):
            theirs, ours = (
                model.generate(embeds, 6, return_type=return_type, **options)
                for model in (twins.hooked, twins.looped)
            )
            if return_type == "str":
                assert [text.rstrip() for text in ours] != ["", ""]
                assert len(ours) == 2
            else:
                assert torch.equal(ours, theirs)
    tokens = twins.looped.generate(TOKENS, 6, **GREEDY)
    assert torch.equal(
        twins.looped.generate(embeds, 6, return_type="tokens", **GREEDY), tokens[:, 8:]
    )
    assert torch.equal(
        twins.looped.generate(TOKENS, 6, return_type="embeds", **GREEDY), twins.looped.embed(tokens)
    )


def test_the_logits_of_every_step(twins: Twins) -> None:
    options = {"output_logits": True, "return_dict_in_generate": True, "freq_penalty": 1.5}
    found = []
    for model in (twins.hooked, twins.looped):
        torch.manual_seed(4)
        found.append(model.generate(TOKENS, 6, verbose=False, stop_at_eos=False, **options))
    theirs, ours = found
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.logits) == len(theirs.logits) == 6
    for our, their in zip(ours.logits, theirs.logits, strict=True):
        assert our.shape == (2, 31)
        assert_same(our, their)
    plain = twins.looped(ours.sequences)[:, 7:-1]
    assert_same(torch.stack(ours.logits, 1), plain)


def test_a_row_that_has_ended_is_filled_up_with_the_same_token(twins: Twins) -> None:
    free = twins.hooked.generate(TOKENS, 12, **GREEDY)[:, 8:].tolist()
    # Tokens of which one row has one much before the other one.
    ends = [free[0][1], free[1][-1]]
    for eos in (ends[0], [ends[0], 29], (ends[0], ends[1])):
        run = GREEDY | {"stop_at_eos": True, "eos_token_id": eos}
        theirs, ours = (m.generate(TOKENS, 12, **run) for m in (twins.hooked, twins.looped))
        assert torch.equal(ours, theirs)


def test_a_stream_comes_in_the_same_pieces(twins: Twins) -> None:
    for size in (1, 3, 8, 10, 25):
        theirs, ours = (
            list(m.generate_stream(TOKENS, 7, size, True, 29, False, verbose=False))
            for m in (twins.hooked, twins.looped)
        )
        assert [piece.shape for piece in ours] == [piece.shape for piece in theirs]
        assert all(map(torch.equal, ours, theirs))


def test_the_first_nine_positions_are_those_of_hooked_transformer(twins: Twins) -> None:
    found = []
    for model in (twins.hooked, twins.looped):
        torch.manual_seed(1)
        found.append(
            model.generate(TOKENS, 5, True, [29, 30], True, 6, None, 0.8, 0.5, verbose=False)
        )
    assert torch.equal(*found)


def test_without_a_prompt_generation_begins_with_bos(twins: Twins) -> None:
    run = GREEDY | {"return_type": "tokens", "max_new_tokens": 6}
    theirs = twins.hooked.generate(**run)
    assert torch.equal(twins.looped.generate(**run), theirs)
    assert int(theirs[0, 0]) == twins.looped.tokenizer.bos_token_id
    twins.looped.cfg.default_prepend_bos = False
    try:
        assert torch.equal(twins.looped.generate(**run), theirs)
    finally:
        twins.looped.cfg.default_prepend_bos = True


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_padding_of_tokens_is_what_the_call_says(twins: Twins, side: str) -> None:
    pad = twins.looped.tokenizer.pad_token_id
    tokens = TOKENS.clone()
    tokens[1, : 3 if side == "left" else -3] = TOKENS[1, : 3 if side == "left" else -3]
    where = slice(0, 3) if side == "left" else slice(-3, None)
    tokens[1, where] = pad
    real = tokens != pad
    theirs, ours = (m(tokens, padding_side=side) for m in (twins.hooked, twins.looped))
    assert_same(ours[real], theirs[real])
    if side == "left":
        theirs, ours = (
            m.generate(tokens, 5, padding_side=side, **GREEDY) for m in (twins.hooked, twins.looped)
        )
        assert torch.equal(ours, theirs)
    else:
        with pytest.raises(InputError, match="pad on the left"):
            twins.looped.generate(tokens, 5, padding_side=side, **GREEDY)


def test_a_cache_of_other_runs_is_refused(twins: Twins) -> None:
    cache = cache_of(twins.looped)
    with pytest.raises(InputError, match=rf"{N_LAYERS} entries.*LoopedKeyValueCache"):
        twins.looped(TOKENS, n_recurrences=2, past_kv_cache=cache)
    with pytest.raises(AssertionError, match="2 rows"):
        twins.looped(TOKENS[:1], past_kv_cache=cache)
    with pytest.raises(InputError, match="start_at_layer"):
        twins.looped(torch.zeros(2, 3, 24), start_at_layer=1, past_kv_cache=cache)
    cache.entries[1].past_keys = torch.zeros(2, 1, 3, 6, dtype=torch.float64)
    with pytest.raises(AssertionError, match="past_keys of entry 1"):
        twins.looped(TOKENS, past_kv_cache=cache)


def heads(cache: TransformerLensKeyValueCache) -> Tensor:
    return torch.stack([entry.past_keys for entry in cache.entries])


def test_a_run_that_fails_leaves_transformerlenss_cache_as_it_was(twins: Twins) -> None:
    cache = cache_of(twins.looped)
    twins.looped(TOKENS[:, :4], past_kv_cache=cache)
    before = heads(cache)

    def fail(x: Tensor, hook: Any) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        twins.looped.run_with_hooks(
            TOKENS[:, 4:], past_kv_cache=cache, fwd_hooks=[("blocks.3.hook_resid_post", fail)]
        )
    assert torch.equal(heads(cache), before)
    assert cache.previous_attention_mask.shape == (2, 4)
