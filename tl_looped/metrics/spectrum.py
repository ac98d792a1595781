"""The spectrum of the loop at the state that a run reached, a number a prompt.

Near a fixed point ``x* = S(x*)`` the distance to it behaves as ``J^n v``, with the Jacobian J of
one recurrence ``S`` at ``x*``: it shrinks by J's spectral radius a recurrence, in the long run. So
the radius at ``x_R`` predicts the rate that ``tl_looped.metrics.convergence`` measures on the run's
steps. What sets the two apart:

- The rate is a fit over all steps above the noise floor. J is far from normal (its largest singular
  value is several times its radius), so that early steps shrink otherwise than late ones; and early
  steps are taken far from ``x*``, where the Jacobian is another.
- A single starting state may hold little of the slowest direction.
- Where the state is no fixed point (``fixed_point_residual``), the radius is that of the map at one
  place of a path, and predicts nothing.

Each prompt is computed alone, with its real tokens only: its numbers depend neither on the batch
nor on padding, and the memory is that of one prompt. See :mod:`tl_looped.metrics.dynamics` for how
a spectrum is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tl_looped.checks import Seed, checked, whole
from tl_looped.errors import InputError
from tl_looped.metrics.convergence import fixed_point_residual
from tl_looped.metrics.dynamics import loop_jacobian_spectrum
from tl_looped.model.limits import checked_recurrences
from tl_looped.model.masks import real_tokens
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.loop_map import LoopMap
from tl_looped.transformer.reading import read_tokens

ITERATIONS, TOLERANCE = 300, 1e-3
"""Products with the Jacobian; the demo's 32 prompts then have errors of the radius below 1 %."""

SPECTRUM = {
    "spectral_radius": "spectral radius of one recurrence's Jacobian at the reached state",
    "spectral_radius_error": "difference of two estimates of the spectral radius",
    "largest_singular_value": "largest singular value of one recurrence's Jacobian",
    "largest_singular_value_error": "distance to the nearest singular value, at most",
    "spectrum_converged": "1 if both errors are within the tolerance, 0 if not",
    "fixed_point_residual": "relative step of one more recurrence, mean over tokens",
}
"""The variables of :func:`loop_spectrum` and what they are; all are without a unit."""


def reached_state(loop_map: LoopMap, n_recurrences: int) -> Float[Tensor, "batch pos d_model"]:
    """``x_R``, the last of ``loop_map.run(R)``, without keeping the others.

    Args:
        loop_map: Of ``model.loop_map(prompt)``.
        n_recurrences: At least 1.
    """
    whole(n_recurrences, "n_recurrences", 1)
    checked_recurrences(n_recurrences)
    with torch.no_grad():
        state: Tensor = loop_map.run(1)[-1]  # the first recurrence may be another than the map
        for _ in range(n_recurrences - 1):
            state = loop_map(state)
    return state


