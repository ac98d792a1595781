"""Calls as TransformerLens has them, on loops: forward, generate, its key-value cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_same
from conftest import VARIANTS, exact_config, with_gains
from refusals import refused
from test_against_transformers import write_retrofit
from torch import Tensor
from transformers import DynamicCache, MaxLengthCriteria, StoppingCriteria

from tl_looped import (
    ArgumentTypeError,
    InputError,
    LoopedKeyValueCache,
    LoopedTransformer,
    TokenizerError,
)
from tl_looped._compat import TransformerLensKeyValueCache
from tl_looped.exits import ExitAt

pytestmark = pytest.mark.usefixtures("without_gradients")
GREEDY: dict[str, Any] = {"do_sample": False, "verbose": False, "stop_at_eos": False}


@pytest.fixture(scope="module")
def demo() -> LoopedTransformer:
    return LoopedTransformer.from_pretrained("demo", device="cpu", dtype=torch.float64)


def small(**options: Any) -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config(**options))


# -- TransformerLens's key-value cache ------------------------------------------------------------


def theirs(model: LoopedTransformer, rows: int = 2) -> TransformerLensKeyValueCache:
    return TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", rows)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_with_transformerlenss_cache_give_the_logits_of_one_run(
    name: str, per_head: bool, tokens: Tensor
) -> None:
    options = VARIANTS[name] | ({"qk_norm": True, "qk_norm_per_head": True} if per_head else {})
    model = with_gains(small(**options))
    whole, cache = model.run_with_cache(tokens)
    past = theirs(model)
    pieces = [model(piece, past_kv_cache=past) for piece in tokens.tensor_split([2, 3, 7], 1)]
    assert_same(torch.cat(pieces, 1), whole)
    assert past.previous_attention_mask.tolist() == [[1] * 9] * 2
    for layer, entry in enumerate(past.entries):
        assert_same(entry.past_values, cache["v", layer])
        if not model.cfg.qk_norm:
            assert_same(entry.past_keys, cache["k", layer])


def test_transformerlenss_cache_is_for_the_recurrences_that_it_was_made_for(
    tokens: Tensor,
) -> None:
    model = small(**VARIANTS["pre-injection"])
    model.set_recurrences(2)
    past = theirs(model)
    model(tokens[:, :5], past_kv_cache=past)
    assert_same(model(tokens[:, 5:], past_key_values=past), model(tokens)[:, 5:])
    for call in (
        lambda: model(tokens, n_recurrences=3, past_kv_cache=past),
        lambda: model(tokens, exit_rule=ExitAt(1), past_kv_cache=past),
        lambda: model.generate(tokens, 2, past_kv_cache=past, verbose=False),
        lambda: model(tokens, past_kv_cache=DynamicCache()),
        lambda: model.generate(tokens, 2, past_kv_cache=DynamicCache(), verbose=False),
    ):
        with pytest.raises(InputError, match="KeyValueCache"):
            call()
    with pytest.raises(InputError, match="stop_at_layer"):
        model(tokens, stop_at_layer=2, past_kv_cache=past)
    assert past.previous_attention_mask.shape == (2, 9)


def test_activations_and_gradients_beside_transformerlenss_cache(tokens: Tensor) -> None:
    model = small(**VARIANTS["pre-injection"])
    found = []
    for past in (theirs(model), LoopedKeyValueCache()):
        with torch.enable_grad():
            model(tokens[:, :4], past_kv_cache=past)
            loss, cache = model.run_with_cache(
                tokens[:, 4:], return_type="loss", past_kv_cache=past, incl_bwd=True
            )
        found.append(
            (loss.detach(), cache["k", 3], cache["blocks.2.attn.hook_z_grad"], cache["pattern", 5])
        )
        model.zero_grad()
    for first, second in zip(*found, strict=True):
        assert_same(first, second)
    assert found[0][3].shape[-1] == 9


def test_a_cache_of_groups_is_refused_where_they_are_ungrouped(tokens: Tensor) -> None:
    """With the flag there are keys and values of each query head, and an entry has no room."""
    model = small(n_key_value_heads=2)
    past = theirs(model)
    model(tokens, past_kv_cache=past)
    model.set_ungroup_grouped_query_attention(True)
    with pytest.raises(InputError, match="set_ungroup_grouped_query_attention"):
        model(tokens, past_kv_cache=past)
    model.set_ungroup_grouped_query_attention(False)
    assert model(tokens, past_kv_cache=past).shape[1] == 9  # nothing was added by the refused run
    assert past.previous_attention_mask.shape == (2, 18)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_edit_of_rotated_keys_is_refused_beside_transformerlenss_cache(
    name: str, tokens: Tensor
) -> None:
    """It holds keys before their rotation: the next run would read them without the edit."""
    model = with_gains(small(**VARIANTS[name]))
    past = theirs(model)
    model(tokens[:, :4], past_kv_cache=past)
    edit = [("blocks.2.attn.hook_rot_k", lambda k, hook: 1.1 * k)]
    with pytest.raises(InputError, match=r"blocks\.2\.attn\.hook_rot_k"):
        model.run_with_hooks(tokens[:, 4:], past_kv_cache=past, fwd_hooks=edit)
    assert past.previous_attention_mask.shape == (2, 4)
    seen = [("blocks.2.attn.hook_rot_k", lambda k, hook: None)]
    logits = model.run_with_hooks(tokens[:, 4:], past_kv_cache=past, fwd_hooks=seen)
    assert_same(logits, model(tokens)[:, 4:])


def test_a_cache_in_another_dtype_is_refused(tokens: Tensor) -> None:
    model = small()
    past = theirs(model)
    for entry in past.entries:
        entry.past_keys = entry.past_keys.float()
    with pytest.raises(InputError, match="past_keys of entry 0 is torch"):
        model(tokens, past_kv_cache=past)


# -- forward --------------------------------------------------------------------------------------


def test_logits_and_cache_go_on(variant: LoopedTransformer, tokens: Tensor) -> None:
    logits, past = variant(tokens[:, :4], return_type="logits_and_cache")
    assert isinstance(past, LoopedKeyValueCache)
    assert past.length == 4
    more, same = variant(tokens[:, 4:], return_type="logits_and_cache", past_key_values=past)
    assert same is past
    assert_same(torch.cat((logits, more), 1), variant(tokens))
    _, none = variant(tokens, return_type="logits_and_cache", use_cache=False)
    assert none is None
    with pytest.raises(InputError, match="one argument"):
        variant(tokens, past_kv_cache=LoopedKeyValueCache(), past_key_values=past)


def test_a_mask_may_begin_with_the_cached_tokens(tokens: Tensor) -> None:
    model = small(**VARIANTS["pre-injection"])
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    past = LoopedKeyValueCache()
    first = model(tokens[:, :4], attention_mask=mask[:, :4], past_kv_cache=past)
    assert torch.equal(past.previous_attention_mask, mask[:, :4])
    second = model(tokens[:, 4:6], attention_mask=mask[:, :6], past_kv_cache=past)
    resid = model.embed(tokens[:, 6:])
    third = model(resid, start_at_layer=0, attention_mask=mask, past_kv_cache=past)
    whole = model(tokens, attention_mask=mask)
    assert_same(torch.cat((first, second, third), 1)[mask.bool()], whole[mask.bool()])
    other = torch.ones(2, 10, dtype=torch.long)
    with pytest.raises(InputError, match="first 9 columns"):
        model(tokens[:, :1], attention_mask=other, past_kv_cache=past)


def test_the_loss_of_labels(variant: LoopedTransformer, tokens: Tensor) -> None:
    labels = tokens.clone()
    labels[0, :4] = -100
    labels[1, 6] = 3
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    logits = variant(tokens, attention_mask=mask)
    run = {"attention_mask": mask, "labels": labels}
    # Row 0 predicts its tokens 4 to 8, row 1 those after its first one, which stands at 2.
    wanted = [(0, at) for at in range(4, 9)] + [(1, at) for at in range(3, 9)]
    each = {(row, at): F.cross_entropy(logits[row, at - 1], labels[row, at]) for row, at in wanted}
    loss = variant(tokens, return_type="loss", **run)
    assert_same(loss, torch.stack(list(each.values())).mean())
    per_token = variant(tokens, return_type="loss", loss_per_token=True, **run)
    assert per_token.shape == (2, 8)
    for row in range(2):
        for at in range(1, 9):
            expected = each.get((row, at), torch.zeros((), dtype=torch.float64))
            assert_same(per_token[row, at - 1], expected)
    both = variant(tokens, return_type="both", **run)
    assert_same(both.loss, loss)
    assert_same(both.logits, logits)
    assert both == (both.logits, both.loss)
    assert torch.equal(variant(tokens, **run), logits)
    own = variant(tokens, return_type="loss", labels=tokens)
    assert_same(own, variant(tokens, return_type="loss"))


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (torch.zeros(2, 8, dtype=torch.long), r"\(2, 9\)"),
        (torch.full((2, 9), 50), "0..49"),
        (torch.full((2, 9), -1), "-100"),
    ],
)
def test_labels_that_are_none_are_refused(labels: Tensor, what: str, tokens: Tensor) -> None:
    with pytest.raises(InputError, match=what):
        small(d_vocab=50)(tokens, return_type="loss", labels=labels)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pixel_values": torch.zeros(1)},
        {"input_values": torch.zeros(1)},
        {"input_ids": torch.zeros(1, 2)},
        {"inputs_embeds": torch.zeros(1, 2, 3)},
        {"position_ids": torch.arange(3)},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"shortformer_pos_embed": torch.zeros(1)},
        {"decoder_input": torch.zeros(1)},
        {"one_zero_attention_mask": torch.ones(1, 9)},
        {"return_dict": True},
        {"use_past_kv_cache": True},
        {"past_kv_caches": None},
    ],
)
def test_what_forward_cannot_do_is_refused_by_name(
    arguments: dict[str, Any], tokens: Tensor
) -> None:
    (name,) = arguments
    with pytest.raises(ArgumentTypeError, match=f"{name}"):
        small()(tokens, **arguments)


def test_values_that_ask_for_nothing_are_taken(tokens: Tensor) -> None:
    model = small()
    nothing = {"pixel_values": None, "output_attentions": False, "shortformer_pos_embed": None}
    assert torch.equal(model(tokens, **nothing), model(tokens))
    plain = model.generate(tokens, 3, **GREEDY)
    assert torch.equal(model.generate(tokens, 3, num_beams=1, pixel_values=None, **GREEDY), plain)


def test_the_embedding_goes_on_as_a_run(variant: LoopedTransformer, tokens: Tensor) -> None:
    seen = []
    hooks = [("hook_embed", lambda x, hook: seen.append(x) or x * 1.5)]
    with variant.hooks(fwd_hooks=hooks):
        resid, ids, none, mask = variant.input_to_embed(tokens)
    assert torch.equal(ids, tokens)
    assert none is None
    assert mask is None
    assert_same(resid, variant.embed(tokens) * 1.5)
    assert len(seen) == 1
    if variant.loop.p:
        assert_same(
            variant(resid, start_at_layer=0), variant.run_with_hooks(tokens, fwd_hooks=hooks)
        )


# -- generate -------------------------------------------------------------------------------------


def test_the_activations_of_prompt_and_reply(demo: LoopedTransformer) -> None:
    prompts = ["Tom has 3 boxes", "She"]
    run = GREEDY | {"n_recurrences": 2, "return_type": "tokens"}
    plain = demo.generate(prompts, 5, **run)
    out, cache, ids = demo.generate(
        prompts,
        5,
        return_cache=True,
        return_input_tokens=True,
        names_filter=[("resid_post", (1, 0)), "recurrence.0.hook_state_out"],
        device="cpu",
        **run,
    )
    assert torch.equal(out, plain)
    tokens, mask = demo.tokenize(prompts, padding_side="left")
    assert torch.equal(ids, tokens)
    assert cache.loop.R == 2
    mask = torch.cat((mask, torch.ones(2, 5, dtype=torch.bool)), 1)
    _, expected = demo.run_with_cache(out, attention_mask=mask, n_recurrences=2)
    assert set(cache.cache_dict) == {
        f"blocks.{cache.loop.index(1, 0)}.hook_resid_post",
        "recurrence.0.hook_state_out",
    }
    for name in cache.cache_dict:
        assert_same(cache[name][mask], expected[name][mask])
    text, again = demo.generate(prompts[0], 5, return_input_tokens=True, **GREEDY)
    assert isinstance(text, str)
    assert torch.equal(again, demo.to_tokens(prompts[0]))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"exit_rule": ExitAt(1)}, "exit_rule"),
        ({"past_kv_cache": LoopedKeyValueCache()}, "past_kv_cache"),
        ({"names_filter": "hook_nothing"}, "hook_nothing"),
        ({"device": "nowhere"}, "device"),
        ({"max_new_tokens": 56}, "65 tokens"),
        ({"input": torch.zeros(2, 9, 32, dtype=torch.float64)}, "embedding"),
    ],
)
def test_a_cache_that_would_not_be_of_the_generation_is_refused(
    options: dict[str, Any], what: str, tokens: Tensor
) -> None:
    calls: list[int] = []
    model = small(n_ctx=64)
    model.add_hook("hook_embed", lambda x, hook: calls.append(1))
    given: dict[str, Any] = {"input": tokens, "max_new_tokens": 2, "return_cache": True} | options
    with pytest.raises((InputError, KeyError), match=what):
        model.generate(**given, **GREEDY)
    assert calls == []  # before anything is computed


class After(StoppingCriteria):
    """Ends the rows whose newest token is one of these; notes what it was given."""

    def __init__(self, ends: list[int]) -> None:
        self.ends, self.seen = ends, list[tuple[Tensor, Tensor]]()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.seen.append((input_ids.clone(), scores.clone()))
        return torch.isin(input_ids[:, -1], torch.tensor(self.ends))


def test_stopping_criteria_end_rows(tokens: Tensor) -> None:
    model = small(**VARIANTS["pre-injection"])
    free = model.generate(tokens, 8, **GREEDY)
    end = int(free[0, 11])
    criterion = After([end])
    out = model.generate(tokens, 8, stopping_criteria=criterion, **GREEDY)
    for row in range(2):
        new = free[row, 9:].tolist()
        kept = new[: new.index(end) + 1] if end in new else new
        assert out[row, 9:].tolist() == kept + [0] * (out.shape[1] - 9 - len(kept))
    for step, (ids, scores) in enumerate(criterion.seen):
        assert torch.equal(ids, out[:, : 10 + step])
        assert_same(scores, model(out[:, : 9 + step])[:, -1])
    assert torch.equal(
        model.generate(tokens, 8, stopping_criteria=[MaxLengthCriteria(12)], **GREEDY),
        free[:, :12],
    )
    assert torch.equal(
        model.generate(tokens, 8, stopping_criteria=lambda ids, scores: True, **GREEDY),
        free[:, :10],
    )
    with pytest.raises(InputError, match="2 rows"):
        model.generate(tokens, 8, stopping_criteria=lambda ids, scores: [True] * 3, **GREEDY)
    with pytest.raises(TypeError, match="stopping_criteria"):
        model.generate(tokens, 8, stopping_criteria=3, **GREEDY)


def test_the_text_of_a_row_that_a_criterion_ended(demo: LoopedTransformer) -> None:
    whole = demo.generate("Tom has 3", 8, return_type="tokens", **GREEDY)
    n = demo.to_tokens("Tom has 3").shape[1]
    both = demo.generate(
        ["Tom has 3", "She"], 8, stopping_criteria=After([int(whole[0, n + 2])]), **GREEDY
    )
    new = whole[0, n:].tolist()
    kept = new[: new.index(int(whole[0, n + 2])) + 1]
    assert both[0] == "Tom has 3" + demo.to_string(kept)


@pytest.mark.parametrize("cached", [True, False])
def test_an_embedding_is_a_prompt(variant: LoopedTransformer, tokens: Tensor, cached: bool) -> None:
    run = GREEDY | {"use_past_kv_cache": cached}
    expected = variant.generate(tokens, 5, **run)
    embeds = variant.embed(tokens)
    out = variant.generate(embeds, 5, return_type="tokens", output_logits=True, **run)
    assert torch.equal(out.sequences, expected[:, 9:])
    assert_same(torch.stack(out.logits, 1), variant(expected[:, :-1])[:, 8:])
    assert torch.equal(variant.generate(embeds, 5, **run), variant.embed(expected))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    padded = variant.generate(tokens, 5, attention_mask=mask, **run)
    again = variant.generate(embeds, 5, attention_mask=mask, return_type="tokens", **run)
    assert torch.equal(again, padded[:, 9:])


def test_embeddings_are_not_streamed(tokens: Tensor) -> None:
    model = small()
    for call in (
        lambda: model.generate_stream(model.embed(tokens), 2, verbose=False),
        lambda: model.generate_stream(tokens, 2, return_type="embeds", verbose=False),
        lambda: model.generate_stream(tokens, 2, output_logits=True, verbose=False),
        lambda: model.generate_stream(tokens, 2, return_cache=True, verbose=False),
        lambda: model.generate(torch.zeros(2, 9, 31), 2, verbose=False),
        lambda: model.generate(model.embed(tokens), 2, stopping_criteria=bool, verbose=False),
    ):
        with pytest.raises(InputError, match=r"embedding|generate"):
            call()


def writing(ids: list[int]) -> Any:
    """A hook that makes each step's token the next of these."""
    left = iter(ids)

    def write(logits: Tensor, hook: Any) -> Tensor:
        return F.one_hot(torch.full(logits.shape[:2], next(left)), logits.shape[-1]).to(logits)

    return [("unembed.hook_out", write)]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_of_text_are_the_whole_text(demo: LoopedTransformer, size: int) -> None:
    # A part of a character's bytes is no character: it comes with the token that ends it.
    ids = demo.tokenizer.encode("東京é", add_special_tokens=False)
    assert len(ids) > 3
    for n, text in ((len(ids), "To東京é"), (1, None)):
        run = GREEDY | {"max_new_tokens": n}
        with demo.hooks(fwd_hooks=writing(ids)):
            pieces = list(demo.generate_stream("To", max_tokens_per_yield=size, **run))
        with demo.hooks(fwd_hooks=writing(ids)):
            assert "".join(pieces) == demo.generate("To", **run)
        if text is not None:
            assert "".join(pieces) == text
            assert not any("\ufffd" in piece for piece in pieces)
        else:
            assert pieces[-1] == "\ufffd"


