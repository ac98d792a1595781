"""Running experiments: right numbers, once, resumable, and nothing lost when something is wrong."""

from __future__ import annotations

import copy
import json
import resource
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from closeness import rounding_bound
from conftest import VARIANTS, random_config
from filelock import FileLock
from safetensors.torch import save_file

from tl_looped import DataError, InputError, LoopedTransformer
from tl_looped.experiments import store
from tl_looped.experiments.identity import folder_identity
from tl_looped.experiments.jobs import is_out_of_memory
from tl_looped.experiments.reading import specification
from tl_looped.experiments.runner import run_experiment
from tl_looped.experiments.sources import find_model
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.metrics import convergence_verdict, from_cache, stream
from tl_looped.metrics.attention_patterns import pairwise_attention_distance
from tl_looped.metrics.states import pairwise_residual_cosine
from tl_looped.progress import Progress

TEXTS = ("Tom has 3 pens.", "One two.", "Six boxes hold 4 pens each, he says.", "It is so.", "No.")
SPEC = Experiment(
    "tiny",
    prompts=PromptSet("text", texts=TEXTS),
    recurrences=3,
    metrics=("signature", "successive"),
)


@pytest.fixture(scope="module")
def tiny() -> LoopedTransformer:
    """(2, 3 x 4, 1) with injection and a tokenizer."""
    tokenizer = LoopedTransformer.from_pretrained("demo", device="meta").tokenizer
    config = random_config(**VARIANTS["pre-injection"], d_vocab=2048)
    return LoopedTransformer.from_config(config, tokenizer)


@pytest.fixture
def notices() -> list[str]:
    return []


def progress_of(notices: list[str]) -> Progress:
    return Progress(say=notices.append)


def test_results_are_those_of_the_metrics_and_are_not_computed_twice(
    tiny: LoopedTransformer, tmp_path: Path
) -> None:
    run = run_experiment(SPEC, tmp_path, model=tiny, batch_size=1)
    data = run.load()
    expected = stream(
        tiny, list(TEXTS), SPEC.metrics, by="depth", n_recurrences=3, batch_size=1, state_seed=0
    )
    assert set(data.data_vars) == set(expected.data_vars)
    for name, values in expected.items():
        np.testing.assert_array_equal(data[name].values, values.values)
    assert data["source_row"].values.tolist() == [0, 1, 2, 3, 4]
    assert {file.name for file in run.folder.iterdir()} == {"results.nc", "spec.toml", "tables"}
    assert Experiment.read(run.folder / "spec.toml") == SPEC
    assert json.loads(data.attrs["spec"]) == SPEC.to_dict()
    assert (data.attrs["format"], data.attrs["n_recurrences"]) == (1, 3)
    assert data.attrs["torch"] == torch.__version__
    assert data.attrs["hash"].startswith(run.folder.name[-8:])
    before = (run.folder / "results.nc").stat().st_mtime_ns
    again = run_experiment(SPEC, tmp_path, model=tiny)
    assert (run.is_new, again.is_new, again.folder) == (True, False, run.folder)
    assert (run.folder / "results.nc").stat().st_mtime_ns == before


