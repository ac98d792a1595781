"""Feedforward models beside looped ones: their metrics, mirroring scores and clusters."""

from __future__ import annotations

import shutil
import weakref
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import rounding_bound
from conftest import VARIANTS, random_config
from transformers import LlamaConfig, LlamaForCausalLM

from tl_looped import CheckpointError, InputError, LoopedTransformer
from tl_looped.checkpoints import BUNDLED, read_tokenizer
from tl_looped.experiments import jobs
from tl_looped.experiments.compare import compare_runs, load_runs
from tl_looped.experiments.engines import load_engine
from tl_looped.experiments.runner import run_experiment
from tl_looped.experiments.sources import find_model
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.metrics import from_cache, pairwise_from_cache
from tl_looped.metrics.depth_curves import mean_curve
from tl_looped.model.bos import adds_bos

TEXTS = ("Tom has 3 pens.", "Six boxes hold 4 pens each, he says.", "It is so, is it?")
PROMPTS = PromptSet("text", texts=TEXTS)
LAYERS = 5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as Hugging Face saves it, with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED["demo"] / name, folder)
    return folder


@pytest.fixture(scope="module")
def runs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A looped run, the Llama's, and one of a control: a LoopedConfig of one recurrence."""
    out = tmp_path_factory.mktemp("runs")
    tokenizer = LoopedTransformer.from_pretrained("demo", device="meta").tokenizer
    looped = LoopedTransformer.from_config(
        random_config(**VARIANTS["pre-injection"], d_vocab=2048), tokenizer
    )
    control = LoopedTransformer.from_config(
        random_config(d_vocab=2048, n_prelude=0, n_coda=0, n_core=6, n_recurrences=1), tokenizer
    )
    for name, model in (("looped", looped), ("control", control)):
        run_experiment(Experiment(name, prompts=PROMPTS), out, model=model)
    spec = Experiment(str(llama), kind="feedforward", prompts=PROMPTS, extras=("neurons",))
    run_experiment(spec, out, device="cpu", batch_size=1)
    return out


def test_metrics_are_those_of_transformers_own_run(llama: Path, runs: Path) -> None:
    (data,) = (d for d in load_runs([runs]).values() if d.attrs["kind"] == "feedforward")
    model = LlamaForCausalLM.from_pretrained(llama, attn_implementation="eager").eval()
    models = (model, deepcopy(model).double())
    tokenizer = LoopedTransformer.from_pretrained("demo", device="meta").tokenizer
    assert (data.attrs["kind"], data.attrs["n_core"]) == ("feedforward", LAYERS)
    for n, text in enumerate(TEXTS):
        tokens = torch.tensor([tokenizer.encode(text)])  # this tokenizer adds no BOS by itself
        assert data["n_tokens"].values[n] == tokens.shape[1]
        with torch.no_grad():
            outs = [m(tokens, output_attentions=True, output_hidden_states=True) for m in models]
        shares = [torch.stack(o.attentions)[:, 0].double().mean(-2) for o in outs]
        length = tokens.shape[1]  # of [layer, head, key]
        rounded, colsum = (1 - torch.special.entr(x).sum(-1) / np.log(length) for x in shares)
        found = data["colsum_concentration"].isel(prompt=n).transpose("effective_layer", "head")
        bound = rounding_bound(colsum, rounded)
        np.testing.assert_allclose(found.values, colsum, atol=bound, rtol=0)
        # The last hidden state of transformers is behind the final norm.
        rounded, norms = (
            torch.stack(o.hidden_states[1:-1])[:, 0].double().norm(dim=-1) for o in outs
        )
        found = data["residual_mean"].isel(prompt=n).values[:-1]
        bound = rounding_bound(norms, rounded)
        np.testing.assert_allclose(found, norms.mean(-1), atol=bound, rtol=0)


def test_layers_are_read_as_they_run_and_no_pattern_is_kept(llama: Path) -> None:
    """The numbers of a cache of the whole run, which would hold the attention of every layer."""
    spec = Experiment(str(llama), kind="feedforward", metrics=("all",), prompts=PROMPTS)
    engine = load_engine(spec, find_model(spec), "cpu")
    row = torch.randint(5, 2000, (7,), generator=torch.Generator().manual_seed(0))
    _, cache = engine.model.run_with_cache(row[None], attention_mask=torch.ones_like(row[None]))
    wanted = from_cache(cache, spec.metrics, by="depth")
    matrices = pairwise_from_cache(cache)
    del cache
    patterns: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def look(x: torch.Tensor, hook: object) -> None:
        alive.append(sum(pattern() is not None for pattern in patterns))
        patterns.append(weakref.ref(x))

    hooks = [(f"blocks.{i}.attn.hook_pattern", look) for i in range(LAYERS)]
    with engine.model.hooks(fwd_hooks=hooks):
        found = engine.run([row])
    assert len(alive) == LAYERS
    assert max(alive) <= 1  # the last layer's, where it is not yet let go
    assert list(found.data_vars) == list(wanted.data_vars)
    for name in found.data_vars:
        np.testing.assert_array_equal(found[name].values, wanted[name].values, err_msg=str(name))
    pairs = engine.pairwise(row)
    for name in pairs.data_vars:
        np.testing.assert_allclose(pairs[name].values, matrices[name].values, atol=1e-12)


@pytest.mark.parametrize(("extras", "needed"), [((), 2 * 4 * 4 * 9**2), (("pairwise",), 2**25)])
def test_what_cannot_fit_the_memory_is_refused_before_anything_runs(
    llama: Path, tmp_path: Path, monkeypatch, extras: tuple[str, ...], needed: int
) -> None:
    text = PromptSet("text", texts=("1" * 9,))
    spec = Experiment(
        str(llama), kind="feedforward", prompts=text, extras=extras, prepend_bos=False
    )
    monkeypatch.setattr(jobs, "free_bytes", lambda device: needed - 1)
    with pytest.raises(InputError, match=r"the attention of 9 tokens.*of memory at least"):
        run_experiment(spec, tmp_path, device="cpu")
    assert not list(tmp_path.rglob("*.npz"))