def test_generation_without_a_prompt_needs_a_bos_token(demo: LoopedTransformer) -> None:
    bos = demo.tokenizer.bos_token_id
    for out in (
        demo.generate(return_type="tokens", **GREEDY),
        next(demo.generate_stream(return_type="tokens", **GREEDY)),
    ):
        assert int(out[0, 0]) == bos
        assert out.shape == (1, 11)
    alone = small()
    with pytest.raises(TokenizerError, match="no tokenizer"):
        alone.generate(verbose=False)
    token, demo.tokenizer.bos_token = demo.tokenizer.bos_token, None
    try:
        with pytest.raises(TokenizerError, match="give a prompt"):
            demo.generate(verbose=False)
    finally:
        demo.tokenizer.bos_token = token


@pytest.mark.parametrize("name", ["pixel_values", "forced_bos_token_id", "num_beams", "top_q"])
@pytest.mark.parametrize("method", ["generate", "generate_stream", "hf_generate"])
def test_what_generation_cannot_do_is_refused_by_name(
    method: str, name: str, tokens: Tensor
) -> None:
    with pytest.raises(TypeError, match=f"{method}.*{name}"):
        getattr(small(), method)(tokens, max_new_tokens=1, **{name: 4})


# -- hf_generate ----------------------------------------------------------------------------------


