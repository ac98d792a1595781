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
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from torch import Tensor

from tl_looped._compat import Slice
from tl_looped.errors import InputError
from tl_looped.model.config import InitialState, LoopedConfig
from tl_looped.model.geometry import LoopGeometry
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.transformer.reading import Tokens, n_prompts, read_input

if TYPE_CHECKING:
    from tl_looped.transformer.hooked_loop import HookedLoop
    from tl_looped.transformer.looped_transformer import LoopedTransformer

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


def twin_sizes(
    model: HookedLoop, batch: int, pos: int, pos_slice: Any, incl_bwd: bool
) -> dict[str, int]:
    """Bytes of every activation and its gradient, by canonical name."""
    twin = type(model)(twin_config(model.cfg))  # type: ignore[call-arg]
    # A random state is drawn from values, of which there are none here.
    state = "zeros" if twin.cfg.initial_state is InitialState.RANDOM else None
    tokens = torch.zeros(batch, pos, dtype=torch.long, device="meta")
    with torch.inference_mode(False), torch.set_grad_enabled(incl_bwd):
        _, cache = twin.run_with_cache(
            tokens,
            initial_state=state,
            return_type="loss" if incl_bwd else None,
            return_cache_object=False,
            pos_slice=pos_slice,
            incl_bwd=incl_bwd,
            force=True,
        )
    in_twin = dict.fromkeys(twin.hook_dict.canonical, 0)
    for key, activation in cache.items():
        in_twin[key.removesuffix("_grad")] += activation.nbytes
    return {
        name: in_twin[twin_name(name, hook, model.loop, twin.loop)]
        for name, hook in model.hook_dict.canonical.items()
    }


def refuse_too_large_cache(model: HookedLoop, input: Any, kwargs: dict[str, Any]) -> None:
    """Raise if the cache of a run with these arguments exceeds the free memory."""
    shape = _shape_of(model, input, kwargs)
    if shape is None:
        return
    incl_bwd = kwargs.get("incl_bwd", False)
    most = most_bytes(model.cfg, len(model.hook_dict.canonical) * (1 + incl_bwd), *shape)
    if most < ALWAYS_FREE:
        return
    device = torch.device(kwargs.get("device") or model.W_E.device)
    free = free_bytes(device)
    if free is None or most < free:
        return
    pos_slice = Slice.unwrap(kwargs.get("pos_slice"))
    sizes = twin_sizes(model, *shape, pos_slice, incl_bwd)
    start, stop = (
        default if kwargs.get(end) is None else model.loop.resolve_or_end(kwargs[end])
        for end, default in (("start_at_layer", 0), ("stop_at_layer", model.loop.n_layers))
    )
    unused = [f"blocks.{i}." for i in (*range(start), *range(stop, model.loop.n_layers))]
    names = model.names_filter_set(kwargs.get("names_filter"))
    if unused:
        names = {name for name in names if not name.startswith(tuple(unused))}
    needed = sum(sizes[name] for name in names)
    if needed > free:
        elsewhere = "" if device.type == "cpu" else ", put it elsewhere (device='cpu')"
        raise InputError(
            f"the cache of {len(names)} activations would take {readable(needed)}, but "
            f"{device} has {readable(free)} free. Cache less (names_filter='residual', "
            "'attention', 'loop' or a list of names, pos_slice=, fewer n_recurrences or "
            f"prompts){elsewhere}, or pass force=True to try nevertheless."
        )


def _shape_of(model: HookedLoop, input: Any, kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Batch and positions of a model's input; None if it is none, which the run will tell."""
    if kwargs.get("start_at_layer") is not None:
        is_stream = isinstance(input, Tensor) and input.ndim == 3
        return (input.shape[0], input.shape[1]) if is_stream else None
    given = read_input(input)
    if not isinstance(given, Tokens):
        text_arguments = (kwargs.get("prepend_bos"), kwargs.get("padding_side"))
        tokens, _ = cast("LoopedTransformer", model).tokenize(given, *text_arguments)
    else:
        tokens = given.tokens[None] if given.tokens.ndim == 1 else given.tokens
    return (tokens.shape[0], tokens.shape[1]) if tokens.ndim == 2 else None


def n_rows(input: Any, kwargs: dict[str, Any]) -> int:
    """Number of prompts in a model's input."""
    if kwargs.get("start_at_layer") is not None:
        return len(input) if isinstance(input, Tensor) and input.ndim else 1
    return n_prompts(input)
