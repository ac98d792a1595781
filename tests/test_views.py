"""Attention views: the right patterns, in a page that needs no network and that no token breaks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import random_config
from tests.toys import identity, sink, uniform_causal
from tl_looped import LoopedTransformer
from tl_looped.cache import LoopedActivationCache
from tl_looped.errors import DataError, InputError, MissingActivationError
from tl_looped.plots import views
from tl_looped.plots.views import (
    attention_view,
    head_across_recurrences,
    heads_at,
    view_page,
    write_view,
)

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 & \ud800"
ABOUT = {"caption": "c", "command": "x", "settings": {}}


class Page(HTMLParser):
    """The elements of a page, and the texts of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.lasttag = ""

    def policy(self) -> str:
        return next(a["content"] for _, a in self.elements if a.get("http-equiv")) or ""


def patterns_of(page: str) -> tuple[list[str], list[str], np.ndarray]:
    """Tokens, labels and patterns as the page's script reads them."""
    data = json.loads(Page(page).scripts[0])
    n = len(data["tokens"])
    cells = [[row + [0] * (n - len(row)) for row in rows] for rows in data["cells"]]
    return data["tokens"], data["labels"], np.array(cells) / 1000


@pytest.fixture(scope="module")
def cache(plain: LoopedTransformer) -> LoopedActivationCache:
    tokens = torch.arange(14).reshape(2, 7)
    with torch.inference_mode():
        return plain.run_with_cache(tokens, names_filter="attention")[1]


def test_one_head_across_recurrences(cache: LoopedActivationCache) -> None:
    page = view_page(head_across_recurrences(cache, list("abcdefg"), layer=1, head=2, prompt=1))
    tokens, labels, patterns = patterns_of(page)
    assert tokens == list("abcdefg")
    assert labels == ["r0 l1 h2", "r1 l1 h2", "r2 l1 h2", "r3 l1 h2"]
    expected = cache.stack_recurrences("pattern")[:, 1, 1, 2]
    assert np.abs(patterns - expected.numpy()).max() <= 0.0005 + 1e-9


def test_all_heads_at_a_recurrence(cache: LoopedActivationCache) -> None:
    view = heads_at(cache, list("abcdefg"), recurrence=-1, layer=0)
    _, labels, patterns = patterns_of(view_page(view))
    assert labels == ["r3 l0 h0", "r3 l0 h1", "r3 l0 h2", "r3 l0 h3"]
    assert view.title == "All heads of core layer 0 at recurrence 3"
    assert np.abs(patterns - cache["pattern", (3, 0)][0].numpy()).max() <= 0.0005 + 1e-9


def test_chosen_recurrences_in_the_order_given(cache: LoopedActivationCache) -> None:
    view = head_across_recurrences(cache, list("abcdefg"), 0, -1, recurrences=[3, -4])
    assert view.labels == ("r3 l0 h3", "r0 l0 h3")


def test_padding_is_left_out(plain: LoopedTransformer) -> None:
    alone, mask = torch.arange(1, 6), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    rows = torch.stack([torch.arange(1, 9), torch.cat((torch.zeros(3, dtype=torch.long), alone))])
    with torch.inference_mode():
        padded = plain.run_with_cache(rows, attention_mask=mask, names_filter="attention")[1]
        single = plain.run_with_cache(alone[None], names_filter="attention")[1]
    view = heads_at(padded, ["pad"] * 3 + list("abcde"), 2, 1, prompt=1)
    same = heads_at(single, list("abcde"), 2, 1)
    assert view.tokens == same.tokens
    assert np.abs(view.thousandths - same.thousandths).max() <= 1  # a rounding edge
    with pytest.raises(InputError, match="8 positions, 5 tokens"):
        heads_at(padded, list("abcde"), 2, 1, prompt=1)


