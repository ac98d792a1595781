"""LoopedActivationCache: TransformerLens's ActivationCache that knows the loop it came from.

It keeps the geometry of its run: TransformerLens reads ``model.cfg.n_layers`` when a method is
called, so a plain cache would misread itself once the model's number of recurrences changes. Its
``model`` is the live model while that still has the run's geometry, and a view of it with the run's
``cfg`` and ``blocks`` afterwards.

``decompose_resid``, ``stack_head_results`` and their kin are exact in every family, see
``tl_looped.decomposition``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped._compat import Slice, SliceInput, get_act_name
from tl_looped.checks import Seed, checked, described
from tl_looped.decomposition import DecomposingCache
from tl_looped.decomposition.labels import LabelForm, label_form, layer_label
from tl_looped.decomposition.steps import Target
from tl_looped.errors import InputError, LayerIndexError, MissingActivationError
from tl_looped.model.axis_slice import AxisSlice
from tl_looped.model.edits import EditLog, Edits
from tl_looped.model.geometry import LayerLike, LoopGeometry
from tl_looped.model.names import WHY_NONE, canonical_name, own_name


@dataclass
class RunRecord:
    """What a cache keeps of its run; filled by the first forward pass, not by one in a hook."""

    filled: bool = False
    state_seed: Seed | None = None
    state_given: bool = False
    early_exit: bool = False
    attention_mask: Tensor | None = None
    n_pos: int | None = None
    n_past: int = 0
    log: EditLog = field(default_factory=EditLog)
    interventions: tuple[str, ...] = ()

    def edits(self, kept: dict[str, Tensor]) -> Edits:
        """What changed the run, for a cache that holds ``kept``."""
        names = set(self.log.names())
        for name in list(names):
            layer, _, activation = name.rpartition(".")
            if activation == "hook_result" and name not in kept:
                # Computed from z later on, it would be what it was before the edit.
                names.add(f"{layer}.output")
        return Edits(frozenset(names), self.interventions)


@checked
class LoopedActivationCache(DecomposingCache):
    """Activations of one run, addressable by effective layer and by (recurrence, layer).

    Args:
        cache_dict: Canonical hook name -> activation.
        model: The model, or anything TransformerLens accepts as one.
        has_batch_dim: Whether the activations have a batch dimension.
        loop: Geometry of the run; read from ``model.loop`` if None.
        state_seed: Seed of the initial state, or None if the state was given or not random.
        state_given: Whether the run's initial state was given by the caller.
        early_exit: Whether tokens could leave the loop early (``exit_rule``).
        attention_mask: ``[batch, pos]`` of the run, False at padding; None if nothing was padded.
        n_pos: Positions of the run, padding included; None if unknown.
        n_past: Positions before them, in the run's key-value cache.
        edits: What hooks and interventions changed in the run; None if unknown, as in a cache that
            is made by hand. Then a decomposition needs activations to check its sum against.

    Examples:
        ``cache["resid_post", (3, 1)]``, ``cache["resid_post", 7]``,
        ``cache["recurrence.3.hook_state_out"]``, ``cache["prelude.0.hook_resid_post"]``,
        ``cache.stack_recurrences("resid_post")``.
    """

    _view: Any

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        loop: LoopGeometry | None = None,
        state_seed: Seed | None = None,
        state_given: bool = False,
        early_exit: bool = False,
        attention_mask: Tensor | None = None,
        n_pos: int | None = None,
        n_past: int = 0,
        edits: Edits | None = None,
    ) -> None:
        if loop is None and not isinstance(getattr(model, "loop", None), LoopGeometry):
            raise InputError(f"model must be looped, or loop given: got {described(model)}")
        self.loop: LoopGeometry = model.loop if loop is None else loop
        self.attention_mask = attention_mask
        self.n_pos = n_pos
        self.n_past = n_past
        self.state_seed = state_seed
        self.state_given = state_given
        self.early_exit = early_exit
        self.edits = edits
        super().__init__(cache_dict, model, has_batch_dim)

    @property
    def n_recurrences(self) -> int:
        """Recurrences of the run."""
        return self.loop.R

    @property
    def model(self) -> Any:
        """The model at the run's number of recurrences."""
        if self._model is None or self._model.loop == self.loop:
            return self._model
        if self._view is None or not self._view.is_current:
            self._view = self._model.view_at(self.loop.R)
        return self._view

    @model.setter
    def model(self, model: Any) -> None:
        self._model = model
        self._view = None

    def __getitem__(self, key: Any) -> Tensor:
        name = self.resolve(key)
        try:
            return self.cache_dict[name]
        except KeyError:
            if name in WHY_NONE:
                raise MissingActivationError(f"there is no {name!r}: {WHY_NONE[name]}") from None
            known = getattr(self.model, "hook_dict", {})
            if (own := own_name(name, known)) is not None:
                raise MissingActivationError(
                    f"{name!r} is TransformerBridge's name: here it is {own!r}"
                ) from None
            raise MissingActivationError(
                f"the cache holds no {name!r} ({len(self)} activations of a run of shape "
                f"{self.loop}). Was it left out by names_filter, is it behind a flag, or did the "
                "run leave the loop early?"
            ) from None

    def __contains__(self, key: Any) -> bool:
        try:
            return self.resolve(key) in self.cache_dict
        except LayerIndexError:
            return False

    def resolve(self, key: Any) -> str:
        """The canonical hook name of a cache key.

        Args:
            key: A hook name or alias, a TransformerLens shorthand such as ``"embed"`` or
                ``"z5"``, or ``(name, layer, layer_type)`` with ``layer`` an effective layer or
                ``(recurrence, layer)``; negative numbers count from the end.

        Raises:
            LayerIndexError: if the layer is out of the run's range.
        """
        if isinstance(key, str):
            if key in self.cache_dict:
                return key
            return canonical_name(get_act_name(key), self.loop)
        if not isinstance(key, tuple) or not key or not isinstance(key[0], str):
            raise InputError(f"a key is a name or (name, layer, layer_type), got {described(key)}")
        name, *rest = key
        if rest and rest[0] is not None:
            rest[0] = self.loop.resolve(rest[0])
        return canonical_name(get_act_name(name, *rest), self.loop)

    def stack_recurrences(
        self, name: str, layer_type: str | None = None
    ) -> Float[Tensor, "recurrence ..."]:
        """One activation over the whole loop.

        Args:
            name: Name as in ``cache[name, layer]`` for block activations, which gives
                ``[recurrence, layer, batch, pos, ...]``; or a loop activation such as
                ``"state_out"``, ``"state_in"``, ``"injected"``, ``"exit_gate"``, with or without
                ``hook_``, or ``"ln_loop.hook_scale"``, which gives ``[recurrence, batch, pos, d]``.
            layer_type: As in ``get_act_name``, for instance ``"ln1"`` for ``"scale"``.

        Raises:
            MissingActivationError: if the cache lacks one of them.
        """
        loop_name = name if "." in name or name.startswith("hook_") else f"hook_{name}"
        name = name.removeprefix("hook_")
        if any(f"recurrence.{r}.{loop_name}" in self.cache_dict for r in range(self.loop.R)):
            return torch.stack([self[f"recurrence.{r}.{loop_name}"] for r in range(self.loop.R)])
        if self.loop.R == 0:
            raise MissingActivationError("the run had no recurrence to stack")
        rows = [
            torch.stack([self[name, (r, l), layer_type] for l in range(self.loop.k)])  # noqa: E741
            for r in range(self.loop.R)
        ]
        return torch.stack(rows)

    def accumulated_resid(
        self,
        layer: LayerLike | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
        labels: LabelForm | None = None,
    ) -> Any:
        """As in TransformerLens: the stream at every layer, as it was there.

        ``layer`` may be (recurrence, layer). Labels name it: ``r3.l1.pre``, ``prelude.0.mid``,
        ``final_post``; or as ``labels`` says, see ``tl_looped.decomposition.labels``. Where that is
        given, they are returned.
        """
        # Behind the last layer there is no MLP; TransformerLens ignores mlp_input there.
        end = Target.of(layer, False, self.loop).layer
        positions = AxisSlice(pos_slice, "positions")
        form = label_form(self.model.cfg, labels)
        stack, names = super().accumulated_resid(
            end, incl_mid, apply_ln, positions, mlp_input, return_labels=True
        )
        if not return_labels and labels is None:
            return stack
        parts = [name.split("_") for name in names]
        return stack, [
            "final_post" if layer == "final" else layer_label(self.loop, int(layer), form, where)
            for layer, where in parts
        ]

    def apply_slice_to_batch_dim(self, batch_slice: Slice | SliceInput) -> LoopedActivationCache:
        """As in TransformerLens; the result keeps the run's geometry, seed, mask and edits."""
        rows = AxisSlice(batch_slice, "rows")
        plain = super().apply_slice_to_batch_dim(rows)
        mask = self.attention_mask
        if mask is not None:
            mask = AxisSlice(batch_slice, "rows", keep=True).apply(mask, dim=0)
        return type(self)(
            plain.cache_dict,
            self._model,
            plain.has_batch_dim,
            self.loop,
            self.state_seed,
            self.state_given,
            self.early_exit,
            mask,
            self.n_pos,
            self.n_past,
            self.edits,
        )

    def __repr__(self) -> str:
        return (
            f"LoopedActivationCache of shape {self.loop}, state_seed={self.state_seed}, "
            f"with keys {list(self.cache_dict)}"
        )
