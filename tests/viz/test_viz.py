"""Views: the right numbers, in pages that need no network and that no token breaks."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_golden, random_config
from matplotlib import colormaps
from matplotlib import image as png
from torch import Tensor
from toys import identity, sink, uniform_causal

from tl_looped import Injection, LoopedTransformer
from tl_looped.cache import LoopedActivationCache
from tl_looped.errors import DataError, InputError, MissingActivationError
from tl_looped.report.views import write_view
from tl_looped.viz import (
    attention_view,
    difference,
    floor_plan,
    head_across_recurrences,
    heads_at,
    settled_tokens,
    settling_recurrence,
)
from tl_looped.viz import page as pages

pytestmark = pytest.mark.once

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


def unpacked(script: str) -> str:
    return gzip.decompress(base64.b64decode(script)).decode()


def patterns_of(page: str) -> tuple[list[str], list[str], np.ndarray]:
    """Tokens, labels and patterns as the page's script reads them."""
    data = json.loads(Page(page).scripts[0])
    n, one = len(data["tokens"]), 10 ** data.get("digits", 3)
    cells = [[row + [0] * (n - len(row)) for row in rows] for rows in data["cells"]]
    return data["tokens"], data["labels"], np.array(cells) / one


@pytest.fixture(scope="module")
def cache(plain: LoopedTransformer) -> LoopedActivationCache:
    tokens = torch.arange(14).reshape(2, 7)
    with torch.inference_mode():
        return plain.run_with_cache(tokens, names_filter="attention")[1]


def test_one_head_across_recurrences(cache: LoopedActivationCache) -> None:
    page = head_across_recurrences(cache, list("abcdefg"), layer=1, head=2, prompt=1).page()
    tokens, labels, patterns = patterns_of(page)
    assert tokens == list("abcdefg")
    assert labels == ["r0 l1 h2", "r1 l1 h2", "r2 l1 h2", "r3 l1 h2"]
    expected = cache.stack_recurrences("pattern")[:, 1, 1, 2]
    assert np.abs(patterns - expected.numpy()).max() <= 0.0005 + 1e-9


def test_all_heads_at_a_recurrence(cache: LoopedActivationCache) -> None:
    view = heads_at(cache, list("abcdefg"), recurrence=-1, layer=0)
    _, labels, patterns = patterns_of(view.page())
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
    assert np.abs(view.whole - same.whole).max() <= 1  # a rounding edge
    # to_str_tokens of a list of texts gives no padding; its strings do as well.
    assert heads_at(padded, list("abcde"), 2, 1, prompt=1).tokens == same.tokens
    with pytest.raises(InputError, match=r"\b8\b.*\b5\b.*\b6\b"):
        heads_at(padded, list("abcdef"), 2, 1, prompt=1)


