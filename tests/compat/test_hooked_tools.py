"""TransformerLens 3.x's tools give the same on a looped model as on HookedTransformer."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import pytest
import torch
from closeness import rounding_of_vectors
from hooked import CASES, CLOSE, LAYERS, LOOPS, Pair, make_pair, metric, some_tokens
from letters import letters
from torch import Tensor
from transformer_lens import SVDInterpreter, patching
from transformer_lens.head_detector import detect_head
from transformer_lens.tools.analysis import direct_logit_attribution
from transformer_lens.tools.analysis.direct_path_patching import get_act_patch_direct_path
from transformer_lens.utilities import Slice

from tl_looped import InvalidDecompositionError
from tl_looped.model.cells import why_no_direct_paths

CLEAN, CORRUPTED = some_tokens(2, 3, seed=1), some_tokens(2, 3, seed=2)


@pytest.fixture(scope="module", params=CASES[:3], ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(*request.param, tmp_path_factory.mktemp("llama"))


# Where the residual stream is a plain sum, and W_U is read without the final gain.
@pytest.fixture(scope="module", params=["grouped", "full"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pair = make_pair(request.param, "native", tmp_path_factory.mktemp("llama"))
    for weight in (pair.hooked.ln_final.w, pair.looped.ln_final.w):
        torch.nn.init.ones_(weight)
    return pair


@pytest.fixture(scope="module", params=LOOPS)
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("llama")
    pair = make_pair("grouped", request.param, folder)
    tokenizer = letters(folder / "tokenizer")
    pair.hooked.set_tokenizer(tokenizer)
    pair.looped.tokenizer = tokenizer
    pair.looped.cfg.default_prepend_bos = pair.hooked.cfg.default_prepend_bos
    return pair


def caches(pair: Pair, tokens: Tensor, **run: Any) -> tuple[Any, Any]:
    with torch.no_grad():
        return tuple(m.run_with_cache(tokens, **run)[1] for m in (pair.looped, pair.hooked))


def in_the_loop(pair: Pair, labels: list[str]) -> list[str]:
    """TransformerLens's labels with the place in the loop in place of the layer's number."""
    places = pair.looped.loop.labels()

    def named(label: str) -> str:
        if found := re.fullmatch(r"L(\d+)([HN])(\d+)", label):
            return f"{places[int(found[1])]}{found[2].lower()}{found[3]}"
        if found := re.fullmatch(r"(\d+)_(\w+)", label):
            return f"{places[int(found[1])]}.{found[2]}"
        return label

    return [named(label) for label in labels]


# The "every" ones are stacks: resid_pre, attn_out, mlp_out; and all_pos of out, q, k, v, pattern.
SWEEPS = ["resid_mid", "block_every", "attn_head_all_pos_every", "attn_head_k_by_pos"]


@pytest.mark.parametrize("pair", CASES[1:3], ids="-".join, indirect=True)
@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_patching_sweep_gives_the_same_grid(pair: Pair, sweep: str) -> None:
    patch = getattr(patching, f"get_act_patch_{sweep}")
    ours, theirs = (
        patch(model, CORRUPTED, cache, metric)
        for model, cache in zip((pair.looped, pair.hooked), caches(pair, CLEAN), strict=True)
    )
    assert theirs.std() > 1e-4
    torch.testing.assert_close(ours, theirs, **CLOSE)


# Its loop over heads takes as many key-value heads as heads for granted.
@pytest.mark.parametrize("pair", [("full", "native")], ids="-".join, indirect=True)
@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.filterwarnings("ignore:get_act_patch_direct_path is most accurate")
def test_direct_paths_are_the_same(pair: Pair, component: str) -> None:
    grids = []
    for model in (pair.looped, pair.hooked):
        with torch.no_grad():
            clean, corrupted = (model.run_with_cache(t)[1] for t in (CLEAN, CORRUPTED))
            run = (model, CORRUPTED, clean, corrupted, metric, 3, 2, component)
            grids.append(get_act_patch_direct_path(*run, verbose=False))
    assert grids[1].std() > 1e-4
    torch.testing.assert_close(*grids, **CLOSE)


@pytest.mark.filterwarnings("ignore:get_act_patch_direct_path is most accurate")
def test_direct_paths_are_refused_where_heads_do_not_arrive_as_written(pair: Pair) -> None:
    model = pair.looped
    clean, corrupted = caches(pair, CLEAN)[0], caches(pair, CORRUPTED)[0]
    if why_no_direct_paths(model.cfg) is None:
        get_act_patch_direct_path(model, CORRUPTED, clean, corrupted, metric, 5, 2, verbose=False)
    else:
        with pytest.raises(InvalidDecompositionError, match="injection"):
            get_act_patch_direct_path(model, CORRUPTED, clean, corrupted, metric, 3, 2)


def test_the_accumulated_stream_is_the_same(pair: Pair) -> None:
    ours, theirs = caches(pair, CLEAN)
    for layer in (None, 0, 3, -1):
        for options in ({}, {"apply_ln": True}, {"incl_mid": True}, {"mlp_input": True}):
            if layer is None and "mlp_input" in options:
                continue  # there is no MLP behind the last layer
            mine, labels = ours.accumulated_resid(layer, return_labels=True, **options)
            expected, wanted = theirs.accumulated_resid(layer, return_labels=True, **options)
            assert labels == in_the_loop(pair, wanted)
            torch.testing.assert_close(mine, expected, **CLOSE)
            assert ours.accumulated_resid(layer, labels="transformer_lens", **options)[1] == wanted


def test_stacks_and_slices_of_a_cache_are_the_same(pair: Pair) -> None:
    ours, theirs = caches(pair, CLEAN)
    for name in ("z", "pattern", "resid_mid", "post"):
        mine, expected = ours.stack_activation(name), theirs.stack_activation(name)
        torch.testing.assert_close(mine, expected, **CLOSE)
    for choice in (1, (0, 1)):
        mine, expected = (c.apply_slice_to_batch_dim(choice)["z", 2] for c in (ours, theirs))
        torch.testing.assert_close(mine, expected, **CLOSE)
    for options in ({"pos_slice": 1}, {"pos_slice": (1, 3)}, {"names_filter": lambda n: "z" in n}):
        mine, expected = caches(pair, CLEAN, **options)
        shared = set(mine.keys()) & set(expected.keys())
        assert len(shared) >= LAYERS
        for name in shared:
            wanted = expected[name]
            if "hook_rot_" in name and "pos_slice" in options:
                # HookedTransformer 3.x slices these two along their heads.
                wanted = Slice.unwrap(options["pos_slice"]).apply(theirs[name], dim=1)
            torch.testing.assert_close(mine[name], wanted, **CLOSE)
    mine, expected = caches(pair, CLEAN[:1], remove_batch_dim=True)
    torch.testing.assert_close(mine["pattern", 1], expected["pattern", 1], **CLOSE)


DECOMPOSITIONS = {
    "decompose_resid": [{}, {"layer": 3, "mlp_input": True}, {"mode": "attn"}],
    "stack_head_results": [{}, {"layer": 4}, {"incl_remainder": True, "pos_slice": -1}],
    "stack_neuron_results": [{"layer": 2}, {"layer": -1, "neuron_slice": (0, 5)}],
    "get_full_resid_decomposition": [{"expand_neurons": False}, {"layer": 2, "pos_slice": -1}],
}


@pytest.mark.parametrize("method", DECOMPOSITIONS)
@pytest.mark.parametrize("apply_ln", [False, True])
def test_a_decomposition_has_the_same_parts(plain: Pair, method: str, apply_ln: bool) -> None:
    ours, theirs = caches(plain, CLEAN)
    for options in DECOMPOSITIONS[method]:
        options = {"layer": -1, "return_labels": True, "apply_ln": apply_ln} | options
        (mine, labels), (expected, wanted) = (getattr(c, method)(**options) for c in (ours, theirs))
        assert labels == in_the_loop(plain, wanted)
        torch.testing.assert_close(mine, expected, **CLOSE)
        assert getattr(ours, method)(labels="transformer_lens", **options)[1] == wanted


def test_logit_attributions_are_the_same(plain: Pair) -> None:
    ours, theirs = caches(plain, CLEAN)
    answers, wrong = torch.tensor([3, 5]), torch.tensor([4, 6])
    for incorrect in (None, wrong):
        results = [
            cache.logit_attrs(
                cache.decompose_resid(pos_slice=-1),
                tokens=answers,
                incorrect_tokens=incorrect,
                pos_slice=-1,
                has_batch_dim=True,
            )
            for cache in (ours, theirs)
        ]
        torch.testing.assert_close(*results, **CLOSE)
    by_tool = [
        direct_logit_attribution(
            model, answer_tokens=answers, incorrect_tokens=wrong, cache=cache, unit="head"
        )
        for model, cache in zip((plain.looped, plain.hooked), (ours, theirs), strict=True)
    ]
    assert by_tool[0].labels == in_the_loop(plain, by_tool[1].labels)
    torch.testing.assert_close(by_tool[0].attribution, by_tool[1].attribution, **CLOSE)


def test_singular_vectors_are_the_same(pair: Pair) -> None:
    # The tool is for fp32 there.
    models = [deepcopy(model).float() for model in (pair.looped, pair.hooked)]
    norm = float(torch.linalg.matrix_norm(pair.looped.W_U.detach(), 2))
    ours, theirs = (SVDInterpreter(model) for model in models)
    for what, head in (("OV", 1), ("w_in", None), ("w_out", None)):
        if what == "OV" and pair.hooked.cfg.n_key_value_heads is not None:
            continue  # HookedTransformer's parameters are named _W_V there, and it finds none
        args = {"layer_index": 2, "num_vectors": 3, "head_index": head}
        mine, expected = (svd.get_singular_vectors(what, **args) for svd in (ours, theirs))
        matrix = (
            pair.looped.OV.AB[2, 1] if what == "OV" else getattr(pair.looped, f"W{what[1:]}")[2]
        )
        bound = norm * rounding_of_vectors(matrix, 3)
        torch.testing.assert_close(mine, expected, atol=bound, rtol=0.0)


TEXTS = ["a cat.", "the mat is flat."]


def test_text_becomes_the_same_tokens(speaker: Pair) -> None:
    ours, theirs = speaker.looped, speaker.hooked
    assert ours.to_tokens(TEXTS[0])[0, 0] == 0, "the BOS token comes first"
    for options in ({}, {"prepend_bos": False}, {"padding_side": "left"}):
        for text in (TEXTS[0], TEXTS):
            assert torch.equal(ours.to_tokens(text, **options), theirs.to_tokens(text, **options))
            assert ours.to_str_tokens(text, **options) == theirs.to_str_tokens(text, **options)
    tokens = theirs.to_tokens(TEXTS)
    assert ours.to_string(tokens) == theirs.to_string(tokens)
    assert ours.to_string(tokens[0]) == theirs.to_string(tokens[0])
    assert ours.to_single_token("q") == theirs.to_single_token("q")
    assert ours.to_single_str_token(7) == theirs.to_single_str_token(7)
    for mode in ("first", "last"):
        wanted = theirs.get_token_position("t", TEXTS[1], mode=mode)
        assert ours.get_token_position("t", TEXTS[1], mode=mode) == wanted
    ids = torch.tensor([3, 9])
    mine, expected = (m.tokens_to_residual_directions(ids) for m in (ours, theirs))
    assert torch.equal(mine, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_give_the_same_logits_and_loss(speaker: Pair, side: str) -> None:
    mask = speaker.looped.tokenize(TEXTS, padding_side=side)[1]
    assert not bool(mask.all())
    ours, theirs = (m(TEXTS, padding_side=side) for m in (speaker.looped, speaker.hooked))
    torch.testing.assert_close(ours[mask], theirs[mask], **CLOSE)
    # Without a mask, HookedTransformer counts the padding on the right as text.
    loss = {"return_type": "loss", "padding_side": side}
    expected = speaker.hooked(TEXTS, attention_mask=mask.int(), **loss)
    torch.testing.assert_close(speaker.looped(TEXTS, **loss), expected, **CLOSE)


def test_generated_text_is_the_same(speaker: Pair) -> None:
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "max_new_tokens": 12}
    tokens = speaker.hooked.to_tokens(TEXTS[1])
    ours, theirs = (m.generate(tokens, **options) for m in (speaker.looped, speaker.hooked))
    assert torch.equal(ours, theirs)


def test_head_scores_are_the_same(speaker: Pair) -> None:
    for head in ("previous_token_head", "duplicate_token_head", "induction_head"):
        ours, theirs = (detect_head(m, TEXTS[1], head) for m in (speaker.looped, speaker.hooked))
        torch.testing.assert_close(ours, theirs, **CLOSE)
