"""Attention maps to look through token by token, drawn by circuitsvis's ``AttentionHeads``.

Three cuts through a looped run: one head at every recurrence, all heads at one (recurrence,
layer), and the steps of one head from recurrence to recurrence.

circuitsvis does not escape tokens inside its script and loads it from a server; so the numbers
stand in a JSON block here, beside the script of its package (:mod:`tl_looped.viz.page`).

Patterns are kept as whole thousandths: what a page shows is within 0.0005 of the pattern.
Differences have as many digits as give the largest of them three, at most six: below 5e-7 they are
the noise of fp32, and shown as 0. Maps are on one scale within a view. Weights are white to violet,
differences blue (less than before), white (unchanged), red (more); blue and red are told apart by
colour-blind readers too.

circuitsvis draws every cell by itself, some thousand a second: 16 maps of 110 tokens keep a browser
busy for many seconds. ``recurrences=`` shows fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import checked, number
from tl_looped.errors import InputError
from tl_looped.viz.page import (
    MAX_BYTES,
    UNPACK,
    View,
    check_size,
    drawing_script,
    json_in_html,
    packed_drawing,
    whole_page,
)
from tl_looped.viz.reading import PromptView, counted
from tl_looped.words import count

DIGITS = 3
_MOST_DIGITS = 6
Patterns = Float[Tensor, "pattern query key"] | Float[np.ndarray, "pattern query key"]


@checked
@dataclass(frozen=True, repr=False)
class AttentionView(View):
    """Some attention patterns of one prompt, or differences of patterns, each with a label.

    Args:
        title: What is shown.
        tokens: The prompt's tokens, as they are to be read.
        labels: One a pattern: ``r3 l1 h2``, recurrence, layer and head, 0-based.
        whole: The patterns times ``10**digits``, rounded: ``[pattern, query, key]``.
        digits: After the decimal point.
        limit: The ends of a difference's colour scale, plus and minus; None for patterns, whose
            scale is 0 to 1.
    """

    title: str
    tokens: tuple[str, ...]
    labels: tuple[str, ...]
    whole: Int[np.ndarray, "pattern query key"]
    digits: int = DIGITS
    limit: float | None = None

    @property
    def values(self) -> Float[np.ndarray, "pattern query key"]:
        """What is shown, as it was rounded."""
        return self.whole / 10**self.digits

    @property
    def height(self) -> int:
        """Small maps, eight in a row, above a large one."""
        return 950 + 115 * -(-len(self.labels) // 8)

    def page(self, max_bytes: int = MAX_BYTES) -> str:
        """As :meth:`View.page`.

        Raises:
            InputError: if the page would be larger than ``max_bytes``.
            DataError: if the package circuitsvis or its script is missing.
        """
        n, length = self.whole.shape[:2]
        page = whole_page(
            self.title,
            _BODY.format(
                data=json_in_html(self.data()), drawing=packed_drawing(), n=n, length=length
            ),
            [UNPACK + DRAW + _DRAW_ALL],
            [drawing_script()],
        )
        drawing = len(packed_drawing()) / 1e6
        return check_size(
            self.title, page, max_bytes,
            f"{n} patterns of {length} tokens, and {drawing:.2f} MB of the drawing script. Show "
            "fewer recurrences or heads, or a shorter prompt",
        )  # fmt: skip

    def data(self) -> dict[str, Any]:
        """What the page's script draws, see :data:`DRAW`."""
        # Zeros at the end of a row, the future of causal attention, are left out.
        cells = [[row[: _used(row)].tolist() for row in pattern] for pattern in self.whole]
        found = {"tokens": list(self.tokens), "labels": list(self.labels), "cells": cells}
        if self.limit is None:
            return found
        return found | {"limit": self.limit, "digits": self.digits}


