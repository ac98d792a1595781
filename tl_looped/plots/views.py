"""Attention to look through token by token: circuitsvis views in pages that need no network.

Two cuts through a looped run: one head at every recurrence, and all heads at one (recurrence,
layer). The drawing is circuitsvis's ``AttentionHeads``. circuitsvis itself loads its JavaScript
from a server when there is a network, and does not escape tokens inside its script; so the script
that its package ships is put into the page here, the numbers stand in a JSON block beside it, and a
content security policy forbids everything else.

Patterns are kept as whole thousandths: what a page shows is within 0.0005 of the pattern. The
script alone takes 1.3 MB of a page; :data:`MAX_BYTES` is the limit for the whole.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.errors import DataError, InputError
from tl_looped.files import make_folder, write_text

MAX_BYTES = 5_000_000
"""Largest page of a view, the drawing script included."""

DIGITS = 3
_UNIT = 10**DIGITS


@dataclass(frozen=True)
class AttentionView:
    """Some attention patterns of one prompt, each with a label.

    Args:
        title: What is shown.
        tokens: The prompt's tokens, as they are to be read.
        labels: One a pattern: ``r3 l1 h2``, recurrence, layer and head, 0-based.
        thousandths: The patterns times 1000, rounded: ``[pattern, query, key]``.
    """

    title: str
    tokens: tuple[str, ...]
    labels: tuple[str, ...]
    thousandths: Int[np.ndarray, "pattern query key"]


def attention_view(
    patterns: Float[Tensor, "pattern query key"] | Float[np.ndarray, "pattern query key"],
    tokens: Sequence[str],
    labels: Sequence[str],
    title: str,
) -> AttentionView:
    """A view of any patterns of one prompt.

    Args:
        patterns: Attention patterns, of any float type; entries from 0 to 1.
        tokens: One string a position.
        labels: One a pattern.
        title: What is shown.

    Raises:
        InputError: if the numbers of tokens or labels do not fit, a pattern is not square, or an
            entry is not finite or outside 0 to 1.
    """
    values = torch.as_tensor(patterns).detach().cpu().double().numpy()
    n, queries, keys = values.shape
    if not n or queries != keys:
        raise InputError(
            f"patterns must be [pattern, query, key] of at least one whole sequence, got shape "
            f"{values.shape}: no position slice, no key-value cache"
        )
    if len(tokens) != keys:
        raise InputError(f"tokens must be one a position: {keys} positions, {len(tokens)} tokens")
    if len(labels) != n:
        raise InputError(f"labels must be one a pattern: {n} patterns, {len(labels)} labels")
    for label, pattern in zip(labels, values, strict=True):
        # An edge of 1e-2 for half precision, whose rounding may exceed 1.
        if not np.isfinite(pattern).all() or pattern.min() < 0 or pattern.max() > 1.01:
            raise InputError(
                f"patterns: {label} has entries from {pattern.min():.3g} to {pattern.max():.3g}; "
                "attention is finite and lies between 0 and 1. Scores instead of a pattern, or a "
                "run that diverged?"
            )
    whole = np.rint(values * _UNIT).astype(np.int64)
    return AttentionView(title, tuple(tokens), tuple(labels), whole)


def head_across_recurrences(
    cache: LoopedActivationCache,
    tokens: Sequence[str],
    layer: int,
    head: int,
    prompt: int = 0,
    recurrences: Iterable[int] | None = None,
) -> AttentionView:
    """One head of a core layer at every recurrence.

    Args:
        cache: A run's cache with the patterns (``names_filter="attention"``).
        tokens: The prompt's tokens, ``model.to_str_tokens(prompt)``; with padding if the run had
            padding, whose positions are left out.
        layer: Core layer, 0-based.
        head: Head of that layer, 0-based.
        prompt: Row of the batch.
        recurrences: Which recurrences, 0-based; all if None.

    Raises:
        InputError: as :func:`attention_view`, or for a head or prompt that is out of range.
        LayerIndexError: for a recurrence or layer that is out of range.
        MissingActivationError: if the cache lacks a pattern.
    """
    wanted = range(cache.n_recurrences) if recurrences is None else list(recurrences)
    if not wanted:
        raise InputError("recurrences: there is none to show")
    layer = _counted("layer", layer, cache.loop.k)
    rows, labels = [], []
    for r in wanted:
        r = _counted("recurrences", r, cache.n_recurrences)
        heads = _heads(cache, r, layer, prompt)
        head = _counted("head", head, len(heads))
        rows.append(heads[head])
        labels.append(f"r{r} l{layer} h{head}")
    title = f"Head {head} of core layer {layer} across recurrences"
    return attention_view(torch.stack(rows), _real_tokens(cache, tokens, prompt), labels, title)


def heads_at(
    cache: LoopedActivationCache,
    tokens: Sequence[str],
    recurrence: int,
    layer: int,
    prompt: int = 0,
) -> AttentionView:
    """All heads of a core layer at one recurrence.

    Args:
        cache, tokens, prompt: As in :func:`head_across_recurrences`.
        recurrence: Recurrence, 0-based.
        layer: Core layer, 0-based.

    Raises:
        InputError, LayerIndexError, MissingActivationError: As in
            :func:`head_across_recurrences`.
    """
    r = _counted("recurrence", recurrence, cache.n_recurrences)
    layer = _counted("layer", layer, cache.loop.k)
    heads = _heads(cache, r, layer, prompt)
    labels = [f"r{r} l{layer} h{head}" for head in range(len(heads))]
    title = f"All heads of core layer {layer} at recurrence {r}"
    return attention_view(heads, _real_tokens(cache, tokens, prompt), labels, title)


def view_page(view: AttentionView, max_bytes: int = MAX_BYTES) -> str:
    """A view as one HTML page that opens without a network.

    Raises:
        InputError: if the page would be larger than ``max_bytes``.
        DataError: if the package circuitsvis or its script is missing.
    """
    scripts = (drawing_script(), DRAW + DRAW_ALL)
    title = html.escape(view.title)
    page = _PAGE.format(
        title=title,
        policy=html.escape(content_policy(scripts)),
        style=VIEW_STYLE,
        data=view_data(view),
        drawing=scripts[0],
        draw=scripts[1],
    )
    page = page.encode("utf-8", "replace").decode()  # half of a surrogate pair has no UTF-8
    size = len(page.encode())
    if size > max_bytes:
        n, length = view.thousandths.shape[:2]
        raise InputError(
            f"the view {view.title!r} would take {size / 1e6:.2f} MB, above max_bytes = "
            f"{max_bytes / 1e6:.2f} MB ({n} patterns of {length} tokens; the drawing script alone "
            f"takes {len(scripts[0].encode()) / 1e6:.2f} MB): show fewer recurrences or heads, or "
            "a shorter prompt"
        )
    return page


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
        InputError, DataError: As :func:`view_page`; then nothing is written.
    """
    page = view_page(view, max_bytes)
    about = {"number": number, "title": view.title, "caption": caption}
    about |= {"command": command, "settings": settings}
    make_folder(folder)
    record = folder / f"view{number:02d}.json"
    write_text(json.dumps(about | {"view": json.loads(view_data(view))}), record)
    write_text(page, record.with_suffix(".html"))
    return record.with_suffix(".html")