def test_hf_generate_gives_what_transformers_gives(tmp_path: Path) -> None:
    source = write_retrofit("llama", tmp_path).double().eval()
    model = LoopedTransformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    tokens = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    run: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": mask,
        "output_logits": True,
        "return_dict_in_generate": True,
        "repetition_penalty": 1.3,
    }
    expected = source.generate(tokens, pad_token_id=0, eos_token_id=None, **run)
    found = model.hf_generate(tokens, stop_at_eos=False, use_cache=True, **run)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    # transformers has its rotary frequencies from fp32.
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits).double(), atol=1e-4, rtol=1e-4
    )
    del run["output_logits"]
    found = model.hf_generate(tokens, stop_at_eos=False, **run)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.logits is None


def test_hf_generate_reads_text_as_the_tokenizer_does(demo: LoopedTransformer) -> None:
    run = {"max_new_tokens": 5, "do_sample": False}
    own = demo.tokenizer("Tom has 3")["input_ids"]
    before, demo.cfg.default_prepend_bos = demo.cfg.default_prepend_bos, None
    try:
        for default in (True, False):
            demo.cfg.default_prepend_bos = default
            tokens = demo.hf_generate("Tom has 3", return_type="tokens", **run)
            assert tokens[0, : len(own)].tolist() == own
            text = demo.hf_generate("Tom has 3", output_logits=True, **run)
            assert isinstance(text, str)
            assert demo.hf_generate(["Tom has 3"], **run) == [text]
    finally:
        demo.cfg.default_prepend_bos = before
    with pytest.raises(InputError, match="tokenizer="):
        demo.hf_generate("Tom", tokenizer=object())