def test_each_looped_run_is_compared_with_each_feedforward_one(runs: Path) -> None:
    found = load_runs([runs])
    comparison = compare_runs(found)
    assert sorted(comparison.runs["feedforward"]) == [False, True, True]
    assert comparison.notices == ()
    # 4 metrics, whole and block alone, 4 recurrences, 2 feedforward models.
    assert len(comparison.mirroring) == 4 * 2 * 4 * 2
    assert comparison.mirroring["same_prompts"].all()
    assert comparison.mirroring["pearson"].dropna().abs().max() <= 1
    assert len(comparison.clusters) == 4 * 2
    (looped,) = (name for name in found if name.startswith("looped"))
    curve = comparison.curves.query("run == @looped and metric == 'sink_rate' and recurrence == 2")
    assert curve["depth"].tolist() == [0, 20, 40, 60, 80, 100]
    by_depth = mean_curve(found[looped], "sink_rate")
    assert curve["value"].tolist() == by_depth[[0, 1, 8, 9, 10, 14]].tolist()


def test_a_virtual_model_with_the_feedforward_curve_mirrors_it(runs: Path) -> None:
    """Give the looped run the control's numbers in the last block: score 1, and only there."""
    found = load_runs([runs])
    (looped,) = (name for name in found if name.startswith("looped"))
    (control,) = (name for name in found if name.startswith("control"))
    data, other = found[looped].copy(deep=True), found[control]
    places = [0, 1, 11, 12, 13, 14]
    for name in data.data_vars:
        if "effective_layer" in data[name].dims and name in other:
            data[name].values[places] = other[name].values
    comparison = compare_runs({"looped": data, "control": other})
    whole = comparison.mirroring.query("curve == 'whole' and recurrence == 3")
    scored = whole.dropna()
    assert len(scored) >= 3
    assert scored["pearson"].to_numpy() == pytest.approx(1)
    assert whole["rmse"].to_numpy() == pytest.approx(0)
    assert (scored["lag"] == 0).all()
    last = comparison.clusters.query("recurrence == 3").iloc[0]
    assert last["stages"] == last["feedforward_stages"]
    assert (last["agreement"], last["rand_index"]) == (1, 1)


def test_a_run_says_of_its_tokenizer_what_the_tokenizer_does(llama: Path, tmp_path: Path) -> None:
    """TransformerBridge makes its copy of a tokenizer add BOS, which is not that one's habit."""
    assert not adds_bos(read_tokenizer(llama))
    lengths = []
    for prepend_bos in (None, True, False):
        spec = Experiment(
            str(llama),
            kind="feedforward",
            prompts=PROMPTS,
            metrics=("magnitude",),
            prepend_bos=prepend_bos,
        )
        data = run_experiment(spec, tmp_path, device="cpu").load()
        assert "adds none" in data.attrs["bos"]
        lengths.append(data["n_tokens"].values)
    assert lengths[0].tolist() == lengths[2].tolist() == (lengths[1] - 1).tolist()


def test_runs_that_were_read_differently_are_told_apart(tmp_path: Path) -> None:
    tokenizer = LoopedTransformer.from_pretrained("demo", device="meta").tokenizer
    model = LoopedTransformer.from_config(
        random_config(**VARIANTS["pre-injection"], d_vocab=2048), tokenizer
    )
    usual = Experiment(
        "looped",
        prompts=PROMPTS,
        metrics=("signature",),
        extras=(),
        recurrences=2,
        prepend_bos=True,
    )
    specs = (
        usual,
        replace(usual, prepend_bos=False),
        replace(usual, skip_first=2),
        replace(usual, state_seed=3),
        replace(usual, ablate_mlp=("core.1",)),
    )
    found = {
        name: run_experiment(spec, tmp_path, model=model).load()
        for name, spec in zip("abcde", specs, strict=True)
    }
    table = compare_runs(found).runs
    assert table["bos"].tolist() == ["yes", "no", "yes", "yes", "yes"]
    assert table["skip_first"].tolist() == [0, 0, 2, 0, 0]
    assert table["state_seed"].tolist() == ["0", "0", "0", "3", "0"]
    assert table["ablated"].tolist() == ["", "", "", "", "core.1"]


def test_other_prompts_and_missing_partners_are_said(runs: Path) -> None:
    found = load_runs([runs])
    (looped,) = (name for name in found if name.startswith("looped"))
    (control,) = (name for name in found if name.startswith("control"))
    fewer = found[control].isel(prompt=slice(2))
    comparison = compare_runs({"a": found[looped], "b": fewer})
    assert comparison.notices == ("a and b did not run the same prompts",)
    assert not comparison.mirroring["same_prompts"].any()
    alone = compare_runs({"a": found[looped], "b": found[looped]})
    assert "a looped run and a feedforward one" in alone.notices[0]
    with pytest.raises(InputError, match="at least two runs"):
        compare_runs({"a": found[looped]})
    with pytest.raises(InputError, match="two runs are called"):
        load_runs([runs, runs])


def test_feedforward_models_that_are_not_there(tmp_path: Path, llama: Path) -> None:
    spec = Experiment(str(tmp_path), kind="feedforward", prompts=PROMPTS)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        find_model(spec)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="TransformerLens cannot load"):
        run_experiment(spec, tmp_path / "out", device="cpu")
    assert find_model(replace(spec, model=str(llama))).recurrences == 1
