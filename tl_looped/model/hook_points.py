"""HookPoints that know where in the loop they stand, and cost little while nobody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.utils.hooks import RemovableHandle

from tl_looped._compat import HookPoint, Module, Slice
from tl_looped.errors import InputError
from tl_looped.model.edits import UNWATCHED, EditLog, Watch, watched_call
from tl_looped.model.geometry import LayerLocation

# Position axis, from the right, of activations that are not [batch, pos, d] or [.., query, key].
PER_HEAD_POS_DIM = -3


def _has_torch_hooks(own: dict[str, Any]) -> bool:
    """Whether PyTorch would call any hook for a module with these attributes.

    Every kind of hook is in one of these eight dicts, those with keyword arguments and those that
    are always called included. They are taken from the module's ``__dict__``, since each attribute
    of a class that defines ``__getattr__``, as ``nn.Module`` does, is slow to look up.
    """
    return bool(
        own["_forward_hooks"]
        or own["_backward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_pre_hooks"]
        or _global_forward_hooks
        or _global_backward_hooks
        or _global_forward_pre_hooks
        or _global_backward_pre_hooks
    )


def has_torch_hooks(module: nn.Module) -> bool:
    """Whether PyTorch would call any hook for this module."""
    return _has_torch_hooks(module.__dict__)


if TYPE_CHECKING:
    _Armed = Module
else:
    _Armed = object


class Arming(_Armed):
    """What remembers whether a torch hook was ever registered on a module.

    An idle call looks at this alone, and at the hooks on all modules: a module keeps its hooks in
    four dicts, those of 27,000 hook points do not fit into the processor's cache, and to look into
    each would be most of what an idle call costs. ``armed`` says that a hook was registered since
    the last call found none.
    """

    armed = False

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As in PyTorch."""
        self.__dict__["armed"] = True
        super().compile(*args, **kwargs)

    # Every way to attach a torch hook leads through one of these.

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As in PyTorch."""
        self.__dict__["armed"] = True
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As in PyTorch."""
        self.__dict__["armed"] = True
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As in PyTorch."""
        self.__dict__["armed"] = True
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As in PyTorch."""
        self.__dict__["armed"] = True
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def register_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As in PyTorch."""
        self.__dict__["armed"] = True
        return super().register_backward_hook(*args, **kwargs)


Reader: TypeAlias = Callable[[Tensor, "LoopedHookPoint"], None]


class LoopedHookPoint(Arming, HookPoint):
    """A TransformerLens HookPoint that also carries its place in the loop.

    Attributes:
        location: Stage, recurrence and layer in the stage; None outside blocks.
        pos_dim: Axis of the position (of the query, in patterns), counted from the right so that
            it also holds without a batch dimension.
        reader: Looks at the activation, as the hooks left it, for instance to store it for the
            cache of the present run. It is called directly: torch's way to call a hook takes longer
            than most of the model's own operations on small activations.
        watch: Where the model says whether the edits of the present run are noted.
    """

    pos_dim: int

    def __init__(self, pos_dim: int = -2) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pos_dim = pos_dim
        self.location: LayerLocation | None = None
        self.reader: Reader | None = None
        self.watch: Watch = UNWATCHED
        self.armed = False

    @property
    def name(self) -> str | None:
        """Canonical name; of a coda layer, at the number of recurrences of the present run."""
        own = self.__dict__
        name: str | None = own.get("_name")
        place = own.get("location")
        if place is None or place[0] != "coda" or name is None:
            return name
        loop = own["watch"].loop or own["watch"].own_loop
        if loop is None:
            return name
        return f"blocks.{loop.coda_index(place.layer)}.{name.split('.', 2)[2]}"

    @name.setter
    def name(self, name: str | None) -> None:
        self.__dict__["_name"] = name

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

    # A hook point holds no parameter, buffer or module, so it needs none of nn.Module's sorting of
    # attributes, which is most of the time it takes to make and name 27,000 of them.
    __setattr__ = object.__setattr__  # type: ignore[assignment]

    def add_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; the model remembers that it has hooks to remove here."""
        if self.watch is not UNWATCHED:
            self.watch.hooked.add(self)
        return super().add_hook(*args, **kwargs)

    @property
    def is_active(self) -> bool:
        """Whether anything at all listens: TransformerLens hooks, raw torch hooks or a cache."""
        return self.reader is not None or _has_torch_hooks(self.__dict__)

    def __call__(self, x: Tensor) -> Tensor:
        """The activation, as the hooks left it; at once if there are none."""
        # The idle call is the common one: 27,000 of them at 128 recurrences of Huginn.
        own = self.__dict__
        if (
            own["armed"]
            or _global_forward_hooks
            or _global_backward_hooks
            or _global_forward_pre_hooks
            or _global_backward_pre_hooks
        ):
            own["armed"] = _has_torch_hooks(own)
            given, log = x, own["watch"].log
            if log is not None and (own["_forward_pre_hooks"] or _global_forward_pre_hooks):
                given = x.clone()  # these hooks get the tensor itself
            if log is None:
                x = super().__call__(x)
            else:
                with log.in_hooks_of(self):
                    x = super().__call__(x)
            if not isinstance(x, Tensor):
                raise InputError(
                    f"a hook of {self.name} returned a {type(x).__name__}: return a tensor, or "
                    "None to leave the activation as it is"
                )
            # What a hook brings along, from a cache for instance, may be on another device.
            if x.device != given.device:
                x = x.to(given.device)
            if log is not None and log.within is None:
                log.compare(self.name, given, x)
        if own["reader"] is not None:
            own["reader"](x, self)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """The activation itself, or a copy if a hook may edit it in place.

        Neighbouring hooks see the same tensor (one layer's ``resid_post`` is the next one's
        ``resid_pre``), autograd may have saved it and a caller may own it; an edit in place must
        reach none of them.
        """
        readers = sum(isinstance(handle.user_hook, CacheWriter) for handle in self.fwd_hooks)
        return x.clone() if len(self._forward_hooks) > readers else x


