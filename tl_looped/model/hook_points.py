"""HookPoints that know where in the loop they stand, and cost little while nobody listens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from tl_looped._compat import HookPoint, Slice
from tl_looped.model.geometry import LayerLocation

# Position axis, from the right, of activations that are not [batch, pos, d] or [.., query, key].
PER_HEAD_POS_DIM = -3


class LoopedHookPoint(HookPoint):
    """A TransformerLens HookPoint that also carries its place in the loop.

    Attributes:
        location: Stage, recurrence and layer in the stage; None outside blocks.
        pos_dim: Axis of the position (of the query, in patterns), counted from the right so that
            it also holds without a batch dimension.
    """

    def __init__(self, pos_dim: int = -2) -> None:
        super().__init__()
        self.pos_dim = pos_dim
        self.location: LayerLocation | None = None

    @property
    def stage(self) -> str | None:
        """``"prelude"``, ``"core"``, ``"coda"`` or None."""
        return self.location.stage if self.location else None

    @property
    def recurrence(self) -> int | None:
        """Recurrence of a core block's or a loop's hook, else None."""
        return self.location.recurrence if self.location else None

    @property
    def layer_in_stage(self) -> int | None:
        """Layer within its stage (0-based), else None."""
        return self.location.layer if self.location and self.location.layer >= 0 else None

    @property
    def is_active(self) -> bool:
        """Whether anything at all is attached: TransformerLens hooks or raw torch hooks."""
        return bool(
            self._forward_hooks
            or self._backward_hooks
            or self._forward_pre_hooks
            or self._backward_pre_hooks
            or _has_global_hooks()
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The activation, as the hooks left it; at once if there are none."""
        # The idle call is the common one: 27,000 of them at 128 recurrences of Huginn.
        if not self.is_active and len(args) == 1 and not kwargs:
            return args[0]
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """The activation itself, or a copy if a hook may edit it in place.

        Neighbouring hooks see the same tensor (one layer's ``resid_post`` is the next one's
        ``resid_pre``), autograd may have saved it and a caller may own it; an edit in place must
        reach none of them.
        """
        readers = sum(isinstance(handle.user_hook, CacheWriter) for handle in self.fwd_hooks)
        return x.clone() if len(self._forward_hooks) > readers else x


class CacheWriter:
    """A hook that only reads: it stores the activation under the hook's name.

    Args:
        store: Where to.
        positions: Positions to keep.
        device: Where the copy lives; the activation's own device if None.
        remove_batch_dim: Drop a leading dimension of one.
        suffix: Appended to the name, for gradients.
    """

    def __init__(
        self,
        store: dict[str, Tensor],
        positions: Slice,
        device: Any,
        remove_batch_dim: bool,
        suffix: str = "",
    ) -> None:
        self.store, self.positions, self.device = store, positions, device
        self.remove_batch_dim, self.suffix = remove_batch_dim, suffix

    def __call__(self, tensor: Tensor, hook: LoopedHookPoint) -> None:
        """Store the activation; return nothing, so that it goes on unchanged."""
        kept = tensor.detach().to(self.device)
        if self.remove_batch_dim and kept.shape[0] == 1:
            kept = kept[0]
        assert hook.name is not None
        assert hook.pos_dim is not None
        self.store[hook.name + self.suffix] = self.positions.apply(kept, dim=hook.pos_dim)


def _has_global_hooks() -> bool:
    return bool(
        _torch_module._global_forward_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_pre_hooks
    )


def place(module: nn.Module, location: LayerLocation) -> None:
    """Tell every LoopedHookPoint below ``module`` where it stands."""
    for child in module.modules():
        if isinstance(child, LoopedHookPoint):
            child.location = location