@checked
def attention_view(
    patterns: Patterns, tokens: Sequence[str], labels: Sequence[str], title: str
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
    values = _checked(patterns, tokens, labels)
    whole = np.rint(values * 10**DIGITS).astype(np.int64)
    return AttentionView(title, tuple(tokens), tuple(labels), whole)


@checked
def head_across_recurrences(
    cache: LoopedActivationCache,
    tokens: Any,
    layer: int,
    head: int,
    prompt: int = 0,
    recurrences: Iterable[int] | None = None,
) -> AttentionView:
    """One head of a core layer at every recurrence.

    Args:
        cache: A run's cache with the patterns (``names_filter="attention"``).
        tokens: The prompt's tokens as strings, ``model.to_str_tokens(prompt)``, or the prompt as
            the model takes it: text, a conversation, token ids. Those of padding may be among them;
            padded positions are left out.
        layer: Core layer, 0-based, or from the end if negative, as all numbers here.
        head: Head of that layer.
        prompt: Row of the batch.
        recurrences: Which recurrences; all if None.

    Raises:
        InputError: as :func:`attention_view`, or for a number that is out of range.
        MissingActivationError: if the cache lacks a pattern.
    """
    run = PromptView(cache, prompt)
    R = run.loop.R
    wanted = (
        range(R) if recurrences is None else [counted("recurrences", r, R) for r in recurrences]
    )
    layer, head, rows, named = _rows(run, tokens, layer, head, wanted)
    return across(rows, named, wanted, layer, head)


@checked
def heads_at(
    cache: LoopedActivationCache,
    tokens: Any,
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
        InputError, MissingActivationError: As in :func:`head_across_recurrences`.
    """
    run = PromptView(cache, prompt)
    r = counted("recurrence", recurrence, run.loop.R)
    layer = counted("layer", layer, run.loop.k)
    heads, named = _heads(run, r, layer), run.tokens(tokens, _length(run, r, layer))
    return all_heads(heads, named, r, layer)


@checked
def difference(
    cache: LoopedActivationCache,
    tokens: Any,
    layer: int,
    head: int,
    prompt: int = 0,
    recurrences: Iterable[int] | None = None,
    limit: float | None = None,
) -> AttentionView:
    """What each recurrence changed of a head's pattern: ``pattern_r - pattern_(r-1)``.

    Red is more attention than one recurrence before, blue less; every row sums to 0. The label
    ``r3-r2 l1 h2`` is recurrence 3 minus recurrence 2.

    Args:
        cache, tokens, layer, head, prompt: As in :func:`head_across_recurrences`.
        recurrences: Which ``r``; all but the first if None.
        limit: Ends of the colour scale, above 0; what exceeds it has the colour of the end. The
            largest difference that is shown if None: pass one to compare views, or to see small
            late steps beside large early ones.

    Raises:
        InputError: as :func:`head_across_recurrences`; for the first recurrence, or a run that has
            no other.
        MissingActivationError: if the cache lacks a pattern.
    """
    run = PromptView(cache, prompt)
    R = run.loop.R
    if R < 2:
        raise InputError(
            f"cache: a run of {count(R, 'recurrence')} has no step; n_recurrences=2 or more"
        )
    if limit is not None:
        number(limit, "limit", above=0)
    given = range(1, R) if recurrences is None else recurrences
    wanted = [counted("recurrences", r, R) for r in given]
    if 0 in wanted:
        raise InputError(
            f"recurrences must lie between 1 and {R - 1}, got 0: there is none before it"
        )
    layer, head, after, named = _rows(run, tokens, layer, head, wanted)
    before = _rows(run, tokens, layer, head, [r - 1 for r in wanted])[2]
    labels = [f"r{r}-r{r - 1} l{layer} h{head}" for r in wanted]
    steps = _checked(after, named, labels) - _checked(before, named, labels)
    largest = float(np.abs(steps).max())
    digits = DIGITS if largest == 0 else DIGITS - 1 - math.floor(math.log10(largest))
    digits = min(max(digits, DIGITS), _MOST_DIGITS)
    whole = np.rint(steps * 10**digits).astype(np.int64)
    rounded = max(int(np.abs(whole).max()), 1) / 10**digits
    title = f"Head {head} of core layer {layer}: each recurrence minus the one before"
    ends = rounded if limit is None else float(limit)
    return AttentionView(title, named, tuple(labels), whole, digits, ends)


def across(
    rows: Patterns, tokens: Sequence[str], recurrences: Sequence[int], layer: int, head: int
) -> AttentionView:
    """A view of one head's patterns at these recurrences, with its labels."""
    labels = [f"r{r} l{layer} h{head}" for r in recurrences]
    return attention_view(
        rows, tokens, labels, f"Head {head} of core layer {layer} across recurrences"
    )


def all_heads(heads: Patterns, tokens: Sequence[str], r: int, layer: int) -> AttentionView:
    """A view of all heads' patterns at one place, with its labels."""
    labels = [f"r{r} l{layer} h{head}" for head in range(len(heads))]
    title = f"All heads of core layer {layer} at recurrence {r}"
    return attention_view(heads, tokens, labels, title)


DRAW = """
function drawLegend(target, data) {
  const legend = document.createElement("div");
  legend.className = "legend";
  const add = (text, style) => {
    const part = document.createElement("span");
    part.className = style ? "scale" : "";
    part.style.cssText = style || "";
    part.textContent = text;
    legend.append(part);
  };
  const bar = (from, to) => add("", `background: linear-gradient(to right, ${from}, ${to})`);
  if (data.limit) {
    add("less than one recurrence before");
    add((-data.limit).toPrecision(3));
    bar("#2166ac", "#fff");
    add("0");
    bar("#fff", "#b2182b");
    add("+" + data.limit.toPrecision(3) + " more");
  } else {
    add("attention weight 0");
    bar("#fff", "#a489c2");
    add("0.5");
    bar("#a489c2", "#4a1486");
    add("1");
  }
  add("", "background: rgb(200,200,200); width: 14px");
  add("later tokens");
  document.getElementById(target).before(legend);
}
function drawView(target, data) {
  const n = data.tokens.length, one = 10 ** (data.digits || 3);
  const attention = data.cells.map(rows => rows.map(row =>
    Array.from({length: n}, (_, key) => (row[key] || 0) / one)));
  drawLegend(target, data);
  CircuitsVis.render(target, CircuitsVis.AttentionHeads, {
    attention, tokens: data.tokens, attentionHeadNames: data.labels,
    minValue: data.limit ? -data.limit : -1, maxValue: data.limit || 1,
    negativeColor: "#2166ac", positiveColor: data.limit ? "#b2182b" : "#4a1486",
    maskUpperTri: data.cells.every(rows =>
      rows.every((row, query) => row.length <= query + 1))});
}
"""
"""JavaScript that draws :meth:`AttentionView.data` into the element of an id, with a legend."""

_DRAW_ALL = """
whenUnpacked(() =>
  drawView("view", JSON.parse(document.getElementById("view-data").textContent)));
"""

_BODY = """<p>Rows are the tokens that attend (destination), columns the tokens attended to
(source). Point at a small map to see it large, click to keep it; point at a cell for its
numbers.</p>
<noscript><p>The maps are drawn by JavaScript inside this page; it is switched off.</p></noscript>
<div class="view" id="view">Drawing {n} maps of {length} tokens …</div>
<script type="application/json" id="view-data">{data}</script>
<script type="text/plain" id="drawing">{drawing}</script>
"""


def _rows(
    run: PromptView, tokens: Any, layer: int, head: int, wanted: Sequence[int]
) -> tuple[int, int, Float[Tensor, "pattern query key"], tuple[str, ...]]:
    """Layer and head from the start, the head's patterns at some recurrences, and the tokens."""
    if not wanted:
        raise InputError("recurrences: there is none to show")
    layer = counted("layer", layer, run.loop.k)
    rows = []
    for r in wanted:
        heads = _heads(run, r, layer)
        head = counted("head", head, len(heads))
        rows.append(heads[head])
    return layer, head, torch.stack(rows), run.tokens(tokens, _length(run, wanted[0], layer))


def _heads(run: PromptView, r: int, layer: int) -> Float[Tensor, "head query key"]:
    return run.heads(run.loop.index(r, layer))


def _length(run: PromptView, r: int, layer: int) -> int:
    return int(run.activation("pattern", run.loop.index(r, layer)).shape[-1])


def _checked(patterns: Patterns, tokens: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Patterns in fp64.

    Raises:
        InputError: as :func:`attention_view`.
    """
    values: np.ndarray = torch.as_tensor(patterns).detach().cpu().double().numpy()
    n, queries, keys = values.shape
    if not n or not keys or queries != keys:
        raise InputError(
            f"patterns must be [pattern, query, key] of at least one whole sequence, got shape "
            f"{values.shape}: no position slice, no key-value cache"
        )
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise InputError(
            "tokens must be strings, one a position, as model.to_str_tokens(prompt) gives them"
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
    return values


def _used(row: Int[np.ndarray, " key"]) -> int:
    used = np.flatnonzero(row)
    return int(used[-1]) + 1 if len(used) else 0
