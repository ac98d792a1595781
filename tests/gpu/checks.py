"""The checks of ``run.py``: exactness first, then what it costs.

Three bounds, none of them chosen by looking at a device:

- what the reference implementations computed (``tests/golden``): 1e-4, as everywhere;
- a device against the CPU in fp32: what rounding explains, from the CPU's own run in fp64
  (``closeness.rounding_bound``);
- half precision: four times what rounding the weights alone costs in fp32. The suite allows three
  on the CPU, and measures up to 2.7; other kernels round in other places.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from closeness import SAME, rounding_bound
from costs import hooks_cost, memory_of_runs
from goldenkeys import golden_keys
from run import Report
from safetensors.torch import load_file
from torch import Tensor

from tl_looped import LoopedKeyValueCache, LoopedTransformer
from tl_looped.metrics import from_cache, stream

CASES = ("huginn", "retrofit_llama", "retrofit_tinyllama", "retrofit_olmo", "ouro")
TOLERANCE = 1e-4
SEED = 7


class Case:
    """A golden checkpoint, and what the authors' code computes from it."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = folder.name, folder
        self.tensors = load_file(folder / "golden.safetensors")
        self.tokens = self.tensors["input_ids"]
        self.random = self.name != "ouro"
        self.run = {"initial_state": self.tensors["initial_state"]} if self.random else {}
        self.seeded = {"state_seed": SEED} if self.random else {}

    def model(self, device: Any, dtype: torch.dtype = torch.float32) -> LoopedTransformer:
        return LoopedTransformer.from_pretrained(self.folder, device=device, dtype=dtype)


def each_case(check: Callable[[Report, Case], None]) -> Callable[[Report], None]:
    """A check of one case, for all of them; one that breaks off does not stop the others."""

    def all_cases(report: Report) -> None:
        for name in CASES:
            try:
                with torch.no_grad():
                    check(report, Case(report.golden / name))
            except Exception as error:
                report.broke_off(f"{check.__name__}, {name}", error)

    return all_cases


def share_of_tolerance(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of ``atol + rtol * |expected|``: at most 1."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    allowed = TOLERANCE + TOLERANCE * expected.abs()
    return float(((found.cpu() - expected).abs() / allowed).max())


def largest(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found.cpu().double() - expected.cpu().double()).abs().max())


@each_case
def golden_parity(report: Report, case: Case) -> None:
    model = case.model(report.device)
    logits, cache = model.run_with_cache(case.tokens, **case.run)
    shares = {
        name: share_of_tolerance(cache[key], case.tensors[name])
        for name, key in golden_keys(model, case.random).items()
    }
    shares["logits"] = share_of_tolerance(logits, case.tensors["logits"])
    # Nobody listens: attention is fused, and other kernels run.
    shares["fused"] = share_of_tolerance(model(case.tokens, **case.run), case.tensors["logits"])
    for n in (1, 2, 9):
        found = model(case.tokens, n_recurrences=n, **case.run)
        shares[f"logits_r{n}"] = share_of_tolerance(found, case.tensors[f"logits_r{n}"])
    if not case.random:
        exits = model.exits(case.tokens)
        for name, tensor in (
            ("gate_logits", exits.gate_logits),
            ("exit_pdf", exits.distribution),
            ("expected_logits", exits.expected_logits),
            ("logits_exit_threshold_0.5", exits.logits_at(0.5)),
        ):
            shares[name] = share_of_tolerance(tensor, case.tensors[name])
    # max() passes over a NaN that is not the first.
    worst = max(shares, key=lambda name: shares[name] if shares[name] == shares[name] else 1e9)
    detail = f"of 1e-4, {len(shares)} tensors, most in {worst}"
    report.exact(f"golden parity, {case.name}", shares[worst], 1.0, detail)


