"""Where the numbers of shown weights are (``tl_looped.model.shown``), and how edits get there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tl_looped._compat import Module
from tl_looped.errors import InputError
from tl_looped.model.hook_points import LoopedHookPoint, parameter


class StoredWeights(Module):
    """Parameters that exist once.

    Attributes:
        path: Name of the module in the model, empty outside one.
        layers: Layers of its stage that run with them.
    """

    path: str = ""
    layers: tuple[int, ...] = ()


class Names(NamedTuple):
    """What a weight is called.

    Attributes:
        shown_as: TransformerLens's name.
        stored_in: The model's own name of the parameter; None if there is none.
        shared_by: TransformerLens's names of all weights that are these numbers.
    """

    shown_as: str
    stored_in: str | None
    shared_by: tuple[str, ...]

    def note(self) -> str:
        """A sentence for a person."""
        if self.stored_in is None:
            return self.shown_as
        note = f"{self.shown_as}, stored in {self.stored_in}"
        others = [name for name in self.shared_by if name != self.shown_as]
        if not others:
            return note
        layers = [name.split(".")[1] for name in self.shared_by]
        if all(layer.isdigit() for layer in layers):
            note += f", shared by blocks {', '.join(layers)}: an edit at one recurrence is an edit"
            return f"{note} at all"
        return f"{note}, shared with {', '.join(others)}: an edit of one is an edit of all"


class Source:
    """Where the numbers of a shown weight are from, and where an edit goes.

    Attributes:
        is_view: Whether :meth:`read` gives the stored numbers themselves, and no copy.
    """

    is_view = False

    def names(self) -> Names:
        """What it is called."""
        raise NotImplementedError

    def read(self) -> Tensor:
        """The weight as a plain tensor: a view of the stored numbers, or a copy of its own."""
        raise NotImplementedError

    def write(self, new: Tensor) -> None:
        """Store other values; no effect if they are those that there are.

        Raises:
            InputError: they cannot be stored. Then nothing changed.
        """
        raise NotImplementedError

    def grad(self) -> Tensor | Source | None:
        """The gradient of what is stored, in the shape of the weight; None if there is none.

        A tensor is a view of the stored gradient, a source is computed of it.
        """
        return None

    def refuse_autograd(self) -> None:
        """Raise what PyTorch does for an edit in place that autograd would have to follow."""

    def parameter(self) -> Tensor | None:
        """What is stored, if it is a parameter and not computed of one."""
        return None


@dataclass(frozen=True, eq=False)
class Rows(Source):
    """Rows of a stored matrix, arranged as TransformerLens has them.

    Args:
        owner: Module of the parameter.
        name: Name of the parameter there.
        called: What the weight is called.
        arrange: View of the parameter in TransformerLens's shape.
        repeats: How many query heads have each of the first dimension's heads.
        gain: Norm whose gain is multiplied in, over the dimension before the last.
        centered: Whether the mean over the last dimension is left out.
    """

    owner: nn.Module
    name: str
    called: Callable[[], Names]
    arrange: Callable[[Tensor], Tensor]
    repeats: int = 1
    gain: StoredWeights | None = None
    centered: bool = False

    @property
    def is_view(self) -> bool:  # type: ignore[override]
        """Neither repeated, multiplied nor centred, and no pruned or parametrised weight."""
        computed = self.repeats > 1 or self.gain is not None or self.centered
        return not computed and self.parameter() is not None

    def names(self) -> Names:
        """As the module says that shows it."""
        return self.called()

    def parameter(self) -> Tensor | None:
        """None if the weight is pruned or parametrised."""
        return self.owner._parameters.get(self.name)

    def read(self) -> Tensor:
        """The rows, repeated and with the gain."""
        stored = self.parameter()
        if stored is None:
            stored = getattr(self.owner, self.name).clone()
        return self._shown(self.arrange(stored))

    def _shown(self, heads: Tensor) -> Tensor:
        if self.repeats > 1:
            heads = heads.repeat_interleave(self.repeats, 0)
        if self.centered:
            heads = heads - heads.mT.mean(0)[:, None]
        return heads if self.gain is None else self._gain(heads) * heads

    def _gain(self, like: Tensor) -> Tensor:
        assert self.gain is not None
        gain: Tensor = parameter(self.gain, "w").to(like.device)
        return gain[:, None]

    def refuse_autograd(self) -> None:
        """By an edit of no rows of the parameter, which is a leaf."""
        gain = None if self.gain is None else self.gain._parameters.get("w")
        for leaf in (self.parameter(), gain):
            if leaf is not None and leaf.requires_grad:
                leaf[:0].zero_()

    @torch.no_grad()
    def write(self, new: Tensor) -> None:
        """What changed, divided by the gain, in the rows."""
        parameter = self.parameter()
        names = self.names()
        if parameter is None:
            raise InputError(
                f"{names.shown_as} is computed: {names.stored_in} is pruned or parametrised. Edit "
                f"what it is computed of (see named_parameters()), or make it permanent first "
                "(torch.nn.utils.prune.remove, parametrize.remove_parametrizations)"
            )
        if parameter.is_meta:
            return
        before = self.read()
        changed = ~same_values(new, before)
        if not bool(changed.any()):
            return
        if self.centered:
            raise InputError(
                f"{names.shown_as} is shown without its mean over the vocabulary, and one value of "
                "it is a matter of all: edit it as it is stored, with "
                "enable_compatibility_mode(center_unembed=False)"
            )
        if self.repeats > 1:
            new, changed = self._one_of_each(new, names), changed[:: self.repeats]
        if self.gain is not None:
            new = self._without_gain(new, changed, names)
        rows = self.arrange(parameter.detach())
        rows.copy_(torch.where(changed, new, rows))

    def _one_of_each(self, new: Tensor, names: Names) -> Tensor:
        """One of the query heads of each group, if they agree."""
        groups = new.unflatten(0, (-1, self.repeats))
        agree = same_values(groups, groups[:, :1]).flatten(1).all(1)
        if not bool(agree.all()):
            first = int(agree.logical_not().nonzero()[0]) * self.repeats
            heads = " and ".join(str(first + i) for i in range(self.repeats))
            owner, _, weight = names.shown_as.rpartition(".")
            raise InputError(
                f"{names.shown_as}: query heads {heads} share one key-value head and must stay "
                f"equal: edit them together ({weight}[{first}:{first + self.repeats}] = ...), or "
                f"edit {owner}._{weight}, which has each key-value head once"
            )
        one: Tensor = groups[:, 0]
        return one

    def _without_gain(self, new: Tensor, changed: Tensor, names: Names) -> Tensor:
        """Values divided by the gain that is folded in."""
        gain = self._gain(new).expand_as(new)
        if bool((changed & (gain == 0)).any()):
            row = int((changed & (gain == 0)).nonzero()[0, -2])
            raise InputError(
                f"{names.shown_as}: row {row} is multiplied by a gain of 0, and has no effect "
                "whatever is stored: set the norm's gain first, or unfold the norms "
                "(enable_compatibility_mode(fold_ln=False))"
            )
        wide = torch.float64 if new.dtype == torch.float64 else torch.float32
        divided: Tensor = (new.to(wide) / gain.to(wide)).to(new.dtype)
        if bool((changed & new.isfinite() & ~divided.isfinite()).any()):
            raise InputError(
                f"{names.shown_as}: divided by the norm's gain, a value is beyond {new.dtype}"
            )
        return divided

    def grad(self) -> Tensor | Source | None:
        """As stored, over all recurrences, and of repeated heads the sum over the group.

        Of a centred matrix it has no mean over the vocabulary either: the logits do not see it.
        """
        parameter = self.parameter()
        if parameter is None or parameter.grad is None:
            return None
        grad = self.grad_of(parameter.grad)
        return grad if self.is_view else Computed(grad, self)

    def grad_of(self, stored: Tensor) -> Tensor:
        """A gradient of the stored matrix as one of the weight."""
        heads = self.arrange(stored)
        if self.repeats > 1:
            heads = heads.repeat_interleave(self.repeats, 0)
        if self.gain is None:
            return heads
        gain = self._gain(heads).detach()
        if bool((gain == 0).any()):
            raise InputError(
                f"{self.names().shown_as}: the gradient behind a gain of 0 is not known from that "
                "of the stored weight: unfold the norms (enable_compatibility_mode(fold_ln=False))"
            )
        return heads / gain


@dataclass(frozen=True, eq=False)
class Constant(Source):
    """What the model does not have, and TransformerLens shows: zeros of a bias, ones of a gain.

    Args:
        value: The values, made for this.
        called: What the weight is called.
        why: What it is, and what to do instead of an edit.
    """

    value: Tensor
    called: Callable[[], Names]
    why: str

    def names(self) -> Names:
        """As the module says that shows it."""
        return self.called()

    def read(self) -> Tensor:
        """The values."""
        return self.value.clone()

    def write(self, new: Tensor) -> None:
        """Refuse other values."""
        if not new.is_meta and not bool(same_values(new, self.value).all()):
            raise InputError(f"{self.names().shown_as} {self.why}")


@dataclass(frozen=True, eq=False)
class Computed(Source):
    """A gradient that is not what is stored, only computed of it."""

    value: Tensor
    of: Source

    def names(self) -> Names:
        """As what it is the gradient of."""
        names = self.of.names()
        return Names(f"{names.shown_as}.grad", None, ())

    def read(self) -> Tensor:
        """The values."""
        return self.value.clone()

    def write(self, new: Tensor) -> None:
        """Refuse other values."""
        if not new.is_meta and not bool(same_values(new, self.value).all()):
            names = self.of.names()
            raise InputError(
                f"{names.shown_as}.grad is computed of the gradient of {names.stored_in}: edit that"
                " one, or a clone() of this one"
            )


@dataclass(frozen=True, eq=False)
class Stack(Source):
    """A weight over layers: a copy.

    Args:
        name: Name of the weight in a block.
        of: Those that are stacked.
        home: Brings a tensor to where the stack is.
    """

    name: str
    of: list[Source]
    home: Callable[[Tensor], Tensor]

    def names(self) -> Names:
        """The name of the stack."""
        return Names(self.name, None, ())

    def read(self) -> Tensor:
        """The stack."""
        return torch.stack([self.home(one.read()) for one in self.of])

    def write(self, new: Tensor) -> None:
        """Refuse other values."""
        if new.is_meta or bool(same_values(new, self.read()).all()):
            return
        one = self.of[0].names().shown_as
        raise InputError(
            f"{self.name} is a stack over layers, a copy of the weights: edit those of a layer, "
            f"such as {_as_code(one)}, or take {self.name}.clone() for numbers of your own"
        )

    def grad(self) -> Tensor | Source | None:
        """The gradients, stacked; zeros where a layer has none."""
        grads = [one.grad() for one in self.of]
        if all(grad is None for grad in grads):
            return None
        rows = []
        for one, grad in zip(self.of, grads, strict=True):
            row = grad.read() if isinstance(grad, Source) else grad
            rows.append(self.home(torch.zeros_like(one.read()) if row is None else row).detach())
        return Computed(torch.stack(rows), self)


def no_bias(hook: str) -> str:
    """Why a bias cannot be edited.

    Args:
        hook: Hook within the block at which one may be added.
    """
    return (
        "is zero: the model has no such bias, and an edit would reach nothing. To add a constant "
        f"in a run, hook {hook} (value + bias)"
    )


def _as_code(name: str) -> str:
    """``blocks.3.attn.W_Q`` as one writes it: ``blocks[3].attn.W_Q``."""
    first, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    return f"{first}[{number}].{rest}" if number.isdigit() else name


def same_values(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors are equal, or both not a number."""
    return (a == b) | (a.isnan() & b.isnan())


def called(point: LoopedHookPoint, weight: str, owner: StoredWeights, name: str | None) -> Names:
    """What a weight of a block is called.

    Args:
        point: A hook point of the module that shows it, which knows its layer.
        weight: The weight's name there.
        owner: Module of the parameter.
        name: The parameter's name there; None if there is none.
    """
    module = str(point.name).rpartition(".")[0] if point.name else ""
    shown_as = f"{module}.{weight}".strip(".")
    if name is None:
        return Names(shown_as, None, ())
    stored_in = f"{owner.path}.{name}".strip(".")
    loop = point.watch.loop or point.watch.own_loop
    if loop is None or not owner.layers:
        return Names(shown_as, stored_in, (shown_as,))
    stage, within = owner.path.split(".")[0], shown_as.split(".", 2)[2]
    places = [(i, loop.locate(i)) for i in range(loop.n_layers)]
    layers = [i for i, place in places if place.stage == stage and place.layer in owner.layers]
    return Names(shown_as, stored_in, tuple(f"blocks.{i}.{within}" for i in layers))
