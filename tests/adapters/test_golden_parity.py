"""Every tensor of every golden case, through the public API, at atol = rtol = 1e-4 in fp32."""

from __future__ import annotations

import pytest
import torch
from conftest import TOLERANCE, Golden, load_golden
from goldenkeys import golden_keys
from torch import Tensor

from tl_looped import LoopedActivationCache, LoopedTransformer

pytestmark = pytest.mark.every_family


@pytest.fixture
def cached(golden: Golden, golden_model: LoopedTransformer) -> tuple[Tensor, LoopedActivationCache]:
    logits, cache = golden_model.run_with_cache(golden.tokens, **golden.run)
    return logits, cache


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_logits_with_and_without_listeners(golden, golden_model, cached) -> None:
    close(cached[0], golden.tensors["logits"])
    close(golden_model(golden.tokens, **golden.run), golden.tensors["logits"])


@pytest.mark.parametrize("recurrences", [1, 2, 9])
def test_logits_at_other_recurrence_counts(golden, golden_model, recurrences) -> None:
    logits = golden_model(golden.tokens, n_recurrences=recurrences, **golden.run)
    close(logits, golden.tensors[f"logits_r{recurrences}"])
    golden_model.set_recurrences(recurrences)
    close(golden_model(golden.tokens, **golden.run), logits)


def expected_names(golden: Golden, model: LoopedTransformer) -> dict[str, object]:
    """Golden tensor -> cache key, for every tensor that is an activation of the run."""
    keys = golden_keys(model, golden.is_raven)
    if golden.is_raven:
        keys |= {
            "initial_state": "hook_initial_state",
            "latent_states": ("resid_pre", -model.loop.c),
        }
    return keys


def test_every_activation(golden, golden_model, cached) -> None:
    keys = expected_names(golden, golden_model)
    for name, key in keys.items():
        close(cached[1][key], golden.tensors[name])
    # What is no activation of this run is checked by the other tests of this file.
    rest = {name.split(".")[0] for name in set(golden.tensors) - set(keys)}
    raven = {"input_ids", "final", "logits", "logits_r1", "logits_r2", "logits_r9", "greedy_tokens"}
    ouro = raven - {"final"} | {
        "gate_logits",
        "exit_pdf",
        "exit_logits",
        "exit_steps_threshold_0",
        "logits_exit_threshold_0",
        "expected_logits",
    }
    assert rest == (raven if golden.is_raven else ouro)


def test_final_state_is_what_the_unembedding_reads(golden, golden_model, cached) -> None:
    if not golden.is_raven:
        golden.tensors["final"] = golden.tensors[f"loop_out.{golden_model.loop.R - 1}"]
    final = cached[1]["ln_final.hook_normalized"] * golden_model.ln_final.w
    close(final, golden.tensors["final"])


def test_every_residual_three_ways_of_naming(golden, golden_model, cached) -> None:
    loop = golden_model.loop
    for r in range(loop.R):
        for i in range(loop.k):
            expected = golden.tensors[f"core.{r}.{i}"]
            close(cached[1]["resid_post", loop.index(r, i)], expected)
            close(cached[1][f"recurrence.{r}.blocks.{i}.hook_resid_post"], expected)
            close(cached[1][f"blocks.({r}, {i}).hook_resid_post"], expected)


def test_stacked_recurrences(golden, golden_model, cached) -> None:
    loop = golden_model.loop
    stacked = cached[1].stack_recurrences("resid_post")
    assert stacked.shape == (loop.R, loop.k, *golden.tensors["embed"].shape)
    close(stacked[-1, -1], golden.tensors[f"core.{loop.R - 1}.{loop.k - 1}"])
    states = cached[1].stack_recurrences("state_out")
    close(states, torch.stack([golden.tensors[f"loop_out.{r}"] for r in range(loop.R)]))
    patterns = cached[1].stack_recurrences("pattern")
    close(patterns[1, 2], golden.tensors["attn.core.1.2"])


def test_greedy_generation(golden, golden_model) -> None:
    state = {"initial_state": "zeros"} if golden.is_raven else {}
    out = golden_model.generate(
        golden.tokens[:1, :5], max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False,
        **state,
    )  # fmt: skip
    assert torch.equal(out, golden.tensors["greedy_tokens"])


def test_coda_lens_at_the_last_state_is_the_model(golden, golden_model, cached) -> None:
    loop = golden_model.loop
    last = cached[1]["resid_post", (loop.R - 1, loop.k - 1)]
    close(golden_model.coda_lens(last), golden.tensors["logits"])


def test_coda_lens_at_an_early_state_is_an_early_stop(golden, golden_model, cached) -> None:
    states = cached[1].stack_recurrences("resid_post")[:, -1]
    lens = golden_model.coda_lens(states)
    close(lens[0], golden.tensors["logits_r1"])
    close(lens[1], golden.tensors["logits_r2"])


def test_logit_lens_of_the_last_block_is_the_model(golden, golden_model, cached) -> None:
    close(golden_model.logit_lens(cached[1]["resid_post", -1]), golden.tensors["logits"])


def test_ouro_exits() -> None:
    golden = load_golden("ouro")
    readout = golden.load().exits(golden.tokens)
    close(readout.gate_logits, golden.tensors["gate_logits"])
    close(readout.distribution, golden.tensors["exit_pdf"])
    for t in range(4):
        close(readout.exit_logits[t], golden.tensors[f"exit_logits.{t}"])
    assert torch.equal(readout.recurrence(0.5).long(), golden.tensors["exit_steps_threshold_0.5"])
    close(readout.logits_at(0.5), golden.tensors["logits_exit_threshold_0.5"])
    close(readout.expected_logits, golden.tensors["expected_logits"])
    # The config's threshold takes the last step in fp32.
    close(readout.logits_at(1.0), golden.tensors["logits"])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.12), (torch.float16, 0.012)])
@pytest.mark.parametrize("recurrences", [1, 5])
@torch.no_grad()
def test_half_precision_is_finite_and_close(golden, dtype, bound, recurrences) -> None:
    """Relative error of the logits (Frobenius norm) against fp32.

    Rounding only the weights and computing in fp32 already costs 0.01 to 0.06 in bf16 and 0.001 to
    0.004 in fp16 on these random models; computing in half precision may cost three times that.
    """
    reference_model, model, rounded = golden.load(), golden.load(dtype=dtype), golden.load()
    for target, source in zip(rounded.parameters(), model.parameters(), strict=True):
        target.copy_(source)
    reference, logits, floor = (
        m(golden.tokens, n_recurrences=recurrences, **golden.run)
        for m in (reference_model, model, rounded)
    )
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    error = (logits.float() - reference).norm() / reference.norm()
    assert error < bound
    assert error < 3 * (floor - reference).norm() / reference.norm()
