"""From a checkpoint to a model whose weights are on their devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tl_looped import checkpoints
from tl_looped._compat import get_device
from tl_looped.checkpoints import Checkpoint
from tl_looped.checks import one_of
from tl_looped.errors import InputError
from tl_looped.model.config import LoopedConfig
from tl_looped.transformer.held_model import hold_model
from tl_looped.transformer.load_options import LoadOptions
from tl_looped.transformer.processing import say_once
from tl_looped.transformer.spreading import by_parameter, check_devices, plan_devices

if TYPE_CHECKING:
    from tl_looped.transformer.looped_transformer import LoopedTransformer


def load_model(cls: type[LoopedTransformer], options: LoadOptions) -> LoopedTransformer:
    """A model with a checkpoint's weights; see :meth:`LoopedTransformer.from_pretrained`."""
    target = None if options.spread else target_device(options.device)
    source = _source(options)
    cfg = source.config()
    options.processing.check(cfg)
    cfg.dtype, cfg.device = options.dtype, "meta"
    if options.default_prepend_bos is not None:
        cfg.default_prepend_bos, cfg.bos_from = options.default_prepend_bos, "caller"
    if options.n_ctx is not None:
        _set_context(cfg, options.n_ctx)
    model = cls(cfg, source.tokenizer() if options.tokenizer is None else None)
    _settle_tokenizer(model, options)
    model.generation_config = source.generation_config()
    source.check(model)
    wanted = options.n_recurrences
    if wanted is None:
        wanted = source.n_recurrences
    if wanted is not None:
        model.set_recurrences(wanted)
    _place(model, source, options, target)
    options.processing.apply(model)
    options.processing.note(model.cfg)
    return model.eval()


def _source(options: LoadOptions) -> Checkpoint:
    if options.hf_model is not None:
        return hold_model(options.model_name, options.hf_model, options.hub)
    return checkpoints.open_checkpoint(options.model_name, options.revision, options.hub)


def target_device(device: str | torch.device | None) -> torch.device:
    """Where a model is to go: TransformerLens's default device if None.

    Raises:
        InputError: torch knows no such device, or this machine has none.
    """
    try:
        target = torch.device(get_device() if device is None else device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is none that torch knows") from error
    check_devices([target], "device")
    return target


def _set_context(cfg: LoopedConfig, n_ctx: int) -> None:
    """Another context length; rotary positions have no table that ends."""
    if n_ctx > cfg.n_ctx:
        say_once(
            f"n_ctx={n_ctx} is longer than the context of {cfg.model_name}, {cfg.n_ctx} tokens: "
            "it was not trained on such texts, and what it says of them may mean nothing"
        )
    cfg.n_ctx = int(n_ctx)


def _settle_tokenizer(model: LoopedTransformer, options: LoadOptions) -> None:
    if options.tokenizer is not None:
        model.set_tokenizer(options.tokenizer, options.default_padding_side)
    else:
        settle_padding_side(model, options.default_padding_side)


def settle_padding_side(model: LoopedTransformer, side: str | None) -> None:
    """Pad on this side from now on; without a tokenizer, say that this changes nothing."""
    if side is None:
        return
    one_of(side, "default_padding_side", ("left", "right"))
    if model.tokenizer is None:
        say_once(f"default_padding_side={side!r} changes nothing: there is no tokenizer")
    else:
        model.tokenizer.padding_side = side


def _place(
    model: LoopedTransformer,
    source: Checkpoint,
    options: LoadOptions,
    target: torch.device | None,
) -> None:
    """Give the model its values, each straight on its device."""
    dtype = model.cfg.dtype
    if target is None:
        device_map, max_memory = options.plan
        assert device_map is not None
        plan = plan_devices(model, device_map, max_memory)
        check_devices(plan.values())
        source.load_into(model, by_parameter(model, plan), dtype)
    else:
        here = target if options.move_to_device else torch.device("cpu")
        if target.type != "meta":
            source.load_into(model, here, dtype)
        model.home_device = None if options.move_to_device else target
    model._note_devices()
