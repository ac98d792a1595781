"""Losses, recurrences, truncated backpropagation and optimisers."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import SAME, assert_same
from conftest import VARIANTS, exact_config, random_config
from scipy.stats import poisson

from tl_looped import ConfigError, InputError, LoopedTransformer, NormLayout
from tl_looped.model.config import Injection
from tl_looped.model.roles import Role, parameter_roles
from tl_looped.training.evaluation import held_out_loss
from tl_looped.training.losses import (
    EveryRecurrence,
    ExitWeighted,
    LastState,
    exit_weighted,
    training_loss,
)
from tl_looped.training.objective import RowsInOrder
from tl_looped.training.optimizers import MuonWithAdamW, make_optimizer
from tl_looped.training.recurrences import Constant, PoissonLogNormal, state_seed
from tl_looped.training.spec import Shape, TrainSpec
from tl_looped.training.trainer import train

TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
INJECTED = VARIANTS["pre-injection"]
QWEN = {
    "qk_bias": True,
    "v_bias": True,
    "n_key_value_heads": 2,
    "qk_norm": True,
    "qk_norm_per_head": True,
    "exit_gate": True,
    "injection": Injection.LINEAR,
    "tie_embeddings": True,
}


def gradients(model: LoopedTransformer, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


# -- losses ---------------------------------------------------------------------------------------


def test_the_last_states_loss_is_the_models_own(variant: LoopedTransformer) -> None:
    own = variant(TOKENS, return_type="loss", state_seed=7)
    loss = training_loss(variant, TOKENS, LastState(), 7)
    assert torch.equal(loss, own)
    expected, found = gradients(variant, own), gradients(variant, loss)
    for name, grad in expected.items():
        if grad is not None:
            assert torch.equal(grad, found[name]), name


def test_every_recurrences_loss_is_the_mean_of_shorter_runs(variant: LoopedTransformer) -> None:
    runs = [
        float(variant(TOKENS, return_type="loss", state_seed=7, n_recurrences=r).detach())
        for r in (1, 2, 3, 4)
    ]
    equal = training_loss(variant, TOKENS, EveryRecurrence(), 7)
    assert float(equal.detach()) == pytest.approx(sum(runs) / 4, abs=SAME)
    weighted = training_loss(variant, TOKENS, EveryRecurrence((1.0, 0.0, 2.0, 5.0)), 7)
    by_hand = (runs[0] + 2 * runs[2] + 5 * runs[3]) / 8
    assert float(weighted.detach()) == pytest.approx(by_hand, abs=SAME)


def test_exit_weighted_loss_by_hand() -> None:
    # Gates 1/2, 1/4 and an ignored last one: p = 1/2, 1/8, 3/8.
    gate = torch.tensor([[[0.0, -math.log(3.0), 9.0]]], dtype=torch.float64)
    losses = torch.tensor([[[2.0, 4.0, 8.0]]], dtype=torch.float64)
    entropy = math.log(2) / 2 + math.log(8) / 8 + 3 / 8 * math.log(8 / 3)
    expected = 2 / 2 + 4 / 8 + 8 * 3 / 8 - 0.1 * entropy
    assert float(exit_weighted(losses, gate, 0.1)) == pytest.approx(expected, abs=1e-14)


def test_the_entropy_term_alone_is_least_for_equal_probabilities() -> None:
    # Uniform over four: gates 1/4, 1/3, 1/2; the least value is 3 - ln 4.
    gates = torch.tensor([[[1 / 4, 1 / 3, 1 / 2, 0.7]]], dtype=torch.float64)
    logits = gates.logit().requires_grad_()
    loss = exit_weighted(torch.full((1, 1, 4), 3.0, dtype=torch.float64), logits, 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(3 - math.log(4), abs=1e-14)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-14, rtol=0)


def test_gradient_of_the_exit_weighted_loss_is_its_differences() -> None:
    losses, logits = torch.randn(
        2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    inputs = (losses.requires_grad_(), logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, g: exit_weighted(x, g, 0.3), inputs)


@pytest.mark.parametrize("logit", [200.0, -200.0])
def test_a_saturated_gate_has_a_finite_loss_and_gradient(logit: float) -> None:
    gate = torch.full((1, 2, 3), logit, requires_grad=True)
    losses = torch.tensor([1.0, 2.0, 5.0]).expand(1, 2, 3)
    loss = exit_weighted(losses, gate, 0.1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.0 if logit > 0 else 5.0)
    assert bool(gate.grad.isfinite().all())


def test_one_gate_weights_the_models_losses_by_token() -> None:
    model = LoopedTransformer.from_config(random_config(**VARIANTS["sandwich-loop-norm"]))
    with torch.no_grad():
        runs = [
            model(TOKENS, return_type="loss", loss_per_token=True, n_recurrences=r)
            for r in (1, 2, 3, 4)
        ]
        _, cache = model.run_with_cache(TOKENS)
        gates = [cache[f"recurrence.{r}.hook_exit_gate"][:, :-1, 0] for r in range(4)]
        left, expected = torch.ones_like(runs[0]), torch.zeros_like(runs[0])
        for r in range(4):
            p = left * (gates[r].sigmoid() if r < 3 else 1.0)
            left = left - p
            expected += p * runs[r] + 0.05 * p * p.log()
        found = training_loss(model, TOKENS, ExitWeighted(0.05), 0)
    assert float(found) == pytest.approx(float(expected.mean()), abs=SAME)


# -- truncated backpropagation --------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 2, 3])
def test_truncated_gradients_are_those_of_a_hand_made_graph(last: int) -> None:
    model = LoopedTransformer.from_config(exact_config(**INJECTED))
    # The whole graph, with the state cut out of it by hand where it should end.
    detach = (f"recurrence.{4 - last}.hook_state_in", lambda state, hook: state.detach())
    cut = model.run_with_hooks(TOKENS, return_type="loss", state_seed=7, fwd_hooks=[detach])
    expected = gradients(model, cut)
    loss = training_loss(model, TOKENS, LastState(), 7, backprop_last=last)
    assert torch.equal(loss.detach(), model(TOKENS, return_type="loss", state_seed=7).detach())
    found = gradients(model, loss)
    for name, grad in expected.items():
        # Another order of additions into the prelude's gradient.
        assert_same(found[name], grad)
    whole = gradients(model, training_loss(model, TOKENS, LastState(), 7))
    assert not torch.allclose(whole["core.0.mlp.down"], found["core.0.mlp.down"], rtol=1e-3)


@pytest.mark.parametrize("loss", [EveryRecurrence((3.0, 1.0, 1.0, 2.0)), ExitWeighted(0.1)])
def test_truncation_changes_the_gradient_and_not_the_value(loss) -> None:
    config = exact_config(**INJECTED, exit_gate=True)
    model = LoopedTransformer.from_config(config)
    whole = training_loss(model, TOKENS, loss, 7)
    cut = training_loss(model, TOKENS, loss, 7, backprop_last=1)
    assert torch.equal(whole, cut)
    expected, found = gradients(model, whole), gradients(model, cut)
    assert not torch.allclose(expected["core.0.mlp.down"], found["core.0.mlp.down"], rtol=1e-3)
    # All four states still reach the coda and the unembedding.
    for name in ("final_norm.w", "unembed.weight"):
        assert_same(found[name], expected[name])


def test_earlier_recurrences_keep_no_graph_and_the_callers_mode_stays() -> None:
    model = LoopedTransformer.from_config(random_config(**INJECTED))
    x, run = model.start_run(TOKENS, 0)
    seen = []
    for state in model.unroll(x, run, 2):
        seen.append(state.requires_grad)
        assert torch.is_grad_enabled()
    assert seen == [False, False, True, True]
    with torch.no_grad():
        assert not any(state.requires_grad for state in model.unroll(x, run, 2))
    with pytest.raises(InputError, match="longer than the context of 64"):
        model.start_run(torch.zeros(1, 65, dtype=torch.long), 0)


FULL = {"n_core": 2, "n_prelude": 1, "injection": Injection.LINEAR, "exit_gate": True}
TRUNCATED: dict[str, dict[str, Any]] = {
    "coda": {},
    "pre-coda-norm": {"norm_layout": NormLayout.RESIDUAL, "pre_coda_norm": True, "qk_bias": True},
    "loop-norm": {"loop_norm": True, "n_coda": 0},
    "loop-norm-coda": {"loop_norm": True, "tie_embeddings": True},
}


def by_hand(
    model: LoopedTransformer, loss: EveryRecurrence | ExitWeighted | LastState, cut: int
) -> torch.Tensor:
    """The loss from one whole run of each number of recurrences.

    States that recurrences before ``cut`` leave are constants: the last one that a run reads is cut
    out of its graph where it is read.
    """
    losses, gates = [], []
    for r in range(model.cfg.n_recurrences):
        # The state that leaves a truncated recurrence; the last truncated one for later runs.
        constant = f"recurrence.{min(r, cut - 1)}.hook_state_out"
        hooks = [(constant, lambda x, hook: x.detach())] if cut else []
        hooks.append((f"recurrence.{r}.hook_exit_gate", lambda x, hook: gates.append(x)))
        logits = model.run_with_hooks(TOKENS, n_recurrences=r + 1, state_seed=7, fwd_hooks=hooks)
        logs = logits[:, :-1].log_softmax(-1)
        losses.append(-logs.gather(-1, TOKENS[:, 1:, None])[..., 0])
    if isinstance(loss, LastState):
        return losses[-1].mean()
    if isinstance(loss, EveryRecurrence):
        return torch.stack(losses).mean()
    left, out = torch.ones_like(losses[0]), torch.zeros_like(losses[0])
    for r, (value, gate) in enumerate(zip(losses, gates, strict=True)):
        p = left * (gate[:, :-1, 0].sigmoid() if r < len(losses) - 1 else 1.0)
        left = left - p
        out = out + p * value + loss.beta * p * p.log()
    return out.mean()


@pytest.mark.parametrize("kind", list(TRUNCATED))
@pytest.mark.parametrize("loss", [LastState(), EveryRecurrence(), ExitWeighted(0.1)], ids=repr)
@pytest.mark.parametrize("last", [1, 3, 4, None])
def test_truncated_losses_train_what_a_loss_by_hand_trains(kind, loss, last: int | None) -> None:
    config = random_config(**(FULL | TRUNCATED[kind] | {"dtype": torch.float64}))
    model = LoopedTransformer.from_config(config)
    for name, parameter in model.named_parameters():  # gains and biases that matter
        if parameter_roles(model)[name] in (Role.GAIN, Role.BIAS):
            generator = torch.Generator().manual_seed(len(name))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.1 * noise)
    cut = 0 if last is None else 4 - last
    wanted = by_hand(model, loss, cut)
    expected = gradients(model, wanted)
    value = training_loss(model, TOKENS, loss, 7, last)
    found = gradients(model, value)
    torch.testing.assert_close(value, wanted, atol=1e-13, rtol=0)
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], grad, atol=1e-12, rtol=1e-10)
    if isinstance(loss, ExitWeighted):
        assert float(found["exit_gate.weight"].norm()) > 1e-3


@pytest.mark.parametrize("loss", [LastState(), EveryRecurrence(), ExitWeighted(0.1)], ids=repr)
def test_truncation_under_autocast_trains_every_parameter(loss) -> None:
    """A weight that autocast first meets without a graph must still be trained where it has one."""
    model = LoopedTransformer.from_config(random_config(**INJECTED, exit_gate=True))
    with torch.autocast("cpu", torch.bfloat16):
        value = training_loss(model, TOKENS, loss, 7, 1)
        assert torch.is_autocast_cache_enabled()
    assert value.dtype == torch.float32
    found = gradients(model, value)
    gate = isinstance(loss, ExitWeighted)
    left_out = {n for n, g in found.items() if g is None or not bool(g.any())}
    assert left_out == (set() if gate else {"exit_gate.weight", "exit_gate.bias"})


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_models_loss_is_fp32_on_its_logits(dtype) -> None:
    model = LoopedTransformer.from_config(random_config(dtype=dtype))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    logits, loss = model(TOKENS, return_type="both", attention_mask=mask)
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    logs = logits.float().log_softmax(-1)[:, :-1]
    each = -logs.gather(-1, TOKENS[:, 1:, None])[..., 0]
    real = (mask[:, :-1] * mask[:, 1:]).bool()
    assert torch.equal(loss, torch.where(real, each, 0.0).sum() / real.sum())
    assert float(loss.detach()) * 64 % 1 != 0  # bf16 has multiples of 1/64 from 2 nats on
    tokenwise = model(TOKENS, return_type="loss", attention_mask=mask, loss_per_token=True)
    assert torch.equal(tokenwise, torch.where(real, each, 0.0))
    loss.backward()
    found = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert found == {dtype}
    assert float(model.W_E.grad.float().norm()) > 1e-3


def test_losses_under_autocast_are_fp32_on_its_logits() -> None:
    model = LoopedTransformer.from_config(random_config(**INJECTED))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = [model(TOKENS, state_seed=7, n_recurrences=r) for r in (1, 2, 3, 4)]
        last = training_loss(model, TOKENS, LastState(), 7)
        every = training_loss(model, TOKENS, EveryRecurrence(), 7)
    assert logits[0].dtype == torch.bfloat16
    logs = [x.float()[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None]) for x in logits]
    assert last.dtype == every.dtype == torch.float32
    torch.testing.assert_close(last, -logs[-1].mean(), atol=1e-6, rtol=0)
    torch.testing.assert_close(every, -torch.stack(logs).mean(), atol=1e-6, rtol=0)
    with torch.no_grad():
        held_out = held_out_loss(model, TOKENS.repeat(3, 1), 2, bf16=True)
        with torch.autocast("cpu", torch.bfloat16):
            own = model(TOKENS).float()[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])
    assert held_out == pytest.approx(-float(own.mean()), abs=1e-6)


# -- recurrences ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "sigma"), [(32.0, 0.5), (3.0, 1.0), (8.0, 0.0)])
def test_moments_of_sampled_recurrences(rate: float, sigma: float) -> None:
    recurrences = PoissonLogNormal(rate, sigma)
    n = 4000
    draws = np.array([recurrences.at(11, step) for step in range(n)])
    variance = rate + rate**2 * math.expm1(sigma**2)
    assert recurrences.mean == rate + 1
    assert abs(draws.mean() - (rate + 1)) < 3 * math.sqrt(variance / n)
    # The mean of a log-normal's square has heavy tails: a wide band for sigma = 1.
    assert draws.var() == pytest.approx(variance, rel=0.25 if sigma == 1.0 else 0.1)
    assert draws.min() >= 1


def test_without_spread_the_counts_are_poissons() -> None:
    draws = np.array([PoissonLogNormal(2.0, 0.0).at(0, step) for step in range(4000)])
    counts = np.bincount(draws, minlength=12)[1:7]
    expected = 4000 * poisson.pmf(np.arange(6), 2.0)
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5  # chi², 5 degrees, p = 0.001


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    recurrences = PoissonLogNormal(32.0, 0.5)
    forwards = [recurrences.at(3, step) for step in range(50)]
    assert [recurrences.at(3, step) for step in reversed(range(50))] == forwards[::-1]
    assert [recurrences.at(4, step) for step in range(50)] != forwards
    # The stream is part of what a seed means; these are its first draws.
    assert forwards[:5] == [31, 18, 22, 104, 87]
    assert [Constant(4).at(seed, 9) for seed in range(3)] == [4, 4, 4]


def test_state_seeds_never_meet_between_runs_or_evaluation() -> None:
    seeds = {state_seed(seed, step) for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000
    assert 0 not in seeds


# -- the order of rows ----------------------------------------------------------------------------


def test_every_epoch_holds_every_row_once_in_a_seeded_order() -> None:
    rows = torch.arange(7)[:, None]
    data = RowsInOrder(rows, 17, seed=2)
    read = [int(data[i]["tokens"]) for i in range(len(data))]
    assert len(read) == 17
    assert sorted(read[:7]) == sorted(read[7:14]) == list(range(7))
    assert len(set(read[14:])) == 3
    assert read[:7] != read[7:14]
    longer = RowsInOrder(rows, 30, seed=2)
    assert [int(longer[i]["tokens"]) for i in range(17)] == read
    other = RowsInOrder(rows, 17, seed=3)
    assert [int(other[i]["tokens"]) for i in range(17)] != read


# -- specs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(0), "n must be"),
        (lambda: PoissonLogNormal(0.0), "rate must be"),
        (lambda: PoissonLogNormal(float("nan")), "rate must be"),
        (lambda: PoissonLogNormal(2.0, -1.0), "sigma must be"),
        (lambda: EveryRecurrence((0.0, 0.0)), "not all 0"),
        (lambda: EveryRecurrence((1.0, -1.0)), "at least 0"),
        (lambda: ExitWeighted(-0.1), "beta must be"),
        (lambda: TrainSpec(steps=0), "steps must be"),
        (lambda: Shape(context=0), "context must be"),
        (lambda: Shape(heads=0), "heads must be"),
        (lambda: TrainSpec(steps=1, backprop_last=0), "backprop_last must be"),
        (lambda: TrainSpec(steps=1, seed=-1), "seed must be"),
        (lambda: TrainSpec(steps=1, learning_rate=float("nan")), "learning_rate must be"),
        (lambda: TrainSpec(steps=1, final_fraction=2.0), "final_fraction must be"),
        (lambda: TrainSpec(steps=1, optimizer="sgd"), "optimizer must be one of"),
    ],
)
def test_impossible_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "spec", "message"),
    [
        ({}, {"loss": ExitWeighted()}, "needs a model with an exit gate"),
        (INJECTED, {"loss": EveryRecurrence((1.0, 2.0))}, "2 weights"),
        (
            INJECTED,
            {"loss": EveryRecurrence((1.0,)), "recurrences": PoissonLogNormal()},
            "a constant number",
        ),
        ({}, {"backprop_last": 2}, "would not be trained"),
        ({}, {"backprop_last": 8, "recurrences": PoissonLogNormal()}, "would not be trained"),
    ],
)
def test_specs_that_do_not_fit_a_model(changes, spec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSpec(steps=1, **spec).check(random_config(**changes))


def test_truncation_that_cuts_nothing_needs_no_injection() -> None:
    TrainSpec(steps=1, backprop_last=4).check(random_config())


# -- runs of every kind ---------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        ({}, {}),
        ({"n_prelude": 0, "n_coda": 0}, {"loss": EveryRecurrence()}),
        ({"exit_gate": True, "loop_norm": True, "n_coda": 0}, {"loss": ExitWeighted()}),
        (INJECTED, {"recurrences": PoissonLogNormal(3.0), "backprop_last": 2}),
        ({"n_core": 4, "n_recurrences": 1}, {"optimizer": "muon"}),
    ],
    ids=["base", "no-prelude-coda-every", "exit-weighted", "sampled-truncated", "control-muon"],
)
def test_loss_falls_for_every_kind_of_run(changes, spec, tmp_path: Path) -> None:
    # Counting up: learned quickly, and not at all by a model that is not trained.
    rows = (torch.arange(8)[:, None] + torch.arange(8)) % 50
    model = LoopedTransformer.from_config(random_config(**({"n_core": 1} | changes)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    full = TrainSpec(
        steps=10, batch_size=8, warmup=1, evaluate_every=5, learning_rate=1e-2, bf16=False, **spec
    )
    log = train(model, rows, rows[:2], full, tmp_path)
    assert log[-1]["held_out_loss"] < log[0]["held_out_loss"] - 0.1
    unmoved = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert unmoved == []


# -- optimisers -----------------------------------------------------------------------------------


def test_muon_takes_the_matrices_of_blocks_and_injection_and_adamw_the_rest() -> None:
    model = LoopedTransformer.from_config(random_config(**INJECTED, exit_gate=True))
    optimizer = make_optimizer(model, TrainSpec(steps=1, optimizer="muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [sorted(names[id(p)] for p in g["params"]) for g in optimizer.param_groups]
    assert "injection.weight" in groups[0]
    assert "core.0.attn.qkv" in groups[0]
    assert {"embed.W_E", "unembed.weight", "exit_gate.weight"} == set(groups[1])
    assert "final_norm.w" in groups[2]
    assert "exit_gate.bias" in groups[2]
    assert optimizer.param_groups[2]["weight_decay"] == 0.0
    assert sum(map(len, groups)) == len(names)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("changes", [*VARIANTS.values(), QWEN], ids=[*VARIANTS, "biases"])
def test_what_is_decayed_and_what_muon_takes_in_every_model(changes, optimizer: str) -> None:
    model = LoopedTransformer.from_config(random_config(**changes))
    made = make_optimizer(model, TrainSpec(steps=1, optimizer=optimizer, weight_decay=0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, vectors, muon = set(), set(), set()
    for i, group in enumerate(made.param_groups):
        members = {names[id(p)] for p in group["params"]}
        assert group["weight_decay"] in (0.0, 0.1)
        (decayed if group["weight_decay"] else vectors).update(members)
        if isinstance(made, MuonWithAdamW) and i < len(made.muon.param_groups):
            muon |= members
    matrices = r"(prelude|core|coda)\.\d\.(attn\.(qkv|out)|mlp\.(gate_up|down))|injection\.weight"
    others = r"embed\.W_E|unembed\.weight|exit_gate\.weight"
    every = set(names.values())
    linear = {n for n in every if re.fullmatch(matrices, n)}
    assert decayed == linear | {n for n in every if re.fullmatch(others, n)}
    assert vectors == {n for n in every if re.search(r"(^|\.|_)bias$|(norm|ln\w+)\.w$", n)}
    assert (decayed | vectors, decayed & vectors) == (every, set())
    assert muon == (linear if optimizer == "muon" else set())


def test_muons_state_survives_saving_and_loading() -> None:
    torch.manual_seed(0)
    a = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    first = MuonWithAdamW([{"params": a[:1]}], [{"params": a[1:]}], 0.1)

    def step(optimizer, parameters, i: int) -> None:
        for n, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + n))
        optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
        optimizer.step()

    for i in range(2):
        step(first, a, i)
    second = MuonWithAdamW([{"params": b[:1]}], [{"params": b[1:]}], 0.1)
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p.data)
    second.load_state_dict(deepcopy(first.state_dict()))  # loading shares tensors
    for i in range(2, 4):
        step(first, a, i)
        step(second, b, i)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_the_joined_optimizer_steps_as_its_parts_do() -> None:
    torch.manual_seed(0)
    a = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    joined = MuonWithAdamW([{"params": a[:1]}], [{"params": a[1:]}], 0.1)
    muon = torch.optim.Muon(b[:1], lr=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(b[1:], lr=0.1, betas=(0.9, 0.95))
    for _ in range(3):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in (joined, muon, adamw):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
