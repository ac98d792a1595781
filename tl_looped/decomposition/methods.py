"""TransformerLens's decomposition methods, exact for looped models.

TransformerLens sums writes as they were made. In a looped model a write is rescaled and mapped on
its way, by norms on the stream and by the injection, so here each write is *carried* to the place
where the stream is read, with the norms' scales as they were in the run. Then the components sum
to the true stream, and attributions to the true logit.

Choices: components are computed in fp32 or better, whatever the model's dtype, and carry no
gradient. ``raw=True`` gives the writes as they were added, not carried. Labels name (recurrence,
layer): ``r3.l1.attn_out``, ``r3.l1h2``, ``prelude.0n17``, ``coda.1.mlp_out``; TransformerLens's own
of models without a loop or with ``labels="transformer_lens"``. ``by=`` sums groups, see
``tl_looped.decomposition.components.grouping``. As in TransformerLens, ``layer=None``, ``-1``
and ``n_layers`` mean the input of the final norm; a layer may also be (recurrence, layer), and what
is decomposed is what that layer receives, injection included.

A decomposition is exact or refused. If a hook or an intervention edited the stream itself during
the run, its writes do not add up to it, and nothing can be carried past the edit: that is an error,
in every precision and with every ``names_filter``. ``tl_looped.decomposition.checks`` says which
edits are none. ``raw=True`` checks nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from tl_looped._compat import ActivationCache, Slice, SliceInput
from tl_looped.checks import checked, described
from tl_looped.decomposition.carry import carry, project
from tl_looped.decomposition.checks import (
    check_stream,
    end_of,
    refuse_edits,
    where_edits_break,
    where_logits_break,
    where_norm_breaks,
    where_parts_break,
    with_one_scale,
)
from tl_looped.decomposition.components import Component, ComponentRows, grouping
from tl_looped.decomposition.labels import (
    LabelForm,
    component_label,
    label_form,
    refuse_grouped,
)
from tl_looped.decomposition.steps import Step, Target, Write, stream_steps
from tl_looped.decomposition.writes import Writes, WritesWanted
from tl_looped.errors import InputError, InvalidDecompositionError, TLLoopedError
from tl_looped.model.axis_slice import AxisSlice
from tl_looped.model.edits import Edits
from tl_looped.model.geometry import LayerLike, LoopGeometry

_ORDER = {"head": 0, "neuron": 1, "mlp_out": 1, "embed": 2, "initial_state": 3}
"""Place of a kind of component in TransformerLens's full decomposition."""

Positions = Slice | SliceInput
Direction = Float[Tensor, " d_model"] | Float[Tensor, "d_model out"]
Stack = Float[Tensor, "component *batch_pos d"]
Labelled = Stack | tuple[Stack, list[str]]


@dataclass(frozen=True)
class _Options:
    by: str | None
    raw: bool
    apply_ln: bool
    incl_remainder: bool = False
    labels: LabelForm | None = None

    def __post_init__(self) -> None:
        refuse_grouped(self.by, self.labels)


