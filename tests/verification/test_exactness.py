"""Each exactness check can fail, and does not by itself: one fault of the code, one check red."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, copy_of, write_tensors
from safetensors.torch import load_file
from torch import Tensor

from tl_looped import LoopedActivationCache, LoopedTransformer, checkpoints
from tl_looped.model.kv_cache import KVRun, LoopedKeyValueCache
from tl_looped.transformer import looped_transformer
from tl_looped.verification import rounding
from tl_looped.verification.certificate import Outcome
from tl_looped.verification.exactness import CHECKS, Runs, run_check
from tl_looped.verification.opening import open_subject
from tl_looped.verification.rounding import MARGIN, _by_noise, difference, rounding_of
from tl_looped.verification.run import load_subject
from tl_looped.verification.subject import Subject
from tl_looped.verification.weights import finite

pytestmark = pytest.mark.usefixtures("without_gradients")

Patch = pytest.MonkeyPatch


def subject_of(case: str = "huginn", dtype: torch.dtype = torch.float32) -> Subject:
    folder = GOLDEN / case
    return load_subject(open_subject(folder, None, None), folder, None, "cpu", dtype, 0)


# -- faults of code -------------------------------------------------------------------------------


def last_recurrence_only(patch: Patch) -> None:
    """A cache that keeps the last recurrence's keys and values."""
    init = LoopedKeyValueCache.__init__
    patch.setattr(LoopedKeyValueCache, "__init__", lambda self, slots=None: init(self, 1))


def keys_of_a_neighbour(patch: Patch) -> None:
    """Keys of the past, taken from one position too late."""
    past = KVRun._past

    def shifted(self: KVRun, place: Any) -> Any:
        keys, values = past(self, place)
        return keys.roll(1, 1), values

    patch.setattr(KVRun, "_past", shifted)


def no_mask(patch: Patch) -> None:
    """Padding is attended to."""
    begin = looped_transformer.begin_run
    patch.setattr(
        looped_transformer, "begin_run", lambda cfg, x, mask, options: begin(cfg, x, None, options)
    )


def lost_write(patch: Patch) -> None:
    """Of a thousandth of one write."""
    decompose = LoopedActivationCache.decompose_resid

    def without(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        stack = decompose(self, *args, **kwargs).clone()
        stack[0] *= 0.999
        return stack

    patch.setattr(LoopedActivationCache, "decompose_resid", without)


def attributions_without_gain(patch: Patch) -> None:
    """The final norm's gain forgotten."""
    attribute = LoopedActivationCache.logit_attrs

    def plain(self: Any, stack: Tensor, *args: Any) -> Tensor:
        return attribute(self, stack / self.model.ln_final.w, *args)

    patch.setattr(LoopedActivationCache, "logit_attrs", plain)


def one_recurrence_more(patch: Patch) -> None:
    """A view runs one recurrence more than it says."""
    view_at = LoopedTransformer.view_at
    more = {1: 2}
    patch.setattr(LoopedTransformer, "view_at", lambda self, n: view_at(self, more.get(n, n)))


def one_number_saved_wrong(patch: Patch) -> None:
    save = checkpoints.save_torch_state_dict

    def wrong(tensors: dict[str, Tensor], folder: Any) -> None:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed["final_norm.w"][3] *= 1 + 1e-6
        save(changed, folder)

    patch.setattr(checkpoints, "save_torch_state_dict", wrong)


FAULTS: list[tuple[str, Callable[[Patch], None]]] = [
    ("cached = uncached", last_recurrence_only),
    ("cached = uncached", keys_of_a_neighbour),
    ("padded = alone", no_mask),
    ("decomposition", lost_write),
    ("decomposition", attributions_without_gain),
    ("recurrences", one_recurrence_more),
    ("saved = loaded", one_number_saved_wrong),
]


@pytest.mark.parametrize(("check", "fault"), FAULTS)
def test_a_fault_turns_its_own_check(
    check: str, fault: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    runs = Runs(subject_of())
    fault(monkeypatch)
    found = {name: run_check(name, runs).outcome for name in CHECKS}
    assert found == dict.fromkeys(CHECKS, Outcome.EXACT) | {check: Outcome.WRONG}


def test_an_edited_model_does_not_decompose() -> None:
    """A hook that stays on the stream: the sums are those of another run."""
    subject = subject_of("ouro")
    subject.model.add_perma_hook("blocks.3.hook_resid_post", lambda value, hook: 1.01 * value)
    runs = Runs(subject)
    found = {name: run_check(name, runs).outcome for name in CHECKS}
    assert found["decomposition"] is Outcome.WRONG
    assert found["cached = uncached"] is Outcome.EXACT


def test_an_error_in_a_check_is_what_it_found(monkeypatch: Patch) -> None:
    runs = Runs(subject_of("ouro"))
    monkeypatch.setattr(runs, "tokens", runs.tokens + 1000)  # outside the vocabulary
    finding = run_check("padded = alone", runs)
    assert finding.outcome is Outcome.WRONG
    assert "InputError" in finding.found


# -- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["huginn", "ouro"])
def test_noise_is_as_large_as_the_rounding_that_float64_shows(case: str) -> None:
    subject = subject_of(case)
    logits = subject.model(subject.tokens)
    measured = rounding_of(subject.model, subject.tokens, logits)
    assert "float64" in measured.how
    noise = _by_noise(subject.model, subject.tokens, logits)
    assert measured.size / MARGIN < noise < MARGIN * measured.size
    assert measured.bound == MARGIN * measured.size


def test_a_run_in_float64_is_bounded_by_noise() -> None:
    runs = Runs(subject_of("retrofit_olmo", torch.float64))
    assert "noise" in runs.rounding.how
    assert runs.rounding.bound < 1e-10
    assert {run_check(name, runs).outcome for name in CHECKS} == {Outcome.EXACT}


def test_a_difference_of_nan_is_infinite() -> None:
    assert difference(torch.tensor([1.0]), torch.tensor([float("nan")])) == float("inf")
    assert difference(torch.zeros(0), torch.zeros(0)) == 0.0


def test_the_model_is_left_as_it_was() -> None:
    subject = subject_of("retrofit_llama")
    model, before = subject.model, subject.model.loop.R
    weights = {name: p.clone() for name, p in model.named_parameters()}
    runs = Runs(subject)
    for name in CHECKS:
        run_check(name, runs)
    assert before == model.loop.R
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


def test_without_memory_for_a_copy_bounds_are_noise_and_dtypes_are_left_out(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    folder = copy_of("ouro", tmp_path / "half")
    tensors = load_file(folder / "model.safetensors")
    write_tensors(folder, {name: tensor.half() for name, tensor in tensors.items()})
    subject = load_subject(open_subject(folder, None, None), folder, None, "cpu", torch.float32, 0)
    assert set(finite(subject).numbers) == {"float32", "float16"}
    monkeypatch.setattr(rounding, "free_bytes", lambda device: 10_000)
    found = finite(subject)
    assert found.outcome is Outcome.EXACT
    assert set(found.numbers) == {"float32"}
    assert "float16" in found.found
    runs = Runs(subject)
    assert "noise" in runs.rounding.how
    assert {run_check(name, runs).outcome for name in CHECKS} == {Outcome.EXACT}
    keys_of_a_neighbour(monkeypatch)
    assert run_check("cached = uncached", runs).outcome is Outcome.WRONG
