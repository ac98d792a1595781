"""TransformerLens's own key-value cache: read before a run, and extended after it, as it does.

``TransformerLensKeyValueCache`` has one entry for each effective layer, so it is for runs at one
number of recurrences. It holds keys before their rotation, :class:`LoopedKeyValueCache` after it;
so what it holds is rotated anew for each run, and what a run adds is noted where it is not rotated
yet. What is edited in it counts, and one that a HookedTransformer with the same weights has filled
goes on here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_looped._compat import TransformerLensKeyValueCache
from tl_looped.errors import InputError
from tl_looped.model.hook_points import LoopedHookPoint, Reader
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.model.rotary import rotate, rotation
from tl_looped.words import count

if TYPE_CHECKING:
    from tl_looped.transformer.hooked_loop import HookedLoop
    from tl_looped.transformer.run_options import RunOptions

_OURS = "past_kv_cache=LoopedKeyValueCache() fits every run"


@contextmanager
def lent(
    model: HookedLoop, cache: TransformerLensKeyValueCache, options: RunOptions
) -> Iterator[RunOptions]:
    """Options of a run that goes on from TransformerLens's cache, and extends it if it succeeds.

    Args:
        model: At the run's number of recurrences.
        cache: Theirs.
        options: Of the run.

    Raises:
        InputError: if the cache is not one of such runs, naming what differs; if rotated keys are
            edited in a run that extends it, since it has no place for them.
    """
    ours, keys = _as_ours(model, cache), dict[int, Tensor]()
    n_past = ours.length
    readers = [_key_reader(model, layer, keys) for layer in range(model.loop.n_layers)]
    with model._reading(readers):
        yield replace(options, past_kv_cache=ours, foreign_cache=None)
    if not cache.frozen:
        _extend(model, cache, ours, keys, n_past)


def _extend(
    model: HookedLoop,
    cache: TransformerLensKeyValueCache,
    ours: LoopedKeyValueCache,
    keys: dict[int, Tensor],
    n_past: int,
) -> None:
    """Add what a run has added to ours, keys as they were before their rotation."""
    assert ours.mask is not None
    by = rotation(model.cfg, _positions(ours.mask)[:, n_past:], keys[0].dtype)
    new = [ours.entries[model.loop.locate(layer)] for layer in range(len(cache.entries))]
    for layer, (rotated, _) in enumerate(new):
        difference = (rotate(keys[layer], by) - rotated[:, n_past:]).abs().max()
        if difference > 64 * torch.finfo(rotated.dtype).eps * keys[layer].abs().max():
            raise InputError(
                f"blocks.{layer}.attn.hook_rot_k was edited, and TransformerLensKeyValueCache "
                "holds keys before their rotation, so that later runs would go on without the "
                f"edit: edit hook_k, or {_OURS}"
            )
    for layer, entry in enumerate(cache.entries):
        entry.append(keys[layer], new[layer][1][:, n_past:])
    cache.append_attention_mask(ours.mask[:, n_past:].long())


def _positions(mask: Tensor) -> Tensor:
    """Of every column, counted from its row's first real token."""
    if bool(mask.all()):
        return torch.arange(mask.shape[1], device=mask.device)[None]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _as_ours(model: HookedLoop, cache: TransformerLensKeyValueCache) -> LoopedKeyValueCache:
    """The same keys, rotated, and values."""
    _check(model, cache)
    loop, mask = model.loop, cache.previous_attention_mask.bool()
    ours = LoopedKeyValueCache()
    ours.frozen, ours.mask = bool(cache.frozen), mask
    if mask.shape[1] == 0:
        return ours
    ours.n_recurrences = loop.R
    by = rotation(model.cfg, _positions(mask), cache.entries[0].past_keys.dtype)
    ours.entries = {
        loop.locate(i): (rotate(entry.past_keys, by), entry.past_values)
        for i, entry in enumerate(cache.entries)
    }
    return ours


def _check(model: HookedLoop, cache: TransformerLensKeyValueCache) -> None:
    cfg, loop = model.cfg, model.loop
    if cfg.n_devices > 1:
        raise InputError(
            f"TransformerLensKeyValueCache is for models on one device, and this one is spread "
            f"over {cfg.n_devices}: {_OURS}"
        )
    if cfg.n_hooked_kv_heads != cfg.n_kv_heads:
        raise InputError(
            f"TransformerLensKeyValueCache holds {cfg.n_kv_heads} key-value heads, and with "
            f"ungroup_grouped_query_attention there are {cfg.n_hooked_kv_heads}: {_OURS}, or "
            "set_ungroup_grouped_query_attention(False)"
        )
    if len(cache.entries) != loop.n_layers:
        raise InputError(
            f"the TransformerLensKeyValueCache has {len(cache.entries)} entries, and a run of "
            f"{count(loop.R, 'recurrence')} has {loop.n_layers} effective layers: make it by "
            "init_cache(model.cfg, ...) once model.set_recurrences() has set them; or " + _OURS
        )
    batch, n_past = cache.previous_attention_mask.shape
    expected = (batch, n_past, cfg.n_kv_heads, cfg.d_head)
    for layer, entry in enumerate(cache.entries):
        for name, held in (("past_keys", entry.past_keys), ("past_values", entry.past_values)):
            if tuple(held.shape) != expected:
                raise InputError(
                    f"{name} of entry {layer} must have shape [batch, pos, n_key_value_heads, "
                    f"d_head] = {expected}, as previous_attention_mask and the model have it, got "
                    f"{tuple(held.shape)}"
                )
            if held.dtype != model.W_E.dtype or held.device != model.W_E.device:
                raise InputError(
                    f"{name} of entry {layer} is {held.dtype} on {held.device}, and the model "
                    f"{model.W_E.dtype} on {model.W_E.device}: make a new cache for it"
                )


def _key_reader(model: HookedLoop, layer: int, keys: dict[int, Tensor]) -> tuple[Any, Reader]:
    """A reader of the new tokens' keys at one layer, as they are before their rotation."""
    cfg, at = model.cfg, f"blocks.{layer}.attn."

    def read(k: Tensor, hook: LoopedHookPoint) -> None:
        keys[layer] = k

    def read_normalized(x: Tensor, hook: LoopedHookPoint) -> None:
        gain = model.blocks[layer].attn.k_norm.w
        k = x.to(gain.dtype) * gain
        keys[layer] = k if cfg.qk_norm_per_head else k.unflatten(-1, (-1, cfg.d_head))

    if cfg.qk_norm:
        return at + "k_norm.hook_normalized", read_normalized
    return at + "hook_k", read
