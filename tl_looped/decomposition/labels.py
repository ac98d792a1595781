"""Labels of layers, heads and components: by their place in the loop, or as in TransformerLens.

``"looped"``: ``r3.l1h2``, ``prelude.0.attn_out``, ``coda.1n17``. ``"transformer_lens"``, by
effective layer: ``L7H2``, ``0_attn_out``, ``19N17``. By default the first, but of models that have
no loop (``cfg.has_loop``); never by the number of recurrences, so that the code that reads labels
need not know how a model was run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tl_looped.checks import checked, one_of
from tl_looped.errors import InputError
from tl_looped.model.geometry import LoopGeometry

if TYPE_CHECKING:
    from tl_looped.decomposition.components import Component

LabelForm = Literal["looped", "transformer_lens"]
"""How labels are written."""


def label_form(cfg: Any, labels: LabelForm | None) -> str:
    """The form that is asked for, or the model's own."""
    if labels is None:
        # A model of another kind, with a cache made by hand, is looped.
        return "looped" if getattr(cfg, "has_loop", True) else "transformer_lens"
    return one_of(labels, "labels", ("looped", "transformer_lens"))


def layer_label(loop: LoopGeometry, layer: int, form: str, what: str) -> str:
    """Of something at an effective layer: ``r3.l1.pre`` or ``7_pre``."""
    return f"{layer}_{what}" if form == "transformer_lens" else f"{loop.locate(layer).label}.{what}"


def head_labels(loop: LoopGeometry, n_heads: int, form: str) -> list[str]:
    """Of all heads of the effective layers, in order."""
    if form == "transformer_lens":
        places = [f"L{i}H" for i in range(loop.n_layers)]
    else:
        places = [f"{place}h" for place in loop.labels()]
    return [f"{place}{head}" for place in places for head in range(n_heads)]


def component_label(loop: LoopGeometry, component: Component, form: str) -> str:
    """Of a component, or a group of them, of a decomposition."""
    place = component.place
    if form == "looped" or place is None:
        return component.label
    layer = {
        "prelude": place.layer,
        "core": loop.p + (place.recurrence or 0) * loop.k + place.layer,
        "coda": loop.p + loop.R * loop.k + place.layer,
    }[place.stage]
    if component.kind in ("head", "neuron"):
        return f"L{layer}{component.kind[0].upper()}{component.index}"
    return f"{layer}_{component.kind}"


def refuse_grouped(by: str | None, labels: LabelForm | None) -> None:
    """Raise if groups are to have labels that TransformerLens has of single components only."""
    if by is not None and labels == "transformer_lens":
        raise InputError(
            f"labels='transformer_lens' are of single components, and by={by!r} sums groups of "
            "them, which TransformerLens has no labels for: use labels='looped'"
        )


@checked
class HeadLabels(list[str]):
    """Labels of all heads: a list, as in TransformerLens 4, that may be called, as in 3.

    Args:
        loop: Geometry of the model.
        n_heads: Heads of a layer.
        cfg: The model's configuration, for the form of the labels.
        labels: That form, if not the model's own.
    """

    def __init__(
        self, loop: LoopGeometry, n_heads: int, cfg: Any, labels: LabelForm | None = None
    ) -> None:
        super().__init__(head_labels(loop, n_heads, label_form(cfg, labels)))
        self._of = (loop, n_heads, cfg)

    def __call__(self, labels: LabelForm | None = None) -> list[str]:
        """The labels; ``labels`` is their form, ``"looped"`` or ``"transformer_lens"``."""
        loop, n_heads, cfg = self._of
        return head_labels(loop, n_heads, label_form(cfg, labels))
