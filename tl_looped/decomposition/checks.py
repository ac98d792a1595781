"""Checks that a cache holds what its writes add up to.

A hook that edits the stream (patching, for instance) makes the writes of the run add up to
something else, and so do weights that changed since. Carrying writes past the edit would then give
wrong numbers. So, where the cache holds what is needed and in fp32 or better, two things are
checked at every position that is read:

- all writes, carried, sum to the stream where it is read, also if only some of them were asked for;
- the heads of a layer sum to its ``hook_attn_out``, its neurons to its ``hook_mlp_out``.

An edit behind the last place that is checked, in a cache that lacks these activations, or in half
precision goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch

from tl_looped._compat import Slice
from tl_looped.decomposition.carry import carry
from tl_looped.decomposition.closeness import EXACT, check_close
from tl_looped.decomposition.components import Component, Rows
from tl_looped.decomposition.steps import Step, Target
from tl_looped.decomposition.writes import Selection, Writes
from tl_looped.errors import InvalidDecompositionError, MissingActivationError


def check_stream(cache: Any, steps: Sequence[Step], target: Target, positions: Slice) -> None:
    """Raise if all writes of a run, carried to a target, do not sum to the stream there."""
    name = target.hook(cache.loop)
    stream = cache.cache_dict.get(name)
    if stream is None or stream.dtype not in EXACT:
        return
    writes = Writes(cache, Selection(), positions, checked=False)
    try:
        total = carry(steps, writes, Rows(lambda component: Component("remainder")))
    except MissingActivationError:
        return
    if total is not None:
        check_close(total[0], writes.read(name), name)


def with_one_scale(cache: Any, target: Target) -> Any:
    """The cache with one scale a position for ``ln1``, where each head has a norm of its own.

    With ``use_attn_in`` or ``use_split_qkv_input`` it works on ``[batch, pos, head, d_model]``.
    """
    name = f"blocks.{target.layer}.ln1.hook_scale"
    scale = cache.cache_dict.get(name)
    if target.mid or scale is None or scale.ndim == 2 + int(cache.has_batch_dim):
        return cache
    one = scale.select(-2, 0)
    if not torch.equal(scale, one.unsqueeze(-2).expand_as(scale)):
        raise InvalidDecompositionError(
            f"the heads of layer {target.layer} read streams of different scales (hooks on their "
            f"inputs, see {name}), so there is no one norm to apply to a component"
        )
    simple = copy(cache)
    simple.cache_dict = {**cache.cache_dict, name: one}
    return simple
