"""Every attention map of one prompt on one sheet, as in Figure 63 of arXiv 2604.11791.

Depth goes upwards, heads to the right; the prelude is framed in blue, the coda in red. The drawing
is :func:`tl_looped.plots.attention_maps.attention_floor_plan`; here it is a page on which pointing
at a map names it.
"""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import checked
from tl_looped.errors import InputError
from tl_looped.model.geometry import LoopGeometry
from tl_looped.plots.attention_maps import Tower, attention_floor_plan, towers_of
from tl_looped.viz.page import MAX_BYTES, View, check_size, json_in_html, whole_page
from tl_looped.viz.reading import PromptView

_DPI = 110


@checked
@dataclass(frozen=True, repr=False)
class FloorPlan(View):
    """A sheet of maps.

    Args:
        title: What is shown.
        loop: Geometry of the run.
        patterns: What is drawn, padding left out: ``[effective_layer, head, query, key]``.
        png: The sheet.
        towers: Where the maps stand on it.
        pixels: Width and height of the sheet.
    """

    title: str
    loop: LoopGeometry
    patterns: Float[Tensor, "layer head query key"]
    png: bytes
    towers: tuple[Tower, ...]
    pixels: tuple[int, int]

    @property
    def height(self) -> int:
        """The sheet as it is shown at first, and the text above it."""
        return min(_SHOWN, self.pixels[1]) + 140

    def page(self, max_bytes: int = MAX_BYTES) -> str:
        """As :meth:`View.page`."""
        towers = [asdict(tower) for tower in self.towers]
        data: dict[str, Any] = {"towers": towers, "heads": self.patterns.shape[1]}
        body = _BODY.format(
            data=json_in_html(
                data | {"layers": [self._name(i) for i in range(len(self.patterns))]}
            ),
            png=base64.b64encode(self.png).decode(),
        )
        page = whole_page(self.title, body, [_SCRIPT], style=_STYLE)
        remedy = "show a shorter prompt, or a run of fewer recurrences"
        return check_size(self.title, page, max_bytes, remedy)

    def _name(self, i: int) -> str:
        """``r3 l1``, ``prelude 0`` or ``coda 1``."""
        place = self.loop.locate(i)
        if place.recurrence is None:
            return f"{place.stage} {place.layer}"
        return f"r{place.recurrence} l{place.layer}"


@checked
def floor_plan(cache: LoopedActivationCache, prompt: int = 0) -> FloorPlan:
    """Every attention map of a run: effective layers upwards, heads to the right.

    The colour is the square root of the weight, so that small weights show; a legend says which is
    which. Within a map queries run downwards, keys to the right.

    Args:
        cache: A run's cache with the patterns of all layers (``names_filter="attention"``).
        prompt: Row of the batch; its padding is left out.

    Raises:
        InputError: a prompt that is out of range, or more maps than one sheet holds.
        MissingActivationError: if the cache lacks a pattern.
    """
    run = PromptView(cache, prompt)
    loop = run.loop
    maps = [run.heads(i).float().cpu() for i in range(loop.n_layers)]
    if not maps:
        raise InputError("cache: the run had no layer, and no attention to draw")
    patterns = torch.stack(maps)
    heads, length = patterns.shape[1:3]
    figure = attention_floor_plan(patterns.numpy(), loop, "")
    sheet = io.BytesIO()
    figure.savefig(sheet, format="png", dpi=_DPI)
    pixels = tuple(round(side * _DPI) for side in figure.get_size_inches())
    title = f"Attention of a {loop} run, every layer and head, {length} tokens"
    return FloorPlan(
        title, loop, patterns, sheet.getvalue(), tuple(towers_of(figure, loop, heads, length)),
        (pixels[0], pixels[1]),
    )  # fmt: skip


_SHOWN = 900  # pixels of the sheet's height at first

_STYLE = """
body { max-width: 1000px; }
#sheet { position: relative; display: inline-block; max-width: 100%; cursor: crosshair; }
#sheet img { display: block; max-width: 100%; max-height: 900px; }
#sheet.whole, #sheet.whole img { max-width: none; max-height: none; }
#frame { position: absolute; display: none; border: 2px solid #111; pointer-events: none;
  box-shadow: 0 0 0 1px #fff; box-sizing: border-box; }
"""

_BODY = """<p>Effective layers from below, heads from the left. <span style="color:#1f59d9">Blue
frame: prelude.</span> <span style="color:#cc1f1f">Red frame: coda.</span> Green lines part
recurrences. In a map, rows are the tokens that attend, columns the tokens attended to. Click for
the full size.</p>
<p>Point at a map to name it: <b id="name">&nbsp;</b></p>
<div id="sheet"><img src="data:image/png;base64,{png}" alt="All attention maps">
<div id="frame"></div></div>
<script type="application/json" id="view-data">{data}</script>
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("view-data").textContent);
const sheet = document.getElementById("sheet"), frame = document.getElementById("frame");
const name = document.getElementById("name");
sheet.addEventListener("click", () => sheet.classList.toggle("whole"));
sheet.addEventListener("mousemove", event => {
  const box = sheet.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
  for (const tower of data.towers) {
    const head = Math.floor((x - tower.left) / tower.width);
    const up = Math.floor((tower.bottom - y) / tower.height), layer = tower.first + up;
    if (head < 0 || head >= data.heads || up < 0 || layer >= tower.last) continue;
    name.textContent = data.layers[layer] + " h" + head + " (effective layer " + layer + ")";
    Object.assign(frame.style, {display: "block",
      left: 100 * (tower.left + head * tower.width) + "%",
      top: 100 * (tower.bottom - (up + 1) * tower.height) + "%",
      width: 100 * tower.width + "%", height: 100 * tower.height + "%"});
    return;
  }
  frame.style.display = "none";
});
"""
