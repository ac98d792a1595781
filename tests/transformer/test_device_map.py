"""Models on several devices, see `pretend` for what stands in for GPUs.

A spread model must give, bit for bit, what the same model gives on one of those devices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, TOLERANCE, VARIANTS, load_golden, random_config
from pretend import pretended_devices
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tl_looped import LoopedTransformer
from tl_looped import interventions as iv
from tl_looped.errors import ConfigError, InputError
from tl_looped.experiments.engines import load_engine
from tl_looped.experiments.parallel import Workers
from tl_looped.experiments.runner import run_experiment
from tl_looped.experiments.sources import find_model
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.metrics import stream
from tl_looped.model.exit_rules import ArgmaxStability, GateExit, KLDivergence, LatentDifference
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.patching import attribute_recurrences, patch_recurrences
from tl_looped.transformer.spreading import PLANS, places, plan_devices

pytestmark = pytest.mark.once

TOKENS = torch.arange(3, 13).reshape(2, 5)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
LAZY = [torch.device("lazy", i) for i in range(4)]
Pair = tuple[LoopedTransformer, LoopedTransformer]


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    with pretended_devices():
        yield


def spread_map(model: LoopedTransformer) -> dict[str, torch.device]:
    """Neighbours on different devices, and the norm and the unembedding away from the embedding."""
    return {name: LAZY[i % 4] for i, name in enumerate(places(model))}


def load_pair(folder: Path, **kwargs: Any) -> Pair:
    one = LoopedTransformer.from_pretrained(folder, device="lazy:0", **kwargs)
    many = LoopedTransformer.from_pretrained(folder, device_map=spread_map(one), **kwargs)
    assert many.cfg.n_devices == len(set(spread_map(one).values())) > 1
    return one, many


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in VARIANTS:
        made[name] = tmp_path_factory.mktemp(name)
        model = LoopedTransformer.from_config(random_config(**(VARIANTS[name])))
        model.save_pretrained(made[name])
    return made


@pytest.fixture(params=["sandwich-loop-norm", "residual-injection"])
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Pair:
    return load_pair(folders[request.param], n_recurrences=2)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, and tensors on the same device."""
    if isinstance(a, Tensor):
        return a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# -- the stand-in for GPUs ------------------------------------------------------------------------


def test_pretended_devices_refuse_to_mix() -> None:
    a, b = torch.ones(2, device="lazy:0"), torch.ones(2, device="lazy:1")
    for other in (b, torch.ones(2)):
        with pytest.raises(RuntimeError, match="on one device"):
            a + other
    with torch.inference_mode(), pytest.raises(RuntimeError, match="on one device"):
        torch.stack([a, b])
    with pytest.raises(RuntimeError, match="numpy"):
        a.numpy()
    assert same(a + b.to(a), torch.full((2,), 2.0, device="lazy:0"))
    assert (b * torch.tensor(3.0)).device == LAZY[1]


# -- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_activation_of_every_family(case: str) -> None:
    golden = load_golden(case)
    one, many = load_pair(golden.folder, n_recurrences=2)
    logits, cache = many.run_with_cache(golden.tokens, **golden.run)
    expected, expected_cache = one.run_with_cache(golden.tokens, **golden.run)
    assert same(logits, expected)
    assert same(cache.cache_dict, expected_cache.cache_dict)
    torch.testing.assert_close(logits.cpu(), golden.tensors["logits_r2"], **TOLERANCE)
    found = {}

    def note(x: Tensor, hook: Any) -> None:
        found[hook.name] = x.device

    # Each layer is computed where its weights are.
    many.run_with_hooks(golden.tokens, fwd_hooks=[(lambda name: True, note)], **golden.run)
    plan = spread_map(many)
    for i in range(many.loop.n_layers):
        place = many.loop.locate(i)
        own = {device for name, device in found.items() if name.startswith(f"blocks.{i}.")}
        assert own == {plan[f"{place.stage}.{place.layer}"]}
    assert found["unembed.hook_out"] == plan.get("unembed", plan["embed"])
    assert found["ln_final.hook_normalized"] == plan["final_norm"]
    assert logits.device == plan["embed"]


