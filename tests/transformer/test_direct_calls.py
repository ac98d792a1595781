"""Blocks, attention, MLPs, norms and embeddings called by themselves, as TransformerLens's are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_same
from conftest import VARIANTS, exact_config
from refusals import refused
from torch import Tensor

from tl_looped import InputError, LoopedTransformer

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config(**VARIANTS[request.param]))


@pytest.fixture
def plain() -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config())


def layers(model: LoopedTransformer) -> list[int]:
    loop = model.loop
    return sorted({0, loop.index(loop.R - 1, 0), loop.n_layers - 1})


@pytest.mark.parametrize("mask", [None, PADDED])
def test_a_block_alone_does_what_it_does_in_a_run(
    model: LoopedTransformer, mask: Tensor | None
) -> None:
    _, cache = model.run_with_cache(TOKENS, attention_mask=mask)
    alone = {} if mask is None else {"attention_mask": mask}
    for i in layers(model):
        block, pre = model.blocks[i], cache["resid_pre", i]
        assert_same(block(pre, **alone), cache["resid_post", i])
        assert_same(block(pre, None, None, mask), cache["resid_post", i])
        mid, mlp_in = cache["resid_mid", i], cache["resid_mid", i]
        attn_in = block.ln1(pre) if hasattr(block, "ln1") else pre
        mlp_in = block.ln2(mid) if hasattr(block, "ln2") else mid
        attn_out = block.attn(attn_in, attn_in, attn_in, **alone)
        mlp_out = block.mlp(mlp_in)
        if hasattr(block, "ln1_post"):
            attn_out, mlp_out = block.ln1_post(attn_out), block.ln2_post(mlp_out)
        assert_same(attn_out, cache["attn_out", i])
        assert_same(mlp_out, cache["mlp_out", i])


def test_the_ends_alone(model: LoopedTransformer) -> None:
    logits, cache = model.run_with_cache(TOKENS)
    assert_same(model.embed(TOKENS), cache["embed"])
    last = cache["resid_post", -1]
    if model.loop.c or not model.cell.ends_in_norm:
        assert_same(model.unembed(model.ln_final(last)), logits)


def test_three_inputs_make_queries_keys_and_values(plain: LoopedTransformer) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 32, dtype=torch.float64, generator=generator) for _ in range(3))
    seen: dict[str, Tensor] = {}
    attn = plain.blocks[3].attn
    for name in ("hook_q", "hook_k", "hook_v"):
        getattr(attn, name).add_hook(lambda x, hook: seen.update({hook.name[-1]: x}))
    out = attn(q, k, v)
    for which, x in zip("qkv", (q, k, v), strict=True):
        expected = torch.einsum("btd,hdk->bthk", x, getattr(attn, f"W_{which.upper()}"))
        assert_same(seen[which], expected)
    heads = [x[:, :, None].repeat(1, 1, plain.cfg.n_heads, 1) for x in (q, k, v)]
    assert_same(attn(*heads), out)
    assert_same(attn(heads[0], k, v), out)
    assert_same(attn(query_input=q, key_input=k, value_input=v), out)
    assert_same(attn(q, q.clone(), q.clone()), attn(q, q, q))


def test_hooks_fire_and_edit(plain: LoopedTransformer) -> None:
    _, cache = plain.run_with_cache(TOKENS)
    pre = cache["resid_pre", 3]
    clean = plain.blocks[3](pre)

    def zero(x: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(x)

    with plain.hooks([("blocks.3.attn.hook_z", zero), ("blocks.3.hook_mlp_out", zero)]):
        assert torch.equal(plain.blocks[3](pre), pre)
    assert torch.equal(plain.blocks[3](pre), clean)


@pytest.mark.parametrize("flag", ["use_attn_in", "use_split_qkv_input", "use_attn_result"])
def test_flags_hold_for_a_block_alone(plain: LoopedTransformer, flag: str) -> None:
    _, cache = plain.run_with_cache(TOKENS)
    setattr(plain.cfg, flag, True)
    assert_same(plain.blocks[3](cache["resid_pre", 3]), cache["resid_post", 3])


def test_gradients_pass_through_a_block_alone(plain: LoopedTransformer) -> None:
    pre = plain.run_with_cache(TOKENS)[1]["resid_pre", 3].requires_grad_()
    plain.blocks[3](pre).sum().backward()
    assert pre.grad is not None
    assert pre.grad.abs().max() > 0


STREAM = torch.zeros(2, 5, 32, dtype=torch.float64)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[str]]] = {
    "tokens": ((TOKENS,), {}, ["resid_pre", "[batch, pos, 32]"]),
    "text": (("text",), {}, ["resid_pre", "[batch, pos, 32]"]),
    "width": ((STREAM[..., :7],), {}, ["resid_pre", "(2, 5, 7)"]),
    "no batch": ((STREAM[0],), {}, ["resid_pre", "(5, 32)"]),
    "too long": ((torch.zeros(1, 65, 32, dtype=torch.float64),), {}, ["65", "context of 64"]),
    "mask": ((STREAM,), {"attention_mask": torch.ones(2, 4)}, ["(2, 5)", "(2, 4)"]),
    "mask of 2": ((STREAM,), {"attention_mask": torch.full((2, 5), 2)}, ["attention_mask", "2"]),
    "cache": ((STREAM,), {"past_kv_cache_entry": object()}, ["past_kv_cache="]),
    "shortformer": ((STREAM,), {"shortformer_pos_embed": STREAM}, ["shortformer_pos_embed"]),
    "second": ((STREAM, STREAM), {}, ["shortformer_pos_embed"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_block_does_not_take(plain: LoopedTransformer, case: str) -> None:
    args, kwargs, parts = BAD[case]
    with refused(InputError, *parts):
        plain.blocks[3](*args, **kwargs)


def test_what_attention_does_not_take(plain: LoopedTransformer) -> None:
    attn = plain.blocks[3].attn
    for name in ("past_kv_cache_entry", "additive_attention_mask", "position_bias"):
        with refused(InputError, name):
            attn(STREAM, STREAM, STREAM, **{name: torch.zeros(2, 1, 1, 5)})
    with refused(InputError, "key_input", "None"):
        attn(STREAM)
    with refused(InputError, "value_input", "(2, 5, 3, 32)"):
        attn(STREAM, STREAM, STREAM[:, :, None].repeat(1, 1, 3, 1))
    with refused(InputError, "same batch and pos", "(2, 4, 32)"):
        attn(STREAM, STREAM[:, :4], STREAM)