@checked
def loop_spectrum(
    model: LoopedTransformer,
    tokens: Any,
    states: Float[Tensor, "state_prompt state_pos d_model"] | None = None,
    *,
    n_recurrences: int | None = None,
    attention_mask: Tensor | None = None,
    initial_state: str | None = None,
    state_seed: Seed | None = None,
    without_mlp: Iterable[str] = (),
    n_iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> xr.Dataset:
    """The spectrum of the loop's Jacobian at the states that prompts reached.

    Costs about ``n_iterations`` to three times as many recurrences a prompt.

    Args:
        model: On one device, and without hooks: they would act in a run and not in the map.
        tokens: Of every prompt, ``[prompt, pos]``, of ``model.to_tokens`` or ``model.tokenize``.
        states: Where, ``hook_state_out`` of the last recurrence; the state after ``n_recurrences``
            of the loop map from the model's start if None.
        n_recurrences: R; the model's present number if None. Has no effect on given states.
        attention_mask: Zero at padding, which is cut off; all tokens are real if None, pad tokens
            included.
        initial_state, state_seed: Of the start, where no states are given: as for the model.
        without_mlp: Ablated layers, see :meth:`LoopedTransformer.loop_map`.
        n_iterations, tolerance, seed: See :func:`loop_jacobian_spectrum`. Half precision is
            differentiated as it is, and rounding then limits the errors.

    Returns:
        The variables of :data:`SPECTRUM` over ``prompt``, in fp64, with units and ``long_name``,
        and the settings as attributes ``spectrum_iterations, spectrum_tolerance, spectrum_seed``.
        NaN where a state or a Jacobian is not finite; ``spectrum_converged`` is 0 there.

    Raises:
        InputError: wrong shapes, a model with hooks or on several devices, too few iterations.
    """
    check_silent(model)
    tokens = read_tokens(tokens)
    if tokens.ndim != 2:
        raise InputError(
            f"tokens must be [prompt, pos], got shape {tuple(tokens.shape)}: one prompt is "
            "tokens[None]"
        )
    real = torch.ones_like(tokens, dtype=torch.bool)
    if attention_mask is not None:
        real = torch.atleast_2d(real_tokens(attention_mask))
    if real.shape != tokens.shape or not bool(real.any(-1).all()):
        raise InputError(
            f"attention_mask must be like tokens, {tuple(tokens.shape)}, with a real token for "
            f"every prompt, got shape {tuple(real.shape)}"
        )
    wanted = (*tokens.shape, model.cfg.d_model)
    if states is not None and tuple(states.shape) != wanted:
        raise InputError(f"states must have shape {wanted}, got {tuple(states.shape)}")
    found: dict[str, list[float]] = {name: [] for name in SPECTRUM}
    for i, row in enumerate(tokens):
        keep = real[i].to(row.device)
        one = row[keep][None]
        loop_map = model.loop_map(
            one,
            torch.ones_like(one),
            initial_state=initial_state,
            state_seed=state_seed,
            without_mlp=without_mlp,
        )
        if states is None:
            with model.turn:
                R = model.loop.R if n_recurrences is None else n_recurrences
            state = reached_state(loop_map, R)
        else:
            state = states[i][keep.to(states.device)][None]
        spectrum = loop_jacobian_spectrum(
            loop_map, state, n_iterations=n_iterations, tolerance=tolerance, seed=seed
        )
        with torch.no_grad():
            residual = fixed_point_residual(state.to(loop_map.initial_state), loop_map(state))
        values = vars(spectrum) | {
            "spectrum_converged": spectrum.converged,
            "fixed_point_residual": residual.mean(),
        }
        for name, column in found.items():
            column.append(float(values[name]))
    return _labelled(found, n_iterations, tolerance, seed)


def _labelled(
    values: dict[str, list[float]], n_iterations: int, tolerance: float, seed: int
) -> xr.Dataset:
    """Lists over prompts as the dataset of :func:`loop_spectrum`."""
    variables: dict[str, Any] = {
        name: ("prompt", torch.tensor(column, dtype=torch.float64).numpy())
        for name, column in values.items()
    }
    data = xr.Dataset(variables)
    for name, what in SPECTRUM.items():
        data[name].attrs.update(long_name=what, units="1")
    return data.assign_attrs(
        spectrum_iterations=n_iterations, spectrum_tolerance=tolerance, spectrum_seed=seed
    )


def without_spectrum(
    n_prompts: int, n_iterations: int = ITERATIONS, tolerance: float = TOLERANCE, seed: int = 0
) -> xr.Dataset:
    """The same for prompts whose spectrum is not computed: NaN throughout."""
    nothing = {name: [math.nan] * n_prompts for name in SPECTRUM}
    return _labelled(nothing, n_iterations, tolerance, seed)


def check_silent(model: LoopedTransformer) -> None:
    """Whether a run of the model is its loop map's, and the map can be differentiated.

    Raises:
        InputError: if the model has hooks, or lies on several devices.
    """
    if model.cfg.n_devices > 1:
        raise InputError(
            f"model lies on {model.cfg.n_devices} devices, and the spectrum of its loop needs one: "
            "name a device, or leave the extra spectrum out"
        )
    active = [point.name for point in model.all_hook_points() if point.is_active]
    if active:
        raise InputError(
            f"model has hooks, at {active[0]} for instance, that act in a run and not in the loop "
            "map whose spectrum is asked for: model.reset_hooks() removes them"
        )