def test_tables_say_what_the_results_say(tiny: LoopedTransformer, tmp_path: Path) -> None:
    run = run_experiment(SPEC, tmp_path, model=tiny)
    data = run.load()
    exact = pd.read_parquet(run.folder / "tables" / "layers.parquet")
    row = exact.set_index(["metric", "label"]).loc[("colsum_concentration", "r1.l2")]
    values = data["colsum_concentration"].sel(effective_layer=2 + 3 + 2).mean("head").values
    assert row["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert row["sd"] == pytest.approx(values.std(ddof=1), rel=1e-12)
    assert (row["effective_layer"], row["in_recurrence"], row["prompts"]) == (7, 1, 5)
    rounded = pd.read_csv(run.folder / "tables" / "layers.csv")
    assert len(rounded) == len(exact)
    prompts = pd.read_csv(run.folder / "tables" / "prompts.csv")
    assert prompts["n_tokens"].tolist() == [len(tiny.tokenize(t)[0][0]) for t in TEXTS]


def test_extras_are_what_the_cache_gives(tiny: LoopedTransformer, tmp_path: Path) -> None:
    spec = replace(SPEC, extras=("convergence", "neurons", "pairwise", "pca", "tokens"))
    data = run_experiment(spec, tmp_path, model=tiny).load()
    caches, exact = (
        [model.run_with_cache(text, n_recurrences=3)[1] for text in TEXTS]
        for model in (tiny, deepcopy(tiny).double())
    )
    for name, f, what in (
        ("pairwise_attention_distance", pairwise_attention_distance, "pattern"),
        ("pairwise_residual_cosine", pairwise_residual_cosine, "resid_post"),
    ):
        rounded, expected = (
            torch.stack([f(c.stack_activation(what)).double() for c in some]).mean(0)
            for some in (caches, exact)
        )
        bound = rounding_bound(expected, rounded)
        np.testing.assert_allclose(data[name].values, expected, atol=bound, rtol=0)
    states = [c.stack_recurrences("resid_post").double() for c in caches]
    wide = [c.stack_recurrences("resid_post") for c in exact]
    for n, pair in enumerate(zip(states, wide, strict=True)):
        rounded, cosine = (
            torch.nn.functional.cosine_similarity(x, x[-1:], dim=-1)[:, :, 0] for x in pair
        )
        bound = rounding_bound(cosine, rounded)
        found = data["token_similarity"].isel(prompt=n).transpose("recurrence", "layer", "token")
        one = found.values[..., : cosine.shape[-1]]
        np.testing.assert_allclose(one, cosine, atol=bound, rtol=0)
        assert np.isnan(found.values[..., cosine.shape[-1] :]).all()
    assert "token_cosine" not in data
    # Distances in the plane of all components are those of the states.
    path, last = data["pca"].values, states[0][:, :, 0, -1].numpy()
    assert path.shape == (3, 3, 3)
    assert data["pca_explained"].values.sum() <= 1 + 1e-6
    assert np.linalg.norm(path - path[-1, -1]) <= np.linalg.norm(last - last[-1, -1]) + 1e-6
    verdicts = convergence_verdict(stream(tiny, list(TEXTS), "all", by="depth", n_recurrences=3))
    np.testing.assert_array_equal(data["verdict"].values, verdicts["verdict"].values)
    assert data.sizes["unique_layer"] == 6
    assert ((data["prediction"] >= 0) & (data["prediction"] <= 1)).all()


def test_limiting_needs_a_window_and_says_so_at_once(tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="set recurrences = 65 or more"):
        run_experiment(replace(SPEC, extras=("limiting",)), tmp_path, model=tiny)
    assert not list(tmp_path.iterdir())


def test_a_part_comes_back_as_it_was(tiny, tmp_path: Path) -> None:
    data = stream(tiny, list(TEXTS), "all", by="depth", n_recurrences=3)
    path = store.write_part(data.assign_coords(label=data["label"]), tmp_path / "a.npz")
    assert store.read_part(path).identical(data)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a\.npz is damaged"):
        store.read_part(path)


# -- stopping and going on ----------------------------------------------------------------------


def same(a: xr.Dataset, b: xr.Dataset) -> bool:
    """Bit for bit, attributes and all."""
    return a.identical(b) and list(a.attrs) == list(b.attrs)


def test_an_interrupted_run_goes_on_to_the_same_bits(tiny, tmp_path: Path) -> None:
    spec = replace(SPEC, extras=("pairwise",), batching="padded")

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(
            spec, tmp_path / "a", model=tiny, batch_size=2, progress=Progress(advance=stop)
        )
    (folder,) = (tmp_path / "a").iterdir()
    assert len(list((folder / "parts").glob("*.npz"))) == 1
    assert not (folder / "results.nc").exists()
    seen: list[tuple[int, int]] = []
    done: list[int] = []
    progress = Progress(
        start=lambda total, before: seen.append((total, before)), advance=done.append
    )
    resumed = run_experiment(spec, tmp_path / "a", model=tiny, progress=progress)
    assert (seen, done) == ([(5, 2)], [2, 1])  # the batch size of the first call is kept
    whole = run_experiment(spec, tmp_path / "b", model=tiny, batch_size=2)
    assert same(resumed.load(), whole.load())


def test_a_damaged_part_is_run_again(tiny, tmp_path: Path, notices: list[str]) -> None:
    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(SPEC, tmp_path, model=tiny, batch_size=1, progress=Progress(advance=stop))
    (part,) = tmp_path.glob("*/parts/*.npz")
    part.write_bytes(part.read_bytes()[:1000])
    run = run_experiment(SPEC, tmp_path, model=tiny, progress=progress_of(notices))
    assert "damaged" in notices[0]
    assert run.load().sizes["prompt"] == 5


def test_memory_running_out_halves_the_batch_and_says_so(
    tiny, tmp_path: Path, notices: list[str]
) -> None:
    spec = replace(SPEC, batching="padded")
    sizes = []

    def small_memory(x: torch.Tensor, hook: object) -> None:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(x))

    with tiny.hooks(fwd_hooks=[("blocks.3.hook_resid_post", small_memory)]):
        run = run_experiment(spec, tmp_path / "a", model=tiny, progress=progress_of(notices))
        assert notices == ["out of memory with 5 prompts at a time: going on with 2"]
        assert sorted(set(sizes)) == [1, 2]
        with pytest.raises(DataError, match=r"out of memory with 5 prompts.*'auto'"):
            run_experiment(spec, tmp_path / "b", model=tiny, batch_size=5)
    by_two = run_experiment(spec, tmp_path / "c", model=tiny, batch_size=2)
    assert same(run.load(), by_two.load())