def view_data(view: AttentionView) -> str:
    """Tokens, labels and patterns as JSON that may stand inside a script element."""
    # Zeros at the end of a row, the future of causal attention, are left out.
    cells = [[row[: _used(row)].tolist() for row in pattern] for pattern in view.thousandths]
    return json_in_html({"tokens": view.tokens, "labels": view.labels, "cells": cells})


def json_in_html(value: Any) -> str:
    """JSON in ASCII without ``<``, ``>`` and ``&``, so that no text can end its script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


@lru_cache(maxsize=1)
def drawing_script() -> str:
    """The script of circuitsvis as its package ships it, fit to stand inside a script element.

    Raises:
        DataError: if the package or the script is missing.
    """
    spec = find_spec("circuitsvis")  # not imported: its import looks for a network
    if spec is None or spec.origin is None:
        raise DataError("attention views need the package circuitsvis: pip install circuitsvis")
    path = Path(spec.origin).parent / "dist" / "cdn" / "iife.js"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"circuitsvis is installed without its script {path}: {error}; version 1.43.3 has it"
        ) from error
    # "<\/script>" in a JavaScript string is the same string, and does not end the element.
    text = text.replace("</script", "<\\/script").replace("\r\n", "\n")
    return text.split("//# sourceMappingURL=")[0]


def content_policy(scripts: Sequence[str]) -> str:
    """A content security policy that lets these scripts run, and no network be used."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