@each_case
def as_on_the_cpu(report: Report, case: Case) -> None:
    """Logits and gradients of the two in fp32."""

    def both(device: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        model = case.model(device, dtype)
        with torch.enable_grad():
            logits = model(case.tokens, **case.seeded)
            model(case.tokens, return_type="loss", **case.seeded).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        joined = torch.cat([gradient.flatten().cpu().double() for gradient in gradients])
        return logits.detach().cpu(), joined

    exact, cpu, found = both("cpu", torch.float64), both("cpu"), both(report.device)
    for i, what in enumerate(("logits", "gradients")):
        bound = rounding_bound(exact[i].double(), cpu[i])
        name = f"{what} as on the CPU, {case.name}"
        report.exact(name, largest(found[i], cpu[i]), bound, "rounding of the CPU's run")


@each_case
def initial_state(report: Report, case: Case) -> None:
    """Drawn from the seed and the position: the same bits everywhere, padded or not."""
    if not case.random:
        return
    rows, pos = case.tokens.shape
    mask = torch.ones(rows, pos, dtype=torch.long)
    mask[0, :3] = 0
    for dtype in (torch.float32, torch.bfloat16):
        cpu, there = (
            case.model(device, dtype).run_with_cache(
                case.tokens, attention_mask=mask, names_filter="hook_initial_state", **case.seeded
            )[1]["hook_initial_state"]
            for device in ("cpu", report.device)
        )
        differing = float((cpu != there.cpu()).sum())
        what = str(dtype).removeprefix("torch.")
        name = f"initial state as on the CPU, {what}, {case.name}"
        report.exact(name, differing, 0.0, f"of {cpu.numel()} numbers")


@each_case
def padding(report: Report, case: Case) -> None:
    """A padded row is computed as it is alone."""
    row = case.tokens[:1, 3:]
    mask = torch.ones(1, case.tokens.shape[1], dtype=torch.long)
    mask[:, :3] = 0
    exact = case.model("cpu", torch.float64)(row, **case.seeded)
    model = case.model(report.device)
    alone = model(row, **case.seeded)
    padded = model(case.tokens[:1], attention_mask=mask, **case.seeded)[:, 3:]
    bound = rounding_bound(exact, case.model("cpu")(row, **case.seeded))
    report.exact(f"padded = alone, {case.name}", largest(padded, alone), bound, "rounding")


@each_case
def half_precision(report: Report, case: Case) -> None:
    """Relative error of the logits, over what rounding the weights alone costs."""
    reference = case.model(report.device)(case.tokens, **case.run)
    for dtype in (torch.bfloat16, torch.float16):
        half, rounded = case.model(report.device, dtype), case.model(report.device)
        for target, source in zip(rounded.parameters(), half.parameters(), strict=True):
            target.copy_(source)
        errors = [
            float((model(case.tokens, **case.run).float() - reference).norm() / reference.norm())
            for model in (half, rounded)
        ]
        what = str(dtype).removeprefix("torch.")
        name = f"{what} beside fp32, {case.name}"
        report.exact(name, errors[0], 4 * errors[1], "four times its weights alone")


@each_case
def generation(report: Report, case: Case) -> None:
    model = case.model(report.device)
    state = {"initial_state": "zeros"} if case.random else {}
    expected = case.tensors["greedy_tokens"]
    for what, cached in (("cached", True), ("uncached", False)):
        found = model.generate(
            case.tokens[:1, :5], max_new_tokens=8, do_sample=False, stop_at_eos=False,
            verbose=False, use_past_kv_cache=cached, **state,
        )  # fmt: skip
        differing = float((found.cpu() != expected).sum())
        name = f"greedy tokens, {what}, {case.name}"
        report.exact(name, differing, 0.0, f"of {expected.numel()} tokens")
    # The same logits one token at a time.
    cache = LoopedKeyValueCache()
    steps = [
        model(case.tokens[:, i : i + 1], past_kv_cache=cache, **case.seeded)
        for i in range(case.tokens.shape[1])
    ]
    exact = case.model("cpu", torch.float64)(case.tokens, **case.seeded)
    bound = rounding_bound(exact, case.model("cpu")(case.tokens, **case.seeded))
    difference = largest(torch.cat(steps, 1), model(case.tokens, **case.seeded))
    report.exact(f"one token at a time = all at once, {case.name}", difference, bound, "rounding")


@each_case
def streaming(report: Report, case: Case) -> None:
    """Metrics of a run that is watched on the device are those of a cache on the CPU, in fp64."""
    if report.device.type == "mps":
        print("left out: mps has no fp64")
        return
    run = {"n_recurrences": 6} | case.seeded
    _, cache = case.model("cpu", torch.float64).run_with_cache(case.tokens, **run)
    expected = from_cache(cache, "all")
    model = case.model(report.device, torch.float64)
    for states in ("recompute", "disk"):
        found = stream(model, case.tokens, "all", states=states, batch_size=2, **run)
        assert set(found.data_vars) == set(expected.data_vars)
        errors: dict[str, float] = {}
        for name in map(str, expected.data_vars):
            theirs = torch.from_numpy(expected[name].values).double()
            mine = torch.from_numpy(found[name].values).double()
            assert torch.equal(mine.isnan(), theirs.isnan()), name
            size = max(1.0, float(theirs.nan_to_num().abs().max()))
            errors[name] = float((mine - theirs).nan_to_num().abs().max()) / size
        worst = max(errors, key=errors.__getitem__)
        name = f"metrics streamed ({states}) = cached on the CPU, {case.name}"
        report.exact(name, errors[worst], SAME, f"{len(errors)} variables, fp64, most in {worst}")


@each_case
def spread(report: Report, case: Case) -> None:
    """Weights on the CPU and the device at once: the core alone is on the device."""
    whole = case.model("cpu")
    places = [name for name, _ in whole.named_children()]
    plan = {
        name: str(report.device) if name == "core" else "cpu"
        for name in places
        if next(whole.get_submodule(name).parameters(), None) is not None
    }
    many = LoopedTransformer.from_pretrained(case.folder, device_map=plan)
    exact = case.model("cpu", torch.float64)(case.tokens, **case.seeded)
    cpu = whole(case.tokens, **case.seeded)
    found = many(case.tokens, **case.seeded)
    name = f"core on {report.device}, all else on the CPU, {case.name}"
    report.exact(name, largest(found, cpu), rounding_bound(exact, cpu), "rounding")


CHECKS: dict[str, Callable[[Report], None]] = {
    "golden": golden_parity,
    "cpu": as_on_the_cpu,
    "state": initial_state,
    "padding": padding,
    "half": half_precision,
    "generation": generation,
    "streaming": streaming,
    "spread": spread,
    "memory": memory_of_runs,
    "hooks": hooks_cost,
}
"""By the name that ``--only`` takes, in the order in which they run."""