@checked
class DecomposingCache(ActivationCache):
    """Exact ``decompose_resid`` and its kin; see the module's docstring."""

    loop: LoopGeometry
    state_given: bool
    early_exit: bool
    edits: Edits | None

    @torch.no_grad()
    def _decompose(
        self,
        selection: WritesWanted,
        target: Target,
        pos_slice: Positions,
        options: _Options,
        onto: Direction | None = None,
    ) -> tuple[Stack, list[Component]]:
        """Wanted components at a target, in the order in which they were written."""
        positions = AxisSlice(pos_slice, "positions")
        if self.early_exit and target.layer >= self.loop.n_layers - self.loop.c:
            raise InvalidDecompositionError(
                "tokens of this run could leave the loop at different recurrences, so the stream "
                "behind it is no one sum: decompose a layer in the loop, or run without exit_rule"
            )
        writes = Writes(self, selection, positions, checked=not options.raw)
        rows = ComponentRows(grouping(options.by))
        steps: list[Step] = list(stream_steps(self.model, self.loop, self.state_given, target))
        end = end_of(self, steps, target)
        if options.raw:
            steps = [step for step in steps if isinstance(step, Write)]
        else:
            names = where_edits_break(steps, selection, writes.posts)
            refuse_edits(self, names, f"its writes do not add up to {target.hook(self.loop)}")

        def normed(stack: Tensor) -> Tensor:
            if not options.apply_ln:
                return stack
            where = {"pos_slice": positions, "has_batch_dim": self.has_batch_dim}
            return self._apply_ln(stack, target, where, checked=not options.raw)

        directions = None
        if onto is None:
            stack = carry(steps, writes, rows)
        else:
            directions = self._directions(writes, onto)
            if options.apply_ln:
                # The last norm is linear too: scaling the directions scales every component.
                dims = int(self.has_batch_dim) + (positions.mode != "int")
                inverse = normed(directions.new_ones((1,) * (dims + 2)))[0]
                directions = inverse[..., None] * directions
            stack = project(steps, writes, rows, directions)
        components = rows.groups
        if stack is None:
            stack = self._no_rows(writes, directions)
        if not options.raw:
            check_stream(self, steps, target, positions)
        if options.incl_remainder:
            stream = writes.read(end)
            if directions is not None:
                stream = (stream.unsqueeze(-2) @ directions).squeeze(-2)
            stack = torch.cat((stack, (stream - stack.sum(0))[None]))
            components.append(Component("remainder"))
        if onto is None:
            return normed(stack), components
        return stack if onto.ndim == 2 else stack.squeeze(-1), components

    def _directions(self, writes: Writes, onto: Direction) -> Float[Tensor, "d_model out"]:
        d_model = self.model.cfg.d_model
        if onto.shape[0] != d_model:
            raise InputError(
                f"project_output_onto must be [d_model={d_model}] or [d_model={d_model}, out], got "
                f"{described(onto)}"
            )
        return writes.weight(onto if onto.ndim == 2 else onto[:, None])

    def _no_rows(self, writes: Writes, directions: Tensor | None) -> Stack:
        stream = writes.read("hook_embed")
        width = stream.shape[-1] if directions is None else directions.shape[-1]
        return stream.new_zeros((0, *stream.shape[:-1], width))

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component ..."],
        layer: LayerLike | None = None,
        mlp_input: bool = False,
        pos_slice: Positions = None,
        batch_slice: Positions = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component ..."]:
        """As in TransformerLens; ``layer`` may also be (recurrence, layer).

        Raises:
            InvalidDecompositionError: the final norm of a run without a coda that left the loop
                early read another stream than the cached one; the norm or its input was edited; or,
                with ``use_attn_in`` or ``use_split_qkv_input``, the heads of a layer read streams
                of different scales.
        """
        where = {
            "pos_slice": AxisSlice(pos_slice, "positions"),
            "batch_slice": AxisSlice(batch_slice, "rows"),
            "has_batch_dim": has_batch_dim,
            "recompute_ln": recompute_ln,
        }
        target = Target.of(layer, mlp_input, self.loop)
        return self._apply_ln(residual_stack, target, where, checked=not recompute_ln)

    def _apply_ln(
        self, stack: Tensor, target: Target, where: dict[str, Any], checked: bool
    ) -> Tensor:
        if target.layer == self.loop.n_layers and self.early_exit and self.loop.c == 0:
            raise InvalidDecompositionError(
                "tokens of this run could leave the loop early, and each was read at its own "
                "recurrence, not at the last, whose stream and final norm the cache holds: run "
                "without exit_rule"
            )
        single = with_one_scale(self, target)
        if checked:
            names = where_norm_breaks(self, target)
            refuse_edits(
                self, names, f"the norm behind {target.hook(self.loop)} read another value"
            )
        at = (target.layer, target.mid)
        with _fitting("residual_stack", stack):
            return ActivationCache.apply_ln_to_stack(single, stack, *at, **where)

    def _labelled(
        self, found: tuple[Stack, list[Component]], return_labels: bool, options: _Options
    ) -> Labelled:
        """The stack, with the labels of its components if they are asked for."""
        stack, components = found
        if not return_labels and options.labels is None:
            return stack
        form = "looped" if options.by else label_form(self.model.cfg, options.labels)
        return stack, [component_label(self.loop, component, form) for component in components]

    # -- TransformerLens's methods ---------------------------------------------------------------

    def decompose_resid(
        self,
        layer: LayerLike | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Positions = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
        by: str | None = None,
        raw: bool = False,
        labels: LabelForm | None = None,
    ) -> Labelled:
        """Sublayers, the embedding and the initial state as they arrive at a layer.

        Args:
            layer, mlp_input, mode, apply_ln, pos_slice, incl_embeds, return_labels: As in
                TransformerLens. ``incl_embeds`` covers the initial state.
            by: Sum over groups: ``"recurrence"``, ``"layer"``, ``"effective_layer"`` or ``"head"``
                (which here sums each sublayer over the recurrences).
            raw: The writes as they were added, not carried.
            labels: How labels are written, see ``tl_looped.decomposition.labels``. Where it is
                given, they are returned.

        Returns:
            ``[component, batch, pos, d_model]``, which sums to the stream (divided by the norm's
            scale, with ``apply_ln``) unless parts were left out; with its labels if asked.

        Raises:
            MissingActivationError: a write or a scale is not cached; the hook is named.
            InvalidDecompositionError: the writes do not add up, see the module's docstring.
        """
        if mode not in ("all", "mlp", "attn"):
            raise InputError(f"mode must be 'all', 'mlp' or 'attn', got {mode!r}")
        selection = WritesWanted(
            incl_embeds,
            "none" if mode == "mlp" else "whole",
            "none" if mode == "attn" else "whole",
        )
        target = Target.of(layer, mlp_input, self.loop)
        options = _Options(by, raw, apply_ln, labels=labels)
        return self._labelled(
            self._decompose(selection, target, pos_slice, options), return_labels, options
        )

    def stack_head_results(
        self,
        layer: LayerLike | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Positions = None,
        apply_ln: bool = False,
        by: str | None = None,
        raw: bool = False,
        labels: LabelForm | None = None,
    ) -> Labelled:
        """Every head's write as it arrives at a layer.

        Args:
            layer, return_labels, incl_remainder, pos_slice, apply_ln: As in TransformerLens.
            by, raw, labels: As in :meth:`decompose_resid`.

        Returns:
            ``[component, batch, pos, d_model]``, labels such as ``r3.l1h2``; with the remainder it
            sums to the stream.
        """
        selection = WritesWanted(embeds=False, attn="parts", mlp="none")
        options = _Options(by, raw, apply_ln, incl_remainder, labels)
        target = Target.of(layer, False, self.loop)
        return self._labelled(
            self._decompose(selection, target, pos_slice, options), return_labels, options
        )

    def stack_neuron_results(
        self,
        layer: LayerLike | None,
        pos_slice: Positions = None,
        neuron_slice: Positions = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Direction | None = None,
        mlp_input: bool = False,
        by: str | None = None,
        raw: bool = False,
        labels: LabelForm | None = None,
    ) -> Labelled:
        """Every neuron's write as it arrives at a layer.

        Args:
            layer, pos_slice, neuron_slice, return_labels, incl_remainder, apply_ln, mlp_input: As
                in TransformerLens.
            project_output_onto: ``[d_model]`` or ``[d_model, out]``; the result's last dimension
                becomes ``out``, and no array of neurons by d_model is made.
            by, raw, labels: As in :meth:`decompose_resid`.
        """
        neurons = AxisSlice(neuron_slice, "neurons", keep=True)
        selection = WritesWanted(embeds=False, attn="none", mlp="parts", neurons=neurons)
        options = _Options(by, raw, apply_ln, incl_remainder, labels)
        target = Target.of(layer, mlp_input, self.loop)
        found = self._decompose(selection, target, pos_slice, options, project_output_onto)
        return self._labelled(found, return_labels, options)

    def get_full_resid_decomposition(
        self,
        layer: LayerLike | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Positions = None,
        return_labels: bool = False,
        project_output_onto: Direction | None = None,
        by: str | None = None,
        raw: bool = False,
        labels: LabelForm | None = None,
    ) -> Labelled:
        """Every head, neuron (or MLP), the embedding, the initial state and the biases (zero).

        In TransformerLens's order: heads, neurons or MLPs, embedding, initial state, bias; groups
        in the order in which they were written. Arguments as in TransformerLens, and as above.
        """
        selection = WritesWanted(attn="parts", mlp="parts" if expand_neurons else "whole")
        target = Target.of(layer, mlp_input, self.loop)
        options = _Options(by, raw, apply_ln, labels=labels)
        stack, components = self._decompose(
            selection, target, pos_slice, options, project_output_onto
        )
        if by is None:
            order = sorted(range(len(components)), key=lambda i: _ORDER[components[i].kind])
            stack, components = stack[order], [components[i] for i in order]
        stack = torch.cat((stack, torch.zeros_like(stack[:1])))
        return self._labelled((stack, [*components, Component("bias")]), return_labels, options)

    def get_neuron_results(
        self,
        layer: LayerLike,
        neuron_slice: Positions = None,
        pos_slice: Positions = None,
        project_output_onto: Direction | None = None,
        raw: bool = False,
    ) -> Float[Tensor, "*batch_pos_neuron out"]:
        """What each neuron of one layer added to the stream there, not carried.

        As in TransformerLens, in fp32 or better; behind a post-norm, its part of the normalised
        output, so that the neurons of a layer always sum to ``hook_mlp_out``. With ``raw`` that is
        not checked.
        """
        neurons = AxisSlice(neuron_slice, "neurons")
        selection = WritesWanted(
            False, "none", "parts", AxisSlice(neuron_slice, "neurons", keep=True)
        )
        writes = Writes(self, selection, AxisSlice(pos_slice, "positions"), checked=not raw)
        write = Write("mlp_out", self.loop.resolve(layer))
        if not raw:
            names = where_parts_break(write, selection, writes.posts)
            refuse_edits(
                self, names, f"the neurons of layer {write.layer} do not sum to its output"
            )
        with torch.no_grad():
            if project_output_onto is None:
                stack = writes.values(write)
            else:
                onto = project_output_onto
                stack = writes.projected(write, self._directions(writes, onto))
                stack = stack if onto.ndim == 2 else stack.squeeze(-1)
        if neurons.mode == "int":
            return stack[0]
        scalars = project_output_onto is not None and project_output_onto.ndim == 1
        return stack.movedim(0, -1 if scalars else -2)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch_pos d_model"],
        tokens: str | int | Integer[Tensor, "..."],
        incorrect_tokens: str | int | Integer[Tensor, "..."] | None = None,
        pos_slice: Positions = None,
        batch_slice: Positions = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, " component *batch_pos"]:
        """What each component adds to a token's logit; arguments as in TransformerLens.

        The final norm's gain counts, folded into ``W_U`` or not, so that the attributions of
        components that sum to the final stream sum to the logit.

        Raises:
            InvalidDecompositionError: the final norm, what it gave or the logits were edited.
        """
        names = where_logits_break(self.loop)
        refuse_edits(self, names, "attributions do not sum to its logits")
        gain = self.model.ln_final.w.to(residual_stack.device)
        slices = (AxisSlice(pos_slice, "positions"), AxisSlice(batch_slice, "rows"))
        with _fitting("residual_stack and tokens", residual_stack):
            return super().logit_attrs(
                residual_stack * gain, tokens, incorrect_tokens, *slices, has_batch_dim
            )


@contextmanager
def _fitting(names: str, stack: Tensor) -> Iterator[None]:
    """What PyTorch and TransformerLens say of sizes that do not go together, in our words."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, (TLLoopedError, torch.OutOfMemoryError)):
            raise
        raise InputError(
            f"{names} must fit together and into the run, of {described(stack)}: {error}"
        ) from error
