"""How far apart two runs of the same mathematics may be: measured on the model itself.

Two ways of computing one thing (with a key-value cache or without, in a batch or alone) round
differently. How much that matters is decided by the model: a loop of many recurrences amplifies an
error by orders of magnitude, and no number holds for all. So it is measured:

- in fp64, where that fits into the free memory: the run's logits beside those of the same weights
  in fp64 are its rounding error;
- elsewhere by noise: in a second run every activation that is kept gets an error as large as one
  rounding, and the logits are compared with those of the first.

Either is one sample of a rounding error. The difference of two runs consists of two others of the
same kind, so it may be :data:`MARGIN` times as large.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.decomposition.closeness import unit
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.cache_size import free_bytes

MARGIN = 16.0
"""By how much the largest of one run's rounding errors may exceed that of another one.

Both are maxima over many errors of the same kind, which differ by a factor of 2 or 3; what a kernel
adds is the order of its sums. Summing n terms one after another is at worst sqrt(n) times as bad as
in blocks, where a term counts; a mistake is larger by orders of magnitude.
"""

_BY_FLOAT64 = "measured against the same run in float64"
_BY_NOISE = "estimated by noise of the size of roundings"
_SHARE = 0.8  # of the free memory
_DRAWS = 2
_NOISY = (
    "hook_embed", "hook_initial_state", "hook_injected", "hook_normalized", "hook_q", "hook_k",
    "hook_v", "hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post",
    "mlp.hook_pre", "mlp.hook_post", "hook_state_out",
)  # fmt: skip


@dataclass(frozen=True)
class Rounding:
    """The rounding error of a run's logits.

    Args:
        size: Largest error of a logit.
        largest: Largest logit.
        how: Where the size is from, for a sentence.
    """

    size: float
    largest: float
    how: str

    @property
    def bound(self) -> float:
        """Largest difference between two runs that rounding explains."""
        return MARGIN * self.size

    def numbers(self, difference: float) -> dict[str, Any]:
        """Of a difference of logits beside the bound, as a finding holds them."""
        return {
            "difference": difference,
            "bound": self.bound,
            "rounding": self.size,
            "rounding_by": self.how,
            "largest_logit": self.largest,
        }


def rounding_of(
    model: LoopedTransformer, tokens: Any, logits: Float[Tensor, "batch pos d_vocab"]
) -> Rounding:
    """Measure the rounding error of a run.

    Args:
        model: The model.
        tokens: What it was run on.
        logits: What the run gave.
    """
    largest = float(logits.abs().max())
    if model.cfg.dtype is not torch.float64 and copy_fits(model, torch.float64):
        exact = in_dtype(model, torch.float64)(tokens)
        return Rounding(difference(logits, exact), largest, _BY_FLOAT64)
    return Rounding(_by_noise(model, tokens, logits), largest, _BY_NOISE)


def in_dtype(model: LoopedTransformer, dtype: torch.dtype) -> LoopedTransformer:
    """The model in another dtype: a copy, or itself if it is in this one."""
    return model if model.cfg.dtype is dtype else deepcopy(model).to(dtype)


def copy_fits(model: LoopedTransformer, dtype: torch.dtype) -> bool:
    """Whether a copy in another dtype fits into the free memory; none does on a GPU of Apple's."""
    device = model.W_E.device
    if device.type == "mps" and dtype is torch.float64:
        return False
    free = free_bytes(device)
    return free is not None and copy_bytes(model, dtype) < _SHARE * free


def copy_bytes(model: LoopedTransformer, dtype: torch.dtype) -> int:
    """Memory of a copy in another dtype while it is made."""
    n = sum(parameter.numel() for parameter in model.parameters())
    return n * (dtype.itemsize + model.cfg.dtype.itemsize)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in fp64; infinite if either is not finite."""
    if not a.numel():
        return 0.0
    # On the CPU: not every device has fp64.
    apart = float((a.cpu().double() - b.cpu().double()).abs().max())
    return apart if apart == apart else float("inf")


def _by_noise(model: LoopedTransformer, tokens: Any, logits: Tensor) -> float:
    size = unit({model.cfg.dtype})
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same on every device

    def noisy(value: Tensor, hook: Any) -> Tensor:
        level = value.square().mean(-1, keepdim=True).sqrt()
        noise = torch.randn(value.shape, generator=generator).to(value)
        return value + size * torch.maximum(value.abs(), level) * noise

    names = [name for name in model.hook_dict.canonical if name.endswith(_NOISY)]
    hooks: list[Any] = [(name, noisy) for name in names]
    runs = (model.run_with_hooks(tokens, fwd_hooks=hooks) for _ in range(_DRAWS))
    own = size * float(logits.abs().max())  # of the unembedding
    return own + max(difference(logits, run) for run in runs)
