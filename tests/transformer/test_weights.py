"""Weights under TransformerLens's names, stacked and folded."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import VARIANTS, exact_config, with_gains
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import parametrize, prune
from transformer_lens import SVDInterpreter

from tl_looped import InputError, LayerIndexError, LoopedTransformer
from tl_looped.model.context import RunContext

STACKS = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out", "b_Q", "b_K", "b_V", "b_O")


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> LoopedTransformer:
    """A small model with gains that are not one, and without gradients."""
    model = LoopedTransformer.from_config(exact_config(**VARIANTS[request.param]))
    return with_gains(model).requires_grad_(False)


def test_stacks_are_indexed_by_effective_layer(model: LoopedTransformer) -> None:
    for name in (*STACKS, "b_in", "b_out"):
        stack, unique = getattr(model, name), model.unique_weights(name)
        assert len(stack) == model.loop.n_layers
        assert len(unique) == model.loop.p + model.loop.k + model.loop.c
        for i, row in enumerate(stack):
            part = (
                model.blocks[i].attn if hasattr(model.blocks[i].attn, name) else model.blocks[i].mlp
            )
            assert torch.equal(row, getattr(part, name))
            assert torch.equal(row, unique[model.unique_layer(i)])
    for i in (0, model.loop.index(2, 1)):
        for name in ("OV", "QK"):
            factored, mine = getattr(model, name), getattr(model.blocks[i].attn, name)
            torch.testing.assert_close(factored.AB[i], mine.AB)
            assert factored.shape[0] == model.loop.n_layers


def test_a_stack_that_is_too_large_is_refused_with_its_size(model: LoopedTransformer) -> None:
    assert model.max_stack_bytes == 2**30
    size = model.loop.n_layers * 32 * 48 * 8  # fp64
    model.max_stack_bytes = size
    assert model.W_in.numel() * 8 == size
    model.max_stack_bytes = size - 1
    with pytest.raises(InputError, match=r"unique_weights\('W_in'\)"):
        model.W_in  # noqa: B018
    assert model.unique_weights("W_in").shape[1:] == (32, 48)


def test_an_older_cache_sees_the_weights_of_its_own_layers(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    _, cache = model.run_with_cache(tokens)
    expected = model.W_V
    model.set_recurrences(1)
    assert torch.equal(cache.model.W_V, expected)
    assert len(model.W_V) == model.loop.n_layers < len(expected)
    assert len(cache.model.all_head_labels) == cache.loop.n_layers * 4


def test_labels_and_blocks_with(model: LoopedTransformer, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    assert model.all_head_labels == cache.stack_head_results(return_labels=True)[1]
    for name in ("ln1", "ln1_post", "ln_mid", "attn"):
        found = model.blocks_with(name)
        has = name == "attn" or name in model.cfg.norm_layout.norm_names
        assert [i for i, _ in found] == (list(range(model.loop.n_layers)) if has else [])
        assert all(block is model.blocks[i] for i, block in found)


@pytest.mark.parametrize("folded", [False, True])
def test_composition_scores_are_those_of_the_products(
    model: LoopedTransformer, folded: bool
) -> None:
    model.enable_compatibility_mode(fold_ln=folded)
    model.set_recurrences(2)
    n, OV, QK = model.loop.n_layers, model.OV.AB, model.QK.AB
    for mode, right in (("Q", QK), ("K", QK.mT), ("V", OV)):
        scores = model.all_composition_scores(mode)
        assert scores.shape == (n, 4, n, 4)
        for i, j in ((0, 1), (0, n - 1), (n - 3, n - 2)):
            product = OV[i, 1] @ right[j, 2]
            assert_same(scores[i, 1, j, 2], product.norm() / OV[i, 1].norm() / right[j, 2].norm())
            assert not scores[j, :, i].any()
            assert not scores[i, :, i].any()
        assert scores.head_labels == model.all_head_labels
        assert scores.layer_indices == list(range(n))
        assert type(scores.scores) is type(scores * 2) is Tensor
    with pytest.raises(InputError, match="'Q', 'K', 'V'"):
        model.all_composition_scores("OV")
    model.max_stack_bytes = (n * 4) ** 2 * 8 - 1
    with pytest.raises(InputError, match="max_stack_bytes"):
        model.all_composition_scores("Q")


# -- TransformerLens's names and the model's ------------------------------------------------------


def test_the_map_of_names_leads_to_the_numbers_and_back(model: LoopedTransformer) -> None:
    own, cfg = dict(model.named_parameters()), model.cfg
    of_own: dict[str, set[str]] = {name: set() for name in own}
    for name, weight in model.tl_named_parameters():
        stored = model.parameter_of(name)
        if stored is None:
            assert name.rpartition(".")[2][0] == "b"
            assert not weight.any()
            continue
        of_own[stored.name].add(name)
        rows = own[stored.name][stored.rows]
        # Each number of the rows is in the weight, once, or for each query head of a group.
        repeats = weight.numel() // rows.numel()
        kinds = ("W_K", "W_V", "b_K", "b_V")
        assert repeats == (cfg.n_heads // cfg.n_kv_heads if name.endswith(kinds) else 1), name
        expected = rows.flatten().sort().values.repeat_interleave(repeats)
        assert torch.equal(weight.flatten().sort().values, expected), name
    for name, names in of_own.items():
        assert set(model.transformer_lens_names(name)) == names
        if name.split(".")[0] in ("core", "prelude", "embed"):
            assert names, f"{name} has a name in TransformerLens"
    core = model.transformer_lens_names("core.1.attn.out")
    assert core == [f"blocks.{model.loop.index(r, 1)}.attn.W_O" for r in range(model.loop.R)]
    assert model.parameter_of("blocks.-1.mlp.W_out") == model.parameter_of(
        f"blocks.{model.loop.n_layers - 1}.mlp.W_out"
    )
    assert model.parameter_of("blocks.0.attn._W_K") == model.parameter_of("blocks.0.attn.W_K")


def test_names_that_there_are_not_are_refused(model: LoopedTransformer) -> None:
    for name in ("W_Q", "blocks.0.attn.W_X", "blocks.x.attn.W_Q", "blocks.0.ln3.w", "core.0.attn"):
        with pytest.raises(InputError, match=r"attn\.W_Q"):
            model.parameter_of(name)
    with pytest.raises(LayerIndexError):
        model.parameter_of(f"blocks.{model.loop.n_layers}.attn.W_Q")
    with pytest.raises(InputError, match=r"core\.0\.attn\.qkv"):
        model.transformer_lens_names("blocks.0.attn.W_Q")


# -- compatibility mode ---------------------------------------------------------------------------


def test_folding_changes_no_logit_and_no_activation(
    model: LoopedTransformer, tokens: Tensor, tmp_path: Path
) -> None:
    logits, cache = model.run_with_cache(tokens)
    model.save_pretrained(tmp_path / "before")
    assert model.enable_compatibility_mode() is None
    after, folded = model.run_with_cache(tokens)
    assert torch.equal(after, logits)
    assert all(torch.equal(folded[name], value) for name, value in cache.items())
    model.save_pretrained(tmp_path / "after")
    before, saved = (load_file(tmp_path / n / "model.safetensors") for n in ("before", "after"))
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    again = LoopedTransformer.from_pretrained(tmp_path / "after", device="cpu", dtype=torch.float64)
    assert again.cfg.normalization_type == "RMS"
    assert torch.equal(again(tokens), model(tokens))


def test_folded_weights_read_what_the_norms_hook_shows(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    model.enable_compatibility_mode()
    model.set_recurrences(5)  # blocks that are made later are folded too
    logits, cache = model.run_with_cache(tokens)
    for i in range(model.loop.n_layers):
        if "ln1" not in model.cfg.norm_layout.norm_names:
            continue
        x = cache[f"blocks.{i}.ln1.hook_normalized"]
        q = torch.einsum("btd,hdk->bthk", x, model.W_Q[i]) + model.b_Q[i]
        k = torch.einsum("btd,hdk->bthk", x, model.W_K[i]) + model.b_K[i]
        assert_same(q, cache["q", i])
        repeats = 4 // model.cfg.n_kv_heads
        assert_same(k[:, :, ::repeats], cache["k", i])
        y = cache[f"blocks.{i}.ln2.hook_normalized"]
        assert_same(y @ model.W_in[i], cache["pre_linear", i])
        assert_same(y @ model.W_gate[i], cache["pre", i])
        block = model.blocks[i]
        assert_same(block.ln1(cache["resid_pre", i]), x)
        assert bool((block.ln1.w == 1).all())
    assert_same(cache["ln_final.hook_normalized"] @ model.W_U, logits)


def test_the_final_norm_and_the_unembedding_fit_together(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    for fold in (False, True, False):
        model.enable_compatibility_mode(fold_ln=fold)
        logits, cache = model.run_with_cache(tokens)
        stream = cache["resid_post", -1]
        assert_same(model.unembed(model.ln_final(stream)), logits)
        assert_same(model.ln_final(stream) @ model.W_U, logits)
        assert_same(model.logit_lens(stream), logits)
        lens = cache.logit_lens(positions=None)
        assert_same(lens.values[-1], logits)
        parts = cache.decompose_resid()
        assert_same(cache.logit_attrs(parts, 7).sum(0), logits[..., 7])
        direction = model.tokens_to_residual_directions(torch.tensor([7, 9]))
        assert torch.equal(direction, model.W_U[:, [7, 9]].T)
        folded = cache.apply_ln_to_stack(parts) @ model.W_U
        if fold:  # as every notebook on a folded model does it
            assert_same(folded.sum(0), logits)


def test_folded_norms_have_no_gain_among_the_parameters(model: LoopedTransformer) -> None:
    norms = model.cfg.norm_layout.norm_names
    names = set(model.tl_parameters())
    assert {"ln_final.w"} | {f"blocks.0.{norm}.w" for norm in norms} <= names
    model.enable_compatibility_mode()
    folded = set(model.tl_parameters())
    gone = {"ln_final.w"} | {
        f"blocks.{i}.{norm}.w"
        for i in range(model.loop.n_layers)
        for norm in {"ln1", "ln2"} & set(norms)
    }
    assert names - folded == gone
    model.enable_compatibility_mode(no_processing=True)
    assert set(model.tl_parameters()) == names
    with pytest.raises(InputError, match="rotary"):
        model.enable_compatibility_mode(refactor_factored_attn_matrices=True)


def test_svd_interpreter_gives_the_same_with_folded_norms(model: LoopedTransformer) -> None:
    def directions() -> Tensor:
        return SVDInterpreter(model).get_singular_vectors("w_in", 3, 4)

    unfolded_W_U = model.W_U
    before: Any = directions()
    model.enable_compatibility_mode()
    after: Any = directions()
    # W_in is the same; the vectors are read through W_U, which has the final gain now.
    W_in = model.blocks[3].mlp.W_in
    right = torch.linalg.svd(W_in.T).Vh[:4]
    for found, W_U in ((before, unfolded_W_U), (after, model.W_U)):
        assert_same(found[:, 0].abs(), (right @ W_U).T.abs())


def test_modules_called_from_outside_have_the_folded_gain_once(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    block = model.blocks[0]
    if "ln1" not in model.cfg.norm_layout.norm_names:
        return
    x = model.embed(tokens)
    context = RunContext.build(model.cfg, 9, None, x.device, x.dtype)

    def through() -> tuple[Tensor, Tensor]:
        return block.mlp(block.ln2(x)), block.attn(block.ln1(x), context)

    before = through()
    model.enable_compatibility_mode()
    for mine, expected in zip(through(), before, strict=True):
        assert_same(mine, expected)


def test_a_model_made_like_a_folded_one_is_not_folded(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    model.enable_compatibility_mode()
    new = LoopedTransformer(model.cfg)
    new.load_state_dict(model.state_dict())
    assert new.cfg.normalization_type == "RMS"
    assert "ln_final.w" in new.tl_parameters()
    logits, cache = new.run_with_cache(tokens)
    assert_same(cache["ln_final.hook_normalized"] * new.ln_final.w @ new.W_U, logits)


def test_pruned_and_parametrised_weights_are_used(model: LoopedTransformer, tokens: Tensor) -> None:
    plain = model(tokens)

    class Twice(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for path, name in (("core.0.mlp", "gate_up"), ("core.0.attn", "qkv"), ("core.0.attn", "out")):
        owner = model.get_submodule(path)
        parametrize.register_parametrization(owner, name, Twice())
        changed = model(tokens)
        assert not torch.allclose(changed, plain)
        parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        assert torch.equal(model(tokens), plain)
        # The same by hand.
        getattr(owner, name).mul_(2)
        assert_same(model(tokens), changed)
        getattr(owner, name).div_(2)


def test_pruned_weights_are_trained(tokens: Tensor) -> None:
    model = with_gains(LoopedTransformer.from_config(exact_config()))
    twin, owners = deepcopy(model), ("prelude.0.attn", "core.1.mlp", "unembed", "embed")
    names = ("qkv", "down", "weight", "W_E")
    masks = {}
    for path, name in zip(owners, names, strict=True):
        prune.l1_unstructured(model.get_submodule(path), name, amount=0.4)
        masks[f"{path}.{name}"] = getattr(model.get_submodule(path), f"{name}_mask")
        assert not masks[f"{path}.{name}"].all()
    for one in (model, twin):
        steps = torch.optim.SGD(one.parameters(), lr=0.5)
        for _ in range(3):
            if one is twin:
                with torch.no_grad():
                    for name, mask in masks.items():
                        twin.get_parameter(name).mul_(mask)
            steps.zero_grad()
            one(tokens, return_type="loss").backward()
            if one is twin:
                for name, mask in masks.items():
                    twin.get_parameter(name).grad.mul_(mask)
            steps.step()
    assert_same(model(tokens), twin(tokens))


def test_blocks_that_are_taken_out_or_added_are_an_error(tokens: Tensor) -> None:
    def cut(model: LoopedTransformer) -> None:
        model.blocks = torch.nn.ModuleList(list(model.blocks)[:2])

    for change in (
        cut,
        lambda model: model.blocks.pop(-1),
        lambda model: model.blocks.append(torch.nn.Identity()),
    ):
        model = LoopedTransformer.from_config(exact_config())
        change(model)
        with pytest.raises(InputError, match=r"model\.blocks has .*SkipLayers"):
            model(tokens)


def test_weights_that_are_replaced_as_a_module_are_an_error(
    model: LoopedTransformer, tokens: Tensor
) -> None:
    for path in ("core.1", "core.0.mlp", "final_norm", "core"):
        changed = deepcopy(model)
        owner, _, name = path.rpartition(".")
        setattr(changed.get_submodule(owner), name, deepcopy(changed.get_submodule(path)))
        with pytest.raises(InputError, match=path.replace(".", r"\.") + " was replaced"):
            changed(tokens)