def test_a_cache_without_batch_dimension(plain: LoopedTransformer) -> None:
    tokens = torch.arange(5)[None]
    with torch.inference_mode():
        cache = plain.run_with_cache(tokens, names_filter="attention", remove_batch_dim=True)[1]
    assert heads_at(cache, list("abcde"), 0, 0).thousandths.shape == (4, 5, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_whole_thousandths_of_any_dtype(dtype: torch.dtype) -> None:
    toys = torch.stack([identity(4), sink(4), uniform_causal(4)]).to(dtype)
    view = attention_view(toys.requires_grad_(), list("abcd"), ["i", "s", "u"], "toys")
    third = {torch.bfloat16: 334, torch.float16: 333}.get(dtype, 333)
    assert view.thousandths[0].tolist() == (1000 * np.eye(4, dtype=int)).tolist()
    assert view.thousandths[2].tolist() == [
        [1000, 0, 0, 0], [500, 500, 0, 0], [third] * 3 + [0], [250] * 4,
    ]  # fmt: skip


def test_attention_to_later_tokens_is_kept() -> None:
    full = torch.full((1, 3, 3), 1 / 3)
    _, _, patterns = patterns_of(view_page(attention_view(full, list("abc"), ["x"], "full")))
    assert patterns.tolist() == [[[0.333] * 3] * 3]


@pytest.mark.parametrize(
    ("patterns", "tokens", "labels", "message"),
    [
        (torch.ones(1, 2, 3), "ab", ["x"], "whole sequence"),
        (torch.ones(0, 2, 2), "ab", [], "at least one"),
        (torch.ones(1, 2, 2), "abc", ["x"], "2 positions, 3 tokens"),
        (torch.ones(1, 2, 2), "ab", ["x", "y"], "1 patterns, 2 labels"),
        (torch.full((1, 2, 2), torch.nan), "ab", ["r1 l0 h0"], "r1 l0 h0 has entries"),
        (torch.tensor([[[1.0, -torch.inf], [0, 1]]]), "ab", ["x"], "Scores instead"),
        (torch.full((1, 2, 2), 1.5), "ab", ["x"], "between 0 and 1"),
    ],
)
def test_what_is_no_pattern(patterns: Tensor, tokens: str, labels: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attention_view(patterns, list(tokens), labels, "t")


@pytest.mark.parametrize(
    ("layer", "head", "prompt", "recurrences", "message"),
    [
        (3, 0, 0, None, "layer must lie between -3 and 2, got 3"),
        (0, 4, 0, None, "head must lie between -4 and 3, got 4"),
        (0, 0, 2, None, "prompt must lie between -2 and 1, got 2"),
        (0, 0, 0, [4], "recurrences must lie between -4 and 3, got 4"),
        (0, 0, 0, [], "none to show"),
    ],
)
def test_out_of_range(
    cache: LoopedActivationCache,
    layer: int,
    head: int,
    prompt: int,
    recurrences: list[int] | None,
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        head_across_recurrences(cache, list("abcdefg"), layer, head, prompt, recurrences)


def test_a_cache_without_patterns(plain: LoopedTransformer) -> None:
    cache = plain.run_with_cache(torch.arange(3)[None], names_filter="residual")[1]
    with pytest.raises(MissingActivationError, match="hook_pattern"):
        heads_at(cache, list("abc"), 0, 0)


def test_no_token_or_title_breaks_the_page() -> None:
    view = attention_view(identity(2)[None], [HOSTILE, "<b>"], [HOSTILE], HOSTILE)
    page = view_page(view)
    parsed = Page(page.encode("utf-8", "replace").decode())
    assert [tag for tag, _ in parsed.elements].count("script") == 3
    assert patterns_of(page)[:2] == ([HOSTILE, "<b>"], [HOSTILE])


def test_the_page_asks_for_nothing_and_allows_its_own_scripts_alone() -> None:
    page = Page(view_page(attention_view(identity(2)[None], ["a", "b"], ["x"], "t")))
    assert not [a for _, a in page.elements if "src" in a or "href" in a]
    assert page.policy().startswith("default-src 'none';")
    allowed = re.findall("'sha256-([^']+)'", page.policy())
    assert allowed == [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in page.scripts[1:]
    ]
    assert "CircuitsVis" in page.scripts[1][:40]
    assert "drawView(" in page.scripts[2]


def test_files_and_the_size_limit(tmp_path: Path) -> None:
    view = attention_view(identity(3)[None], list("abc"), ["x"], "t")
    with pytest.raises(InputError, match=r"would take 1\.\d+ MB, above max_bytes = 0\.50 MB"):
        write_view(view, tmp_path / "views", 1, **ABOUT, max_bytes=500_000)
    assert not (tmp_path / "views").exists()
    page = write_view(view, tmp_path / "views", 7, **ABOUT)
    assert sorted(path.name for path in page.parent.iterdir()) == ["view07.html", "view07.json"]
    assert page.stat().st_size < views.MAX_BYTES
    record = json.loads(page.with_suffix(".json").read_text())
    assert record == {
        "number": 7, "title": "t", "caption": "c", "command": "x", "settings": {},
        "view": {
            "tokens": ["a", "b", "c"],
            "labels": ["x"],
            "cells": [[[1000], [0, 1000], [0, 0, 1000]]],
        },
    }  # fmt: skip


def test_without_circuitsvis(monkeypatch: pytest.MonkeyPatch) -> None:
    views.drawing_script.cache_clear()
    monkeypatch.setattr(views, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install circuitsvis"):
        views.drawing_script()


def test_a_model_of_one_recurrence() -> None:
    model = LoopedTransformer.from_config(random_config(n_recurrences=1))
    cache = model.run_with_cache(torch.arange(3)[None], names_filter="attention")[1]
    assert head_across_recurrences(cache, list("abc"), 0, 0).labels == ("r0 l0 h0",)
