"""Rotary position embeddings: both pairings of dimensions, and Llama 3's frequency scaling.

Angles are computed in fp32 for the positions at hand, as the reference implementations do. With
``rotary_in_fp32`` the rotation itself is done in fp32 and cast back (Huginn); otherwise cosines and
sines are first cast to the activations' dtype (retrofits, Ouro).

In fp64 everything is fp64, the frequencies too and with ``rotary_in_fp32`` as well. A user asks for
fp64 to have the formula itself, and fp32 angles would put an error of some 1e-7 per position
between the two; the references' fp64, whose tables stay fp32, is therefore not followed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.model.config import LoopedConfig, RotaryStyle


class Rotation(NamedTuple):
    """Cosines and sines for a batch of positions, one row shared by all where they are equal.

    The sines carry the sign of the rotation's matrix: minus in the first dimension of each pair.
    """

    cos: Float[Tensor, "batch pos 1 d_head"]
    sin: Float[Tensor, "batch pos 1 d_head"]
    interleaved: bool

    def to(self, device: torch.device) -> Rotation:
        """The same on another device."""
        return self._replace(cos=self.cos.to(device), sin=self.sin.to(device))

    @property
    def unsigned_sin(self) -> Float[Tensor, "batch pos 1 d_head"]:
        """The sines without that sign, as transformers' modules take them."""
        if self.interleaved:
            return self.sin[..., 1::2].repeat_interleave(2, -1)
        second = self.sin.chunk(2, -1)[1]
        return torch.cat((second, second), -1)


def inverse_frequencies(
    cfg: LoopedConfig, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " half"]:
    """``rotary_base ** (-2i / d_head)``, rescaled after Llama 3 where the config asks for it."""
    exponent = torch.arange(0, cfg.d_head, 2, dtype=dtype) / cfg.d_head
    frequencies = 1.0 / (cfg.rotary_base**exponent)
    if cfg.rope_scaling is None:
        return frequencies
    scaling = cfg.rope_scaling
    factor = float(scaling["factor"])
    low = float(scaling["low_freq_factor"])
    high = float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / frequencies
    # Long waves are slowed down by the factor, short ones kept, those between interpolated.
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (smooth + (1.0 - smooth) / factor)


def rotation(
    cfg: LoopedConfig, positions: Int[Tensor, "batch pos"], dtype: torch.dtype
) -> Rotation:
    """Cosines and sines of every angle at ``positions``, ready for :func:`rotate`."""
    interleaved = cfg.rotary_style is RotaryStyle.INTERLEAVED
    work = dtype if dtype == torch.float64 else torch.float32
    frequencies = inverse_frequencies(cfg, work).to(positions.device)
    angles = positions[..., None].to(work) * frequencies
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    keep = work if cfg.rotary_in_fp32 else dtype
    return Rotation(cos[:, :, None].to(keep), sin[:, :, None].to(keep), interleaved)


def rotate(
    x: Float[Tensor, "batch pos head d_head"], by: Rotation
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotate each pair of dimensions of ``x`` by its angle."""
    x_ = x if x.dtype == by.cos.dtype else x.to(by.cos.dtype)
    if by.interleaved:
        swapped = x_.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        first, second = x_.chunk(2, -1)
        swapped = torch.cat((second, first), -1)
    rotated: Tensor = x_ * by.cos + swapped * by.sin
    return rotated if rotated.dtype == x.dtype else rotated.to(x.dtype)
