"""How large a cache will be, and whether it fits.

The size is not computed from a table of shapes, which could go out of date: a twin of the model
without values, of one layer a stage and at most three recurrences, runs on the meta device with the
caching hooks themselves, and its activations are counted as often as the model has them. All layers
of a stage have the same shapes, and all recurrences between the first and the last.

Bytes are those of the cached tensors. Some of them share their memory while they stay on the
model's device (one layer's ``resid_post`` is the next one's ``resid_pre``), so the memory that a
cache takes can be less, and is never more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from tl_looped.model.config import LoopedConfig
from tl_looped.model.geometry import LoopGeometry
from tl_looped.model.hook_points import LoopedHookPoint

PRESETS: dict[str, Callable[[str], bool]] = {
    "residual": lambda name: name.endswith(("hook_resid_pre", "hook_resid_mid", "hook_resid_post")),
    "attention": lambda name: name.endswith(("attn.hook_pattern", "attn.hook_z")),
    "loop": lambda name: name.startswith("recurrence.") or name == "hook_initial_state",
    "all": lambda name: True,
}
"""Words that a ``names_filter`` may be, or hold. None is the name of a hook.

- ``"residual"``: the stream before, within and after every layer
- ``"attention"``: pattern and ``z`` of every head; not the scores, which are as large again
- ``"loop"``: the initial state and the loop's own hooks at every recurrence
- ``"all"``: everything, as None
"""

ALWAYS_FREE = 2**26
"""Bytes for which it is not worth the time to ask whether they are free."""

_TWIN_RECURRENCES = 3  # a first one, a last one, and one that stands for those between


def twin_config(cfg: LoopedConfig) -> LoopedConfig:
    """The configuration of the smallest model with every shape of activation that ``cfg`` has."""
    return replace(
        cfg,
        device="meta",
        n_prelude=min(cfg.n_prelude, 1),
        n_core=1,
        core_layers=None,
        n_coda=min(cfg.n_coda, 1),
        n_recurrences=min(cfg.n_recurrences, _TWIN_RECURRENCES),
    )


def twin_name(name: str, hook: LoopedHookPoint, loop: LoopGeometry, twin: LoopGeometry) -> str:
    """The hook of the twin that has the shape of a hook of the model."""
    place = hook.location
    if place is None:
        return name
    suffix = name.split(".", 2)[2]  # past "blocks.{i}" or "recurrence.{r}"
    if place.recurrence is None:
        index = twin.prelude_index(0) if place.stage == "prelude" else twin.coda_index(0)
        return f"blocks.{index}.{suffix}"
    r = min(place.recurrence, 1) if place.recurrence < loop.R - 1 else twin.R - 1
    return f"recurrence.{r}.{suffix}" if place.layer < 0 else f"blocks.{twin.index(r, 0)}.{suffix}"


def most_bytes(cfg: LoopedConfig, n_hooks: int, batch: int, pos: int) -> int:
    """More than any ``n_hooks`` activations take, found without looking at one."""
    assert cfg.d_mlp is not None
    widest = max(cfg.n_heads * max(cfg.d_model, cfg.d_head, pos), cfg.d_mlp)
    return n_hooks * batch * pos * widest * torch.float64.itemsize


def free_bytes(device: torch.device) -> int | None:
    """Memory that new tensors on a device may take; None where it cannot be known.

    On the CPU, what the machine has available or, if that is less, what the limits of the
    process's control groups (containers, batch systems) leave.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type not in ("cpu", "mps"):
        return None
    available: int = psutil.virtual_memory().available
    limit = cgroup_free_bytes()
    return available if limit is None else min(available, limit)


def cgroup_free_bytes(
    mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """What the memory limits of this process's control groups leave, or None without a limit.

    Args:
        mounted: Where the groups are, of version 2 or, below ``memory``, of version 1.
        own: The file that names the process's groups.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    left: list[int] = []
    for _, controllers, path in lines:
        if controllers == "":
            root, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = mounted / "memory"
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        # A limit of any group further up holds too. Inside a container the path may not exist,
        # and the container's own group is then at the root.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                left += _left_in_group(folder, *names)
    return max(min(left), 0) if left else None


def _left_in_group(folder: Path, limit: str, used: str, reclaimable: str) -> list[int]:
    try:
        most = (folder / limit).read_text().strip()
        taken = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    # The page cache counts as used, but the kernel gives it up before it refuses memory.
    return [] if most == "max" else [int(most) - taken + int(stat.get(reclaimable, 0))]


def readable(n_bytes: int) -> str:
    """``"1.5 GiB (1610612736 bytes)"``."""
    size, unit = float(n_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{n_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit} ({n_bytes} bytes)"
