"""A loop cell with the scales of a finished run, as linear maps of the stream.

The cell's own code runs here, on sites whose norms multiply by gain / cached scale and whose hook
points do nothing. So a decomposition follows whatever a cell does, and says what it does nowhere
again. Pulled back, the same code is differentiated: the transpose of a linear map is its
vector-Jacobian product.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tl_looped._compat import Module
from tl_looped.decomposition.steps import Crossing, prefix
from tl_looped.errors import InvalidDecompositionError
from tl_looped.model.cells import LoopCell, Site
from tl_looped.model.norms import HookedRMSNorm
from tl_looped.model.program import Do

Map: TypeAlias = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""Of the stream or the state, of e, and of the state that the recurrence has read."""


class Scaling(Module):
    """Multiplication by a norm's gain / scale, read when it is first needed."""

    def __init__(self, factor: Callable[[], Tensor]) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return x * self.factor()


class FrozenLoop:
    """The cell of a run's model at the scales of the run.

    Args:
        model: The model.
        weight: Brings a weight where the cache is, in the decomposition's precision.
        read: Reads a cached activation.

    Raises:
        InvalidDecompositionError: for a cell that is not linear for fixed scales.
    """

    def __init__(
        self, model: Any, weight: Callable[[Tensor], Tensor], read: Callable[[str], Tensor]
    ) -> None:
        cell: LoopCell = model.cell
        reason = cell.why_not_linear()
        if reason is not None:
            raise InvalidDecompositionError(f"{model.cfg.model_name}: {reason}")
        self._weight, self._read, self._silent = weight, read, model.silent_parts
        with torch.device("meta"):
            modules = cell.make_modules(cell.cfg)
        for name, module in modules.items():
            own = cell.modules[name]
            assert own is not None
            # As they are used: by attribute, where pruned or parametrised ones are made.
            weights = {key: weight(attrgetter(key)(own)) for key in module.state_dict()}
            module.load_state_dict(weights, assign=True)
        self.cell = type(cell)(cell.cfg, modules)

    def forward(self, step: Crossing, x: Tensor, e: Tensor | None, state: Tensor | None) -> Tensor:
        """What a step makes of components, ``[row, *batch_pos, ...]``.

        Args:
            step: The step.
            x: The stream or the state.
            e: The prelude's components, of the first rows.
            state: What the recurrence has read, if its write uses that.
        """
        do = step.op.do
        if do is Do.READ and not step.alone:
            e = _with_rows(e, x)
        if do is Do.WRITE and self.cell.writes_from_state:
            state = _with_rows(state, self.cell.state_like(x))
        return self._map(step)(x, e, state)

    def back(self, step: Crossing, onto: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Directions in a step's result, pulled back to what it is made of.

        Args:
            step: The step.
            onto: ``[out, *batch_pos, ...]``.
            like: Of the shape of directions in the stream.

        Returns:
            Directions in the stream or the state, in e and in the state that was read.
        """
        stream, state = torch.zeros_like(like), self.cell.state_like(like)
        x = state if step.op.do in (Do.READ, Do.LEAVE) else stream
        transpose = torch.func.vjp(self._map(step), x, stream, state)[1]
        found: tuple[Tensor, Tensor, Tensor] = transpose(onto)
        return found

    def _map(self, step: Crossing) -> Map:
        cell, op = self.cell, step.op
        site = self._silent.sites[0] if op.recurrence >= 0 else self._silent.ends
        at = self._frozen(site, prefix(op))
        at.recurrence = None if op.recurrence < 0 else op.recurrence
        if op.do is Do.ENTER:
            return lambda x, e, state: cell.derive(x)
        if op.do is Do.READ:
            return lambda x, e, state: cell.read(at, x, None if step.alone else e)
        if op.do is Do.WRITE:
            return lambda x, e, state: cell.write(at, state, x)
        return lambda x, e, state: cell.finish(at, x)

    def _frozen(self, site: Site, path: str) -> Site:
        """A site whose norms have fixed scales, and whose hook points pass on what they get."""
        frozen: dict[Do, dict[str, nn.Module]] = {
            do: {name: self._point(path + name, site._modules[name]) for name in names}
            for do, names in site.names.items()
        }
        return Site(None, frozen)

    def _point(self, path: str, point: nn.Module | None) -> nn.Module:
        if not isinstance(point, HookedRMSNorm):
            return nn.Identity()
        gain = point.weights.w
        return Scaling(lambda: self._weight(gain) / self._read(f"{path}.hook_scale"))


def _with_rows(x: Tensor | None, like: Tensor) -> Tensor:
    """Components with as many rows as there are by now; later ones had no part in it."""
    wide = torch.zeros_like(like)
    if x is not None:
        wide[: len(x)] = x
    return wide
