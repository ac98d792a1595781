"""Which layers of a feedforward model become prelude, core and coda.

Layers keep the order that they have in the feedforward model, each is used once, and those that no
stage names are dropped. A permuted list is refused: it is far more often a slip than a wish, and
the result would look like a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tl_looped.checks import checked, whole
from tl_looped.errors import InputError


@dataclass(frozen=True)
class LayerPlan:
    """Layers of the feedforward model, 0-based, of each stage.

    Args:
        prelude, core, coda: In increasing order, also from stage to stage.
        n_layers: Of the feedforward model.
    """

    prelude: tuple[int, ...]
    core: tuple[int, ...]
    coda: tuple[int, ...]
    n_layers: int

    @property
    def kept(self) -> tuple[int, ...]:
        """All layers that are used."""
        return self.prelude + self.core + self.coda

    @property
    def dropped(self) -> tuple[int, ...]:
        """All others."""
        return tuple(i for i in range(self.n_layers) if i not in self.kept)

    def stages(self) -> dict[str, tuple[int, ...]]:
        """The three stages by name, in order."""
        return {"prelude": self.prelude, "core": self.core, "coda": self.coda}


def plan_layers(n_layers: int, prelude: Any, core: Any, coda: Any) -> LayerPlan:
    """Check the lists of a user.

    Args:
        n_layers: Of the feedforward model.
        prelude: Iterable of layers; None for all before the first core layer.
        core: Iterable of layers, at least one.
        coda: Iterable of layers; None for all after the last core layer.

    Raises:
        InputError: layers that do not exist, are named twice, or are out of order; no core.
    """
    middle = _checked("core", core, n_layers)
    if not middle:
        raise InputError(
            f"core={core!r} is empty; the loop needs at least one of the layers {_span(n_layers)}"
        )
    first = range(middle[0]) if prelude is None else prelude
    last = range(middle[-1] + 1, n_layers) if coda is None else coda
    plan = LayerPlan(
        _checked("prelude", first, n_layers), middle, _checked("coda", last, n_layers), n_layers
    )
    _check_apart(plan)
    return plan


@checked
def parse_layers(text: str) -> tuple[int, ...]:
    """``"0-3,7"`` -> ``(0, 1, 2, 3, 7)``; an empty text is no layer.

    Raises:
        InputError: anything else than numbers and ascending ranges between commas.
    """
    out: list[int] = []
    for part in text.split(",") if text.strip() else []:
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            raise InputError(
                f"{part!r} in {text!r} is neither a layer nor a range of layers; "
                "layers are written like 0-3,7"
            )
        start, stop = int(ends[0]), int(ends[-1])
        if stop < start:
            raise InputError(f"the range {part.strip()!r} in {text!r} runs backwards")
        if stop - start > 10_000:
            raise InputError(f"the range {part.strip()!r} in {text!r} has more than 10000 layers")
        out += range(start, stop + 1)
    return tuple(out)


def _checked(name: str, layers: Any, n_layers: int) -> tuple[int, ...]:
    out = tuple(_layer(name, layer, n_layers) for layer in layers)
    if len(set(out)) < len(out):
        twice = sorted({layer for layer in out if out.count(layer) > 1})
        raise InputError(f"{name}={list(out)} names layers twice: {twice}. Name each layer once")
    if list(out) != sorted(out):
        raise InputError(
            f"{name}={list(out)} is out of order; layers keep the feedforward model's order: "
            f"{name}={sorted(out)}"
        )
    return out


def _layer(name: str, layer: Any, n_layers: int) -> int:
    fix = f"the feedforward model has the layers {_span(n_layers)}, counted from 0, not the end"
    return whole(layer, f"a layer of {name}", 0, n_layers - 1, fix=fix)


def _check_apart(plan: LayerPlan) -> None:
    """No layer in two stages, and the stages in order."""
    stages = plan.stages()
    for one, other in (("prelude", "core"), ("prelude", "coda"), ("core", "coda")):
        both = sorted(set(stages[one]) & set(stages[other]))
        if both:
            raise InputError(
                f"{one}={list(stages[one])} and {other}={list(stages[other])} overlap in the "
                f"layers {both}; a layer can be in one stage only, take it out of the other"
            )
        if stages[one] and stages[other] and stages[one][-1] > stages[other][0]:
            raise InputError(
                f"{one}={list(stages[one])} does not come before {other}={list(stages[other])}; "
                "the stages keep the feedforward model's order: prelude, core, coda"
            )


def _span(n_layers: int) -> str:
    return f"0..{n_layers - 1}"
