"""Estimates against real caches, presets, and the refusal of caches that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import VARIANTS, random_config
from torch import Tensor

from tl_looped import InputError, LoopedTransformer
from tl_looped.transformer.cache_size import PRESETS, cgroup_free_bytes, free_bytes, readable

pytestmark = pytest.mark.once

FLAGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "result": ("use_attn_result",),
    "split": ("use_split_qkv_input", "use_hook_mlp_in"),
    "attn_in": ("use_attn_in", "use_attn_result"),
}


def bytes_of(model: LoopedTransformer, tokens: Tensor, **kwargs: Any) -> int:
    kwargs.setdefault("return_type", None)
    _, cache = model.run_with_cache(tokens, **kwargs)
    return sum(tensor.nbytes for tensor in cache.cache_dict.values())


@pytest.mark.parametrize("flags", list(FLAGS))
def test_the_estimate_is_the_size_of_a_real_cache(
    variant: LoopedTransformer, tokens: Tensor, flags: str
) -> None:
    for flag in FLAGS[flags]:
        getattr(variant, f"set_{flag}")(True)
    for R in (1, 2, 4, 7):
        assert variant.estimate_cache_bytes(batch=2, pos=9, n_recurrences=R) == bytes_of(
            variant, tokens, n_recurrences=R
        )


@pytest.mark.parametrize(
    "names_filter",
    [
        *PRESETS,
        "blocks.2.attn.hook_pattern",
        ("resid_post", (2, 1)),
        ["loop", "hook_embed", "recurrence.0.hook_state_in"],
        lambda name: name.endswith("hook_scale"),
    ],
    ids=lambda wanted: "function" if callable(wanted) else str(wanted),
)
def test_the_estimate_reads_every_kind_of_filter(
    variant: LoopedTransformer, tokens: Tensor, names_filter: Any
) -> None:
    estimate = variant.estimate_cache_bytes(names_filter, batch=2, pos=9)
    assert estimate == bytes_of(variant, tokens, names_filter=names_filter)
    assert estimate > 0


@pytest.mark.parametrize("pos_slice", [-1, (2, 7), [0, 3], (1, 9, 3)])
def test_the_estimate_knows_each_hooks_position_axis(
    variant: LoopedTransformer, tokens: Tensor, pos_slice: Any
) -> None:
    estimate = variant.estimate_cache_bytes(batch=2, pos=9, pos_slice=pos_slice)
    assert estimate == bytes_of(variant, tokens, pos_slice=pos_slice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_estimate_knows_that_scales_are_wider_than_the_stream(
    variant: LoopedTransformer, tokens: Tensor, dtype: torch.dtype
) -> None:
    variant.to(dtype)
    assert variant.estimate_cache_bytes(batch=2, pos=9) == bytes_of(variant, tokens)


@pytest.mark.parametrize("R", [1, 2, 3, 5])
def test_the_estimate_counts_the_gradients_that_there_are(
    variant: LoopedTransformer, tokens: Tensor, R: int
) -> None:
    estimate = variant.estimate_cache_bytes(batch=2, pos=9, n_recurrences=R, incl_bwd=True)
    run = {"incl_bwd": True, "return_type": "loss", "n_recurrences": R}
    assert estimate == bytes_of(variant, tokens, **run)


def test_the_estimate_at_no_recurrence_at_all(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(random_config(**VARIANTS["residual-injection"]))
    estimate = model.estimate_cache_bytes(batch=2, pos=9, n_recurrences=0)
    assert estimate == bytes_of(model, tokens, n_recurrences=0)


def test_the_estimate_leaves_hooks_and_recurrences_alone(plain: LoopedTransformer) -> None:
    fired: list[str] = []
    plain.add_hook("hook_embed", lambda tensor, hook: fired.append(hook.name))
    try:
        plain.estimate_cache_bytes(n_recurrences=9, pos=3)
        assert fired == []
        assert plain.loop.R == plain.cfg.n_recurrences == 4
        assert len(plain.hook_dict["hook_embed"].fwd_hooks) == 1
        assert not plain.hook_dict["blocks.0.hook_resid_post"].is_active
    finally:
        plain.reset_hooks()


@pytest.mark.parametrize(("batch", "pos"), [(0, 3), (1, 0)])
def test_an_estimate_of_no_token_is_refused(plain: LoopedTransformer, batch: int, pos: int) -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        plain.estimate_cache_bytes(batch=batch, pos=pos)


def test_what_the_presets_hold(variant: LoopedTransformer) -> None:
    layers, R = variant.loop.n_layers, variant.loop.R
    stream = {f"blocks.{i}.hook_resid_{at}" for i in range(layers) for at in ("pre", "mid", "post")}
    assert variant.names_filter_set("residual") == stream
    heads = {f"blocks.{i}.attn.hook_{at}" for i in range(layers) for at in ("pattern", "z")}
    assert variant.names_filter_set("attention") == heads
    loop = variant.names_filter_set("loop")
    assert {f"recurrence.{r}.hook_state_out" for r in range(R)} | {"hook_initial_state"} <= loop
    assert not any(name.startswith(("blocks.", "ln_", "hook_embed")) for name in loop)
    assert variant.names_filter_set("all") == variant.names_filter_set(None)
    assert not set(PRESETS) & set(variant.hook_dict)


def test_a_part_of_an_activation_does_not_keep_the_whole(
    plain: LoopedTransformer, tokens: Tensor
) -> None:
    names = ["blocks.0.attn.hook_q", "blocks.0.hook_resid_post"]
    for pos_slice in (None, -1, (1, 3)):
        _, cache = plain.run_with_cache(tokens, names_filter=names, pos_slice=pos_slice)
        for activation in cache.values():
            assert activation.untyped_storage().nbytes() == activation.nbytes


@pytest.fixture(scope="module")
def long() -> LoopedTransformer:
    """A small model whose patterns of a long prompt fit into no memory."""
    return LoopedTransformer.from_config(random_config(n_ctx=2**20))


class Started(Exception):
    """Raised by a hook, to see that a run has begun."""


def has_started(tensor: Tensor, hook: Any) -> None:
    raise Started


def test_a_cache_that_does_not_fit_is_refused_before_the_run(long: LoopedTransformer) -> None:
    tokens = torch.zeros(1, 2**20, dtype=torch.long)
    needed = long.estimate_cache_bytes("attention", 1, 2**20)
    pattern = 4 * 2**40 * 4
    z = 32 * 2**20 * 4
    assert needed == long.loop.n_layers * (pattern + z)
    long.add_hook("hook_embed", has_started)
    try:
        with pytest.raises(InputError, match=rf"{needed} bytes.*cpu has .*free.*force=True"):
            long.run_with_cache(tokens, names_filter="attention")
        with pytest.raises(Started):
            long.run_with_cache(tokens, names_filter="attention", force=True)
        with pytest.raises(Started):
            long.run_with_cache(tokens[:, : 2**10], names_filter="attention")
        with pytest.raises(Started):
            long.run_with_cache(tokens, names_filter="hook_embed")
    finally:
        long.reset_hooks()


def test_the_refusal_counts_the_slice_and_the_layers_of_the_run(long: LoopedTransformer) -> None:
    tokens = torch.zeros(1, 2**20, dtype=torch.long)
    long.add_hook("hook_embed", has_started)
    try:
        for fits in ({"pos_slice": -1}, {"stop_at_layer": 0}, {"device": "meta"}):
            with pytest.raises(Started):
                long.run_with_cache(tokens, names_filter="attention", **fits)
        with pytest.raises(InputError, match="free"):
            long.run_with_cache(tokens, names_filter="attention", stop_at_layer=1)
        with pytest.raises(InputError, match="cache of 30 activations"):
            long.run_with_cache(tokens, names_filter="attention", stop_at_layer=15)
    finally:
        long.reset_hooks()


def test_free_memory_is_that_of_the_machine_and_its_groups() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert 0 < free <= psutil.virtual_memory().total
    assert free_bytes(torch.device("meta")) is None


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/batch/job\n")
    mounted = tmp_path / "cgroup"
    stat = "anon 500\ninactive_file 100\n"
    write(mounted / "batch/job", memory__max="max\n", memory__current="900\n", memory__stat=stat)
    assert cgroup_free_bytes(mounted, own) is None
    write(mounted / "batch", memory__max="2000\n", memory__current="900\n", memory__stat=stat)
    assert cgroup_free_bytes(mounted, own) == 2000 - 900 + 100
    write(mounted / "batch/job", memory__max="950\n")
    assert cgroup_free_bytes(mounted, own) == 950 - 900 + 100
    write(mounted / "batch/job", memory__max="100\n")
    assert cgroup_free_bytes(mounted, own) == 0


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:cpu:/box\n4:memory:/box\n")
    write(
        tmp_path / "cgroup/memory",  # inside a container, whose own path is not mounted
        memory__limit_in_bytes="4000\n",
        memory__usage_in_bytes="1500\n",
        memory__stat="total_inactive_file 300\n",
    )
    assert cgroup_free_bytes(tmp_path / "cgroup", own) == 4000 - 1500 + 300
    assert cgroup_free_bytes(tmp_path / "cgroup", tmp_path / "absent") is None


def test_sizes_are_readable() -> None:
    assert readable(1023) == "1023 bytes"
    assert readable(3 * 2**29) == "1.5 GiB (1610612736 bytes)"
