"""Ablations, confirmed verdicts, patterns and the disk: against the model's own runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from closeness import rounding_bound

from tl_looped import ConfigError, InputError, LayerIndexError, LoopedTransformer
from tl_looped.experiments import engines
from tl_looped.experiments.runner import run_experiment
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.metrics import (
    CONVERGENCE,
    Verdict,
    by_recurrence,
    convergence_verdict,
    stream,
)

TEXTS = ("Tom has 3 pens and 4 boxes.", "It is so, is it?", "She reads 12 pages.")
R = 5
SPEC = Experiment("demo", prompts=PromptSet("text", texts=TEXTS), recurrences=R)


@pytest.fixture(scope="module")
def demo() -> LoopedTransformer:
    return LoopedTransformer.from_pretrained("demo", device="cpu")


def run(spec: Experiment, out: Path, model: LoopedTransformer | None = None) -> xr.Dataset:
    return run_experiment(spec, out, model=model, device="cpu", batch_size=2).load()


def test_an_ablated_layer_writes_its_attention_alone(demo, tmp_path: Path) -> None:
    data = run(replace(SPEC, ablate_mlp=("prelude.1",)), tmp_path)
    demo64 = LoopedTransformer.from_pretrained("demo", device="cpu", dtype=torch.float64)
    for prompt, text in enumerate(TEXTS):
        _, cache = demo.run_with_cache(text, n_recurrences=R)  # without the ablation
        _, exact = demo64.run_with_cache(text, n_recurrences=R)
        norms, wide = (c["prelude.1.hook_resid_mid"][0].norm(dim=-1) for c in (cache, exact))
        found = data["residual_mean"].sel(effective_layer=1, prompt=prompt)
        assert float(found) == pytest.approx(wide.mean().item(), abs=rounding_bound(wide, norms))


@pytest.mark.full
def test_an_ablated_core_layer_is_one_without_mlp_weights(tmp_path: Path) -> None:
    without = LoopedTransformer.from_pretrained("demo", device="cpu")
    with torch.no_grad():
        without.core[2].mlp.down.zero_()
        without.coda[0].mlp.down.zero_()
    wanted = run(replace(SPEC, extras=("pca",)), tmp_path, without)
    spec = replace(SPEC, extras=("pca",), ablate_mlp=("core.2", "coda.0"))
    found = run(spec, tmp_path)
    assert set(found.data_vars) == set(wanted.data_vars)
    for name in found.data_vars:
        np.testing.assert_array_equal(found[name].values, wanted[name].values, err_msg=str(name))
    plain = run(SPEC, tmp_path)
    assert (plain["residual_mean"] != found["residual_mean"]).any("prompt").values[5:].all()


def test_the_reference_run_of_an_ablation_is_ablated_throughout(tmp_path: Path) -> None:
    """The first R recurrences of 2R, compared with the last of 2R: by either door."""
    spec = replace(SPEC, metrics=("fixed_point",), ablate_mlp=("core.1",))
    against = by_recurrence(run(replace(spec, reference_recurrences=2 * R), tmp_path))
    whole = by_recurrence(run(replace(spec, recurrences=2 * R), tmp_path))
    for name in ("fixed_point_abs", "fixed_point_attention"):
        wanted = whole[name].isel(recurrence=slice(R))
        np.testing.assert_array_equal(against[name].values, wanted.values)


def test_no_ablation_stays_on_a_model(demo, tmp_path: Path) -> None:
    before = demo(TEXTS[0])
    run(replace(SPEC, ablate_mlp=("core.0",)), tmp_path, demo)
    assert torch.equal(demo(TEXTS[0]), before)


@pytest.mark.parametrize("name", ["1", "blocks.1", "core.-1", "core.01", "core.", "coda.0.mlp"])
def test_names_that_are_no_layer(name: str) -> None:
    with pytest.raises(ConfigError, match=r'layers are named "prelude.1"'):
        replace(SPEC, ablate_mlp=(name,))


def test_layers_that_are_not_there(demo, tmp_path: Path) -> None:
    with pytest.raises(LayerIndexError, match=r"core layer 4 is out of range: the run has 0\.\.3"):
        run(replace(SPEC, ablate_mlp=("core.4",)), tmp_path)


def test_a_confirmed_verdict_is_that_of_the_states_of_twice_the_recurrences(
    demo, tmp_path: Path
) -> None:
    data = run(replace(SPEC, extras=("confirm",)), tmp_path)
    assert data.attrs["confirmed"] == 1
    alone = run(replace(SPEC, extras=("convergence",)), tmp_path)
    assert alone.attrs["confirmed"] == 0
    for prompt, text in enumerate(TEXTS):
        _, cache = demo.run_with_cache(text, n_recurrences=2 * R)
        states = cache.stack_recurrences("resid_post")[:, :, 0]
        wanted = convergence_verdict(states[:R, :, None], states[:, :, None])
        found = data.isel(prompt=prompt)
        assert Verdict(int(found["verdict"])) is Verdict(int(wanted.verdict))
        assert float(found["rate"]) == pytest.approx(float(wanted.rate), rel=1e-3, nan_ok=True)


@pytest.mark.full
def test_the_longer_run_takes_the_same_kernels(demo, tmp_path: Path, monkeypatch) -> None:
    """A chaotic loop would turn the rounding of other kernels into another way to go."""
    seen = []

    def spy(data: xr.Dataset, longer: xr.Dataset, **others: bool) -> xr.Dataset:
        seen.append((data, longer))
        return convergence_verdict(data, longer, **others)

    monkeypatch.setattr(engines, "convergence_verdict", spy)
    run(replace(SPEC, extras=("confirm",)), tmp_path)
    for data, longer in seen:
        norms = [by_recurrence(one)["residual_mean"].values for one in (data, longer)]
        np.testing.assert_array_equal(norms[0], norms[1][:R])
    assert sum(data.sizes["prompt"] for data, _ in seen) == len(TEXTS)


def test_runs_that_part_for_rounding_get_a_verdict_if_their_start_is_known(demo) -> None:
    data = stream(demo, list(TEXTS), CONVERGENCE, by="depth", n_recurrences=R)
    longer = stream(demo, list(TEXTS), CONVERGENCE, by="depth", n_recurrences=2 * R)
    apart = longer.assign(residual_mean=longer["residual_mean"] * 1.1)
    with pytest.raises(InputError, match="longer belongs to another run"):
        convergence_verdict(data, apart)
    found = convergence_verdict(data, apart, same_start=True)
    wanted = convergence_verdict(data, longer)
    assert found["verdict"].equals(wanted["verdict"])


def test_patterns_are_those_of_the_first_prompt(demo, tmp_path: Path) -> None:
    data = run(replace(SPEC, extras=("patterns",)), tmp_path)
    _, cache = demo.run_with_cache(TEXTS[0], n_recurrences=R)
    wanted = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"][0] for i in range(4 + 4 * R)])
    np.testing.assert_array_equal(data["pattern"].values, wanted.numpy())
    assert data["pattern_token"].values.tolist() == demo.to_str_tokens(TEXTS[0])


def test_too_many_patterns_are_refused_before_anything_runs(tmp_path: Path) -> None:
    long = PromptSet("text", texts=("Tom has 3 pens. " * 30,))
    spec = replace(SPEC, prompts=long, extras=("patterns",), recurrences=2000)
    with pytest.raises(InputError, match=r"patterns.*GiB.*fewer recurrences"):
        run(spec, tmp_path)


@pytest.mark.full
def test_states_on_disk_and_a_second_run_give_the_same_bits(tmp_path: Path, monkeypatch) -> None:
    spec = replace(SPEC, extras=("confirm",))
    on_disk = run(spec, tmp_path / "disk")
    monkeypatch.setattr(engines, "_LARGEST_SPILL", 0)
    assert run(spec, tmp_path / "second").identical(on_disk)


@pytest.mark.parametrize("extra", ["confirm", "convergence", "limiting"])
def test_verdicts_need_the_runs_own_end(extra: str) -> None:
    with pytest.raises(ConfigError, match="leave reference_recurrences out"):
        replace(SPEC, reference_recurrences=10, extras=(extra,))
