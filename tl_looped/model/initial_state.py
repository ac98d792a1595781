"""The loop's random initial state, as a function of seed and position.

The checkpoints' rule: each channel of each position is an independent draw from a normal of
standard deviation s, cut at three of them, times the embedding scale. The references draw from the
global generator, so their state changes with the batch, the padding and every earlier draw. Here
the state at position t depends on the seed and on t alone: the same for every row, for any padding
and any length, so that batching, padding and caching change nothing. The uniform bits are those of
the counter-based Philox generator, whose stream numpy guarantees across versions and machines.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.errors import InputError

CUT = 3.0  # standard deviations
_WORDS_PER_STEP = 4  # Philox4x64 yields four words a counter step


def truncated_normal(seed: int, start: int, stop: int, d: int) -> Float[Tensor, "pos d"]:
    """Standard normals cut at three standard deviations, for positions ``start`` to ``stop - 1``.

    Args:
        seed: Any integer from 0 to 2**128 - 1.
        start: First position.
        stop: End of the positions, exclusive.
        d: Channels a position.

    Returns:
        fp64 on the CPU. Row t is the same for every ``start`` and ``stop``.
    """
    if type(seed) is not int:
        raise InputError(f"state_seed must be an integer, got {seed!r}")
    if not 0 <= seed < 2**128:
        raise InputError(f"state_seed must be from 0 to 2**128 - 1, got {seed}")
    # Outside torch.compile the operator would cost more than the draw, and load the compiler.
    draw = _uniform_as_operator if torch.compiler.is_compiling() else _uniform
    uniform = draw(str(seed), start, stop, d)
    below = torch.special.ndtr(torch.tensor(-CUT, dtype=torch.float64))
    state: Tensor = torch.special.ndtri(below + uniform * (1.0 - 2.0 * below))
    return state


def _uniform(seed: str, start: int, stop: int, d: int) -> Tensor:
    """Uniform numbers between 0 and 1, exclusive, ``[pos, d]``; a seed has more than 64 bits."""
    steps = math.ceil(d / _WORDS_PER_STEP)
    generator = np.random.Philox(key=int(seed))
    generator.advance(start * steps)
    raw = generator.random_raw((stop - start) * steps * _WORDS_PER_STEP)
    words = raw.reshape(stop - start, -1)[:, :d]
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54)


# torch.compile traces numpy's arithmetic with its own, which lacks shifts of unsigned integers, and
# would keep the drawn numbers as constants. An operator is called as it is.
_uniform_as_operator = torch.library.custom_op(
    "tl_looped::uniform_by_seed_and_position",
    _uniform,
    mutates_args=(),
    schema="(str seed, SymInt start, SymInt stop, SymInt d) -> Tensor",
)


@_uniform_as_operator.register_fake
def _shape_of_uniform(seed: str, start: int, stop: int, d: int) -> Tensor:
    return torch.empty(stop - start, d, dtype=torch.float64)


def draw_initial_state(
    seed: int,
    positions: Int[Tensor, "batch pos"],
    d_model: int,
    scale: float,
    dtype: torch.dtype,
) -> Float[Tensor, "batch pos d_model"]:
    """The initial state at every position: ``scale`` times :func:`truncated_normal`."""
    first, last = int(positions.min()), int(positions.max())
    table = (truncated_normal(seed, first, last + 1, d_model) * scale).to(dtype)
    return table.to(positions.device)[positions - first]
