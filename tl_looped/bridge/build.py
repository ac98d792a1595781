"""From a looped model to a TransformerBridge."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
    detect_tokenizer_bos_eos,
)

from tl_looped.bridge import ARCHITECTURE
from tl_looped.bridge.adapter import LoopedArchitectureAdapter
from tl_looped.bridge.unrolled import UnrolledModel
from tl_looped.model.geometry import LoopGeometry


def bridge_of(model: Any, loop: LoopGeometry, state_seed: int) -> TransformerBridge:
    """A bridge over a looped model's own weights.

    Args:
        model: A LoopedTransformer.
        loop: Its geometry, with the number of recurrences to unroll.
        state_seed: Seed of a random initial state.
    """
    register_bridge_adapter()
    cfg = TransformerBridgeConfig(
        d_model=model.cfg.d_model,
        d_head=model.cfg.d_head,
        n_heads=model.cfg.n_heads,
        n_layers=loop.n_layers,
        n_ctx=model.cfg.n_ctx,
        d_vocab=model.cfg.d_vocab,
    )
    bridge = build_bridge_from_module(
        UnrolledModel(model, loop, state_seed), ARCHITECTURE, tl_config=cfg
    )
    if model.tokenizer is not None:
        _give_tokenizer(bridge, model.tokenizer)
    return bridge


def register_bridge_adapter() -> None:
    """Make TransformerLens's factory know the adapter, also where no entry point is installed."""
    ArchitectureAdapterFactory.discover_entry_points()
    ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, LoopedArchitectureAdapter)


def _give_tokenizer(bridge: TransformerBridge, tokenizer: Any) -> None:
    """A copy of the model's tokenizer, with the special tokens that TransformerLens needs.

    Not by way of ``build_bridge_from_module``: that changes the tokenizer it is given, and may load
    another one from wherever the tokenizer says it came from.
    """
    tokenizer = deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
    found = detect_tokenizer_bos_eos(tokenizer)
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = found
    bridge.tokenizer = tokenizer