def test_one_prompt_too_many_for_the_memory_is_an_error(tiny, tmp_path: Path) -> None:
    def no_memory(x: torch.Tensor, hook: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with (
        tiny.hooks(fwd_hooks=[("blocks.3.hook_resid_post", no_memory)]),
        pytest.raises(DataError, match=r"a single prompt of \d+ tokens"),
    ):
        run_experiment(SPEC, tmp_path, model=tiny)


def test_other_errors_are_not_taken_for_memory(tiny, tmp_path: Path) -> None:
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))

    def broken(x: torch.Tensor, hook: object) -> None:
        raise RuntimeError("mistake in a hook")

    with (
        tiny.hooks(fwd_hooks=[("blocks.3.hook_resid_post", broken)]),
        pytest.raises(RuntimeError, match="mistake in a hook"),
    ):
        run_experiment(SPEC, tmp_path, model=tiny)


# -- bad input ----------------------------------------------------------------------------------


def test_prompts_beyond_the_context_are_left_out_or_cut_and_counted(
    tiny, tmp_path: Path, notices: list[str]
) -> None:
    long = " ".join(["pens"] * 100)
    texts = (*TEXTS[:2], long, TEXTS[3])
    skip = replace(SPEC, prompts=PromptSet("text", texts=texts))
    data = run_experiment(skip, tmp_path, model=tiny, progress=progress_of(notices)).load()
    assert "1 of 4 prompts are longer than the context of 64 tokens and are left out" in notices
    assert data["source_row"].values.tolist() == [0, 1, 3]
    assert (data.attrs["prompts_too_long"], data.attrs["prompts_run"]) == (1, 3)
    cut = replace(SPEC, prompts=PromptSet("text", texts=texts, too_long="truncate"))
    data = run_experiment(cut, tmp_path, model=tiny, progress=progress_of(notices)).load()
    assert "1 prompts were cut to the context of 64 tokens" in notices
    assert data["n_tokens"].values.tolist()[2] == 64
    assert (data.attrs["prompts_truncated"], data.attrs["prompts_too_long"]) == (1, 0)
    only = replace(SPEC, prompts=PromptSet("text", texts=(long,)))
    with pytest.raises(DataError, match=r"all 1 are longer.*64 tokens.*truncate"):
        run_experiment(only, tmp_path, model=tiny)


def test_a_prompt_of_exactly_the_context_is_whole(tiny, tmp_path: Path) -> None:
    text = "1" * 64  # digits are tokens of their own
    n_bos = len(tiny.tokenize("1")[0][0]) - 1
    spec = replace(SPEC, prompts=PromptSet("text", texts=(text[n_bos:],)))
    data = run_experiment(spec, tmp_path, model=tiny).load()
    assert data["n_tokens"].values.tolist() == [64]
    assert data.attrs["prompts_too_long"] == 0


def test_results_of_another_format_or_damaged_are_kept_beside(
    tiny, tmp_path: Path, notices: list[str]
) -> None:
    run = run_experiment(SPEC, tmp_path, model=tiny)
    good = run.load()
    path = run.folder / "results.nc"
    path.write_bytes(bytes(good.assign_attrs(format=99).to_netcdf(engine="h5netcdf")))
    with pytest.raises(DataError, match=r"format 99.*reads format 1"):
        run.load()
    other = path.read_bytes()
    again = run_experiment(SPEC, tmp_path, model=tiny, progress=progress_of(notices))
    assert again.is_new
    assert "kept as results.old-1.nc" in notices[0]
    assert (run.folder / "results.old-1.nc").read_bytes() == other
    assert same(again.load(), good)
    path.write_bytes(path.read_bytes()[:-100])
    run_experiment(SPEC, tmp_path, model=tiny, progress=progress_of(notices))
    assert "damaged" in notices[1]
    assert (run.folder / "results.old-2.nc").exists()