DRAW = """
function drawView(target, data) {
  const n = data.tokens.length;
  const attention = data.cells.map(rows => rows.map(row =>
    Array.from({length: n}, (_, key) => (row[key] || 0) / 1000)));
  CircuitsVis.render(target, CircuitsVis.AttentionHeads, {
    attention, tokens: data.tokens, attentionHeadNames: data.labels,
    minValue: 0, maxValue: 1, maskUpperTri: data.cells.every(rows =>
      rows.every((row, query) => row.length <= query + 1))});
}
"""
"""JavaScript that draws the data of :func:`view_data` into the element of an id."""

DRAW_ALL = """
drawView("view", JSON.parse(document.getElementById("view-data").textContent));
"""

# circuitsvis draws dark on light, whatever the reader's colours are.
VIEW_STYLE = """
.view { background: #fff; color: #1d2327; color-scheme: light; border-radius: 6px;
  padding: 12px; overflow-x: auto; font: 14px/1.4 system-ui, sans-serif; }
.view h3 { font-size: 14px; font-weight: 600; }
.view h2 { font-size: 13px; }
.view h4 { font-size: 10px; font-weight: 500; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 16px auto; max-width: 1000px; padding: 0 12px; font: 16px/1.5 system-ui, sans-serif;
  background: #fff; color: #1d2327; }}
{style}
</style>
</head>
<body>
<h1 style="font-size:20px">{title}</h1>
<p>Rows are the tokens that attend, columns the tokens attended to. Point at a small map to see it
large; click it to keep it.</p>
<noscript><p>The maps are drawn by JavaScript inside this page; it is switched off.</p></noscript>
<div class="view" id="view"></div>
<script type="application/json" id="view-data">{data}</script>
<script>{drawing}</script>
<script>{draw}</script>
</body>
</html>
"""


def _heads(cache: LoopedActivationCache, r: int, layer: int, prompt: int) -> Tensor:
    """``[head, query, key]`` of one prompt, without padding."""
    pattern = cache["pattern", (r, layer)]
    if not cache.has_batch_dim:
        pattern = pattern[None]
    one = pattern[_counted("prompt", prompt, len(pattern))]
    real = _real(cache, prompt)
    return one if real is None else one[:, real][:, :, real]


def _real(cache: LoopedActivationCache, prompt: int) -> Tensor | None:
    mask = cache.attention_mask
    if mask is None:
        return None
    row = mask if mask.ndim == 1 else mask[prompt if cache.has_batch_dim else 0]
    return row.bool().cpu()


def _real_tokens(cache: LoopedActivationCache, tokens: Sequence[str], prompt: int) -> list[str]:
    real = _real(cache, prompt)
    if real is None:
        return list(tokens)
    if len(tokens) != len(real):
        raise InputError(
            f"tokens must be one a position, padding included: {len(real)} positions, "
            f"{len(tokens)} tokens"
        )
    return [token for token, keep in zip(tokens, real.tolist(), strict=True) if keep]


def _counted(argument: str, index: int, n: int) -> int:
    """An index from either end as one from the start."""
    if not -n <= index < n:
        raise InputError(f"{argument} must lie between {-n} and {n - 1}, got {index}")
    return index % n


def _used(row: Int[np.ndarray, " key"]) -> int:
    used = np.flatnonzero(row)
    return int(used[-1]) + 1 if len(used) else 0
