"""The prompt's tokens, coloured by the recurrence at which their prediction settles.

At every position and recurrence r the state of the loop is read by a lens: the coda lens says what
the model would predict had the loop stopped at r, the logit lens reads the same state through the
final norm and the unembedding alone. The prediction of a position settles at the first recurrence
from which its most likely next token is the same up to the last one.

Decisions and limits. Only the most likely token counts, not its probability: a tie that rounding
breaks may flip for ever. The prediction of the last recurrence agrees with itself, so a position
that "settles" there has changed at the last step and is drawn as not settled; whether another
settled for good, a longer run alone can say. A position whose logits are NaN has no prediction, and
is undefined throughout. The paper has no such picture; its definition of settling is that of the
lens readouts in :mod:`tl_looped.metrics.readouts`, at every position.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_looped.cache import LoopedActivationCache
from tl_looped.checks import checked, one_of
from tl_looped.errors import InputError
from tl_looped.plots.colours import Colour, recurrence_colours
from tl_looped.viz.page import MAX_BYTES, View, check_size, whole_page
from tl_looped.viz.reading import PromptView
from tl_looped.words import count

Lens = Literal["coda", "logit"]

UNDEFINED = -1
"""Where there is no prediction."""

_MOST_BOXES = 12
_MOST_CHANGES = 8


@checked
def settling_recurrence(predictions: Int[Tensor, " recurrence *any"]) -> Int[Tensor, "*any"]:
    """The first recurrence from which the prediction never changes again until the last.

    ``min { r : p_s = p_(R-1) for all s >= r }``. It is R - 1 where the last step changed the
    prediction, so that nothing has settled within the run; and 0 for a run of one recurrence.

    Args:
        predictions: The most likely token of every recurrence; negative where there is none.

    Returns:
        ``0..R-1``; :data:`UNDEFINED` where any recurrence has no prediction.

    Raises:
        InputError: no recurrence.
    """
    if predictions.ndim == 0 or not len(predictions):
        raise InputError(
            f"predictions must be [recurrence, ...] of at least one recurrence, got shape "
            f"{tuple(predictions.shape)}"
        )
    same = (predictions == predictions[-1]).long()
    # From the last one back, a product of ones up to the first change.
    stays = same.flip(0).cumprod(0).sum(0)
    undefined = (predictions < 0).any(0)
    return (len(predictions) - stays).masked_fill(undefined, UNDEFINED)


@checked
@dataclass(frozen=True, repr=False)
class SettledTokens(View):
    """A prompt, coloured by when its predictions settle.

    Args:
        title: What is shown.
        lens: Which lens read the states.
        tokens: The prompt's tokens.
        settles_at: Recurrence, as :func:`settling_recurrence`; R - 1 means that it did not settle
            within the run.
        predictions: The most likely next token at every recurrence, as an id;
            :data:`UNDEFINED` if the logits were NaN.
        names: The ids of ``predictions`` as text.
    """

    title: str
    lens: Lens
    tokens: tuple[str, ...]
    settles_at: Int[np.ndarray, " pos"]
    predictions: Int[np.ndarray, "recurrence pos"]
    names: dict[int, str]

    @property
    def height(self) -> int:
        """Lines of boxes, as they wrap at the width of a page."""
        said = [self.names.get(int(token), "undefined") for token in self.predictions[-1]]
        letters = [
            max(8.5 * len(a), 6.7 * (len(b) + 5)) for a, b in zip(self.tokens, said, strict=True)
        ]
        return 190 + 42 * math.ceil(1.1 * sum(16 + wide for wide in letters) / 720)

    def page(self, max_bytes: int = MAX_BYTES) -> str:
        """As :meth:`View.page`."""
        R = len(self.predictions)
        colours = recurrence_colours(max(R - 1, 1))
        boxes = "\n".join(self._box(i, colours) for i in range(len(self.tokens)))
        body = _BODY.format(
            lens=self.lens, legend=self._legend(colours), boxes=boxes, last=R - 1
        )  # fmt: skip
        page = whole_page(self.title, body, style=_STYLE)
        return check_size(self.title, page, max_bytes, "show a shorter prompt")

    def _box(self, i: int, colours: Sequence[Colour]) -> str:
        r, last = int(self.settles_at[i]), len(self.predictions) - 1
        kind, style = _look(r, last, colours)
        if r == UNDEFINED:
            said = "undefined"
        else:
            said = f"r{r} → {_bdi(self.names[int(self.predictions[-1, i])])}"
        return (
            f'<span class="token {kind}" style="{style}" title="{html.escape(self._story(i))}">'
            f"{_bdi(self.tokens[i])}<small>{said}</small></span>"
        )

    def _story(self, i: int) -> str:
        """What every recurrence predicts after position ``i``."""
        spans, r = [], 0
        for token, group in groupby(self.predictions[:, i].tolist()):
            n = len(list(group))
            name = "undefined" if token == UNDEFINED else repr(visible(self.names[token]))
            spans.append(f"r{r} {name}" if n == 1 else f"r{r} to r{r + n - 1} {name}")
            r += n
        left_out = len(spans) - _MOST_CHANGES
        if left_out > 0:
            spans = [f"({left_out} earlier predictions)", *spans[-_MOST_CHANGES:]]
        return f"Position {i}, next token: {', '.join(spans)}"

    def _legend(self, colours: Sequence[Colour]) -> str:
        last = len(self.predictions) - 1
        counts = {r: int((self.settles_at == r).sum()) for r in range(-1, last + 1)}
        if last > _MOST_BOXES:
            stops = ", ".join(_css(colours[round(x * (last - 1) / 8)]) for x in range(9))
            early = sum(n for r, n in counts.items() if 0 <= r < last)
            entries = [
                f'r0 <span class="scale" style="background:linear-gradient(to right, {stops})">'
                f"</span> r{last - 1}: {count(early, 'token')}"
            ]
        else:
            entries = [_entry(r, last, colours, f"r{r}", counts[r]) for r in range(last)]
        entries.append(_entry(last, last, colours, f"changed at r{last}, the last", counts[last]))
        if counts[UNDEFINED]:
            entries.append(_entry(UNDEFINED, last, colours, "undefined", counts[UNDEFINED]))
        return "\n".join(f"<span>{entry}</span>" for entry in entries)


@checked
def settled_tokens(
    cache: LoopedActivationCache,
    tokens: Any,
    lens: Lens | str = "coda",
    prompt: int = 0,
) -> SettledTokens:
    """The prompt's tokens, coloured by the recurrence at which their prediction settles.

    Holds the logits of one recurrence of one prompt at a time.

    Args:
        cache: With ``hook_resid_post`` of the last core layer at every recurrence, at all
            positions (``names_filter="residual"``).
        tokens: The prompt's tokens as strings, ``model.to_str_tokens(prompt)``, or the prompt as
            the model takes it: text, a conversation, token ids. Those of padding may be among them;
            padded positions are left out.
        lens: ``"coda"``, what the model would say had the loop stopped there, or ``"logit"``, the
            final norm and the unembedding.
        prompt: Row of the batch.

    Raises:
        InputError: a number that is out of range, another lens, tokens that do not fit, or a run
            without a recurrence.
        MissingActivationError: if the cache lacks a state, or the run left the loop early.
    """
    one_of(lens, "lens", get_args(Lens))
    run = PromptView(cache, prompt)
    loop, model = run.loop, cache.model
    if loop.R == 0:
        raise InputError("cache: the run had no recurrence, and no state of the loop to read")
    rows = []
    with torch.no_grad():
        for r in range(loop.R):
            state = run.activation("resid_post", loop.index(r, loop.k - 1))
            rows.append(_top(_logits(model, state, run.real(len(state)), lens == "coda")))
    predictions, real = torch.stack(rows).cpu(), run.real(len(state))
    if real is not None:
        predictions = predictions[:, real.cpu()]
    settles_at = settling_recurrence(predictions).numpy()
    last = loop.R - 1
    done = int(((settles_at >= 0) & (settles_at < last)).sum())
    return SettledTokens(
        title=f"When predictions settle: {done} of {len(settles_at)} tokens before the last of "
        f"{count(loop.R, 'recurrence')}",
        lens="coda" if lens == "coda" else "logit",
        tokens=run.tokens(tokens, len(state)),
        settles_at=settles_at,
        predictions=predictions.numpy(),
        names={i: _name(model, i) for i in predictions.unique().tolist() if i != UNDEFINED},
    )


def _logits(model: Any, state: Tensor, real: Tensor | None, coda: bool) -> Tensor:
    """``[pos, d_vocab]``, padding included."""
    if not coda:
        return model.logit_lens(state[None])[0]
    mask = None if real is None else real[None]
    return model.coda_lens(state[None], attention_mask=mask)[0]


def _top(logits: Tensor) -> Int[Tensor, " pos"]:
    """The most likely token, the first of those that tie; UNDEFINED where a logit is NaN."""
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), UNDEFINED)


def _name(model: Any, token: int) -> str:
    return f"#{token}" if model.tokenizer is None else str(model.to_single_str_token(token))


def visible(token: str) -> str:
    """A token with its white space made visible."""
    signs = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(signs.get(sign, sign) for sign in token) or "∅"


def _bdi(token: str) -> str:
    # Isolated, so that a token of another direction does not turn its neighbours around.
    return f"<bdi>{html.escape(visible(token))}</bdi>"


def _look(r: int, last: int, colours: Sequence[Colour]) -> tuple[str, str]:
    """CSS class and style of a box."""
    if r == UNDEFINED:
        return "undefined", ""
    if r == last:
        return "open", ""
    red, green, blue = colours[r]
    dark = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18
    return "done", f"background:{_css(colours[r])};color:{'#fff' if dark else '#000'}"


def _css(colour: Colour) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)


def _entry(r: int, last: int, colours: Sequence[Colour], name: str, count: int) -> str:
    kind, style = _look(r, last, colours)
    return f'<span class="token {kind}" style="{style}">{name}</span> {count}'


_STYLE = """
.token { display: inline-block; padding: 1px 5px; border: 1px solid #0003; border-radius: 3px;
  white-space: pre; text-align: center; }
.token small { display: block; font-size: 11px; }
.token.open { background: #fff; border: 1px dashed #1d2327; }
.token.undefined { background: repeating-linear-gradient(45deg, #ddd, #ddd 4px, #fff 4px,
  #fff 8px); }
.prompt { display: flex; flex-wrap: wrap; gap: 4px; font: 14px/1.35 ui-monospace, monospace; }
"""

_BODY = """<p>Colour: the recurrence from which the most likely next token stays the same up to
r{last}, the last (by the {lens} lens). Below each token: that recurrence, and the token that is
predicted to come next. Point at a token for all predictions.</p>
<div class="legend"><span>settles at (number of tokens):</span> {legend}</div>
<div class="prompt">
{boxes}
</div>
"""
