"""TransformerLens's detectors, interpreters and hooks, unmodified, on looped models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import rounding_of_vectors
from conftest import VARIANTS, random_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformer_lens import HookedRootModule, SVDInterpreter, utilities
from transformer_lens.head_detector import detect_head
from transformers import PreTrainedTokenizerFast

from tl_looped import HookNameError, LoopedTransformer

TOKENS = torch.tensor([[5, 11, 7], [1, 40, 22]])


def small(variant: str = "pre", **changes: Any) -> LoopedTransformer:
    shape = {"n_prelude": 1, "n_core": 2, "n_recurrences": 2}
    return LoopedTransformer.from_config(random_config(**(VARIANTS[variant] | shape | changes)))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and " the" as one token."""
    pieces = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    bpe = Tokenizer(models.BPE(vocab, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


@pytest.fixture
def speaker(tokenizer: PreTrainedTokenizerFast) -> LoopedTransformer:
    model = small("pre-injection", d_vocab=len(tokenizer), default_prepend_bos=True)
    model.tokenizer = tokenizer
    return model


def test_detect_head_scores_the_cached_patterns(speaker: LoopedTransformer) -> None:
    text = "on the mat"
    _, cache = speaker.run_with_cache(text, remove_batch_dim=True)
    size = cache["pattern", 0].shape[-1]
    wanted = torch.ones(size, size).tril().triu(-2)
    patterns = torch.stack([cache["pattern", layer] for layer in range(speaker.loop.n_layers)])
    share = (patterns * wanted).sum((-2, -1)) / patterns.sum((-2, -1))
    torch.testing.assert_close(detect_head(speaker, text, wanted, cache=cache), share)
    torch.testing.assert_close(detect_head(speaker, text, wanted), share)
    previous = patterns.diagonal(-1, -2, -1).sum(-1) / patterns.sum((-2, -1))
    torch.testing.assert_close(detect_head(speaker, text, "previous_token_head"), previous)
    distance = 1 - (patterns - wanted).abs().sum((-2, -1)) / size
    rounded = detect_head(speaker, text, wanted, heads=[(3, 2)], error_measure="abs")
    assert rounded[3, 2] == pytest.approx(float(distance[3, 2]), abs=6e-4)
    assert int((rounded == -1).sum()) == rounded.numel() - 1


def test_test_prompt_prints_the_rank_of_the_answer(speaker: LoopedTransformer, capsys: Any) -> None:
    utilities.test_prompt("on", "the", speaker, top_k=3)
    printed = capsys.readouterr().out
    answer = speaker.to_single_token(" the")
    logits = speaker("on")[0, -1]
    rank = int((logits > logits[answer]).sum())
    best = logits.topk(3)
    assert "Tokenized prompt: ['<s>', 'o', 'n']" in printed
    assert "Tokenized answer: [' the']" in printed
    assert f"Rank: {rank: <8} Logit: {logits[answer].item():5.2f}" in printed
    assert f"Ranks of the answer tokens: [(' the', {rank})]" in printed
    for place, (logit, token) in enumerate(zip(best.values, best.indices, strict=True)):
        assert f"Top {place}th token. Logit: {logit.item():5.2f}" in printed
        assert f"Token: |{speaker.to_string(token)}|" in printed


@pytest.mark.parametrize("variant", ["post-qk-norm", "residual-injection"])
def test_svd_interpreter_reads_the_shared_weights_of_an_effective_layer(variant: str) -> None:
    model = small(variant)
    generator = torch.Generator().manual_seed(1)
    weights = model.core[1]
    with torch.no_grad():
        for name in model.cfg.norm_layout.norm_names:
            getattr(weights, name).w.uniform_(0.5, 2.0, generator=generator)
    d, n_q, n_kv, head = 8, 4, model.cfg.n_kv_heads, 2
    first_value_row = (n_q + n_kv + head * n_kv // n_q) * d
    W_V = weights.attn.qkv[first_value_row : first_value_row + d].T
    W_O = weights.attn.out[:, head * d : (head + 1) * d].T
    w_in = weights.mlp.gate_up[model.cfg.d_mlp :]
    if variant == "residual-injection":
        w_in = w_in * weights.ln2.w
    matrices = {"OV": W_V @ W_O, "w_in": w_in, "w_out": weights.mlp.down.T}
    for layer in ((0, 1), (1, 1)):
        svd = SVDInterpreter(model)
        for kind, matrix in matrices.items():
            found = svd.get_singular_vectors(kind, model.loop.index(*layer), 4, head)
            directions = torch.linalg.svd(matrix).Vh[:4]
            expected = (directions @ model.W_U).T
            # A singular vector is determined up to its sign.
            bound = rounding_of_vectors(matrix, 4) * float(
                torch.linalg.matrix_norm(model.W_U.detach(), 2)
            )
            torch.testing.assert_close(found[:, 0].abs(), expected.abs(), atol=bound, rtol=0.0)


def test_hooks_of_a_hooked_root_module() -> None:
    model = small()
    assert isinstance(model, HookedRootModule)
    place, seen = model.loop.index(1, 1), []

    def note(value: Tensor, hook: Any) -> None:
        seen.append((hook.name, hook.layer(), value.shape))

    expected = (f"blocks.{place}.hook_resid_post", place, (2, 3, 32))
    with model.hooks(fwd_hooks=[("recurrence.1.blocks.1.hook_resid_post", note)]):
        model(TOKENS)
    model(TOKENS)
    assert seen == [expected]
    model.add_hook(("resid_post", (1, 1)), note)
    model.add_perma_hook(lambda name: name == "hook_embed", lambda value, hook: None)
    assert set(model.list_hooks()) == {expected[0], "hook_embed"}
    assert set(model.list_hooks(including_permanent=False)) == {expected[0]}
    model(TOKENS)
    assert seen == [expected] * 2
    model.reset_hooks()
    assert set(model.list_hooks()) == {"hook_embed"}
    model.reset_hooks(including_permanent=True)
    assert model.list_hooks() == {}
    model(TOKENS)
    assert len(seen) == 2


def test_a_hook_name_that_does_not_exist_stops_the_run_and_leaves_no_hook() -> None:
    model, runs = small(), []
    hooks = [("hook_embed", lambda value, hook: runs.append(hook.name)), ("blocks.6.hook_x", id)]
    with pytest.raises(HookNameError, match=r"0\.\.5"):
        model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert not runs
    assert model.list_hooks() == {}


def test_every_block_hook_gives_its_effective_layer() -> None:
    model = small("residual-injection")
    for name, hook in model.hook_dict.items():
        if name.startswith("blocks."):
            assert f"blocks.{hook.layer()}." in name
            assert model.loop.locate(hook.layer()) == hook.location
