"""A padded batch gives, row by row, what the unpadded runs give: logits, states and patterns."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_same
from conftest import Golden
from torch import Tensor

from tl_looped import LoopedKeyValueCache, LoopedTransformer

LENGTHS = (11, 4, 7)


@pytest.fixture
def golden_model(golden: Golden) -> LoopedTransformer:
    return golden.load(dtype=torch.float64)


def padded(golden: Golden, side: str) -> tuple[Tensor, Tensor, list[slice]]:
    """Rows of unequal length, padded with a token that is in the vocabulary."""
    source = torch.cat((golden.tokens, golden.tokens.flip(1)[:1]))
    tokens = torch.full((3, 11), 5)
    mask = torch.zeros(3, 11, dtype=torch.long)
    where = []
    for i, n in enumerate(LENGTHS):
        place = slice(11 - n, 11) if side == "left" else slice(0, n)
        tokens[i, place], mask[i, place] = source[i, :n], 1
        where.append(place)
    return tokens, mask, where


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("listening", [False, True])
def test_rows_equal_unpadded_runs(
    golden: Golden, golden_model: LoopedTransformer, side: str, listening: bool
) -> None:
    tokens, mask, where = padded(golden, side)
    cache = None
    if listening:
        logits, cache = golden_model.run_with_cache(tokens, attention_mask=mask)
    else:
        logits = golden_model(tokens, attention_mask=mask)
    for i, place in enumerate(where):
        alone, alone_cache = golden_model.run_with_cache(tokens[i : i + 1, place])
        assert_same(logits[i, place], alone[0])
        if cache is not None:
            state = cache["resid_post", (2, 1)][i, place]
            assert_same(state, alone_cache["resid_post", (2, 1)][0])
            pattern = cache["pattern", (2, 1)][i, :, place, place]
            assert_same(pattern, alone_cache["pattern", (2, 1)][0])


def test_patterns_of_padding_are_zero_and_nothing_is_nan(golden, golden_model) -> None:
    tokens, mask, _ = padded(golden, "left")
    logits, cache = golden_model.run_with_cache(tokens, attention_mask=mask)
    pattern = cache["pattern", (1, 0)]
    assert logits.isfinite().all()
    assert not pattern[1, :, :7].any()  # queries of padding
    assert not pattern[1, :, 7:, :7].any()  # keys of padding
    rows = pattern.sum(-1)[mask.bool()[:, None].expand(-1, pattern.shape[1], -1)]
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_gradients_of_a_padded_batch_are_finite(golden, golden_model) -> None:
    tokens, mask, _ = padded(golden, "left")
    for _ in range(2):  # fused attention first, then with a listener on the pattern
        golden_model(tokens, attention_mask=mask)[mask.bool()].sum().backward()
        assert all(p.grad.isfinite().all() for p in golden_model.parameters() if p.grad is not None)
        golden_model.add_hook(lambda name: name.endswith("pattern"), lambda value, hook: None)


def test_coda_lens_of_a_padded_batch(golden, golden_model) -> None:
    tokens, mask, where = padded(golden, "left")
    _, cache = golden_model.run_with_cache(tokens, attention_mask=mask)
    lens = golden_model.coda_lens(cache["resid_post", (1, -1)], attention_mask=mask)
    for i, place in enumerate(where):
        expected = golden_model(tokens[i : i + 1, place], n_recurrences=2)[0]
        assert_same(lens[i, place], expected)


@pytest.mark.parametrize("first", ["left", "right"])
@pytest.mark.parametrize("then", ["left", "right"])
@pytest.mark.parametrize("said", [False, True])
def test_padding_of_what_continues_a_padded_batch(first: str, then: str, said: bool) -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu", dtype=torch.float64)
    starts, ends = ["Tom has 3", "Tom has 3 boxes and"], [" boxes.", " 4 more of them."]
    cache, side = LoopedKeyValueCache(), {"padding_side": then} if said else {}
    if not said:
        model.tokenizer.padding_side = then
    model(model.to_tokens(starts, padding_side=first), past_kv_cache=cache)
    new = model.to_tokens(ends, prepend_bos=False, padding_side=then)
    assert bool((new == model.tokenizer.pad_token_id).any())
    logits = model(new, past_kv_cache=cache, **side)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        own = model.to_tokens(end, prepend_bos=False)
        place = slice(-own.shape[1], None) if then == "left" else slice(0, own.shape[1])
        alone = model(torch.cat((model.to_tokens(start), own), 1))
        assert_same(logits[i, place], alone[0, -own.shape[1] :])


def test_one_more_pad_token_per_row_is_a_token_unless_said() -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu", dtype=torch.float64)
    start, cache = model.to_tokens(["Tom has 3", "Tom has 4"]), LoopedKeyValueCache()
    model(start, past_kv_cache=cache)
    pad = torch.full((2, 1), model.tokenizer.pad_token_id)
    ones = torch.ones(2, start.shape[1] + 1)
    whole = model(torch.cat((start, pad), 1), attention_mask=ones)
    cache.freeze()
    assert_same(model(pad, past_kv_cache=cache)[:, 0], whole[:, -1])
    cache.unfreeze()
    model(pad, past_kv_cache=cache, padding_side="right")
    assert cache.mask is not None
    assert cache.mask[:, -1].tolist() == [False, False]
