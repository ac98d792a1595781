"""Models larger than one device: which weights go where.

``LoopedTransformer.from_pretrained(..., device_map="auto")`` spreads the weights by accelerate's
own plan (``infer_auto_device_map``) and loads each straight to its device. Accelerate's
``dispatch_model`` is not used: it moves a module's input in front of the module, but here every
effective layer computes with the weights of another module, which it borrows. As TransformerLens
does for ``n_devices``, the residual stream moves to the device of a layer's weights when it enters
the layer, with rotation and masks; keys and values stay with their layer. So do the injection, the
norms between layers, the exit gate and the unembedding.

The contract of a spread model:

- The devices are those of the places ``embed``, ``prelude.{i}``, ``injection``, ``core.{i}``,
  ``coda.{i}``, ``final_norm``, ``exit_gate``, ``unembed``. A place is never split; an unembedding
  that is tied to the embedding is where that is.
- Whatever a run gives (logits, residual streams, exit steps, what :meth:`unroll` and a
  ``loop_map`` give), and whatever is cached unless ``device=`` says otherwise, is on
  ``cfg.device``, the embedding's, where tokens go in. Hooks see an activation where it is computed,
  and may return one of any device.
- Weights (``W_U``, ``blocks[i].W_Q``) are where they are; stacks of them are on ``cfg.device``.
- All random numbers are drawn on the CPU, so that they are those of a model on one device.
- Moves change no value. Gradients may differ in their last bit: a move is a node of autograd's
  graph, and those decide in which order it sums.
- A core on several devices costs a move of the stream for each of them at every recurrence.
- ``model.to(device)`` gathers a spread model on one device.
- A device may be the CPU: such a layer is computed on the CPU. Weights that wait on the disk, or on
  the CPU for their turn on the GPU, are not supported.

Tried with devices that compute on the CPU and refuse to mix, as CUDA devices do. CUDA itself was
not tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from tl_looped.errors import InputError

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Accelerate's ways to plan a device map."""

DeviceMap: TypeAlias = str | int | torch.device | Mapping[str, Any]

# In the order of the forward pass, so that "sequential" fills one device after the other.
_ORDER = (
    "embed",
    "prelude",
    "injection",
    "core",
    "exit_gate",
    "coda",
    "final_norm",
    "unembed",
)
_WHOLE = ["BlockWeights", "Embed", "Unembed", "Linear", "NormWeights"]


def places(model: nn.Module) -> list[str]:
    """Names of what has a device of its own, in the order of the forward pass."""
    found = []
    for name in _ORDER:
        module = model._modules.get(name)
        if isinstance(module, nn.ModuleList):
            found += [f"{name}.{i}" for i in range(len(module))]
        elif module is not None and next(module.parameters(), None) is not None:
            found.append(name)
    return found


def plan_devices(
    model: nn.Module, device_map: DeviceMap, max_memory: Mapping[int | str, int | str] | None = None
) -> dict[str, torch.device]:
    """The device of every place of a model, which may be on the meta device.

    Args:
        model: A looped transformer, in the dtype that it is to have.
        device_map: One of :data:`PLANS`, a device for everything, or devices by module names, where
            ``""`` is the whole model and ``"core"`` all layers of the core.
        max_memory: Most bytes per device, for a plan.

    Raises:
        InputError: for a map that leaves a place out, splits one, names something else or a disk;
            if the memory does not hold the model.
    """
    if isinstance(device_map, str) and device_map in PLANS:
        device_map = _planned(model, device_map, max_memory)
    elif max_memory is not None:
        raise InputError(f"max_memory is for a device_map of {PLANS}, got {device_map!r}")
    if not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    names, tied = places(model), "unembed" not in places(model)
    known = {"", *names, *(name.split(".")[0] for name in names), *(["unembed"] if tied else [])}
    if unknown := sorted(map(str, set(device_map) - known)):
        raise InputError(
            f"device_map: {unknown} are not places of this model, which has {names}; '' is all of "
            "it, and no layer can be split"
        )
    devices = {key: _device(key, value) for key, value in device_map.items()}
    plan: dict[str, torch.device] = {}
    for name in names:
        keys = [key for key in (name, name.split(".")[0], "") if key in devices]
        if not keys:
            raise InputError(f"device_map names no device for {name!r}; the places are {names}")
        plan[name] = devices[keys[0]]
    if tied and devices.get("unembed", plan["embed"]) != plan["embed"]:
        raise InputError(
            f"device_map puts the unembedding on {devices['unembed']} and the embedding on "
            f"{plan['embed']}, but in this model they are one matrix"
        )
    return plan


def check_devices(devices: Iterable[torch.device], asked_by: str = "device_map") -> None:
    """Raise where a device is not one of this machine.

    Args:
        devices: Devices of any kind; those that PyTorch cannot count are left to it.
        asked_by: Who names them, for the message.

    Raises:
        InputError: for a GPU that PyTorch does not see.
    """
    for device in devices:
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"{asked_by} names {device}, and PyTorch sees {torch.cuda.device_count()} CUDA "
                "devices"
            )
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise InputError(f"{asked_by} names {device}, and PyTorch sees no Apple GPU here")


