"""Attention views of a run that kept the attention of its first prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_looped.experiments.reading import is_feedforward
from tl_looped.files import make_folder, write_text
from tl_looped.metrics.labels import geometry_of
from tl_looped.viz.attention_views import AttentionView, across, all_heads
from tl_looped.viz.page import MAX_BYTES

_READ = "Rows are the tokens that attend, columns the tokens attended to."


def write_views(data: xr.Dataset, folder: Path, command: str) -> list[Path]:
    """Write the views of a result with ``pattern``; none without it, or without a loop.

    All heads of the first core layer at the last recurrence, and the head of the core whose
    attention changes most between recurrences, at every recurrence (16 of them if there are more).

    Args:
        data: A result by depth.
        folder: The run's ``views``.
        command: That made the run.

    Returns:
        The pages.

    Raises:
        InputError, DataError: as :func:`write_view`.
    """
    if "pattern" not in data or is_feedforward(data):
        return []
    loop = geometry_of(data)
    patterns = data["pattern"].transpose("effective_layer", "head", "query", "key").to_numpy()
    core = patterns[loop.p : loop.p + loop.k * loop.R]
    core = core.reshape(loop.R, loop.k, *core.shape[1:])
    tokens = [str(token) for token in data["pattern_token"].to_numpy()]
    settings = {"recurrences": loop.R, "prompt": 0, "rounded to": 0.001}
    views = [(_all_heads(core, tokens), f"All heads of core layer 0 at recurrence {loop.R - 1}.")]
    if loop.R > 1:
        views.append((_most_changing(core, tokens), "The head whose attention changes most."))
    return [
        write_view(
            view, folder, number, caption=f"{said} {_READ}", command=command, settings=settings
        )
        for number, (view, said) in enumerate(views, start=1)
    ]


def write_view(
    view: AttentionView,
    folder: Path,
    number: int,
    *,
    caption: str,
    command: str,
    settings: dict[str, Any],
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write ``viewNN.html``, and ``viewNN.json`` from which a report shows the same view.

    Args:
        view: What to write.
        folder: A run's ``views`` folder; it is made if it is missing.
        number: Of the view in its run.
        caption: What it shows and how to read it.
        command: The command that made it.
        settings: What it was made with, as JSON can hold it.
        max_bytes: Largest page.

    Returns:
        The page.

    Raises:
        InputError, DataError: As ``AttentionView.page``; then nothing is written.
    """
    page = view.page(max_bytes)
    about = {"number": number, "title": view.title, "caption": caption}
    about |= {"command": command, "settings": settings}
    make_folder(folder)
    record = folder / f"view{number:02d}.json"
    write_text(json.dumps(about | {"view": view.data()}), record)
    write_text(page, record.with_suffix(".html"))
    return record.with_suffix(".html")


def _all_heads(core: np.ndarray, tokens: list[str]) -> AttentionView:
    last = len(core) - 1
    return all_heads(core[last, 0], tokens, last, 0)


def _most_changing(core: np.ndarray, tokens: list[str]) -> AttentionView:
    """The head with the largest mean Frobenius norm of its steps."""
    change = np.sqrt((np.diff(core, axis=0) ** 2).sum((-2, -1))).mean(0)
    layer, head = (int(i) for i in np.unravel_index(np.nanargmax(change), change.shape))
    n = len(core)
    shown = np.unique(np.linspace(0, n - 1, min(n, 16)).round().astype(int)).tolist()
    return across(core[shown, layer, head], tokens, shown, layer, head)
