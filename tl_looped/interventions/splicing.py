"""A dictionary of features (a sparse autoencoder) in place of an activation."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tl_looped._compat import HookPoint, get_act_name
from tl_looped.checks import checked, described
from tl_looped.errors import InputError
from tl_looped.interventions.selection import Recurrences, members
from tl_looped.model.context import LoopRun
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.transformer import LoopedTransformer
from tl_looped.transformer.intervening import Changes, Intervention

_OWNERS = ("blocks.", "recurrence.", "prelude.", "coda.")
_WITHIN = re.compile(r"(?:blocks|recurrence)\.\d+\.(.+)")
FeatureEdit: TypeAlias = Callable[[Tensor, LoopedHookPoint], Tensor | None]
"""Gets the features and the hook point of the activation; returns new ones, or None."""


@checked
@dataclass(frozen=True, eq=False)
class Splice(Intervention):
    """An activation goes through a sparse autoencoder: ``x`` becomes ``decode(encode(x))``.

    With the error term it becomes ``decode(edited features) + (x - decode(encode(x)))``, what is in
    brackets without a gradient, as SAELens has it: features can be edited, and what the autoencoder
    misses stays. It is computed as ``x`` plus the difference of two decodings, so that a run whose
    features nobody edits has the model's own activations to the last bit.

    The autoencoder sees the activation in its own dtype and on its own device, and what it gives is
    brought back. Its hooks, if it has TransformerLens's hook points (SAELens's classes do), fire
    inside ``encode`` and ``decode``; the error is computed without them.

    Args:
        sae: Any object with ``encode`` and ``decode``, ``[batch, pos, ...]`` to
            ``[batch, pos, feature]`` and back.
        recurrences: Where; all if None.
        layers: Core layers, 0-based; all if None.
        error_term: False: what the autoencoder misses is lost.
        name: Activation: its name in a layer or a recurrence, as in a cache (``"mlp_out"``,
            ``"z"``, ``"state_out"``), or a hook of the model. If None, the ``hook_name`` of the
            autoencoder's own configuration, ``"resid_post"`` without one. A hook of the model means
            that one place; if ``recurrences`` are given, its layer there; if ``layers`` are given,
            those.
        features: Edits or collects features: a function of the features and the hook point, which
            knows its ``recurrence`` and ``layer_in_stage``. It returns new features, or None if it
            edited in place or only looked.

    Raises:
        InputError: if ``sae`` lacks a method, is for one head or writes elsewhere than it reads (a
            transcoder), is of another width, or does not return the shape it was given.
        LayerIndexError, HookNameError, GatedHookError: for a place that the run does not have.
    """

    sae: Any
    recurrences: Recurrences = None
    layers: Recurrences = None
    error_term: bool = True
    name: str | None = None
    features: FeatureEdit | None = None

    def __post_init__(self) -> None:
        lacking = [m for m in ("encode", "decode") if not callable(getattr(self.sae, m, None))]
        if isinstance(self.sae, type) or lacking:
            raise InputError(
                f"sae must be an object with the methods encode and decode, got "
                f"{described(self.sae)}"
            )
        head, to = _told(self.sae, "hook_head_index"), _told(self.sae, "hook_name_out")
        if head is not None:
            raise InputError(
                f"{self}: the autoencoder is for head {head} alone; give one whose encode and "
                "decode take the whole activation"
            )
        if to is not None and to != _told(self.sae, "hook_name"):
            raise InputError(
                f"{self}: a transcoder reads {_told(self.sae, 'hook_name')!r} and writes {to!r}; "
                "what is spliced in reads and writes one activation"
            )

    def __repr__(self) -> str:
        return (
            f"Splice({type(self.sae).__name__}, recurrences={self.recurrences}, "
            f"layers={self.layers}, name={self._wanted!r}, error_term={self.error_term})"
        )

    @property
    def _wanted(self) -> str:
        told = _told(self.sae, "hook_name") if self.name is None else self.name
        return told if isinstance(told, str) else "resid_post"

    def changes(self, model: LoopedTransformer, run: LoopRun) -> Changes:
        """Replace the activation."""
        return Changes(edits=[(name, self._splice) for name in self._places(model)])

    def _places(self, model: LoopedTransformer) -> list[str]:
        """Canonical names of the hooks."""
        wanted, loop, layers = self._wanted, model.loop, self.layers
        if wanted in model.hook_dict or wanted.startswith(_OWNERS):
            place = model._canonical(wanted)
            if self.recurrences is None and layers is None:
                return [place]
            point, within = model.hook_dict[place], _WITHIN.fullmatch(place)
            if point.recurrence is None or within is None:
                raise InputError(f"{self}: {wanted} runs once: leave recurrences and layers out")
            suffix, layers = within[1], point.layer_in_stage if layers is None else layers
        else:
            spelled = wanted if "hook_" in wanted else get_act_name(wanted, 0)
            suffix = spelled.removeprefix("blocks.0.")
        where = members(self.recurrences, loop.R, "recurrence", self)
        if f"recurrence.0.{suffix}" in model.hook_dict:
            if layers is not None:
                raise InputError(f"{self}: {suffix} belongs to a recurrence: leave layers out")
            return [f"recurrence.{r}.{suffix}" for r in where]
        chosen = members(layers, loop.k, "core layer", self)
        names = (f"recurrence.{r}.blocks.{layer}.{suffix}" for r in where for layer in chosen)
        return [model._canonical(name) for name in names]

    def _splice(self, x: Tensor, hook: LoopedHookPoint) -> Tensor:
        self._check_width(x)
        given = _at_home(x, self.sae)
        if not self.error_term:
            return self._decoded(given, x, hook, self.features)
        with torch.no_grad(), _unhooked(self.sae):
            clean = self._decoded(given.detach(), x, hook, None)
        # The order keeps bits: where nothing is edited, x plus zero.
        return x.detach() + (self._decoded(given, x, hook, self.features) - clean)

    def _decoded(
        self, given: Tensor, x: Tensor, hook: LoopedHookPoint, edit: FeatureEdit | None
    ) -> Tensor:
        features = self.sae.encode(given)
        if not isinstance(features, Tensor):
            raise InputError(f"{self}: encode must return a tensor, got {described(features)}")
        if edit is not None:
            edited = edit(features := features.clone(), hook)
            features = features if edited is None else edited
        found = self.sae.decode(features)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            raise InputError(
                f"{self}: decode must return {list(x.shape)}, the shape of {hook.name}, got "
                f"{list(found.shape) if isinstance(found, Tensor) else described(found)}"
            )
        return found.to(x)

    def _check_width(self, x: Tensor) -> None:
        width = _told(self.sae, "d_in")
        if type(width) is int and width not in (x.shape[-1], x.shape[2:].numel()):
            raise InputError(
                f"{self}: the autoencoder reads {width} dimensions, and the activation is "
                f"{list(x.shape)}"
            )


def _told(sae: Any, what: str) -> Any:
    """What an autoencoder's configuration says, where SAELens keeps it; None if it says nothing."""
    cfg = getattr(sae, "cfg", None)
    for holder in (_item(cfg, "metadata"), cfg):
        found = _item(holder, what)
        if found is not None:
            return found
    return None


def _item(holder: Any, what: str) -> Any:
    return holder.get(what) if isinstance(holder, Mapping) else getattr(holder, what, None)


def _at_home(x: Tensor, sae: Any) -> Tensor:
    """The activation in the dtype and on the device of an autoencoder that is a module."""
    weights = sae.parameters() if isinstance(sae, nn.Module) else ()
    home = next((p for p in weights if p.is_floating_point()), None)
    return x if home is None else x.to(home)


@contextmanager
def _unhooked(sae: Any) -> Iterator[None]:
    """An autoencoder whose TransformerLens hook points have no hooks for a while."""
    modules = sae.modules() if isinstance(sae, nn.Module) else ()
    points = [module for module in modules if isinstance(module, HookPoint)]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept = [(point, kind, point.__dict__[kind]) for point in points for kind in kinds]
    try:
        for point, kind, _ in kept:
            point.__dict__[kind] = OrderedDict()
        yield
    finally:
        for point, kind, hooks in kept:
            point.__dict__[kind] = hooks