def memory_of_gpus(n: int) -> dict[int | str, int | str]:
    """Free bytes of the first n GPUs, and of nothing else, as ``max_memory``.

    Raises:
        InputError: if PyTorch sees fewer.
    """
    seen = torch.cuda.device_count()
    if n > seen:
        raise InputError(
            f"n_devices={n}, and PyTorch sees {seen} CUDA devices: device_map= spreads a model "
            "over others too, the CPU included"
        )
    return {i: torch.cuda.mem_get_info(i)[0] for i in range(n)}


def refuse_offloaded(model: nn.Module) -> None:
    """Raise if accelerate has taken the weights away until their own module is called."""
    on_meta = next(model.parameters()).device.type == "meta"
    if on_meta and any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise InputError(
            "the weights are offloaded (accelerate's cpu_offload, disk_offload or "
            "dispatch_model), which brings them back when their module is called, and here "
            "every layer computes with the weights of another one. Load the model with "
            "LoopedTransformer.from_pretrained(..., device_map='auto', max_memory=...): a "
            "device of it may be the CPU"
        )


def refuse_dispatched(model: nn.Module, placed: Mapping[str, Any]) -> None:
    """Raise if accelerate's ``dispatch_model`` has put the modules elsewhere."""
    here = {name: str(device) for name, device in device_map_of(model).items()}
    if {name: str(device) for name, device in placed.items()} != here:
        raise InputError(
            f"dispatch_model cannot spread this model over {dict(placed)}: it moves the input "
            "of each module, and here every layer computes with the weights of another one. "
            "Load it spread: LoopedTransformer.from_pretrained(..., device_map='auto')"
        )


def by_parameter(model: nn.Module, plan: Mapping[str, torch.device]) -> dict[str, torch.device]:
    """The device of every parameter."""
    return {
        name: plan[next(place for place in plan if name.startswith(f"{place}."))]
        for name, _ in model.named_parameters()
    }


def device_map_of(model: nn.Module) -> dict[str, int | str]:
    """Where the weights are, by place; ``{"": device}`` if all are on one device."""
    found = {name: next(model.get_submodule(name).parameters()).device for name in places(model)}
    named = {name: _name(device) for name, device in found.items()}
    return {"": named["embed"]} if len(set(named.values())) == 1 else named


def _planned(
    model: nn.Module, how: str, max_memory: Mapping[int | str, int | str] | None
) -> Mapping[str, Any]:
    """Accelerate's plan."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    # Only what holds weights, or hook points would be planned for too.
    skeleton = nn.Module()
    for name in _ORDER:
        module = model._modules.get(name)
        if module is not None and next(module.parameters(), None) is not None:
            skeleton.add_module(name, module)
    memory: Any = None if max_memory is None else dict(max_memory)
    try:
        if how == "sequential":
            memory = get_max_memory(memory)
        else:
            memory = get_balanced_memory(
                skeleton,
                max_memory=memory,
                no_split_module_classes=_WHOLE,
                low_zero=how == "balanced_low_0",
            )
        found: Mapping[str, Any] = infer_auto_device_map(
            skeleton, max_memory=dict(memory), no_split_module_classes=_WHOLE
        )
    except ValueError as error:  # what is not a device, or not a size
        raise InputError(f"max_memory={max_memory!r}: {error}") from error
    on_disk = sorted(name for name, device in found.items() if str(device) == "disk")
    if on_disk:
        size = sum(p.numel() * p.element_size() for p in skeleton.parameters()) / 2**30
        have = {str(key): f"{value / 2**30:.2f} GiB" for key, value in memory.items()}
        raise InputError(
            f"device_map={how!r}: the weights take {size:.2f} GiB, and {have} do not hold them all "
            f"with room for the largest layer ({on_disk} are left). Looped models run without "
            "offloading to disk: use a smaller dtype (dtype='bfloat16'), more or larger devices, "
            "raise max_memory (with a 'cpu' entry to compute some layers on the CPU), or give a "
            "dict of module names to devices"
        )
    return found


def _device(name: str, value: Any) -> torch.device:
    """A device as accelerate names it: a number is a GPU."""
    if isinstance(value, int) and not isinstance(value, bool):
        accelerator = torch.accelerator.current_accelerator()
        kind = "cuda" if accelerator is None else accelerator.type
        return torch.device(kind, value)
    if str(value) in ("disk", "meta"):
        raise InputError(
            f"device_map puts {name or 'the model'!r} on {str(value)!r}: weights must be in the "
            "memory of a device that computes. Name the CPU or a GPU, use a smaller dtype or more "
            "devices (device='meta' loads a model without values)"
        )
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device_map: {value!r} is neither one of {PLANS} nor a device such as 0, 'cuda:1' or "
            "'cpu'"
        ) from error
    if device.type != "cpu" and device.index is None:
        # A tensor's device has its number, and the two are compared.
        there = torch.accelerator.is_available()
        return torch.device(device.type, torch.accelerator.current_device_index() if there else 0)
    return device


def _name(device: torch.device) -> int | str:
    return device.index if device.type == "cuda" and device.index is not None else str(device)
