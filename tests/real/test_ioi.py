"""The indirect-object task on pretrained weights: heads by name, and across recurrences.

Heads are numbered as in TransformerLens's L17H4; the weights are the Q4_1 quantisation of
SmolLM2-135M-Instruct, dequantised. What is said of heads is found on one template and two pairs of
names, and holds on others too.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pandas as pd
import pytest
import torch
from closeness import rounding_bound
from torch import Tensor
from transformer_lens import patching as tl_patching
from transformers import LlamaForCausalLM

from real.ioi import (
    AGAINST_OBJECT,
    AGAINST_SUBJECT,
    CORE,
    EACH,
    EVERYWHERE,
    FOUND_ON,
    HELD_OUT,
    IN_CORE,
    INDUCTION,
    INHIBITION,
    LATE,
    N_HEADS,
    N_LAYERS,
    SIX,
    Head,
    Names,
    Task,
    clean_run,
)
from real.test_loops import ByHand
from tl_looped import LoopedActivationCache, LoopedTransformer
from tl_looped.patching import patch_recurrences


@pytest.fixture(scope="module")
def model(virtual: Callable[..., LoopedTransformer]) -> LoopedTransformer:
    """Every layer once; the layers that read names, 17 to 24, are the core."""
    return virtual(CORE)


@pytest.fixture(scope="module")
def task(tokenizer: Any) -> Task:
    return Task.of(tokenizer, *FOUND_ON)


@pytest.fixture(scope="module")
def clean(model: LoopedTransformer, task: Task) -> tuple[LoopedActivationCache, float]:
    return clean_run(model, task)


@pytest.fixture(scope="module")
def rounding(model: LoopedTransformer, task: Task) -> float:
    """How far two runs of the same mathematics may be apart, in nats of a logit difference.

    Of the longest run here, five recurrences; the shorter ones round less. A patched run takes
    explicit attention where a plain one takes the fused kernel, and cells share batches.
    """
    with torch.no_grad():
        exact = deepcopy(model).double()(task.corrupted, n_recurrences=5)
        bound = 2 * rounding_bound(exact, model(task.corrupted, n_recurrences=5))
    assert bound < 0.02
    return bound


# -- the task ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "names"), EVERYWHERE)
def test_prompts_differ_in_one_name_of_one_token(
    tokenizer: Any, template: str, names: Names
) -> None:
    task = Task.of(tokenizer, template, names)
    assert task.answers.shape == (4, 2)
    assert ((task.clean != task.corrupted).sum(1) == 1).all()
    rows = torch.arange(4)
    last = task.places(1, 1)
    assert torch.equal(task.clean[rows, last], task.answers[:, 1])
    assert torch.equal(task.corrupted[rows, last], task.answers[:, 0])
    # Two prompts of each kind.
    assert (task.places(0, 0) < task.places(1, 0)).tolist() == [True, True, False, False]


def test_the_model_knows_who_is_given_it(model: LoopedTransformer, tokenizer: Any) -> None:
    right, first = [], []
    for i, (template, own) in enumerate(EVERYWHERE):
        for names in (own, EVERYWHERE[i - 1][1]):
            task = Task.of(tokenizer, template, names)
            logits = model(task.clean)
            right += (task.differences(logits) > 0).tolist()
            first += (logits[:, -1].argmax(-1) == task.answers[:, 0]).tolist()
    assert len(right) == 32
    # Half of the prompts would be right by chance, and no word in 49,152 would be the name.
    assert sum(right) >= 0.95 * len(right)
    assert sum(first) >= 0.9 * len(first)


@pytest.mark.parametrize("core", [range(12, 18), CORE], ids=["12-17", "17-24"])
def test_logit_differences_are_those_of_transformers_layers(
    virtual: Callable[..., LoopedTransformer], hf: LlamaForCausalLM, task: Task, core: range
) -> None:
    model = virtual(core)
    by_hand = ByHand(hf, task.clean)
    means = []
    for n in (4, 2, 1):
        found = task.differences(model(task.clean, n_recurrences=n))
        if n == 4:  # the longest run rounds most
            in_fp64 = deepcopy(model).double()(task.clean, n_recurrences=4)
            bound = rounding_bound(task.differences(in_fp64), found)
            assert bound < 0.01  # of differences of several nats
        layers = [*range(core.start), *(list(core) * n), *range(core.stop, N_LAYERS)]
        expected = by_hand.read_out(by_hand.through(by_hand.embedded, layers))
        torch.testing.assert_close(found, task.differences(expected), atol=bound, rtol=0.0)
        means.append(float(found.mean()))
    assert abs(means[-1] - float(task.difference(hf(task.clean).logits))) < bound
    # Repeating layers that were not trained for it costs the answer, little by little.
    assert means == sorted(means)
    assert means[-1] > 2 * means[0] > 0


# -- patching in the model as it was trained -----------------------------------------------------


def by_hand(model: LoopedTransformer, cache: Any, corrupted: Any, task: Task) -> dict[Head, float]:
    """Effects of single heads by a raw hook, all heads of a layer in one run from there on."""
    n = len(task.clean)
    worst = float(task.difference(corrupted["unembed.hook_out"]))
    best = float(task.difference(cache["unembed.hook_out"]))
    effects = {}
    for layer in LATE:

        def put(z: Tensor, hook: Any) -> Tensor:
            for h, rows in zip(EACH, z.split(n), strict=True):
                rows[:, :, h] = cache[hook.name][:, :, h]
            return z

        stream = corrupted["resid_pre", layer].repeat(N_HEADS, 1, 1)
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", put)]):
            ends = model(stream, start_at_layer=layer, stop_at_layer=N_LAYERS)
        logits = model.unembed(model.ln_final(ends[:, -1:]))
        for h, rows in zip(EACH, logits.split(n), strict=True):
            effects[layer, h] = (float(task.difference(rows)) - worst) / (best - worst)
    return effects


@pytest.fixture(scope="module")
def effects(
    model: LoopedTransformer, task: Task, clean: tuple[LoopedActivationCache, float]
) -> dict[Head, float]:
    """Effects on the prompts that were searched."""
    with torch.no_grad():
        corrupted = model.run_with_cache(task.corrupted)[1]
        return by_hand(model, clean[0], corrupted, task)


def largest(effects: dict[Head, float], n: int) -> set[Head]:
    return set(sorted(effects, key=lambda head: -abs(effects[head]))[:n])


def test_six_heads_stand_out(effects: dict[Head, float]) -> None:
    assert largest(effects, 6) == SIX
    assert largest(effects, 1) == {AGAINST_SUBJECT}
    sizes = sorted((abs(value) for value in effects.values()), reverse=True)
    assert sizes[5] - sizes[6] > 0.25 * sizes[5]
    assert {head for head in SIX if effects[head] < 0} == {AGAINST_OBJECT, (29, 0)}


@pytest.mark.parametrize(("template", "names"), HELD_OUT)
def test_the_same_six_on_prompts_that_were_not_searched(
    model: LoopedTransformer, tokenizer: Any, template: str, names: Names
) -> None:
    task = Task.of(tokenizer, template, names)
    corrupted = model.run_with_cache(task.corrupted)[1]
    effects = by_hand(model, clean_run(model, task)[0], corrupted, task)
    assert largest(effects, 6) == SIX
    assert {head for head in SIX if effects[head] < 0} == {AGAINST_OBJECT, (29, 0)}


@pytest.mark.parametrize(("template", "names"), EVERYWHERE)
def test_heads_look_where_their_names_say(
    model: LoopedTransformer, tokenizer: Any, template: str, names: Names
) -> None:
    """More than half of their attention, on the mean of the prompts."""
    task = Task.of(tokenizer, template, names)
    cache, best = clean_run(model, task)
    rows, end = torch.arange(4), torch.full((4,), task.clean.shape[1] - 1)
    s1, s2, io = task.places(1, 0), task.places(1, 1), task.places(0, 0)

    def attention(head: Head, queries: Tensor, keys: Tensor) -> float:
        found: Tensor = cache["pattern", head[0]][rows, head[1], queries, keys]
        return float(found.mean())

    assert attention(INDUCTION, s2, s1 + 1) > 0.5
    assert attention(INHIBITION, end, s2) > 0.5
    assert attention(AGAINST_SUBJECT, end, s2) > 0.5
    assert attention(AGAINST_OBJECT, end, io) > 0.5

    # What they write themselves about the two names: nothing, or against one of them.
    stack, labels = cache.stack_head_results(
        pos_slice=-1, return_labels=True, labels="transformer_lens"
    )
    of_names = [
        dict(zip(labels, cache.logit_attrs(stack, tokens=a, pos_slice=-1).mean(-1), strict=True))
        for a in task.answers.T
    ]

    def written(head: Head) -> tuple[float, float]:
        label = f"L{head[0]}H{head[1]}"
        return float(of_names[0][label]), float(of_names[1][label])

    for head in (INDUCTION, INHIBITION):
        assert abs(written(head)[0] - written(head)[1]) < 0.02 * best
    io_logit, s_logit = written(AGAINST_SUBJECT)
    assert s_logit < -2 * abs(io_logit)
    io_logit, s_logit = written(AGAINST_OBJECT)
    assert io_logit < -2 * abs(s_logit)


# -- TransformerLens's patching, and ours --------------------------------------------------------


def swept(model: LoopedTransformer, cache: Any, task: Task, layers: list[int]) -> Tensor:
    """Logit difference with one head patched, by TransformerLens's own sweep: ``[layer, head]``."""
    cells = pd.DataFrame([(i, h) for i in layers for h in EACH], columns=["layer", "head"])
    found = tl_patching.get_act_patch_attn_head_out_all_pos(
        model, task.corrupted, cache, task.difference, index_axis_names=None, index_df=cells
    )
    return found.view(len(layers), N_HEADS)