def test_a_full_disk_is_one_message_and_loses_nothing(tiny, tmp_path: Path) -> None:
    """The system itself refuses files above 4 KiB, as it would refuse all on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(DataError, match=r"parts/.*cannot be written.*make room"):
            run_experiment(SPEC, tmp_path, model=tiny, batch_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (folder,) = tmp_path.iterdir()
    assert {file.name for file in (folder / "parts").iterdir()} == {"plan.json", ".lock"}
    run = run_experiment(SPEC, tmp_path, model=tiny)
    assert run.load().sizes["prompt"] == 5


def test_arguments_out_of_range(tiny, tmp_path: Path) -> None:
    for size in (0, -1, "many", True):
        with pytest.raises(InputError, match="batch_size"):
            run_experiment(SPEC, tmp_path, model=tiny, batch_size=size)
    with pytest.raises(InputError, match="says bfloat16"):
        run_experiment(replace(SPEC, dtype="bfloat16"), tmp_path, model=tiny)
    with pytest.raises(DataError, match="there is no"):
        store.read_dataset(tmp_path / "results.nc")
    with pytest.raises(DataError, match="holds no finished run"):
        store.find_runs(tmp_path)


def test_a_changed_model_is_another_run(tiny, tmp_path: Path) -> None:
    """In memory and on disk, where only one layer's values change, not sizes or names."""
    spec = replace(SPEC, model=str(tmp_path / "model"))
    tiny.save_pretrained(tmp_path / "model")
    first = find_model(spec).identity
    assert find_model(spec).identity == first
    other = LoopedTransformer.from_config(tiny.cfg, tiny.tokenizer)
    assert find_model(spec, other).identity == find_model(spec, tiny).identity
    with torch.no_grad():
        other.core[1].mlp.down.mul_(1.001)
    assert find_model(spec, other).identity != find_model(spec, tiny).identity
    other.save_pretrained(tmp_path / "model")
    assert find_model(spec).identity != first


def test_numbers_do_not_depend_on_how_a_model_comes(tiny, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "model")
    spec = replace(SPEC, model=str(tmp_path / "model"))
    loaded = run_experiment(spec, tmp_path, device="cpu").load()
    given = run_experiment(SPEC, tmp_path, model=tiny).load()
    for name in given.data_vars:
        np.testing.assert_array_equal(loaded[name].values, given[name].values)
    cache = tiny.run_with_cache(TEXTS[0], n_recurrences=3)[1]
    one = from_cache(cache, "signature", by="depth")
    np.testing.assert_allclose(given["sink_rate"][:, :1], one["sink_rate"], atol=1e-6)


def test_a_model_in_memory_is_known_by_its_tokenizer_too(tiny) -> None:
    spec = replace(SPEC, model="in memory")
    before = find_model(spec, tiny).identity
    tokenizer = tiny.tokenizer
    try:
        tiny.tokenizer = copy.deepcopy(tokenizer)
        assert find_model(spec, tiny).identity == before
        tiny.tokenizer.add_tokens(["dog"])
        assert find_model(spec, tiny).identity != before
    finally:
        tiny.tokenizer = tokenizer


def test_every_tensor_of_a_large_file_is_looked_at(tmp_path: Path) -> None:
    weights = {"large": torch.zeros(2_000_000), "small": torch.zeros(16)}
    (tmp_path / "config.json").write_text("{}")
    save_file(weights, tmp_path / "model.safetensors")
    before = folder_identity(tmp_path)
    weights["small"][7] = 1
    save_file(weights, tmp_path / "model.safetensors")
    assert folder_identity(tmp_path) != before
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 2_000_000)  # damaged: still something to tell it by
    assert len(folder_identity(tmp_path)) == 64


def test_another_model_to_compare_with_is_written_down_and_nothing_is_run(
    tiny, tmp_path: Path
) -> None:
    first = run_experiment(replace(SPEC, feedforward="a"), tmp_path, model=tiny)
    again = run_experiment(replace(SPEC, feedforward="b"), tmp_path, model=tiny)
    assert (first.is_new, again.is_new, again.folder) == (True, False, first.folder)
    assert specification(again.load())["feedforward"] == "b"
    assert Experiment.read(again.folder / "spec.toml").feedforward == "b"
    none = run_experiment(SPEC, tmp_path, model=tiny)
    assert "feedforward" not in specification(none.load())


def test_two_processes_do_not_work_in_one_folder(tiny, tmp_path: Path) -> None:
    done = run_experiment(SPEC, tmp_path, model=tiny)
    (done.folder / "results.nc").unlink()
    (done.folder / "parts").mkdir()
    with (
        FileLock(done.folder / "parts" / ".lock"),
        pytest.raises(DataError, match="another process is running this experiment"),
    ):
        run_experiment(SPEC, tmp_path, model=tiny)
    assert run_experiment(SPEC, tmp_path, model=tiny).is_new
