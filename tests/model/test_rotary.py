"""Rotary angles: the formula itself in fp64, the references' fp32 in every other precision."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import random_config

from tl_looped import RotaryStyle
from tl_looped.model.rotary import inverse_frequencies, rotation

POSITIONS = (0, 1, 7, 1000)
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


def frequency(i: int, base: float, scaled: bool) -> float:
    plain = base ** (-2 * i / 8)
    if not scaled:
        return plain
    smooth = min(max((8 * plain / (2 * math.pi) - 1.0) / (4.0 - 1.0), 0.0), 1.0)
    return plain * smooth + plain / 8.0 * (1.0 - smooth)


@pytest.mark.parametrize("style", RotaryStyle)
@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_in_fp64_the_angles_are_the_formula(
    style: RotaryStyle, in_fp32: bool, scaled: bool
) -> None:
    changes = {"rope_scaling": SCALED} if scaled else {}
    cfg = random_config(rotary_style=style, rotary_in_fp32=in_fp32, rotary_base=500.0, **changes)
    found = rotation(cfg, torch.tensor([POSITIONS]), torch.float64)
    assert found.cos.dtype == found.sin.dtype == torch.float64
    for row, position in enumerate(POSITIONS):
        for i in range(4):
            angle = position * frequency(i, 500.0, scaled)
            # Roundings of an angle of up to 1000, each 2e-16 of it.
            both = (2 * i, 2 * i + 1) if style is RotaryStyle.INTERLEAVED else (i, i + 4)
            for place, sign in zip(both, (-1.0, 1.0), strict=True):
                at = (0, row, 0, place)
                assert found.cos[at].item() == pytest.approx(math.cos(angle), abs=1e-11)
                assert found.sin[at].item() == pytest.approx(sign * math.sin(angle), abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_fp32", [False, True])
def test_otherwise_they_are_computed_in_fp32(dtype: torch.dtype, in_fp32: bool) -> None:
    cfg = random_config(rotary_in_fp32=in_fp32)
    assert inverse_frequencies(cfg).dtype == torch.float32
    positions = torch.tensor([POSITIONS])
    angles = positions[..., None].float() * inverse_frequencies(cfg)
    found = rotation(cfg, positions, dtype)
    assert found.cos.dtype == (torch.float32 if in_fp32 else dtype)
    assert torch.equal(found.cos[0, :, 0, :4], angles[0].cos().to(found.cos.dtype))
