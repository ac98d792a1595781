"""The loop as a map: against the model's own runs, brute-force Jacobians and known spectra."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_same
from conftest import TOLERANCE, VARIANTS, Golden, exact_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tl_looped import ArgumentTypeError, InitialState, Injection, LoopedTransformer
from tl_looped.errors import InputError
from tl_looped.metrics.dynamics import loop_jacobian_spectrum, loop_starts, path_independence

pytestmark = pytest.mark.usefixtures("without_gradients")


def states_of(model: LoopedTransformer, tokens: Tensor, **kwargs) -> Tensor:
    _, cache = model.run_with_cache(
        tokens, names_filter=lambda name: name.endswith("hook_state_out"), **kwargs
    )
    return cache.stack_recurrences("state_out")


def test_the_map_repeats_the_run_of_the_reference_cases(golden: Golden) -> None:
    model = golden.load(dtype=torch.float64)
    loop_map = model.loop_map(golden.tokens, **golden.run)
    expected = states_of(model, golden.tokens, **golden.run)
    assert_same(loop_map.run(model.loop.R), expected)
    reference = golden.tensors[f"loop_out.{model.loop.R - 1}"]
    torch.testing.assert_close(expected[-1].float(), reference, **TOLERANCE)


def test_the_map_repeats_the_run_of_every_variant(
    variant: LoopedTransformer, tokens: Tensor
) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for attention_mask in (None, mask):
        loop_map = variant.loop_map(tokens, attention_mask, state_seed=7)
        assert (loop_map.mask is None) == (attention_mask is None)
        expected = states_of(variant, tokens, attention_mask=attention_mask, state_seed=7)
        assert torch.equal(loop_map.run(4), expected)
        assert torch.equal(loop_map(expected[1]), expected[2])


def test_a_run_may_skip_the_first_adapter_and_the_map_itself_never_does(tokens: Tensor) -> None:
    changes = {"injection": Injection.LINEAR, "initial_state": InitialState.PRELUDE_SKIP_ADAPTER}
    model = LoopedTransformer.from_config(exact_config(**changes))
    loop_map = model.loop_map(tokens)
    expected = states_of(model, tokens)
    assert torch.equal(loop_map.run(4), expected)
    assert torch.equal(loop_map.run(2, expected[0]), expected[1:3])
    assert not torch.allclose(loop_map(loop_map.initial_state), expected[0])
    given = model.loop_map(tokens, initial_state=loop_map.initial_state)
    assert torch.equal(given.run(1)[0], given(given.initial_state))


def test_no_hook_fires_and_no_number_of_recurrences_plays_a_role(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))
    seen: list[str] = []
    model.add_hook(lambda name: True, lambda x, hook: seen.append(hook.name))
    model.add_hook(lambda name: True, lambda x, hook: x * 0)
    loop_map = model.loop_map(tokens, state_seed=3)
    found = loop_map.run(6)
    assert seen == []
    model.reset_hooks()
    assert torch.equal(found, states_of(model, tokens, n_recurrences=6, state_seed=3))
    assert model.loop.R == 4


def test_the_map_refuses_what_it_cannot_take(plain: LoopedTransformer, tokens: Tensor) -> None:
    loop_map = plain.loop_map(tokens)
    with pytest.raises(InputError, match=r"\bstate\b"):
        loop_map(torch.zeros(1, 9, 32))
    with pytest.raises(InputError, match="n_recurrences"):
        loop_map.run(0)
    with pytest.raises(InputError, match="context"):
        plain.loop_map(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(InputError, match=r"initial_state.*'zeros'"):
        plain.loop_map(tokens, initial_state="ones")
    assert not plain.loop_map(tokens, initial_state="zeros").initial_state.any()


def test_random_states_are_the_models_own(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))
    assert torch.equal(
        model.loop_map(tokens).random_state(5), model.loop_map(tokens, state_seed=5).initial_state
    )
    none = LoopedTransformer.from_config(exact_config())
    loop_map = none.loop_map(tokens)
    size = loop_map.initial_state.square().mean().sqrt()
    drawn = loop_map.random_state(0).square().mean().sqrt()
    assert drawn.item() == pytest.approx(size.item(), rel=0.1)


def linear(matrix: Tensor):
    return lambda x: (matrix @ x.flatten(-2)[..., None])[..., 0].unflatten(-1, x.shape[-2:])


def turn(angle: float, size: float) -> Tensor:
    c, s = size * math.cos(angle), size * math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


KNOWN = {
    "diagonal": (torch.tensor([0.9, -0.5, 0.1, 0.0]).double().diag(), 0.9, 0.9),
    "negative": (torch.tensor([-0.9, 0.5, 0.1, 0.0]).double().diag(), 0.9, 0.9),
    "growing": (torch.tensor([1.5, 0.5, 0.1, 0.0]).double().diag(), 1.5, 1.5),
    "complex pair": (torch.block_diag(turn(1.0, 0.8), turn(0.3, 0.4)), 0.8, 0.8),
    "rotation": (torch.block_diag(turn(0.7, 1.0), turn(2.0, 0.1)), 1.0, 1.0),
    "sheared pair": (
        torch.block_diag(torch.tensor([[0.5, -4.0], [0.1, 0.5]]).double(), 0.1 * torch.eye(2)),
        math.sqrt(0.65),
        None,
    ),
    "not normal": (
        torch.tensor([[0.5, 10, 0, 0], [0, 0.4, 0, 0], [0, 0, 0.1, 0], [0, 0, 0, 0]]).double(),
        0.5,
        None,
    ),
    "nilpotent": (torch.diag(torch.full((3,), 2.0), 1).double(), 0.0, 2.0),
    "zero": (torch.zeros(4, 4).double(), 0.0, 0.0),
}


@pytest.mark.parametrize("n_iterations", [8, 300, 2000])  # ends of a long mean weigh nothing
def test_a_map_that_forgets_its_state_has_no_spectrum_but_zero(n_iterations: int) -> None:
    state = torch.ones(3, 2, 2)
    found = loop_jacobian_spectrum(torch.ones_like, state, n_iterations=n_iterations)
    assert found.spectral_radius.tolist() == [0, 0, 0]
    assert found.largest_singular_value.tolist() == [0, 0, 0]
    assert found.converged.all()


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_spectra(name: str) -> None:
    matrix, radius, sigma = KNOWN[name]
    found = loop_jacobian_spectrum(linear(matrix), torch.zeros(2, 2).double(), n_iterations=1000)
    assert found.spectral_radius.item() == pytest.approx(radius, rel=1e-4, abs=1e-12)
    largest = torch.linalg.svdvals(matrix)[0].item()
    assert sigma is None or sigma == pytest.approx(largest)
    assert found.largest_singular_value.item() == pytest.approx(largest, rel=1e-6)
    assert found.converged.item()


def test_too_few_iterations_are_told_from_enough() -> None:
    close = torch.tensor([0.9, 0.89, 0.1, 0.0]).double().diag() + torch.ones(4, 4).double().triu(1)
    truth = 0.9
    state = torch.zeros(2, 2).double()
    few = loop_jacobian_spectrum(linear(close), state, n_iterations=12, tolerance=1e-4)
    assert not few.converged.item()
    many = loop_jacobian_spectrum(linear(close), state, n_iterations=1500, tolerance=1e-4)
    assert many.converged.item()
    assert many.spectral_radius.item() == pytest.approx(truth, rel=1e-4)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0.2, 3.0))
def test_the_radius_is_invariant_to_the_basis_and_below_the_singular_value(
    seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([1.0, 0.6, -0.5, 0.2]).double() * scale
    basis = torch.randn(4, 4, generator=generator).double() + 3 * torch.eye(4)
    matrix = basis @ values.diag() @ torch.linalg.inv(basis)
    found = loop_jacobian_spectrum(linear(matrix), torch.zeros(2, 2).double(), seed=seed)
    assert found.spectral_radius.item() == pytest.approx(scale, rel=1e-6)
    assert found.largest_singular_value.item() >= found.spectral_radius.item() * (1 - 1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # in PyTorch's forward mode
@pytest.mark.parametrize("name", list(VARIANTS))
def test_against_the_brute_force_jacobian_of_a_model(name: str) -> None:
    changes = VARIANTS[name] | {"d_model": 8, "d_head": 4, "n_heads": 2, "d_mlp": 8, "n_core": 1}
    changes |= {"n_key_value_heads": 1} if "n_key_value_heads" in changes else {}
    model = LoopedTransformer.from_config(exact_config(**changes)).double()
    loop_map = model.loop_map(torch.tensor([[3, 1, 4], [1, 5, 9]]))
    state = loop_map.run(12)[-1]
    with sdpa_kernel(SDPBackend.MATH):
        whole = torch.func.jacrev(loop_map)(state)
    blocks = torch.stack([whole[i, :, :, i].reshape(24, 24) for i in range(2)])
    assert not whole[0, :, :, 1].any()
    with sdpa_kernel(SDPBackend.MATH):  # forward mode too
        _, pushed = torch.func.jvp(loop_map, (state,), (state,))
    torch.testing.assert_close(
        pushed.flatten(1), (blocks @ state.flatten(1)[..., None])[..., 0], rtol=1e-9, atol=1e-12
    )
    found = loop_jacobian_spectrum(loop_map, state, n_iterations=800, tolerance=3e-3)
    torch.testing.assert_close(
        found.spectral_radius, torch.linalg.eigvals(blocks).abs().amax(-1), rtol=3e-3, atol=0
    )
    torch.testing.assert_close(
        found.largest_singular_value, torch.linalg.svdvals(blocks)[:, 0], rtol=1e-4, atol=0
    )
    assert found.converged.all()


def test_padding_is_held_fixed(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"])).double()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    padded = model.loop_map(tokens, mask)
    alone = model.loop_map(tokens[:1, 4:])
    both = loop_jacobian_spectrum(padded, padded.run(3)[-1], mask, n_iterations=100)
    one = loop_jacobian_spectrum(alone, alone.run(3)[-1], n_iterations=100)
    torch.testing.assert_close(
        both.largest_singular_value[:1], one.largest_singular_value, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(both.spectral_radius[:1], one.spectral_radius, rtol=0.02, atol=0)


def test_a_spectrum_in_inference_mode_and_with_gradients_on(tokens: Tensor) -> None:
    model = LoopedTransformer.from_config(exact_config(**VARIANTS["pre-injection"]))
    with torch.inference_mode():
        loop_map = model.loop_map(tokens)
        state = loop_map.run(2)[-1]
        quiet = loop_jacobian_spectrum(loop_map, state, n_iterations=8)
    with torch.enable_grad():
        loop_map = model.loop_map(tokens)
        state = loop_map.run(2)[-1]
        loud = loop_jacobian_spectrum(loop_map, state, n_iterations=8)
        assert state.requires_grad
    assert torch.equal(quiet.spectral_radius, loud.spectral_radius)
    assert not loud.spectral_radius.requires_grad


def test_a_spectrum_at_a_state_that_is_not_finite_is_nan() -> None:
    state = torch.tensor([[1.0, math.nan]])
    found = loop_jacobian_spectrum(lambda x: x * x.sum(), state)
    assert found.spectral_radius.isnan()
    assert found.largest_singular_value.isnan()
    assert not found.converged


def test_wrong_input_names_the_argument() -> None:
    with pytest.raises(InputError, match="n_iterations"):
        loop_jacobian_spectrum(lambda x: x, torch.ones(2, 2), n_iterations=4)
    with pytest.raises(InputError, match="same shape"):
        loop_jacobian_spectrum(lambda x: x[..., :1], torch.ones(2, 2))
    with pytest.raises(InputError, match="at least two"):
        path_independence(lambda x: x, {"a": torch.ones(2, 2)}, 3)
    with pytest.raises(ArgumentTypeError, match="starts"):
        path_independence(lambda x: x, {"a": torch.ones(2, 2), "b": torch.ones(3, 2)}, 3)


def test_a_contraction_forgets_its_start_and_the_identity_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = {name: torch.randn(2, 3, 4, generator=generator).double() for name in "ab"}
    starts["minus a"] = -starts["a"]
    forgetful = path_independence(lambda x: 0.5 * x + 1, starts, 60)
    torch.testing.assert_close(forgetful.cosine, torch.ones(2, 3, 3).double())
    assert forgetful.relative_distance.max() < 1e-15
    assert forgetful.names == ("a", "b", "minus a")
    faithful = path_independence(lambda x: x, starts, 5)
    torch.testing.assert_close(faithful.cosine[:, 0, 2], -torch.ones(2).double())
    torch.testing.assert_close(faithful.relative_distance[:, 0, 2], 2 * torch.ones(2).double())
    assert torch.equal(faithful.relative_distance, faithful.relative_distance.mT)


def test_ends_are_compared_at_real_tokens_and_zero_ends_are_undefined() -> None:
    a, b = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    b[:, 0] = -1
    found = path_independence(lambda x: x, {"a": a, "b": b}, 1, torch.tensor([[0, 1, 1]]))
    assert found.cosine[0, 0, 1].item() == pytest.approx(1)
    gone = path_independence(lambda x: 0 * x, {"a": a, "b": b}, 1)
    assert gone.cosine.isnan().all()
    assert gone.relative_distance.isnan().all()


def test_starts_of_a_model_and_another_prompts_fixed_point(tokens: Tensor) -> None:
    changes = VARIANTS["pre-injection"] | {"init_mode": "normal"}
    model = LoopedTransformer.from_config(exact_config(**changes))
    here, there = model.loop_map(tokens), model.loop_map(tokens.flip(0))
    starts = loop_starts(here, seeds=(0, 1), given={"other prompt": there.run(40)[-1]})
    assert list(starts) == ["seed 0", "seed 1", "zeros", "other prompt"]
    assert torch.equal(starts["seed 1"], here.random_state(1))
    found = path_independence(here, starts, 40)
    assert found.relative_distance.max() < 1e-4
    assert found.cosine.min() > 0.9999
    ends = found.end_states
    torch.testing.assert_close(ends[0], states_of(model, tokens, n_recurrences=40)[-1])
