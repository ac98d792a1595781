"""Whether a sum of writes is what the cache holds, but for rounding.

What rounding explains is derived from the run: from the precision of its activations and from how
large they were on the way. No bound on the error of an edit follows, only that a sum which passes
is as close to the cached stream as the run itself was to exact arithmetic.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.errors import InvalidDecompositionError, MissingActivationError

MARGIN = 6.0
"""How many times the estimated rounding is let through.

The estimate has one rounding for each operation on the stream, where a norm has two or three, and
knows neither the order in which a kernel adds nor the tail of a distribution. Unedited runs stay
near one or below, in every precision and family.
"""

_MATRIX_PRECISION = {"high": 2.0**-11, "medium": 2.0**-8}
"""Units of roundoff of torch's faster fp32 matrix products."""


def unit(dtypes: set[torch.dtype]) -> float:
    """Largest relative error of one rounding in a run whose activations have these dtypes."""
    coarsest = max(torch.finfo(dtype).eps / 2 for dtype in dtypes)
    if torch.float64 in dtypes and len(dtypes) == 1:
        return coarsest
    return max(coarsest, _MATRIX_PRECISION.get(torch.get_float32_matmul_precision(), 0.0))


def rounding(x: Tensor, dtypes: set[torch.dtype], n_terms: int) -> Tensor:
    """Size of the error of each value of ``x``, ``[..., d]``, a sum of ``n_terms`` products.

    One rounding of the result; the order of the sum in the precision of the decomposition, whose
    error grows with the root of the number of terms; and the smallest numbers of the dtype.
    """
    coarse, fine = unit(dtypes), torch.finfo(x.dtype).eps / 2
    level = x.square().mean(-1, keepdim=True).sqrt()
    smallest = max(torch.finfo(dtype).smallest_normal for dtype in dtypes) * coarse
    size: Tensor = coarse * x.abs() + fine * n_terms**0.5 * level + smallest
    return size


def unchecked(missing: MissingActivationError) -> InvalidDecompositionError:
    """The error of a cache without provenance that lacks what its sums would be checked against."""
    return InvalidDecompositionError(
        "this cache was made by hand or by hooks that stayed, so nothing says whether its run was "
        f"edited, and the sum of its writes cannot be checked: {missing} Add it, use the cache of "
        "run_with_cache, or pass raw=True."
    )


def check_close(
    found: Float[Tensor, "*batch_pos d_model"],
    truth: Float[Tensor, "*batch_pos d_model"],
    expected: Float[Tensor, "*batch_pos"],
    name: str,
) -> None:
    """Raise if a sum of writes is not what the cache holds under ``name``.

    Args:
        found, truth: The sum and what is cached.
        expected: Norm of the error that rounding is expected to make.
        name: For the message.
    """
    error, size = (found - truth).norm(dim=-1), truth.norm(dim=-1)
    # Where a single position's estimate is low by chance, the others' counts.
    usual = (expected / size).nan_to_num(0.0, posinf=0.0).median()
    allowed = MARGIN * torch.maximum(expected, usual * size)
    if not bool((error <= allowed).all()):  # even if it is NaN
        worst = float((error / size.clamp(min=torch.finfo(size.dtype).tiny)).max())
        raise InvalidDecompositionError(
            f"the writes sum to something else than {name}: at some position the error is "
            f"{worst:.2g} of the stream, more than rounding explains. Either activations in the "
            "cache are not those of its run, or the model's weights changed since. raw=True gives "
            "the writes as they are."
        )