def adopt(point: HookPoint, like: LoopedHookPoint, where: str) -> LoopedHookPoint:
    """Make a hook point that takes another one's place what that one was; its hooks stay.

    Args:
        point: A new hook point, TransformerLens's or ours, which becomes ours in place: whoever
            made it goes on to hook it.
        like: The one in whose place it is.
        where: Its place, for the message.

    Raises:
        InputError: for a class of its own, which may do anything; for a hook point that stands
            somewhere already, and can have one name only.
    """
    own = point.__dict__
    if type(point) is HookPoint:
        own.pop("name", None)
        point.__class__ = LoopedHookPoint
    if not isinstance(point, LoopedHookPoint):
        raise InputError(
            f"{where} was replaced by a {type(point).__name__}: a hook point here is "
            "TransformerLens's HookPoint or a LoopedHookPoint, with hooks for what is to be done"
        )
    if point.name is not None and _stand(point) != _stand(like):
        raise InputError(
            f"{where} was replaced by the hook point of {point.name}, and one hook point has one "
            "place: make a new HookPoint()"
        )
    same = ("location", "watch", "_name", "training", "reader")
    own.update({name: like.__dict__.get(name) for name in same}, pos_dim=like.pos_dim, armed=True)
    return point


def _stand(point: LoopedHookPoint) -> tuple[Any, ...]:
    """Where a hook point stands, at any number of recurrences."""
    own = point.__dict__
    location, name, watch = own.get("location"), str(own.get("_name")), own.get("watch")
    within = name.split(".", 2)[-1] if name.startswith("blocks.") else name
    return location, within, id(watch)


