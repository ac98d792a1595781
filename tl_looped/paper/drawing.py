"""Figures of the paper on disk: of one run, or of a looped one over a feedforward one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import xarray as xr

from tl_looped.errors import InputError
from tl_looped.experiments.drawing import save_figures
from tl_looped.experiments.reading import bos_apart, same_prompts
from tl_looped.paper.figures import draw

OVER = (8, 40)
"""Figures of a looped run over a feedforward one."""


def draw_figures(
    data: Any,
    numbers: Iterable[int],
    folder: Path,
    command: str,
    say: Callable[[str], None],
) -> list[Path]:
    """Draw and save figures of one result; what cannot be drawn of it is said, and passed over."""
    images = []
    for number in numbers:
        try:
            images += save_figures(draw(number, data), folder, command)
        except InputError as error:
            say(f"figure {number}: {error}")
    return images


def draw_over(
    name: str,
    looped: xr.Dataset,
    feedforward: xr.Dataset,
    figures: Iterable[int],
    folder: Path,
    command: str,
    say: Callable[[str], None],
) -> list[Path]:
    """Draw and save figures of a looped run over a feedforward one.

    Args:
        name: Told apart by it in ``folder``: ``fig08_<name>``.
        looped, feedforward: Results by depth.
        figures: Of :data:`OVER`.
        folder: Where to write.
        command: That made them.
        say: Gets what cannot be drawn, and that prompts differ.

    Returns:
        The images; none of runs that were read with BOS and without, whose curves do not compare.
    """
    if not same_prompts(looped, feedforward):
        say(f"{name}: the feedforward run is not of the same prompts")
    if apart := bos_apart(looped, feedforward):
        say(f"{name} is not drawn over the feedforward run: {apart}")
        return []
    images = []
    for number in figures:
        try:
            drawn = draw(number, looped, feedforward=feedforward)
        except InputError as error:
            say(f"figure {number} of {name}: {error}")
            continue
        images += save_figures(
            [replace(one, name=f"{one.name}_{name}") for one in drawn], folder, command
        )
    return images
