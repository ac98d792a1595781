"""A HookedTransformer and a looped model of one recurrence with its weights, both in fp64.

Unlike ``hooked.Pair``, which goes by way of a checkpoint, the weights are copied one by one, and
the layouts are those that need no injection: the residual stream is a plain sum on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calls import N_LAYERS, SIZES, STAGES
from letters import letters
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_looped import LoopedConfig, LoopedTransformer
from tl_looped.model.config import RotaryStyle

EPS = 1e-5
# Key-value heads, whether W_U is W_E, biases of queries, keys and values, pairs of rotary angles,
# and whether the final norm has no gain: then W_U is the same with and without it.
KINDS: dict[str, dict[str, Any]] = {
    "full": {"kv": 4, "tied": False, "bias": False, "adjacent": False, "gain_of_one": True},
    "grouped": {"kv": 2, "tied": False, "bias": True, "adjacent": False, "gain_of_one": False},
    "tied": {"kv": 4, "tied": True, "bias": True, "adjacent": True, "gain_of_one": False},
}


@dataclass(frozen=True)
class Twins:
    """The same weights twice, and one tokenizer."""

    hooked: HookedTransformer
    looped: LoopedTransformer


def hooked_twin(
    kv: int, tied: bool, bias: bool, adjacent: bool, gain_of_one: bool
) -> HookedTransformer:
    cfg = HookedTransformerConfig(
        **SIZES, eps=EPS, n_layers=N_LAYERS,
        n_key_value_heads=None if kv == SIZES["n_heads"] else kv,
        act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True,
        positional_embedding_type="rotary", rotary_dim=int(SIZES["d_head"]), rotary_base=10000,
        rotary_adjacent_pairs=adjacent, tie_word_embeddings=tied, dtype=torch.float64,
        device="cpu", seed=0,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        short = name.split(".")[-1].lstrip("_")
        if name == "ln_final.w" and gain_of_one:
            pass
        elif name.endswith(".w"):
            weight.data = 1 + 0.3 * noise
        elif short.startswith("b_"):
            weight.data = 0.2 * noise * (bias and short in ("b_Q", "b_K", "b_V"))
        else:
            weight.data = 0.2 * noise
    if tied:
        model.unembed.W_U.data = model.embed.W_E.data.T.clone()
    return model.eval()


def looped_twin(
    hooked: HookedTransformer, kv: int, tied: bool, bias: bool, adjacent: bool, gain_of_one: bool
) -> LoopedTransformer:
    cfg = LoopedConfig(
        **SIZES, eps=EPS, **{f"n_{stage}": n for stage, n in STAGES.items()}, n_key_value_heads=kv,
        tie_embeddings=tied, qk_bias=bias, v_bias=bias, dtype=torch.float64, device="cpu",
        rotary_style=RotaryStyle.INTERLEAVED if adjacent else RotaryStyle.HALF,
    )  # fmt: skip
    model = LoopedTransformer.from_config(cfg)
    assert model.loop.R == 1
    theirs = hooked.state_dict()
    state = {"embed.W_E": theirs["embed.W_E"], "final_norm.w": theirs["ln_final.w"]}
    if not tied:
        state["unembed.weight"] = theirs["unembed.W_U"].T
    places = [f"{stage}.{i}" for stage, n in STAGES.items() for i in range(n)]
    for layer, place in enumerate(places):
        block = {k: theirs.get(f"blocks.{layer}.{k}") for k in _NAMES}
        for name in ("W_K", "W_V", "b_K", "b_V"):  # grouped heads are stored under another name
            grouped = theirs.get(f"blocks.{layer}.attn._{name}")
            block[f"attn.{name}"] = block[f"attn.{name}"] if grouped is None else grouped
        state |= {f"{place}.{name}": weight for name, weight in _block(block, bias).items()}
    model.load_state_dict(state)
    return model


_NAMES = [f"attn.{kind}_{x}" for kind in "Wb" for x in "QKVO"]
_NAMES += ["mlp.W_in", "mlp.W_gate", "mlp.W_out", "ln1.w", "ln2.w"]


def _block(w: dict[str, Any], bias: bool) -> dict[str, Tensor]:
    """TransformerLens's weights of a block as ours, which are stacked the other way around."""
    out = {
        "attn.qkv": torch.cat([w[f"attn.W_{x}"].transpose(1, 2).flatten(0, 1) for x in "QKV"]),
        "attn.out": w["attn.W_O"].flatten(0, 1).T,
        "mlp.gate_up": torch.cat((w["mlp.W_gate"].T, w["mlp.W_in"].T)),
        "mlp.down": w["mlp.W_out"].T,
        "ln1.w": w["ln1.w"],
        "ln2.w": w["ln2.w"],
    }
    biases = {f"attn.{x.lower()}_bias": w[f"attn.b_{x}"] for x in "QKV"}
    return out | (biases if bias else {})


def make_twins(kind: str, folder: Path) -> Twins:
    hooked = hooked_twin(**KINDS[kind])
    looped = looped_twin(hooked, **KINDS[kind])
    tokenizer = letters(folder)
    hooked.set_tokenizer(tokenizer)
    looped.set_tokenizer(tokenizer)
    looped.cfg.default_prepend_bos = hooked.cfg.default_prepend_bos
    return Twins(hooked, looped)
