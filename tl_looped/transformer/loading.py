"""From a checkpoint to a model whose weights are on their devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tl_looped import checkpoints
from tl_looped._compat import get_device
from tl_looped.errors import InputError
from tl_looped.model.config import parse_dtype
from tl_looped.transformer.spreading import DeviceMap, by_parameter, check_devices, plan_devices

if TYPE_CHECKING:
    from tl_looped.transformer.looped_transformer import LoopedTransformer


def load_model(
    cls: type[LoopedTransformer],
    path_or_hub_id: str | Path,
    n_recurrences: int | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    revision: str | None,
    device_map: DeviceMap | None,
    max_memory: Mapping[int | str, int | str] | None,
    default_prepend_bos: bool | None,
) -> LoopedTransformer:
    """A model with a checkpoint's weights; see :meth:`LoopedTransformer.from_pretrained`."""
    if device is not None and device_map is not None:
        raise InputError(
            f"device={str(device)!r} and device_map={device_map!r} exclude each other: one "
            "puts all weights on one device, the other spreads them"
        )
    if device_map is None and max_memory is not None:
        raise InputError("max_memory is for a device_map: give device_map='auto' with it")
    source = checkpoints.open_checkpoint(path_or_hub_id, revision)
    cfg = source.config()
    cfg.dtype = parse_dtype(torch.float32 if dtype is None else dtype)
    cfg.device = "meta"
    if default_prepend_bos is not None:
        cfg.default_prepend_bos, cfg.bos_from = default_prepend_bos, "caller"
    model = cls(cfg, source.tokenizer())
    model.generation_config = source.generation_config()
    source.check(model)
    wanted = source.n_recurrences if n_recurrences is None else n_recurrences
    if wanted is not None:
        model.set_recurrences(wanted)
    if device_map is not None:
        plan = plan_devices(model, device_map, max_memory)
        check_devices(plan.values())
        source.load_into(model, by_parameter(model, plan), model.cfg.dtype)
    else:
        try:
            target = torch.device(get_device() if device is None else device)
        except RuntimeError as error:
            raise InputError(f"device {device!r} is none that torch knows") from error
        if target.type != "meta":
            source.load_into(model, target, model.cfg.dtype)
    model._note_devices()
    return model.eval()