def test_transformerlens_sweep_has_these_effects(
    model: LoopedTransformer,
    task: Task,
    clean: tuple[Any, float],
    effects: dict[Head, float],
    rounding: float,
) -> None:
    """And so has ours, of core layers."""
    cache, best = clean
    worst = float(task.difference(model(task.corrupted)))
    layers = [20, 23]
    theirs = (swept(model, cache, task, layers) - worst) / (best - worst)
    found = patch_recurrences(
        model, task.corrupted, cache, task.difference, "z", heads="each",
        layers=[layer - CORE.start for layer in layers], progress=False,
    )  # fmt: skip
    ours = found["effect"].squeeze().transpose("layer", "head").to_numpy()
    assert theirs.shape == ours.shape == (2, N_HEADS)
    bound = rounding / (best - worst)
    for i, layer in enumerate(layers):
        for h in EACH:
            assert abs(effects[layer, h] - float(theirs[i, h])) < bound
            assert abs(effects[layer, h] - ours[i, h]) < bound


def test_a_run_patched_with_itself_stays_as_it_is(
    model: LoopedTransformer, task: Task, rounding: float
) -> None:
    logits, cache = model.run_with_cache(task.corrupted)
    worst = task.difference(logits)
    assert (swept(model, cache, task, [23]) - worst).abs().max() < rounding
    found = patch_recurrences(
        model, task.corrupted, cache, task.difference, "z", heads=[0, 3], layers=[3, 6],
        clean_metric=-float(worst), progress=False,
    )  # fmt: skip
    assert found["difference"].sizes == {**found["effect"].sizes, "layer": 2, "head": 2}
    assert abs(found["difference"]).max() < rounding


