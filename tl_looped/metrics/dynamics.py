"""The loop as a dynamical system: how its Jacobian stretches, and whether the start matters.

``step`` is any map from a state to a state of the same shape ``[*batch, pos, d_model]`` that keeps
prompts apart; ``model.loop_map(prompt)`` is one. Each prompt has a Jacobian of its own, of the size
``pos * d_model`` squared, which is never built: automatic differentiation gives its products with
vectors from both sides.

PyTorch's fused attention can be differentiated neither twice nor forwards, so the step is run with
the plain one (``SDPBackend.MATH``). Use the same around ``torch.func.jvp(loop_map, ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tl_looped.checks import Seed, checked, number, whole
from tl_looped.errors import InputError
from tl_looped.metrics.inputs import token_mask, token_mean
from tl_looped.model import limits
from tl_looped.transformer.loop_map import LoopMap

StateMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class JacobianSpectrum:
    """The largest stretch of a step's Jacobian, a prompt.

    Args:
        spectral_radius: Largest modulus of an eigenvalue: how fast a small perturbation grows or
            shrinks a recurrence, in the long run. NaN where state or Jacobian is not finite.
        spectral_radius_error: Difference of the estimates from the two halves of the iterations
            that were averaged. A sign of what is left to converge, no bound: it can be several
            times too small where several eigenvalues have nearly the largest modulus.
        largest_singular_value: Largest stretch of any direction in ONE recurrence; never below the
            spectral radius, and far above it where the Jacobian is not normal.
        largest_singular_value_error: ``||J^T J v - sigma^2 v|| / (2 sigma)``: some singular value
            is that near.
        converged: Whether both errors are at most ``tolerance`` times their value.
        n_iterations, tolerance, seed: The arguments.
    """

    spectral_radius: Float[Tensor, "*batch"]
    spectral_radius_error: Float[Tensor, "*batch"]
    largest_singular_value: Float[Tensor, "*batch"]
    largest_singular_value_error: Float[Tensor, "*batch"]
    converged: Tensor
    n_iterations: int
    tolerance: float
    seed: int


@checked
def loop_jacobian_spectrum(
    step: StateMap,
    state: Float[Tensor, "*batch pos d_model"],
    attention_mask: Tensor | None = None,
    n_iterations: int = 300,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> JacobianSpectrum:
    """Spectral radius and largest singular value of a step's Jacobian at a state.

    Spectral radius: a random vector is multiplied by J ``n_iterations`` times; the radius is
    the geometric mean of its growth over the last half. A complex pair makes the growth oscillate,
    so the mean is weighted with a smooth bump that vanishes at both ends, under which a
    quasi-periodic sequence converges fast (Das et al. 2017, arXiv 1601.06051). Two eigenvalues of
    nearly the same modulus, or a Jordan block, converge slowly: look at the error.
    Largest singular value: power iteration of ``J^T J``, until the error is a thousandth of what
    is asked for.

    Args:
        step: See the module. Half precision is differentiated as it is: the numbers are those of
            the rounded map's formula, in its precision.
        state: Where, for instance the fixed point ``x_R``.
        attention_mask: ``[*batch, pos]``, zero at padding, which is held fixed.
        n_iterations: At least 8. Each costs about a recurrence; the Jacobian of a causal model is
            block triangular over positions and far from normal, so ask for several hundred.
        tolerance: Relative error that counts as converged.
        seed: Of the starting vector.

    Raises:
        InputError: wrong shapes, or fewer than 8 iterations.
    """
    whole(n_iterations, "n_iterations", 8, 10**5)
    number(tolerance, "tolerance", above=0)
    whole(seed, "seed", 0)
    real = token_mask(state, attention_mask)
    with _differentiable():
        x = state.detach().clone()
        keep = torch.ones_like(x) if real is None else real[..., None].to(x).expand(x.shape).clone()
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) * keep
        _check_step(step, x)

        pull = torch.func.vjp(step, x)[1]
        # J^T u is linear in u, and its own derivative is J: a forward product from two backward
        # ones. Both keep their graph, where torch.func.jvp would run the step anew for each.
        push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(x))[1]
        forward, backward = (lambda v: push(v)[0] * keep), (lambda v: pull(v)[0] * keep)
        radius, radius_error = _spectral_radius(forward, start, n_iterations)
        sigma, sigma_error = _largest_singular_value(
            forward, backward, start, n_iterations, enough=1e-3 * tolerance
        )
    good = (radius_error <= tolerance * radius) & (sigma_error <= tolerance * sigma)
    return JacobianSpectrum(
        radius, radius_error, sigma, sigma_error, good, n_iterations, tolerance, seed
    )


@contextmanager
def _differentiable() -> Iterator[None]:
    """Where a step can be differentiated, and no graph of the parameters is kept."""
    with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def _check_step(step: StateMap, x: Tensor) -> None:
    shape = step(x).shape
    if shape != x.shape:
        raise InputError(
            f"step must map a state to one of the same shape {tuple(x.shape)}, got {tuple(shape)}"
        )


def _norm(v: Tensor) -> Float[Tensor, "*batch"]:
    return v.double().flatten(-2).norm(dim=-1)


def _scaled(v: Tensor, norm: Tensor) -> Tensor:
    """Of norm one; a zero vector stays zero."""
    safe = torch.where(norm == 0, 1.0, norm)
    return (v.double() / safe[..., None, None]).to(v.dtype)


def _spectral_radius(push: StateMap, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
    v = _scaled(v, _norm(v))
    growth = []
    for _ in range(n):
        v = push(v)
        norm = _norm(v)
        growth.append(norm.log())  # -inf where the map kills the vector: radius zero
        v = _scaled(v, norm)
    late = torch.stack(growth[n // 2 :])
    first, second = late[: len(late) // 2], late[len(late) // 2 :]
    radius = _smooth_mean(late).exp()
    error = (_smooth_mean(first).exp() - _smooth_mean(second).exp()).abs()
    return radius, error


def _smooth_mean(x: Float[Tensor, " n *batch"]) -> Float[Tensor, "*batch"]:
    """Mean under the bump ``exp(-1 / (t (1 - t)))``; -inf if any value is.

    The ends of a long bump underflow to zero, and are no part of it: zero times -inf is NaN.
    """
    t = torch.arange(1, len(x) + 1, dtype=torch.float64, device=x.device) / (len(x) + 1)
    weight = (-1 / (t * (1 - t))).exp()
    weight = (weight / weight.sum()).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(weight > 0, weight * x, 0.0).sum(0)


def _largest_singular_value(
    push: StateMap, pull: StateMap, v: Tensor, n: int, enough: float
) -> tuple[Tensor, Tensor]:
    v = _scaled(v, _norm(v))
    for _ in range(n):
        pushed = push(v)
        back = pull(pushed)
        sigma = _norm(pushed)
        residual = _norm(back.double() - sigma.square()[..., None, None] * v.double())
        error = torch.where(sigma == 0, 0.0, residual / (2 * sigma))
        if bool((error <= enough * sigma).all()):
            break
        v = _scaled(back, _norm(back))
    return sigma, error


@dataclass(frozen=True)
class PathIndependence:
    """How alike the end states of several starts are, a prompt; means over real tokens, in fp64.

    Args:
        names: Of the starts, the order of rows and columns.
        cosine: Cosine of two end states; NaN where one is zero at every token.
        relative_distance: ``2 ||a - b|| / (||a|| + ||b||)``: 0 for equal states, 2 for opposite
            ones; NaN where both are zero.
        end_states: After ``n_recurrences``.
        n_recurrences: The argument.
    """

    names: tuple[str, ...]
    cosine: Float[Tensor, "*batch start start"]
    relative_distance: Float[Tensor, "*batch start start"]
    end_states: Float[Tensor, "start *batch pos d_model"]
    n_recurrences: int


@checked
def path_independence(
    step: StateMap,
    starts: Mapping[str, Float[Tensor, "*batch pos d_model"]],
    n_recurrences: int,
    attention_mask: Tensor | None = None,
) -> PathIndependence:
    """Iterate a step from several starts and compare where they end.

    Means something where the prompt reaches the loop by an injection. Without one the initial
    state IS the prompt, and another start is another prompt. That ends agree does not show that
    they are a fixed point: see :mod:`tl_looped.metrics.convergence`.

    Args:
        step: See the module.
        starts: States ``[*batch, pos, d_model]`` by name; :func:`loop_starts` makes the usual ones.
            Another prompt's fixed point is a further one.
        n_recurrences: How often to iterate, at least once.
        attention_mask: ``[*batch, pos]``, zero at padding.
    """
    if len(starts) < 2:
        raise InputError(f"starts must hold at least two states, got {list(starts)}")
    whole(n_recurrences, "n_recurrences", 1, limits.most_layers)
    ends = []
    for state in starts.values():
        for _ in range(n_recurrences):
            state = step(state)
        ends.append(state)
    real = token_mask(ends[0], attention_mask)
    norms = [end.double().norm(dim=-1) for end in ends]

    def pairwise(of: Callable[[int, int], Tensor]) -> Tensor:
        n = range(len(ends))
        values = [torch.stack([of(a, b) for b in n], -1) for a in n]
        return torch.stack(values, -2)

    def cosine(a: int, b: int) -> Tensor:
        value = (ends[a].double() * ends[b].double()).sum(-1) / (norms[a] * norms[b])
        return token_mean(value, real, left_out=(norms[a] == 0) | (norms[b] == 0))

    def distance(a: int, b: int) -> Tensor:
        size = norms[a] + norms[b]
        value = 2 * (ends[a].double() - ends[b].double()).norm(dim=-1) / size
        return token_mean(value, real, left_out=size == 0)

    return PathIndependence(
        tuple(starts), pairwise(cosine), pairwise(distance), torch.stack(ends), n_recurrences
    )


@checked
def loop_starts(
    loop_map: LoopMap,
    seeds: tuple[Seed, ...] = (0, 1, 2),
    zeros: bool = True,
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Starts for :func:`path_independence` by name: ``seed 0``, ..., ``zeros`` and the given ones.

    Args:
        loop_map: Of ``model.loop_map(prompt)``; its ``random_state`` says how a seed is drawn.
        seeds: Of random states.
        zeros: Whether the zero state is among them.
        given: Further states, for instance another prompt's fixed point.
    """
    starts = {f"seed {seed}": loop_map.random_state(seed) for seed in seeds}
    if zeros:
        starts["zeros"] = torch.zeros_like(loop_map.initial_state)
    return starts | dict(given or {})