def test_a_cache_without_batch_dimension(plain: LoopedTransformer) -> None:
    tokens = torch.arange(5)[None]
    with torch.inference_mode():
        cache = plain.run_with_cache(tokens, names_filter="attention", remove_batch_dim=True)[1]
    assert heads_at(cache, list("abcde"), 0, 0).whole.shape == (4, 5, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_whole_thousandths_of_any_dtype(dtype: torch.dtype) -> None:
    toys = torch.stack([identity(4), sink(4), uniform_causal(4)]).to(dtype)
    view = attention_view(toys.requires_grad_(), list("abcd"), ["i", "s", "u"], "toys")
    third = {torch.bfloat16: 334, torch.float16: 333}.get(dtype, 333)
    assert view.whole[0].tolist() == (1000 * np.eye(4, dtype=int)).tolist()
    assert view.whole[2].tolist() == [
        [1000, 0, 0, 0], [500, 500, 0, 0], [third] * 3 + [0], [250] * 4,
    ]  # fmt: skip


def test_attention_to_later_tokens_is_kept() -> None:
    full = torch.full((1, 3, 3), 1 / 3)
    _, _, patterns = patterns_of(attention_view(full, list("abc"), ["x"], "full").page())
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
        (3, 0, 0, None, r"layer .*-3.*2, got 3"),
        (0, 4, 0, None, r"head .*-4.*3, got 4"),
        (0, 0, 2, None, r"prompt .*-2.*1, got 2"),
        (0, 0, 0, [4], r"recurrences .*-4.*3, got 4"),
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
    with pytest.raises(MissingActivationError, match=r"'pattern'.*\b2\b"):
        heads_at(cache, list("abc"), 0, 0)


def test_no_token_or_title_breaks_the_page() -> None:
    view = attention_view(identity(2)[None], [HOSTILE, "<b>"], [HOSTILE], HOSTILE)
    page = view.page()
    parsed = Page(page.encode("utf-8", "replace").decode())
    assert [tag for tag, _ in parsed.elements].count("script") == 3
    assert patterns_of(page)[:2] == ([HOSTILE, "<b>"], [HOSTILE])


def test_the_page_asks_for_nothing_and_allows_its_own_scripts_alone() -> None:
    page = Page(attention_view(identity(2)[None], ["a", "b"], ["x"], "t").page())
    assert not [a for _, a in page.elements if "src" in a or "href" in a]
    assert page.policy().startswith("default-src 'none';")
    allowed = re.findall("'sha256-([^']+)'", page.policy())
    assert allowed == [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in (unpacked(page.scripts[1]), page.scripts[2])
    ]
    assert "drawView(" in page.scripts[2]


def test_files_and_the_size_limit(tmp_path: Path) -> None:
    view = attention_view(identity(3)[None], list("abc"), ["x"], "t")
    with pytest.raises(InputError, match=r"0\.4\d MB.*max_bytes = 0\.10 MB"):
        write_view(view, tmp_path / "views", 1, **ABOUT, max_bytes=100_000)
    assert not (tmp_path / "views").exists()
    page = write_view(view, tmp_path / "views", 7, **ABOUT)
    assert sorted(path.name for path in page.parent.iterdir()) == ["view07.html", "view07.json"]
    assert page.stat().st_size < 500_000
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
    pages.drawing_script.cache_clear()
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install circuitsvis"):
        pages.drawing_script()


def test_a_model_of_one_recurrence() -> None:
    model = LoopedTransformer.from_config(random_config(n_recurrences=1))
    cache = model.run_with_cache(torch.arange(3)[None], names_filter="attention")[1]
    assert head_across_recurrences(cache, list("abc"), 0, 0).labels == ("r0 l0 h0",)


def test_patterns_of_the_reference() -> None:
    """What the authors' code attends to, second prompt, through the page."""
    golden = load_golden("huginn")
    cache = golden.load().run_with_cache(golden.tokens, **golden.run)[1]
    names = [str(i) for i in range(11)]
    _, labels, patterns = patterns_of(head_across_recurrences(cache, names, 2, 3, prompt=1).page())
    assert labels[4] == "r4 l2 h3"
    for r, pattern in enumerate(patterns):
        expected = golden.tensors[f"attn.core.{r}.2"][1, 3].numpy()
        assert np.abs(pattern - expected).max() <= 0.0005 + 1e-4
    plan = floor_plan(cache, prompt=1)
    np.testing.assert_allclose(plan.patterns[-1], golden.tensors["attn.coda.1"][1], atol=1e-4)


def cache_of(model: LoopedTransformer, patterns: Tensor) -> LoopedActivationCache:
    """A run's cache whose core patterns are ``[recurrence, layer, head, query, key]``."""
    with torch.inference_mode():
        tokens = torch.arange(patterns.shape[-1])[None]
        cache = model.run_with_cache(tokens, n_recurrences=len(patterns))[1]
    for r, layer in np.ndindex(*patterns.shape[:2]):
        name = f"blocks.{cache.loop.index(r, layer)}.attn.hook_pattern"
        cache.cache_dict[name] = patterns[r, layer][None]
    return cache


def test_the_difference_from_the_recurrence_before(plain: LoopedTransformer) -> None:
    one = torch.stack([identity(4), sink(4), uniform_causal(4), uniform_causal(4)])
    view = difference(cache_of(plain, one[:, None, None].expand(4, 3, 4, 4, 4)), list("abcd"), 1, 2)
    assert view.labels == ("r1-r0 l1 h2", "r2-r1 l1 h2", "r3-r2 l1 h2")
    _, _, shown = patterns_of(view.page())
    assert shown[0].tolist() == [[0, 0, 0, 0], [1, -1, 0, 0], [1, 0, -1, 0], [1, 0, 0, -1]]
    assert shown[1][3].tolist() == [-0.75, 0.25, 0.25, 0.25]
    assert not shown[2].any()
    assert (view.limit, view.digits) == (1.0, 3)


def test_differences_of_a_run(cache: LoopedActivationCache) -> None:
    patterns = cache.stack_recurrences("pattern")[:, 2, 0, 1].double()
    view = difference(cache, list("abcdefg"), 2, 1)
    expected = (patterns[1:] - patterns[:-1]).numpy()
    assert np.abs(view.values - expected).max() <= 0.5 * 10.0**-view.digits + 1e-12
    assert view.limit == np.abs(view.values).max()
    assert view.limit * 10**view.digits >= 100  # three digits
    late = difference(cache, list("abcdefg"), 2, 1, recurrences=[-1, 2], limit=0.5)
    assert late.labels == ("r3-r2 l2 h1", "r2-r1 l2 h1")
    assert (json.loads(Page(late.page()).scripts[0])["limit"], late.limit) == (0.5, 0.5)


def test_identical_recurrences_differ_by_nothing(plain: LoopedTransformer) -> None:
    same = cache_of(plain, uniform_causal(5).expand(3, 3, 4, 5, 5))
    view = difference(same, list("abcde"), 0, 0)
    assert view.whole.shape == (2, 5, 5)
    assert not view.whole.any()
    assert view.limit == 0.001  # a scale has two ends


def test_small_differences_keep_their_digits(plain: LoopedTransformer) -> None:
    step = torch.tensor([[0, 0], [1.0, -1.0]], dtype=torch.float64)
    rows = torch.stack([uniform_causal(2), uniform_causal(2) + 4.32e-4 * step])
    view = difference(cache_of(plain, rows[:, None, None].expand(2, 3, 4, 2, 2)), list("ab"), 0, 0)
    np.testing.assert_allclose(view.values[0], 4.32e-4 * step, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recurrences": [0]}, "between 1 and 3, got 0: there is none before"),
        ({"recurrences": [-4]}, "between 1 and 3, got 0"),
        ({"recurrences": []}, "none to show"),
        ({"limit": 0.0}, r"limit .*0, got 0\.0"),
        ({"limit": float("nan")}, "limit .*nan"),
        ({"head": 9}, r"head .*-4.*3, got 9"),
    ],
)
def test_no_such_difference(cache: LoopedActivationCache, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        difference(cache, list("abcdefg"), **({"layer": 0, "head": 0} | arguments))


def test_maps_stand_where_the_floor_plan_says(plain: LoopedTransformer) -> None:
    """The sheet's grey at the middle of a cell is that of its weight."""
    n, loop = 4, plain.loop
    with torch.inference_mode():
        cache = plain.run_with_cache(torch.arange(n)[None], names_filter="attention")[1]
    plan = floor_plan(cache)
    sheet = png.imread(io.BytesIO(plan.png))[..., :3]
    height, width = sheet.shape[:2]
    assert plan.pixels == (width, height)
    seen = set()
    for tower in plan.towers:
        for layer, head in np.ndindex(tower.last - tower.first, 4):
            seen.add((tower.first + layer, head))
            cell = tower.width / (n + 2)
            cell_height = tower.height / (n + 2)
            for query, key in ((0, 0), (n - 1, 0), (n - 1, n - 1), (0, n - 1)):
                x = tower.left + head * tower.width + (key + 1.5) * cell
                y = tower.bottom - (layer + 1) * tower.height + (query + 1.5) * cell_height
                weight = float(plan.patterns[tower.first + layer, head, query, key])
                grey = colormaps["Greys"](weight**0.5)[:3]
                found = sheet[int(y * height), int(x * width)]
                assert np.abs(found - grey).max() < 0.02
    assert seen == {(i, head) for i in range(loop.n_layers) for head in range(4)}
    data = json.loads(Page(plan.page()).scripts[0])
    assert data["layers"][:3] == ["prelude 0", "prelude 1", "r0 l0"]
    assert data["layers"][-2:] == ["r3 l2", "coda 0"]


def test_a_floor_plan_leaves_padding_out(plain: LoopedTransformer) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    tokens = torch.tensor([[0, 0, 5, 6, 7]])
    with torch.inference_mode():
        padded = plain.run_with_cache(tokens, attention_mask=mask, names_filter="attention")[1]
        alone = plain.run_with_cache(tokens[:, 2:], names_filter="attention")[1]
    plan = floor_plan(padded)
    assert plan.patterns.shape == (15, 4, 3, 3)
    torch.testing.assert_close(plan.patterns, floor_plan(alone).patterns)


def test_the_recurrence_from_which_a_prediction_stays() -> None:
    #                  settled at once, at 1, back and forth, at the last, never there
    rows = [[5, 1, 4, 3, 7], [5, 2, 6, 3, -1], [5, 2, 4, 3, 7], [5, 2, 4, 8, 7]]
    assert settling_recurrence(torch.tensor(rows)).tolist() == [0, 1, 2, 3, -1]
    assert settling_recurrence(torch.tensor(rows[:1])).tolist() == [0, 0, 0, 0, 0]
    with pytest.raises(InputError, match="at least one recurrence"):
        settling_recurrence(torch.zeros(0, 3, dtype=torch.long))


@pytest.fixture(scope="module")
def reader() -> LoopedTransformer:
    """A model without a coda whose lenses name the largest coordinate of the state."""
    model = LoopedTransformer.from_config(random_config(n_coda=0, d_vocab=32))
    with torch.no_grad():
        model.unembed.weight.copy_(torch.eye(32))
    return model


@pytest.mark.parametrize("lens", ["coda", "logit"])
def test_tokens_settle_where_their_predictions_do(reader: LoopedTransformer, lens: str) -> None:
    tokens = torch.arange(4)[None]
    with torch.inference_mode():
        cache = reader.run_with_cache(tokens, names_filter="residual")[1]
    predictions = torch.tensor([[9, 1, 4, 3], [9, 2, 6, 3], [9, 2, 4, 3], [9, 2, 4, 8]])
    for r, row in enumerate(predictions):
        states = torch.eye(32)[row][None]
        cache.cache_dict[f"blocks.{cache.loop.index(r, 2)}.hook_resid_post"] = states
    view = settled_tokens(cache, list("abcd"), lens=lens)
    assert view.predictions.tolist() == predictions.tolist()
    assert view.settles_at.tolist() == [0, 1, 2, 3]
    assert view.title == "When predictions settle: 3 of 4 tokens before the last of 4 recurrences"
    boxes = [a for tag, a in Page(view.page()).elements if tag == "span" and "title" in a]
    assert [a["class"] for a in boxes] == ["token done"] * 3 + ["token open"]
    assert boxes[2]["title"] == "Position 2, next token: r0 '#4', r1 '#6', r2 to r3 '#4'"
    states = torch.eye(32)[predictions[1]][None].clone()
    states[0, 0] = torch.nan
    cache.cache_dict[f"blocks.{cache.loop.index(1, 2)}.hook_resid_post"] = states
    assert settled_tokens(cache, list("abcd"), lens=lens).settles_at.tolist() == [-1, 1, 2, 3]


def test_the_coda_lens_ends_in_the_prediction_of_the_model(variant: LoopedTransformer) -> None:
    """And padding changes nothing."""
    alone, mask = torch.arange(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    padded = torch.stack([torch.cat((torch.zeros(2, dtype=torch.long), alone)), torch.arange(7)])
    with torch.inference_mode():
        logits, cache = variant.run_with_cache(alone[None], names_filter="residual")
        both = variant.run_with_cache(padded, attention_mask=mask, names_filter="residual")[1]
    view = settled_tokens(cache, list("abcde"))
    assert view.predictions[-1].tolist() == logits[0].argmax(-1).tolist()
    same = settled_tokens(both, list("abcde"), prompt=0)
    assert same.tokens == view.tokens
    assert same.predictions.tolist() == view.predictions.tolist()


def test_long_runs_have_a_scale_for_their_legend(plain: LoopedTransformer) -> None:
    with torch.inference_mode():
        cache = plain.run_with_cache(torch.arange(3)[None], n_recurrences=20)[1]
    page = settled_tokens(cache, list("abc")).page()
    legend = page[page.index('class="legend"') :]
    assert "r18: " in legend
    assert "changed at r19, the last" in legend


def test_what_settling_cannot_read(cache: LoopedActivationCache, plain: LoopedTransformer) -> None:
    with pytest.raises(MissingActivationError, match="'resid_post'"):
        settled_tokens(cache, list("abcdefg"))
    run = plain.run_with_cache(torch.arange(3)[None], names_filter="residual")[1]
    with pytest.raises(InputError, match=r"lens.*coda.*logit.*'tuned'"):
        settled_tokens(run, list("abc"), lens="tuned")
    with pytest.raises(InputError, match=r"prompt.*-1\b.*\b0\b.*\b1\b"):
        settled_tokens(run, list("abc"), prompt=1)
    with pytest.raises(InputError, match=r"\b3\b.*\b2\b"):
        settled_tokens(run, list("ab"))
    part = plain.run_with_cache(torch.arange(3)[None], pos_slice=-1)[1]
    with pytest.raises(InputError, match=r"\b1\b.*\b3\b"):
        settled_tokens(part, list("abc"))
    injected = LoopedTransformer.from_config(random_config(injection=Injection.LINEAR))
    without = injected.run_with_cache(torch.arange(3)[None], n_recurrences=0)[1]
    with pytest.raises(InputError, match="no recurrence"):
        settled_tokens(without, list("abc"))
    with pytest.raises(InputError, match="recurrences"):
        head_across_recurrences(without, list("abc"), 0, 0)


def every_view(cache: LoopedActivationCache, tokens: list[str]) -> list[pages.View]:
    return [
        head_across_recurrences(cache, tokens, 0, 0),
        heads_at(cache, tokens, 0, 0),
        difference(cache, tokens, 0, 0),
        floor_plan(cache),
        settled_tokens(cache, tokens),
    ]


def test_every_view_in_a_notebook_and_as_a_file(plain: LoopedTransformer, tmp_path: Path) -> None:
    tokens = [HOSTILE, '"><b onclick=x>', "&amp;"]
    with torch.inference_mode():
        cache = plain.run_with_cache(torch.arange(3)[None])[1]
    for i, view in enumerate(every_view(cache, tokens)):
        page = view.page()
        (tag, frame), *others = Page(view._repr_html_()).elements
        assert (tag, others) == ("iframe", [])
        assert frame["srcdoc"] == page
        assert frame["sandbox"] == "allow-scripts"
        assert f"height:{view.height}px" in (frame["style"] or "")
        file = view.save(tmp_path / "new" / f"{i}.html")
        assert file.read_text(encoding="utf-8") == page
        parsed = Page(page)
        assert not [tag for tag, a in parsed.elements if "onclick" in a or tag in ("link", "b0")]
        sources = [a[k] or "" for _, a in parsed.elements for k in ("src", "href") if k in a]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        assert parsed.policy().startswith("default-src 'none';")
        own = re.sub(r'id="drawing">[^<]*', "", page)
        assert "http:" not in own
        assert "https:" not in own
        assert "alert(1)</script>" not in page
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [f"{i}.html" for i in range(5)]


def test_views_stay_small_and_say_what_to_do(plain: LoopedTransformer, tmp_path: Path) -> None:
    with torch.inference_mode():
        cache = plain.run_with_cache(torch.arange(3)[None])[1]
    for view, most in zip(every_view(cache, list("abc")), [5e5, 5e5, 5e5, 1e5, 1e4], strict=True):
        assert len(view.page().encode()) < most
        with pytest.raises(InputError, match=r"max_bytes = 0\.00 MB"):
            view.page(max_bytes=1000)
    with pytest.raises(InputError, match=r"path.*\.html"):
        view.save(tmp_path / "view.png")
    (tmp_path / "folder").write_text("")
    with pytest.raises(DataError, match="folder"):
        view.save(tmp_path / "folder" / "view.html")


def test_a_text_in_place_of_tokens() -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    text = "Tom has 3 boxes."
    with torch.inference_mode():
        cache = model.run_with_cache(text, n_recurrences=2)[1]
    view = settled_tokens(cache, text)
    assert list(view.tokens) == model.to_str_tokens(text)
    assert set(view.names) == set(view.predictions.flatten().tolist())
    assert heads_at(cache, text, 1, 1).tokens == view.tokens
