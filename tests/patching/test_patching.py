"""Patching across recurrences: against patches by hand, TransformerLens's sweeps and invariants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import xarray as xr
from closeness import SAME, assert_rounded_once, assert_same_data
from conftest import VARIANTS, exact_config
from refusals import refused
from test_interventions import contracting
from torch import Tensor
from transformer_lens import patching as tl_patching

from tl_looped import (
    ArgumentTypeError,
    HookNameError,
    InputError,
    LayerIndexError,
    LoopedActivationCache,
    LoopedTransformer,
    MissingActivationError,
)
from tl_looped.interventions import RepeatRecurrence, SwapStates
from tl_looped.patching import attribute_recurrences, patch_recurrences

CLEAN = torch.tensor([[5, 11, 7], [1, 40, 2]])
CORRUPTED = torch.tensor([[8, 3, 7], [9, 2, 30]])
ALL = slice(None)
QUIET = {"progress": False}


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 4]).mean()


def model_of(kind: str, **changes: Any) -> LoopedTransformer:
    return LoopedTransformer.from_config(exact_config(**(VARIANTS[kind] | changes)))


@pytest.fixture(scope="module")
def injecting() -> LoopedTransformer:
    return model_of("pre-injection")


def by_hand(model: LoopedTransformer, donor: Tensor, name: str, part: Any, **run: Any) -> float:
    def write(x: Tensor, hook: Any) -> Tensor:
        x[part] = donor[part]
        return x

    patched = model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, write)], **run)
    return float(metric(patched) - metric(model(CORRUPTED, **run)))


# Activation, choices of the grid, and the hook and part of the activation that a cell replaces.
GRIDS: dict[str, tuple[str, dict[str, Any], str, Callable[[int, int], Any]]] = {
    "stream": ("resid_post", {"positions": "each"}, "hook_resid_post", lambda p, h: (ALL, p)),
    "whole stream": ("resid_pre", {}, "hook_resid_pre", lambda p, h: ALL),
    "mlp": ("mlp_out", {"positions": [-1]}, "hook_mlp_out", lambda p, h: (ALL, 2)),
    "heads": ("z", {"heads": "each"}, "attn.hook_z", lambda p, h: (ALL, ALL, h)),
    "head and position": (
        "q", {"heads": [1], "positions": "each"}, "attn.hook_q", lambda p, h: (ALL, p, 1),
    ),
    "patterns": (
        "pattern", {"heads": "each", "positions": "each"}, "attn.hook_pattern",
        lambda p, h: (ALL, h, p),
    ),
    "scores": ("attn_scores", {"heads": "each"}, "attn.hook_attn_scores", lambda p, h: (ALL, h)),
    "key-value heads": (
        "rot_k", {"heads": "each"}, "attn.hook_rot_k", lambda p, h: (ALL, ALL, h),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pre-injection", "post-qk-norm"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_equals_patches_by_hand(kind: str, grid: str) -> None:
    activation, choices, suffix, part = GRIDS[grid]
    model = model_of(kind)
    with torch.no_grad():
        _, cache = model.run_with_cache(CLEAN, n_recurrences=3)
        found = patch_recurrences(
            model, CORRUPTED, cache, metric, activation, layers=[0, (2, 1)], **choices, **QUIET
        )
        assert found.sizes["source_recurrence"] == 3
        assert found.sizes["target_recurrence"] == 4
        assert len(np.unique(found["difference"])) > found["difference"].size // 3
        for r, target, entry in ((0, 0, 0), (1, 3, 1), (2, 2, 1)):
            source_layer, layer = ((0, 0), (2, 1))[entry]
            where = {"source_recurrence": r, "target_recurrence": target, "layer": entry}
            cell = found["difference"].isel(where)
            assert (int(cell["source_layer"]), int(cell["layer"])) == (source_layer, layer)
            donor = cache[activation, (r, source_layer)]
            name = f"recurrence.{target}.blocks.{layer}.{suffix}"
            cells = cell.stack(cell=cell.dims) if cell.ndim else [cell]
            for one in cells:
                place = int(one["pos"]) if "pos" in one.coords else 0
                head = int(one["head"]) if "head" in one.coords else 0
                expected = by_hand(model, donor, name, part(place, head))
                assert float(one) == pytest.approx(expected, abs=SAME)


@pytest.mark.parametrize("name", ["state_in", "hook_injected", "state_out"])
def test_activations_of_the_loop(name: str, injecting: LoopedTransformer) -> None:
    model = injecting
    with torch.no_grad():
        _, cache = model.run_with_cache(CLEAN)
        found = patch_recurrences(
            model, CORRUPTED, cache, metric, name, positions="each", state_seed=3, **QUIET
        )
        assert found["effect"].dims == ("source_recurrence", "target_recurrence", "pos")
        short = name.removeprefix("hook_")
        for r, target, pos in ((0, 2, 1), (3, 1, 2), (1, 1, 0)):
            donor = cache[f"recurrence.{r}.hook_{short}"]
            hook = f"recurrence.{target}.hook_{short}"
            expected = by_hand(model, donor, hook, (ALL, pos), state_seed=3)
            assert float(found["difference"][r, target, pos]) == pytest.approx(expected, abs=SAME)
    assert found.attrs["state_seed"] == 3
    assert found.attrs["source_state_seed"] == "0"


def test_the_diagonal_is_transformer_lenss_sweep(injecting: LoopedTransformer) -> None:
    model = injecting
    with torch.no_grad():
        clean_logits, cache = model.run_with_cache(CLEAN)
        found = patch_recurrences(
            model, CORRUPTED, cache, metric, "resid_pre", positions="each", **QUIET
        )
        clean, corrupted = float(metric(clean_logits)), float(metric(model(CORRUPTED)))
        theirs = tl_patching.get_act_patch_resid_pre(
            model,
            CORRUPTED,
            cache,
            lambda logits: (metric(logits) - corrupted) / (clean - corrupted),
        )
    assert found.attrs["clean"] == pytest.approx(clean)
    assert found.attrs["corrupted"] == pytest.approx(corrupted)
    for r in range(model.loop.R):
        for layer in range(model.loop.k):
            ours = torch.from_numpy(found["effect"][r, r, layer].to_numpy())
            assert_rounded_once(theirs[model.loop.index(r, layer)], ours)


# -- invariants ---------------------------------------------------------------------------------


def diagonal(data: xr.DataArray) -> np.ndarray:
    return np.stack([data[r, r].to_numpy() for r in range(data.shape[0])])


@pytest.mark.parametrize("kind", VARIANTS)
def test_patching_a_run_with_itself_changes_nothing(kind: str) -> None:
    model = model_of(kind)
    with torch.no_grad():
        _, cache = model.run_with_cache(CORRUPTED)
        for name, choices in (("resid_post", {}), ("z", {"heads": "each"}), ("state_out", {})):
            found = patch_recurrences(model, CORRUPTED, cache, metric, name, **choices, **QUIET)
            np.testing.assert_allclose(diagonal(found["difference"]), 0.0, atol=SAME)
            assert np.isnan(found["effect"]).all()
            others = found["difference"].to_numpy()[~np.eye(model.loop.R, dtype=bool)]
            assert np.abs(others).max() > 1e-3


def test_at_a_fixed_point_no_recurrence_differs_from_another() -> None:
    model = contracting()
    with torch.no_grad():
        _, long = model.run_with_cache(CORRUPTED, n_recurrences=96)
        start = long["recurrence.95.hook_state_out"]
        _, cache = model.run_with_cache(CORRUPTED, initial_state=start)
        for name, choices in (("resid_post", {}), ("pattern", {"heads": "each"}), ("injected", {})):
            found = patch_recurrences(
                model, CORRUPTED, cache, metric, name, initial_state=start, **choices, **QUIET
            )
            np.testing.assert_allclose(found["difference"], 0.0, atol=1e-12)


def test_a_whole_state_decides_iff_nothing_is_injected(injecting: LoopedTransformer) -> None:
    for model, decides in ((model_of("pre"), True), (injecting, False)):
        with torch.no_grad():
            _, cache = model.run_with_cache(CLEAN)
            found = patch_recurrences(model, CORRUPTED, cache, metric, "state_out", **QUIET)
        effect = diagonal(found["effect"])
        assert np.allclose(effect[:-1], 1.0, atol=SAME) == decides
        # Behind the last recurrence nothing is injected any more.
        assert effect[-1] == pytest.approx(1.0, abs=SAME)


# -- attribution --------------------------------------------------------------------------------


def test_attribution_is_exact_for_small_changes() -> None:
    model = model_of("pre-injection")
    with torch.no_grad():
        _, corrupted = model.run_with_cache(CORRUPTED)
        _, clean = model.run_with_cache(CLEAN)
    grids: dict[str, dict[str, Any]] = {
        "resid_post": {"positions": "each"},
        "z": {"heads": "each"},
        "pattern": {"heads": [2], "positions": [1]},
        "state_in": {},
    }
    for name, choices in grids.items():
        near = {
            key: value + 1e-6 * (clean.cache_dict[key] - value)
            for key, value in corrupted.cache_dict.items()
        }
        cache = LoopedActivationCache(near, model)
        arguments = (model, CORRUPTED, cache, metric, name)
        grids = choices | {"clean_metric": 1.0}
        exact = patch_recurrences(*arguments, **grids, **QUIET)["difference"]
        estimate = attribute_recurrences(*arguments, **grids)["difference"]
        assert exact.dims == estimate.dims
        np.testing.assert_allclose(diagonal(estimate), diagonal(exact), rtol=1e-3, atol=1e-11)
        assert np.abs(diagonal(exact)).max() > 1e-8


def test_attribution_of_scores_knows_the_mask(injecting: LoopedTransformer) -> None:
    _, cache = injecting.run_with_cache(CLEAN)
    found = attribute_recurrences(injecting, CORRUPTED, cache, metric, "attn_scores", heads="each")
    assert np.isfinite(found["difference"]).all()
    assert np.abs(found["difference"]).max() > 0


def demo_case() -> tuple[LoopedTransformer, Tensor, Any, Callable[[Tensor], Tensor]]:
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    template = "Anna has {} apples and 2 pears. How many fruits does she have?\nAnna has "
    clean, corrupted = model.to_tokens(template.format(7)), model.to_tokens(template.format(4))
    seven, four = model.to_single_token("7"), model.to_single_token("4")
    _, cache = model.run_with_cache(clean)
    return (
        model,
        corrupted,
        cache,
        lambda logits: (logits[:, -1, seven] - logits[:, -1, four]).mean(),
    )


def test_attribution_correlates_with_the_exact_grid() -> None:
    model, corrupted, cache, difference = demo_case()
    arguments = (model, corrupted, cache, difference, "z")
    exact = patch_recurrences(*arguments, heads="each", **QUIET)
    estimate = attribute_recurrences(*arguments, heads="each")
    assert exact["effect"].shape == (4, 4, 4, 4)
    both = [data["effect"].to_numpy().ravel() for data in (exact, estimate)]
    r = np.corrcoef(*both)[0, 1]
    assert r > 0.8
    assert (exact.attrs["method"], estimate.attrs["method"]) == (
        "activation patching",
        "attribution patching, first order",
    )


def test_attribution_leaves_no_gradient_and_works_in_inference_mode(
    injecting: LoopedTransformer,
) -> None:
    _, cache = injecting.run_with_cache(CLEAN)
    outside = attribute_recurrences(injecting, CORRUPTED, cache, metric, "resid_mid")
    with torch.inference_mode():
        inside = attribute_recurrences(injecting, CORRUPTED, cache, metric, "resid_mid")
    xr.testing.assert_identical(outside, inside)
    assert all(p.grad is None for p in injecting.parameters())


# -- batches, padding, prompts ------------------------------------------------------------------


def test_how_cells_are_batched_changes_nothing(injecting: LoopedTransformer) -> None:
    _, cache = injecting.run_with_cache(CLEAN)
    arguments = (injecting, CORRUPTED, cache, metric, "resid_post")
    one_by_one = patch_recurrences(*arguments, positions="each", batch_size=1, **QUIET)
    together = patch_recurrences(*arguments, positions="each", batch_size=7, **QUIET)
    assert_same_data(one_by_one, together)


def test_padded_prompts_and_given_states_go_with_their_cells(injecting: LoopedTransformer) -> None:
    model = injecting
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    state = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    run = {"attention_mask": mask, "initial_state": state}
    with torch.no_grad():
        _, cache = model.run_with_cache(CLEAN, **run)
        found = patch_recurrences(model, CORRUPTED, cache, metric, "mlp_out", **run, **QUIET)
        name = "recurrence.2.blocks.1.hook_mlp_out"
        expected = by_hand(model, cache["mlp_out", (1, 1)], name, ALL, **run)
    assert float(found["difference"][1, 2, 1]) == pytest.approx(expected, abs=SAME)
    assert found.attrs["initial_state"] == "given"


def test_one_clean_prompt_serves_all_rows(injecting: LoopedTransformer) -> None:
    _, one = injecting.run_with_cache(CLEAN[:1], remove_batch_dim=True)
    _, both = injecting.run_with_cache(CLEAN[[0, 0]])
    arguments = {"clean_metric": 0.5, **QUIET}
    assert_same_data(
        patch_recurrences(injecting, CORRUPTED, one, metric, "z", **arguments),
        patch_recurrences(injecting, CORRUPTED, both, metric, "z", **arguments),
    )


def test_runs_of_other_lengths(injecting: LoopedTransformer) -> None:
    _, cache = injecting.run_with_cache(CLEAN, n_recurrences=9)
    found = patch_recurrences(
        injecting, CORRUPTED, cache, metric, "resid_post", source_recurrences=slice(6, None),
        target_recurrences=-1, layers=[-1], n_recurrences=2, **QUIET,
    )  # fmt: skip
    assert found["source_recurrence"].values.tolist() == [6, 7, 8]
    assert found["target_recurrence"].values.tolist() == [1]
    assert found["layer"].values.tolist() == [2]
    assert (found.attrs["n_recurrences"], found.attrs["source_n_recurrences"]) == (2, 9)
    assert injecting.loop.R == 4


def test_results_can_be_written(injecting: LoopedTransformer, tmp_path: Any) -> None:
    _, cache = injecting.run_with_cache(CLEAN)
    found = patch_recurrences(injecting, CORRUPTED, cache, metric, "z", heads="each", **QUIET)
    found.to_netcdf(tmp_path / "grid.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "grid.nc", engine="h5netcdf") as read:
        xr.testing.assert_identical(read.load(), found)


# -- refusals -----------------------------------------------------------------------------------


REFUSED: list[tuple[type[Any], str, str, dict[str, Any]]] = [
    (HookNameError, "near matches", "resid_poost", {}),
    (LayerIndexError, "source recurrence 4", "z", {"source_recurrences": 4}),
    (LayerIndexError, "target recurrence -5", "z", {"target_recurrences": -5}),
    (LayerIndexError, "core layer 3", "z", {"layers": [3]}),
    (LayerIndexError, "head 4", "z", {"heads": [4]}),
    (LayerIndexError, "position 3", "z", {"positions": [3]}),
    (ArgumentTypeError, "positions", "z", {"positions": "all"}),
    (InputError, "no heads", "resid_post", {"heads": "each"}),
    (InputError, "belongs to the loop", "state_out", {"layers": [0]}),
    (InputError, "empty", "z", {"layers": []}),
    (InputError, "batch_size", "z", {"batch_size": 0}),
]


@pytest.mark.parametrize(("kind", "part", "name", "arguments"), REFUSED)
def test_what_does_not_exist_is_said(
    kind: type[Any],
    part: str,
    name: str,
    arguments: dict[str, Any],
    injecting: LoopedTransformer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, cache = injecting.run_with_cache(CLEAN)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with refused(kind, part):
        patch_recurrences(injecting, CORRUPTED, cache, metric, name, **QUIET, **arguments)


def test_runs_that_do_not_fit_are_said(injecting: LoopedTransformer) -> None:
    _, cache = injecting.run_with_cache(CLEAN)
    arguments = (cache, metric, "z")
    with refused(InputError, "equal length", "3 positions"):
        patch_recurrences(injecting, CORRUPTED[:, :2], *arguments, **QUIET)
    with refused(InputError, "2 prompts"):
        patch_recurrences(injecting, CORRUPTED[[0, 1, 0]], *arguments, **QUIET)
    with refused(InputError, "one number"):
        patch_recurrences(injecting, CORRUPTED, cache, lambda x: x[:, 0, 0], "z", **QUIET)
    with refused(InputError, "no gradient"):
        attribute_recurrences(injecting, CORRUPTED, cache, lambda x: x.detach().sum(), "z")
    _, few = injecting.run_with_cache(CLEAN, names_filter="residual")
    with refused(MissingActivationError, "hook_z"):
        patch_recurrences(injecting, CORRUPTED, few, metric, "z", **QUIET)
    with refused(InputError, "clean_metric="):
        patch_recurrences(injecting, CORRUPTED, few, metric, "resid_post", **QUIET)


def test_no_forward_pass_has_more_rows_than_asked_for(injecting: LoopedTransformer) -> None:
    _, cache = injecting.run_with_cache(CLEAN)
    rows: list[int] = []
    with injecting.readers([("hook_embed", lambda x, hook: rows.append(x.shape[0]))]):
        patch_recurrences(injecting, CORRUPTED, cache, metric, "z", batch_size=7, **QUIET)
    assert max(rows) == 6
    assert sum(rows) == 2 + 2 * 4 * 4 * 3


def test_cells_run_alone_while_rows_are_told_apart(injecting: LoopedTransformer) -> None:
    _, cache = injecting.run_with_cache(CLEAN)
    arguments = (injecting, CORRUPTED, cache, metric, "mlp_out")
    with torch.no_grad(), injecting.intervening(SwapStates(1)):
        found = patch_recurrences(*arguments, batch_size=16, **QUIET)["difference"]
        name = "recurrence.3.blocks.1.hook_mlp_out"
        expected = by_hand(injecting, cache["mlp_out", (0, 1)], name, ALL)
    assert float(found[0, 3, 1]) == pytest.approx(expected, abs=SAME)


def test_a_repeated_recurrence_is_attributed_in_every_pass() -> None:
    model = model_of("pre-injection")
    _, corrupted = model.run_with_cache(CORRUPTED)
    for times in (1, 2):
        with model.intervening(RepeatRecurrence(1, times)):
            found = attribute_recurrences(
                model, CORRUPTED, corrupted, metric, "mlp_out", clean_metric=1.0
            )["difference"]
            by_pass: list[Tensor] = []

            def watch(x: Tensor, hook: Any, to: list[Tensor] = by_pass) -> Tensor:
                to.append((x.detach(), torch.zeros_like(x, requires_grad=True)))
                return x + to[-1][1]

            name = "recurrence.1.blocks.2.hook_mlp_out"
            value = metric(model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, watch)]))
            gradients = torch.autograd.grad(value, [leaf for _, leaf in by_pass])
        donor = corrupted["mlp_out", (3, 2)]
        expected = sum(
            float(((donor - x) * g).sum()) for (x, _), g in zip(by_pass, gradients, strict=True)
        )
        assert len(by_pass) == 1 + times
        assert float(found[3, 1, 2]) == pytest.approx(expected, rel=SAME)


def test_text_keeps_its_padding_without_a_beginning_token() -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu", dtype=torch.float64)
    texts = ["Ann went.", "Ann went to the"]
    _, cache = model.run_with_cache(texts, prepend_bos=False)
    found = patch_recurrences(
        model, texts, cache, metric, "state_out", target_recurrences=3, source_recurrences=3,
        prepend_bos=False, **QUIET,
    )  # fmt: skip
    expected = float(metric(model(texts, prepend_bos=False)).detach())
    assert found.attrs["corrupted"] == pytest.approx(expected, abs=SAME)


def test_other_masks_and_other_arguments_are_refused(injecting: LoopedTransformer) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    _, cache = injecting.run_with_cache(CLEAN)
    with refused(InputError, "-inf", "same padding"):
        attribute_recurrences(
            injecting, CORRUPTED, cache, metric, "attn_scores", attention_mask=mask.numpy()
        )
    for name, value in (("stop_at_layer", 3), ("return_type", "loss"), ("exit_rule", None)):
        with refused(InputError, f"takes no {name}"):
            patch_recurrences(injecting, CORRUPTED, cache, metric, "z", **{name: value}, **QUIET)
    with refused(InputError, "one number", "None"):
        patch_recurrences(injecting, CORRUPTED, cache, lambda x: None, "z", **QUIET)
    injecting.set_use_split_qkv_input(True)
    try:
        with refused(InputError, "runs three times"):
            patch_recurrences(
                injecting, CORRUPTED, cache, metric, "normalized", layer_type="ln1", **QUIET
            )
    finally:
        injecting.set_use_split_qkv_input(False)