def test_a_whole_stream_patched_restores_the_clean_run(
    model: LoopedTransformer, task: Task, clean: tuple[Any, float], rounding: float
) -> None:
    cache, best = clean

    def put(x: Tensor, hook: Any) -> Tensor:
        found: Tensor = cache[hook.name]
        return found

    for layer in (0, 12, 24, 29):
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", put)]):
            logits = model(task.corrupted)
        assert (logits - cache["unembed.hook_out"]).abs().max() < rounding
    found = patch_recurrences(
        model, task.corrupted, cache, task.difference, "state_out", progress=False
    )
    assert abs(found["difference"].item() + found.attrs["corrupted"] - best) < rounding


# -- across recurrences --------------------------------------------------------------------------


def test_states_patched_across_recurrences_are_runs_of_other_lengths(
    model: LoopedTransformer, task: Task, rounding: float
) -> None:
    """Nothing is injected: state r in place of r' gives a clean run, r - r' recurrences longer."""
    looped = model.view_at(3)
    cache, best = clean_run(looped, task)
    found = patch_recurrences(
        looped, task.corrupted, cache, task.difference, "state_out", progress=False
    )
    worst = found.attrs["corrupted"]
    runs = {n: float(task.difference(model(task.clean, n_recurrences=n))) for n in range(1, 6)}
    assert abs(runs[3] - best) < rounding
    for source in range(3):
        for target in range(3):
            cell = found["difference"].sel(source_recurrence=source, target_recurrence=target)
            assert abs(float(cell) + worst - runs[3 + source - target]) < rounding
    assert min(abs(runs[n] - runs[n + 1]) for n in range(1, 5)) > 10 * rounding


@pytest.mark.parametrize(("template", "names"), [FOUND_ON, HELD_OUT[-1]])
def test_the_circuit_works_in_the_first_recurrence_alone(
    model: LoopedTransformer, tokenizer: Any, template: str, names: Names
) -> None:
    """Heads of the second recurrence do not do it again, although their weights are the same."""
    task, looped = Task.of(tokenizer, template, names), model.view_at(2)
    cache, _ = clean_run(looped, task)
    grids = {}
    for layer, h in IN_CORE:
        found = patch_recurrences(
            looped, task.corrupted, cache, task.difference, "z", progress=False,
            layers=[layer - CORE.start], heads=[h],
        )  # fmt: skip
        grids[layer, h] = found["effect"].to_numpy().squeeze()
    first = [abs(grid[0, 0]) for grid in grids.values()]
    second = [abs(grid[1, 1]) for grid in grids.values()]
    assert min(first) > 2 * max(second)
    # The output of the heads at the end of the circuit, put in later, works there as well as at
    # its own place: it is the second recurrence that does not make it.
    for head in (AGAINST_SUBJECT, AGAINST_OBJECT):
        assert grids[head][0, 1] / grids[head][0, 0] > 0.5