def gradients(model: LoopedTransformer) -> dict[str, Tensor]:
    model.zero_grad()
    model(TOKENS, return_type="loss", attention_mask=MASK).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.device == parameter.device, name
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


def generated(model: LoopedTransformer, **options: Any) -> Any:
    fixed = {"max_new_tokens": 3, "stop_at_eos": False, "verbose": False, "seed": 5}
    return model.generate(TOKENS, **(fixed | options))


def all_flags(model: LoopedTransformer) -> list[Any]:
    found = []
    for switch in (
        model.set_use_attn_result,
        model.set_use_hook_mlp_in,
        model.set_use_attn_in,
        model.set_use_split_qkv_input,
    ):
        switch(True)
        found.append(model.run_with_cache(TOKENS, return_type=None)[1].cache_dict)
        switch(False)
    return found


def loop_map(model: LoopedTransformer) -> list[Tensor]:
    start = model.loop_map(TOKENS, attention_mask=MASK)
    state = start.run(2)[-1].detach().requires_grad_()
    nexts = start(state)
    (gradient,) = torch.autograd.grad(nexts.square().sum(), state)
    return [start.initial_state, nexts, gradient, start.random_state(3)]


def patched(model: LoopedTransformer) -> Tensor:
    """Activations of a cache, which is on one device, put into layers on others."""
    _, cache = model.run_with_cache(TOKENS)
    hooks = [
        ("blocks.1.hook_resid_post", lambda x, hook: cache[hook.name]),
        ("blocks.2.attn.hook_z", lambda x, hook: x.index_copy(1, *at(x, cache[hook.name]))),
    ]
    return model.run_with_hooks(TOKENS.flip(0), fwd_hooks=hooks)


