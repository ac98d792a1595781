"""The paper's colours (arXiv 2604.11791): later recurrences yellower, later layers greener.

Recurrences run from green to yellow, core layers from blue to green. The yellow end is darker than
pure yellow, which nobody can see on white paper. Prelude and coda are blue and red, as in Figure
63. One recurrence or one layer gets the first colour of its scale.
"""

from __future__ import annotations

from matplotlib.colors import Colormap, LinearSegmentedColormap

from tl_looped.errors import InputError

Colour = tuple[float, float, float]

RECURRENCE_SCALE: Colormap = LinearSegmentedColormap.from_list(
    "recurrences", [(0.00, 0.35, 0.28), (0.36, 0.60, 0.16), (0.98, 0.80, 0.02)]
)
LAYER_SCALE: Colormap = LinearSegmentedColormap.from_list(
    "layers", [(0.10, 0.14, 0.75), (0.05, 0.45, 0.62), (0.16, 0.76, 0.30)]
)
PRELUDE: Colour = (0.12, 0.35, 0.85)
CODA: Colour = (0.80, 0.12, 0.12)
NEUTRAL: Colour = (0.45, 0.45, 0.45)
SEVERAL: tuple[Colour, ...] = (
    (0.15, 0.15, 0.15),
    (0.55, 0.25, 0.60),
    (0.85, 0.45, 0.10),
    (0.20, 0.45, 0.70),
)
"""Of lines that stand for neither recurrences nor layers."""
FEEDFORWARD: Colour = (0.0, 0.0, 0.0)


def _scale(colours: Colormap, n: int) -> list[Colour]:
    if n < 0:
        raise InputError(f"n must be at least 0, got {n}")
    points = [colours(i / max(1, n - 1)) for i in range(n)]
    return [(float(r), float(g), float(b)) for r, g, b, _ in points]


def recurrence_colours(n: int) -> list[Colour]:
    """Colours of ``n`` recurrences as RGB, green to yellow."""
    return _scale(RECURRENCE_SCALE, n)


def layer_colours(n: int) -> list[Colour]:
    """Colours of ``n`` core layers as RGB, blue to green."""
    return _scale(LAYER_SCALE, n)
