"""TransformerLens's names of weights, and the model's own, both ways.

TransformerLens has a matrix ``blocks.{i}.attn.W_Q`` for every layer; here ``qkv`` holds the rows of
queries, keys and values together, once for all recurrences of a layer, as ``named_parameters``,
optimisers and state dicts see it:

======================================  ===============================================
TransformerLens                         the model
======================================  ===============================================
``embed.W_E``                           ``embed.W_E``
``blocks.{i}.attn.W_Q``, W_K, W_V       rows of ``{stage}.{l}.attn.qkv``, in this order
``blocks.{i}.attn.W_O``                 ``{stage}.{l}.attn.out``
``blocks.{i}.attn.b_Q``, b_K, b_V       ``{stage}.{l}.attn.q_bias``, k_bias, v_bias
``blocks.{i}.attn.q_norm.w``, k_norm.w  ``{stage}.{l}.attn.q_norm.w``, k_norm.w
``blocks.{i}.mlp.W_gate``, W_in         rows of ``{stage}.{l}.mlp.gate_up``
``blocks.{i}.mlp.W_out``                ``{stage}.{l}.mlp.down``
``blocks.{i}.ln1.w`` and other norms    ``{stage}.{l}.ln1.w`` ...
``ln_final.w``                          ``final_norm.w``
``unembed.W_U``                         ``unembed.weight``; ``embed.W_E`` if tied
``b_O``, ``b_in``, ``b_out``, ``b_U``   none: zero
======================================  ===============================================

``stage`` is ``prelude``, ``core`` or ``coda``. Matrices are stored as ``[out, in]``, a head's rows
together, and shown as TransformerLens has them, ``[head, in, out]`` or ``[in, out]``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from tl_looped.errors import InputError
from tl_looped.model.config import LoopedConfig

if TYPE_CHECKING:
    from tl_looped.transformer.named_weights import NamedWeights

_BLOCK = re.compile(r"blocks\.(-?\d+)\.(.+)")
# HookedTransformer's own parameters under grouped-query attention, not repeated for query heads.
_STORED_HEADS = re.compile(r"attn\._([Wb]_[KV])")


class StoredRows(NamedTuple):
    """Where a weight is stored.

    Attributes:
        name: Name among ``model.named_parameters()``.
        rows: Rows of its first dimension; ``slice(None)`` for all of them.
    """

    name: str
    rows: slice = slice(None)


def of_a_block(cfg: LoopedConfig) -> dict[str, StoredRows | None]:
    """Name within a TransformerLens block -> name within a layer of a stage; None is zero."""
    assert cfg.d_mlp is not None
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    qk_bias, v_bias = cfg.qk_bias, cfg.v_bias
    found = {
        "attn.W_Q": StoredRows("attn.qkv", slice(0, q)),
        "attn.W_K": StoredRows("attn.qkv", slice(q, q + kv)),
        "attn.W_V": StoredRows("attn.qkv", slice(q + kv, q + 2 * kv)),
        "attn.W_O": StoredRows("attn.out"),
        "attn.b_Q": StoredRows("attn.q_bias") if qk_bias else None,
        "attn.b_K": StoredRows("attn.k_bias") if qk_bias else None,
        "attn.b_V": StoredRows("attn.v_bias") if v_bias else None,
        "attn.b_O": None,
        "mlp.W_gate": StoredRows("mlp.gate_up", slice(0, cfg.d_mlp)),
        "mlp.W_in": StoredRows("mlp.gate_up", slice(cfg.d_mlp, 2 * cfg.d_mlp)),
        "mlp.W_out": StoredRows("mlp.down"),
        "mlp.b_in": None,
        "mlp.b_out": None,
    }
    norms = [f"{norm}.w" for norm in cfg.norm_layout.norm_names]
    norms += ["attn.q_norm.w", "attn.k_norm.w"] if cfg.qk_norm else []
    return found | {norm: StoredRows(norm) for norm in norms}


def of_the_ends(cfg: LoopedConfig) -> dict[str, StoredRows | None]:
    """TransformerLens's name outside the blocks -> the model's; None is zero."""
    return {
        "embed.W_E": StoredRows("embed.W_E"),
        "ln_final.w": StoredRows("final_norm.w"),
        "unembed.W_U": StoredRows("embed.W_E" if cfg.tie_embeddings else "unembed.weight"),
        "unembed.b_U": None,
    }


def parameter_of(model: NamedWeights, name: str) -> StoredRows | None:
    """Where a weight of TransformerLens's name is stored."""
    ends = of_the_ends(model.cfg)
    if name in ends:
        return ends[name]
    block = _BLOCK.fullmatch(name)
    within = _STORED_HEADS.sub(r"attn.\1", block[2]) if block else ""
    known = of_a_block(model.cfg)
    if block is None or within not in known:
        raise InputError(
            f"{name!r} is no weight of TransformerLens's that this model has: its names are "
            f"{[*ends]} and, in blocks.0 to blocks.{model.loop.n_layers - 1}, {[*known]}"
        )
    place, stored = model.loop.locate(int(block[1])), known[within]
    if stored is None:
        return None
    stage, number = model.cfg.weights_of(place)
    return StoredRows(f"{stage}.{number}.{stored.name}", stored.rows)


def transformer_lens_names(model: NamedWeights, name: str) -> list[str]:
    """TransformerLens's names of all weights that are stored in a parameter."""
    own = {own for own, _ in model.named_parameters()}
    if name not in own:
        raise InputError(f"{name!r} is no parameter of the model: it has {sorted(own)}")
    cfg, loop = model.cfg, model.loop
    found = [tl for tl, at in of_the_ends(cfg).items() if at is not None and at.name == name]
    within = {tl: at.name for tl, at in of_a_block(cfg).items() if at is not None}
    for i in range(loop.n_layers):
        stage, number = cfg.weights_of(loop.locate(i))
        layer = f"{stage}.{number}."
        if name.startswith(layer):
            names = [tl for tl, at in within.items() if at == name.removeprefix(layer)]
            found += [f"blocks.{i}.{tl}" for tl in names]
    return found