def test_rows_of_hf_generate_are_filled_up_with_eos(demo: LoopedTransformer) -> None:
    texts = ["Tom has 3 boxes.", "She"]
    free = demo.hf_generate(texts, 8, stop_at_eos=False, do_sample=False, return_type="tokens")
    new = free[:, -8:].tolist()
    end = next(token for token in new[0] if token not in new[1])
    out = demo.hf_generate(texts, 8, eos_token_id=end, do_sample=False, return_type="tokens")
    stop = new[0].index(end) + 1
    eos = demo.tokenizer.eos_token_id
    assert out[0, -8:].tolist() == new[0][:stop] + [eos] * (8 - stop)
    run: dict[str, Any] = {"eos_token_id": end, "do_sample": False}
    filled = demo.hf_generate(texts, 8, pad_token_id=eos + 9, return_type="tokens", **run)
    assert filled[0, -8:].tolist() == new[0][:stop] + [eos + 9] * (8 - stop)
    assert torch.equal(filled[1], out[1])
    assert demo.hf_generate(texts, 8, pad_token_id=eos + 9, **run) == demo.hf_generate(
        texts, 8, **run
    )
    with refused(InputError, "pad_token_id", "2047"):
        demo.hf_generate(texts, 8, pad_token_id=2048, **run)
    tokens, mask = demo.tokenize(texts, prepend_bos=False, padding_side="left")
    mine = demo.generate(
        tokens, 8, eos_token_id=end, do_sample=False, attention_mask=mask, verbose=False
    )
    assert mine[0, -8:].tolist() == new[0][:stop] + [end] * (8 - stop)