def hook_points_of(module: nn.Module) -> dict[str, LoopedHookPoint]:
    """Hook points below a module, by their names there."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoopedHookPoint)}


def find_hooks(module: nn.Module, known: dict[str, LoopedHookPoint], place: str) -> None:
    """Look up the hook points below a module anew, and let new ones be what those before were.

    Args:
        module: Where to look.
        known: Those that were there, by their names there; brought up to date.
        place: The module's name, for messages.

    Raises:
        InputError: if something else stands in the place of one.
    """
    for path, before in known.items():
        above, _, name = path.rpartition(".")
        owner = module.get_submodule(above)
        found = owner._modules.get(name)
        if found is before:
            continue
        where = f"{place}.{path}".lstrip(".")
        if not isinstance(found, HookPoint):
            what = "removed" if found is None else f"replaced by a {type(found).__name__}"
            raise InputError(
                f"{where} was {what}, but a run needs a hook point there: to let an activation "
                "pass through a module, hook it, or use interventions.Splice"
            )
        known[path] = adopt(found, before, where)
        owner.__dict__[name] = known[path]  # within easy reach, see `settle`


class QuickModule(Arming, Module):
    """A module whose call goes straight to ``forward`` while no torch hook is attached to it.

    PyTorch's own call takes several times as long to find that out.

    Attributes:
        noted_as: A hook point of the module, which knows its name and the present run; and the
            names within the module under which edits by torch hooks are noted: of its first
            argument, of its result. None if nothing needs to know.
    """

    noted_as: ClassVar[tuple[str, str, str] | None] = None
    forward: Callable[..., Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["armed"] = False

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            """As in PyTorch; a plain HookPoint in the place of one of ours takes on what it was."""
            if isinstance(value, HookPoint) and name in self._modules:
                before = self._modules[name]
                if isinstance(before, LoopedHookPoint):  # else setup() knows what it was
                    adopt(value, before, name)
            super().__setattr__(name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in PyTorch."""
        own = self.__dict__
        if (
            own["armed"]
            or _global_forward_hooks
            or _global_backward_hooks
            or _global_forward_pre_hooks
            or _global_backward_pre_hooks
        ):
            own["armed"] = _has_torch_hooks(own) or self._compiled_call_impl is not None
            if args and (own["_forward_pre_hooks"] or _global_forward_pre_hooks):
                # As at a hook point: the stream goes on beside it, and a cache may hold it.
                args = (args[0].clone(), *args[1:])
            call: Callable[..., Tensor] = super().__call__
            if self.noted_as is None:
                return call(*args, **kwargs)
            where, before, after = self.noted_as
            point: LoopedHookPoint = own["_modules"][where]
            log, path = point.watch.log, str(point.name).removesuffix(where)
            if log is None:
                return call(*args, **kwargs)
            return watched_call(self, call, log, (path + before, path + after), (args, kwargs))
        return self.forward(*args, **kwargs)


def parameter(owner: nn.Module, name: str) -> Tensor:
    """A parameter of borrowed weights.

    Looked up where ``nn.Module`` finds it only after Python has looked for an attribute in vain;
    there is none there if the parameter is pruned or parametrised.
    """
    found = owner._parameters.get(name)
    return cast(Tensor, getattr(owner, name)) if found is None else found


class CacheWriter:
    """A hook that only reads: it stores the activation under the hook's name.

    Args:
        store: Where to.
        positions: Positions to keep.
        device: Where the copy lives; the activation's own device if None.
        remove_batch_dim: Drop a leading dimension of one.
        suffix: Appended to the name, for gradients.
        log: Of the run that the cache is of; what its hooks call, a model or a part, is not stored.
    """

    def __init__(
        self,
        store: dict[str, Tensor],
        positions: Slice,
        device: Any,
        remove_batch_dim: bool,
        suffix: str = "",
        log: EditLog | None = None,
    ) -> None:
        self.store, self.positions, self.device = store, positions, device
        self.remove_batch_dim, self.suffix, self.log = remove_batch_dim, suffix, log

    def __call__(self, tensor: Tensor, hook: LoopedHookPoint) -> None:
        """Store the activation; return nothing, so that it goes on unchanged."""
        if self.log is not None and (
            self.log.paused or (self.log.within is not None and self.log.within is not hook)
        ):
            return
        kept = tensor.detach() if tensor.requires_grad else tensor
        if self.device is not None:
            kept = kept.to(self.device)
        if self.remove_batch_dim and kept.shape[0] == 1:
            kept = kept[0]
        name = hook.name
        assert name is not None
        if self.positions.mode != "identity":
            kept = self.positions.apply(kept, dim=hook.pos_dim)
        if kept.untyped_storage().nbytes() > kept.nbytes:
            kept = kept.clone()  # a part of a tensor would keep the whole of it in memory
        self.store[name + self.suffix] = kept


def place(module: nn.Module, location: LayerLocation) -> None:
    """Tell every LoopedHookPoint below ``module`` where it stands."""
    for child in _tree(module):
        if isinstance(child, LoopedHookPoint):
            child.location = location


def settle(module: nn.Module, training: bool, watch: Watch) -> None:
    """Make a new tree of modules a model's own: its mode, its watch, its members within easy reach.

    ``nn.Module`` finds a member (``self.attn``) only after Python has failed to find an attribute
    of that name, which takes longer than an idle hook. As plain attributes they are found at once.
    Assigning another module to the name replaces both entries.
    """
    for child in _tree(module):
        own = child.__dict__
        own["training"] = training
        own.update(child._modules)
        if isinstance(child, LoopedHookPoint):
            child.watch = watch


def _tree(module: nn.Module) -> Iterator[nn.Module]:
    # nn.Module.modules() guards against shared members, which take most of its time.
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _tree(child)
