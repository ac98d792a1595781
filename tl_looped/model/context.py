"""What one forward pass carries besides the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.checks import described
from tl_looped.errors import InputError
from tl_looped.model.config import LoopedConfig
from tl_looped.model.geometry import LayerLocation
from tl_looped.model.kv_cache import KVRun
from tl_looped.model.masks import real_tokens
from tl_looped.model.program import Program
from tl_looped.model.rotary import Rotation, rotation


class Sources(NamedTuple):
    """What a block's queries, and its keys and values, are made of; its stream where None.

    Both pass the norm before attention, if the block has one, as the stream does.
    """

    q: Float[Tensor, "batch pos d_model"] | None = None
    kv: Float[Tensor, "batch pos d_model"] | None = None


NO_SOURCES = Sources()
"""The stream makes all of them."""


@dataclass
class RunContext:
    """Positions, rotation and mask of a batch.

    Args:
        rotation: Rotary cosines and sines at the batch's positions.
        positions: Position of every new token, counted from its row's first real token.
        allowed: Which key each query may attend to; None means plain causal, and a single query
            attends to every key.
        no_key: Queries (of padding) that may attend to nothing; None if there are none.
        kv: Keys and values of earlier tokens; None without a cache.
        peeking: Read ``kv`` and note nothing, for lenses.
        spread: The model's layers are on several devices; each takes the context :meth:`at` its
            own.
    """

    rotation: Rotation
    positions: Int[Tensor, "batch pos"]
    allowed: Bool[Tensor, "batch 1 query key"] | None
    no_key: Bool[Tensor, "batch 1 query 1"] | None
    kv: KVRun | None = None
    peeking: bool = False
    spread: bool = False
    _blocked: Bool[Tensor, "batch 1 query key"] | None = None
    # By device; a context that is made from this one by `replace` starts with none.
    _elsewhere: dict[torch.device, RunContext] = field(default_factory=dict, init=False)

    @classmethod
    def build(
        cls,
        cfg: LoopedConfig,
        length: int,
        mask: Bool[Tensor, "batch key"] | None,
        device: torch.device,
        dtype: torch.dtype,
        kv: KVRun | None = None,
    ) -> RunContext:
        """Context of ``length`` new tokens a row.

        Args:
            cfg: For the rotary angles.
            length: New tokens; those of ``kv`` come before them.
            mask: False at padding, past and new tokens together; None if there is none.
            device: Where to compute.
            dtype: Of the activations.
            kv: Keys and values of earlier tokens.
        """
        total, spread = length + (kv.n_past if kv else 0), cfg.n_devices > 1
        if mask is None or bool(mask.all()):
            positions = torch.arange(total - length, total, device=device)[None]
            allowed = None
            if 1 < length < total:
                allowed = _causal(length, total, device)[None, None]
            rotated = rotation(cfg, positions, dtype)
            return cls(rotated, positions, allowed, None, kv, spread=spread)
        # A pad token's own position is never read by a real token; 0 keeps it in range.
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, total - length :]
        allowed = _causal(length, total, device) & mask[:, None, None, :]
        no_key = ~allowed.any(-1, keepdim=True)
        rotated = rotation(cfg, positions, dtype)
        return cls(rotated, positions, allowed, no_key, kv, spread=spread)

    @classmethod
    def alone(cls, cfg: LoopedConfig, x: Float[Tensor, "batch pos ..."], mask: Any) -> RunContext:
        """Context of a layer that is called by itself, on a whole stream from its first position.

        Args:
            cfg: The model's configuration.
            x: The stream.
            mask: ``[batch, pos]``, zero at padding; None if nothing is padded.

        Raises:
            InputError: a mask of another shape or with other values.
        """
        if mask is not None:
            mask = real_tokens(mask).to(x.device)
            if mask.shape != x.shape[:2]:
                raise InputError(
                    f"attention_mask must have shape [batch, pos] = {tuple(x.shape[:2])}, got "
                    f"{tuple(mask.shape)}"
                )
        return cls.build(cfg, x.shape[1], mask, x.device, x.dtype)

    def at(self, device: torch.device) -> RunContext:
        """The same on another device, copied there once; the keys and values are the same."""
        if device == self.positions.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = replace(
                self,
                rotation=self.rotation.to(device),
                positions=self.positions.to(device),
                allowed=None if self.allowed is None else self.allowed.to(device),
                no_key=None if self.no_key is None else self.no_key.to(device),
                _blocked=None,
            )
        return self._elsewhere[device]

    def blocked(self, queries: int, keys: int) -> Bool[Tensor, "batch 1 query key"]:
        """Where attention is forbidden, as a mask to fill with -inf."""
        if self._blocked is None or self._blocked.shape[-2:] != (queries, keys):
            allowed = self.allowed
            if allowed is None:
                allowed = _causal(queries, keys, self.positions.device)[None, None]
            self._blocked = ~allowed
        return self._blocked

    def with_past(
        self,
        place: LayerLocation,
        k: Float[Tensor, "batch pos n_kv d_head"],
        v: Float[Tensor, "batch pos n_kv d_head"],
    ) -> tuple[Float[Tensor, "batch key n_kv d_head"], Float[Tensor, "batch key n_kv d_head"]]:
        """Keys and values of earlier and new tokens at a layer."""
        if self.kv is None:
            return k, v
        return self.kv.peek(place, k, v) if self.peeking else self.kv.extend(place, k, v)


@dataclass
class LoopRun:
    """What one forward pass carries besides the residual stream.

    Args:
        context: Positions, rotation and mask.
        program: The steps, as interventions edit them.
        initial_state: The state that recurrence 0 starts from; None draws or derives it.
        state_seed: Seed of a random initial state.
        prelude_output: ``e``, what is injected; set when the loop is entered.
        state: The state that the present recurrence has read.
        gate: Gate logits of the newest recurrence, in models with a gate.
        memory: Whatever else a cell carries across layers and recurrences.
        enters_loop: Whether the run passes the start of the loop.
        trains_gate: Whether the gate keeps a graph where its state has none (truncation).
        changed: Names of hook points whose activation is changed by edits of the program or by
            borrowed weights.
    """

    context: RunContext
    program: Program
    initial_state: Float[Tensor, "..."] | None
    state_seed: int
    prelude_output: Float[Tensor, "batch pos d_model"] | None = None
    state: Float[Tensor, "..."] | None = None
    gate: Float[Tensor, "batch pos 1"] | None = None
    memory: dict[Any, Tensor] = field(default_factory=dict)
    enters_loop: bool = True
    trains_gate: bool = False
    changed: set[str] = field(default_factory=set)


def check_stream(cfg: LoopedConfig, name: str, x: Any, n_heads: int | None = None) -> None:
    """Raise unless ``x`` is a stream, or one for each head where ``n_heads`` says how many.

    Args:
        cfg: The model's configuration.
        name: The argument's name, for the message.
        x: What was given.
        n_heads: Heads that may have streams of their own.

    Raises:
        InputError: for anything else, and for more positions than the context holds.
    """
    shapes = [(cfg.d_model,)] if n_heads is None else [(cfg.d_model,), (n_heads, cfg.d_model)]
    fits = isinstance(x, Tensor) and x.is_floating_point() and tuple(x.shape[2:]) in shapes
    if not fits or 0 in x.shape:
        each = "" if n_heads is None else f" or [batch, pos, {n_heads}, {cfg.d_model}]"
        raise InputError(
            f"{name} must be a stream [batch, pos, {cfg.d_model}]{each}, got {described(x)}"
        )
    if x.shape[1] > cfg.n_ctx:
        raise InputError(
            f"{name} has {x.shape[1]} positions, which is longer than the context of {cfg.n_ctx}"
        )


def _causal(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """The last ``queries`` of ``keys`` positions see themselves and what came before."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