def at(x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor([1], device=x.device), new[:, 1:2].to(x)


def composed(model: LoopedTransformer) -> list[Tensor]:
    cut = model.loop.p + 1
    half = model(TOKENS, stop_at_layer=cut)
    injects = hasattr(model, "injection")
    e = model(TOKENS, stop_at_layer=model.loop.p - 1) if model.loop.p > 1 else None
    if e is not None:
        _, cache = model.run_with_cache(TOKENS)
        e = cache["resid_post", model.loop.p - 1]
    given = {"prelude_output": e} if injects else {}
    return [half, model(half, start_at_layer=cut, **given)]


def folded(model: LoopedTransformer) -> list[Tensor]:
    model.enable_compatibility_mode()
    ones = torch.ones(1, 2, model.cfg.d_model, device=LAZY[0])
    found = [model(TOKENS), model.W_Q, model.W_U.cpu(), model.unembed(model.ln_final(ones)).cpu()]
    found.append(model.tokens_to_residual_directions(TOKENS))
    model.enable_compatibility_mode(no_processing=True)
    return found


def cached(model: LoopedTransformer, **options: Any) -> Any:
    return model.run_with_cache(TOKENS, **options)[1]


def attributions(model: LoopedTransformer) -> Tensor:
    cache = cached(model)
    return cache.logit_attrs(cache.decompose_resid(), TOKENS, TOKENS.flip(0))


def shared_slots(model: LoopedTransformer) -> Any:
    return generated(model, past_kv_cache=LoopedKeyValueCache(1))


def lenses(model: LoopedTransformer) -> list[Tensor]:
    states = cached(model, attention_mask=MASK).stack_recurrences("resid_post")
    return [model.coda_lens(states, attention_mask=MASK), model.logit_lens(states)]


def exits(model: LoopedTransformer) -> list[Any]:
    rules = [LatentDifference(0.8), ArgmaxStability(1), KLDivergence(0.5)]
    found = [model(TOKENS, attention_mask=MASK, exit_rule=rule) for rule in rules]
    if model.cfg.exit_gate:
        found += [model(TOKENS, exit_rule=GateExit(0.6)), vars(model.exits(TOKENS))]
    return found


def unrolled(model: LoopedTransformer) -> list[Tensor]:
    x, run = model.start_run(TOKENS, 3)
    states = list(model.unroll(x, run, backprop_last=1))
    return [*states, model.read_out(states[0], run)]


def streamed(model: LoopedTransformer, **options: Any) -> Any:
    rows = [[1, 2, 3, 4], [5, 6, 7]]
    data = stream(model, rows, "all", batching="padded", **options)
    return data.to_dict(), {name: str(values.dtype) for name, values in data.items()}


def stacks(model: LoopedTransformer) -> list[Tensor]:
    return [model.unique_weights("W_out"), model.W_K, model.b_Q, model.accumulated_bias(1)]


CHECKS: dict[str, Callable[[LoopedTransformer], Any]] = {
    "seed": lambda m: m(TOKENS, state_seed=7),
    "padding": lambda m: m(TOKENS, attention_mask=MASK, return_type="both"),
    "gradients": gradients,
    "cached gradients": lambda m: cached(m, return_type="loss", incl_bwd=True).cache_dict,
    "flags": all_flags,
    "key-value cache": generated,
    "padded key-value cache": lambda m: generated(m, attention_mask=MASK, do_sample=False),
    "key-value slots": shared_slots,
    "key-value cache and exits": lambda m: generated(m, exit_rule=KLDivergence(0.5)),
    "no key-value cache": lambda m: generated(m, use_past_kv_cache=False),
    "exits": exits,
    "unrolled": unrolled,
    "loop map": loop_map,
    "patching": patched,
    "stop and start": composed,
    "folded norms": folded,
    "lenses": lenses,
    "accumulated": lambda m: cached(m).accumulated_resid(),
    "head results": lambda m: cached(m).stack_head_results(),
    "attributions": attributions,
    "stacked weights": stacks,
}


@pytest.mark.full
@pytest.mark.parametrize("check", CHECKS)
def test_a_spread_model_gives_what_one_device_gives(check: str, pair: Pair) -> None:
    one, many = pair
    assert same(CHECKS[check](one), CHECKS[check](many))


@pytest.mark.parametrize("states", ["recompute", "disk"])
def test_streamed_metrics(states: str, folders: dict[str, Path]) -> None:
    one, many = load_pair(folders["residual-injection"], n_recurrences=2)
    expected, found = streamed(one, states=states), streamed(many, states=states)
    # As text, where NaN is NaN.
    assert repr(found) == repr(expected)


def test_an_experiment(tmp_path: Path) -> None:
    one = LoopedTransformer.from_pretrained("demo", device="lazy:0")
    many = LoopedTransformer.from_pretrained("demo", device_map=spread_map(one))
    (tmp_path / "prompts.txt").write_text("Ann went.")
    spec = Experiment(
        "demo",
        prompts=PromptSet("file", file=str(tmp_path / "prompts.txt")),
        recurrences=2,
        metrics=("step",),
        extras=(),
    )
    runs = [run_experiment(spec, tmp_path / str(i), model=m) for i, m in enumerate((one, many))]
    assert runs[0].load().identical(runs[1].load())


def test_saving(pair: Pair, tmp_path: Path) -> None:
    one, many = pair
    many.save_pretrained(tmp_path)
    again = LoopedTransformer.from_pretrained(tmp_path, device="lazy:0")
    assert same(dict(again.named_parameters()), dict(one.named_parameters()))
    assert again.cfg.n_devices == 1


# -- where the weights are ------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Bytes of the new tensors on each device."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes: dict[torch.device, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("device") is not None:
            self.n_bytes[out.device] = self.n_bytes.get(out.device, 0) + out.nbytes
        return out


def test_weights_go_straight_to_their_devices(folders: dict[str, Path]) -> None:
    plan = spread_map(LoopedTransformer.from_pretrained(folders["pre"], device="meta"))
    with Made() as made:
        model = LoopedTransformer.from_pretrained(folders["pre"], device_map=plan)
    held = dict.fromkeys(LAZY, 0)
    for parameter in model.parameters():
        held[parameter.device] += parameter.nbytes
    assert {device: made.n_bytes[device] for device in LAZY} == held
    assert model.hf_device_map == {name: str(device) for name, device in plan.items()}
    # The map is what device_map takes.
    again = LoopedTransformer.from_pretrained(folders["pre"], device_map=model.hf_device_map)
    assert again.hf_device_map == model.hf_device_map
    assert model.cfg.device == "lazy:0"


def test_moving_gathers_and_a_cast_does_not(pair: Pair) -> None:
    one, many = pair
    before = many.hf_device_map
    assert len(before) == len(places(many))
    many.double()
    assert many.hf_device_map == before
    many.float().to("lazy:0")
    assert (many.hf_device_map, many.cfg.n_devices) == ({"": "lazy:0"}, 1)
    assert same(many(TOKENS), one(TOKENS))
    assert many.run_with_cache(TOKENS)[1]["resid_post", 0].device == LAZY[0]
    assert copy.deepcopy(one).cpu().hf_device_map == {"": "cpu"}


def test_a_whole_model_and_whole_stages(folders: dict[str, Path]) -> None:
    by_stage = {"": "lazy:0", "core": "lazy:1", "core.2": "lazy:2"}
    model = LoopedTransformer.from_pretrained(folders["pre"], device_map=by_stage)
    found = {name: str(device) for name, device in model.hf_device_map.items()}
    assert [found[f"core.{i}"][-1] for i in range(3)] == ["1", "1", "2"]
    assert {found[name] for name in found if not name.startswith("core")} == {"lazy:0"}
    model = LoopedTransformer.from_pretrained(folders["pre"], device_map="lazy:1")
    assert (model.hf_device_map, model.cfg.n_devices) == ({"": "lazy:1"}, 1)


# -- plans ----------------------------------------------------------------------------------------


@pytest.fixture
def weightless() -> LoopedTransformer:
    return LoopedTransformer.from_config(random_config(device="meta"))


def n_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("how", PLANS)
def test_accelerates_plan_keeps_layers_whole_and_within_the_memory(how: str, weightless) -> None:
    layer = n_bytes(weightless.core[0])
    room = {0: 4 * layer, 1: 5 * layer, 2: 7 * layer}  # low_0 leaves the first one nearly empty
    plan = plan_devices(weightless, how, room)
    assert list(plan) == places(weightless)
    assert len(set(plan.values())) > 1
    for index, most in room.items():
        own = [name for name, device in plan.items() if device == torch.device("cuda", index)]
        assert sum(n_bytes(weightless.get_submodule(name)) for name in own) <= most
    numbers = [device.index for device in plan.values()]
    assert numbers == sorted(numbers)  # forward through the devices, in the order of the pass


def test_what_does_not_fit_is_told_before_anything_is_loaded(weightless) -> None:
    layer = n_bytes(weightless.core[0])
    with pytest.raises(InputError, match=r"do not hold them all.*bfloat16.*max_memory"):
        plan_devices(weightless, "auto", {0: 2 * layer})
    half = weightless.to(torch.bfloat16)
    with_cpu = plan_devices(half, "auto", {0: 3 * layer, "cpu": 9 * layer})
    assert {device.type for device in with_cpu.values()} == {"cuda", "cpu"}


def test_auto_without_gpus_is_the_cpu(folders: dict[str, Path]) -> None:
    model = LoopedTransformer.from_pretrained(folders["pre"], device_map="auto")
    assert (model.hf_device_map, model.cfg.n_devices) == ({"": "cpu"}, 1)
    plain = LoopedTransformer.from_pretrained(folders["pre"], device="cpu")
    assert torch.equal(model(TOKENS), plain(TOKENS))


# -- refusals -------------------------------------------------------------------------------------

WHOLE = {"": "cpu"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such place": ({"device_map": WHOLE | {"lm_head": 0}}, "lm_head"),
    "a split layer": ({"device_map": WHOLE | {"core.0.attn": 0}}, "no layer can be split"),
    "a place left out": ({"device_map": {"embed": "cpu"}}, "no device for 'prelude.0'"),
    "disk": ({"device_map": WHOLE | {"core": "disk"}}, "puts 'core' on 'disk'"),
    "meta": ({"device_map": "meta"}, "puts 'the model' on 'meta'"),
    "no device": ({"device_map": "spread"}, "spread.*balanced"),
    "no such device": ({"device_map": WHOLE | {"core": 7}}, "names cuda:7"),
    "both": ({"device_map": "auto", "device": "cpu"}, "exclude each other"),
    "memory alone": ({"max_memory": {0: "1GB"}}, "max_memory is for a device_map"),
    "memory and a map": ({"device_map": WHOLE, "max_memory": {0: 1}}, "max_memory is for"),
    "memory of none": ({"device_map": "auto", "max_memory": {"gpu": "1GB"}}, "gpu"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_maps(what: str, folders: dict[str, Path]) -> None:
    arguments, match = REFUSED[what]
    with pytest.raises(InputError, match=match):
        LoopedTransformer.from_pretrained(folders["pre"], **arguments)


def test_one_matrix_is_on_one_device(folders: dict[str, Path]) -> None:
    tied = folders["residual-injection"]
    with pytest.raises(InputError, match="one matrix"):
        LoopedTransformer.from_pretrained(tied, device_map={"": "lazy:0", "unembed": "lazy:1"})
    agreed = {"": "lazy:1", "unembed": "lazy:0", "embed": "lazy:0"}
    assert LoopedTransformer.from_pretrained(tied, device_map=agreed).cfg.n_devices == 2


def test_a_bridge_is_on_one_device(pair: Pair) -> None:
    with pytest.raises(ConfigError, match=r"model\.to\(device\)|TransformerLens 4"):
        pair[1].to_bridge()


# -- experiments ----------------------------------------------------------------------------------


def test_an_experiments_device_may_be_a_plan() -> None:
    spec = Experiment("demo", recurrences=2)
    assert Workers.here("auto").device == "auto"
    engine = load_engine(spec, find_model(spec), "auto")
    assert engine.model.hf_device_map == {"": "cpu"}


def test_processes_do_not_share_a_spread_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for plan in PLANS:
        with pytest.raises(InputError, match=f"device='{plan}'.*2 processes"):
            Workers.here(plan)


INTERVENTIONS: list[Callable[[LoopedTransformer], iv.Intervention]] = [
    lambda model: iv.SkipRecurrences(1),
    lambda model: iv.RepeatRecurrence(0),
    lambda model: iv.SkipLayers(1),
    lambda model: iv.SwapLayers(0, 2),
    lambda model: iv.FreezeAttention(0),
    lambda model: iv.FreezeLoop(0),
    lambda model: iv.FreezeLoop(1, at=iv.fixed_point(model, TOKENS, 3, math.inf)),
    lambda model: iv.AddNoise(0.3, 1),
    lambda model: iv.SwapStates(1),
    lambda model: iv.ReplaceInitialState(torch.zeros(1, TOKENS.shape[1], model.cfg.d_model)),
    lambda model: iv.AblateHeads({1: [0]}, by="mean", reference=model.run_with_cache(TOKENS)[1]),
]


@pytest.mark.parametrize("make", INTERVENTIONS)
def test_interventions_on_spread_models(
    pair: Pair, make: Callable[[LoopedTransformer], iv.Intervention]
) -> None:
    found = []
    for model in pair:
        with torch.no_grad(), model.intervening(make(model)):
            found.append(model(TOKENS).cpu())
    assert torch.equal(*found)


def test_patching_of_spread_models(pair: Pair) -> None:
    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3].mean()

    grids = []
    for model in pair:
        _, cache = model.run_with_cache(TOKENS.flip(1))
        for patch in (patch_recurrences, attribute_recurrences):
            grids.append(patch(model, TOKENS, cache, metric, "resid_post")["difference"])
    for one, many in ((grids[0], grids[2]), (grids[1], grids[3])):
        np.testing.assert_array_equal(one, many)
