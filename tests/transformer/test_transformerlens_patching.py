"""TransformerLens's activation patching, unmodified, on looped models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pytest
import torch
from closeness import assert_rounded_once
from conftest import VARIANTS, exact_config
from torch import Tensor
from transformer_lens import patching

from tl_looped import LoopedTransformer

SMALL = {"n_prelude": 1, "n_core": 2, "n_recurrences": 2, "n_coda": 1, "n_heads": 2}
CLEAN = torch.tensor([[5, 11], [1, 40]])
CORRUPTED = torch.tensor([[8, 3], [9, 2]])
ALL = slice(None)

# TransformerLens's sweep -> hook, and the part of the activation that one cell replaces.
SWEEPS: dict[str, tuple[str, Callable[..., tuple[Any, ...]]]] = {
    "resid_pre": ("hook_resid_pre", lambda pos: (ALL, pos)),
    "resid_mid": ("hook_resid_mid", lambda pos: (ALL, pos)),
    "attn_out": ("hook_attn_out", lambda pos: (ALL, pos)),
    "mlp_out": ("hook_mlp_out", lambda pos: (ALL, pos)),
    "attn_head_out_by_pos": ("attn.hook_z", lambda pos, head: (ALL, pos, head)),
    "attn_head_q_by_pos": ("attn.hook_q", lambda pos, head: (ALL, pos, head)),
    "attn_head_k_by_pos": ("attn.hook_k", lambda pos, head: (ALL, pos, head)),
    "attn_head_v_by_pos": ("attn.hook_v", lambda pos, head: (ALL, pos, head)),
    "attn_head_pattern_by_pos": ("attn.hook_pattern", lambda head, pos: (ALL, head, pos)),
    "attn_head_pattern_dest_src_pos": ("attn.hook_pattern", lambda *place: (ALL, *place)),
    "attn_head_out_all_pos": ("attn.hook_z", lambda head: (ALL, ALL, head)),
    "attn_head_q_all_pos": ("attn.hook_q", lambda head: (ALL, ALL, head)),
    "attn_head_k_all_pos": ("attn.hook_k", lambda head: (ALL, ALL, head)),
    "attn_head_v_all_pos": ("attn.hook_v", lambda head: (ALL, ALL, head)),
    "attn_head_pattern_all_pos": ("attn.hook_pattern", lambda head: (ALL, head)),
}


def small(variant: str = "pre", **changes: Any) -> LoopedTransformer:
    """Six effective layers, two heads; one key-value head where the variant groups them."""
    values = VARIANTS[variant] | SMALL | changes
    if "n_key_value_heads" in values:
        values["n_key_value_heads"] = 1
    return LoopedTransformer.from_config(exact_config(**values))


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 4]).mean()


def patch_by_hand(model: LoopedTransformer, name: str, part: Any, clean: Tensor) -> Tensor:
    def replace(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[part] = clean[part]
        return value

    return metric(model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, replace)]))


SWEPT = [(variant, sweep) for variant in VARIANTS for sweep in SWEEPS if "head" not in sweep]
SWEPT += [("post-qk-norm", sweep) for sweep in SWEEPS if "head" in sweep]
SWEPT += [("residual-injection", f"attn_head_{which}_by_pos") for which in ("q", "k", "pattern")]


@pytest.mark.parametrize(("variant", "sweep"), SWEPT)
def test_a_patching_sweep_equals_patches_by_hand(variant: str, sweep: str) -> None:
    model = small(variant)
    suffix, part_of = SWEEPS[sweep]
    _, cache = model.run_with_cache(CLEAN)
    with torch.no_grad():
        grid = getattr(patching, f"get_act_patch_{sweep}")(model, CORRUPTED, cache, metric)
        assert grid.shape[0] == model.loop.n_layers
        assert grid.unique().numel() > grid.shape[0] // 2, "patches have effects of their own"
        last = tuple(size - 1 for size in grid.shape)
        for cell in [tuple(0 for _ in last), tuple(size // 2 for size in grid.shape), last]:
            name = f"blocks.{cell[0]}.{suffix}"
            by_hand = patch_by_hand(model, name, part_of(*cell[1:]), cache.cache_dict[name])
            assert grid[cell] == by_hand.float()  # TransformerLens keeps its grids in fp32


ITSELF = [(variant, "block_every") for variant in ("pre-injection", "residual-injection")]
ITSELF += [("post-qk-norm", f"attn_head_{which}_pos_every") for which in ("all", "by")]


@pytest.mark.parametrize(("variant", "every"), ITSELF)
def test_patching_a_run_with_itself_changes_nothing(variant: str, every: str) -> None:
    model = small(variant)
    _, cache = model.run_with_cache(CORRUPTED)
    with torch.no_grad():
        grid = getattr(patching, f"get_act_patch_{every}")(model, CORRUPTED, cache, metric)
        expected = metric(model(CORRUPTED)).expand(grid.shape).clone()
    if every != "block_every":
        # TransformerLens fills the key and value heads that grouped attention lacks with zeros.
        expected[2:4, ..., model.cfg.n_kv_heads :] = 0.0
    assert_rounded_once(grid, expected)


def test_patching_takes_recurrence_and_layer_as_the_layer() -> None:
    model = small("pre-injection")
    _, cache = model.run_with_cache(CLEAN)
    places = [(0, 0), (1, 1), (1, 0)]

    def sweep(layers: Sequence[Any]) -> Tensor:
        where = pd.DataFrame({"layer": layers, "pos": [1, 0, 1]})
        setter = patching.layer_pos_patch_setter
        return patching.generic_activation_patch(
            model, CORRUPTED, cache, metric, setter, "resid_post", index_df=where
        )

    effects = sweep(places)
    assert effects.unique().numel() == 3
    assert torch.equal(effects, sweep([model.loop.index(*place) for place in places]))
