"""What the package takes from TransformerLens, in one place, and PyTorch's Module, typed.

All of these have the same address in TransformerLens 3.5.0 to 4.3.0, so there is no choice of
import to make here yet. A version that moves or renames one is dealt with here, and no other module
imports from ``transformer_lens`` (import-linter checks it). ``HookedTransformer``, which 4.0
removed, and what came with 4.x (``model_protocol``, most of ``tools``) must not be needed.

``nn.Module`` defines ``__getattr__``, so that to a type checker every name is an attribute of every
module, and a misspelt one passes. ``Module``, ``Linear``, ``ModuleList``, ``HookPoint`` and
``HookedRootModule`` are the classes of PyTorch and TransformerLens at run time, and to a type
checker the same without ``__getattr__``. A module of this package derives from one of these; its
children and parameters are assigned in ``__init__`` or declared in the body of the class.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from torch import nn
from transformer_lens import ActivationCache, FactoredMatrix
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.config import TransformerLensConfig
from transformer_lens.utilities import (
    Slice,
    SliceInput,
    composition_scores,
    get_act_name,
    get_device,
    lm_cross_entropy_loss,
    sample_logits,
    warn_if_mps,
)

LISTS_BRIDGE_NAMES = int(importlib.metadata.version("transformer-lens").split(".")[0]) >= 4
"""Whether TransformerLens's tools look for TransformerBridge's hook names in a ``hook_dict``."""

if not TYPE_CHECKING:
    # Slice takes more than its alias says: a Python slice, and None for an open end.
    SliceInput = SliceInput | slice | tuple[int | None, ...]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager
    from typing import Any, Literal, TypeAlias

    from transformer_lens.hook_points import HookPoint as _HookPoint

    _Hooks: TypeAlias = Iterable[tuple[str | Callable[[str], bool], Callable[..., Any]]]
    _Direction: TypeAlias = Literal["fwd", "bwd"]

    class Module(nn.Module):
        """``nn.Module`` with no attributes but those that are declared."""

        __getattr__: None  # type: ignore[assignment, misc]

    class Linear(nn.Linear):
        """``nn.Linear`` with no attributes but those that are declared."""

        __getattr__: None  # type: ignore[assignment, misc]

    class ModuleList(nn.ModuleList):
        """``nn.ModuleList`` with no attributes but those that are declared."""

        __getattr__: None  # type: ignore[assignment, misc]

    class HookPoint(_HookPoint):
        """TransformerLens's hook point, with no attributes but those that are declared."""

        __getattr__: None  # type: ignore[assignment, misc]

    class HookedRootModule(Module):
        """What this package uses of TransformerLens's class, with the types that its code has."""

        is_caching: bool
        context_level: int

        def reset_hooks(
            self,
            clear_contexts: bool = True,
            direction: Literal["fwd", "bwd", "both"] = "both",
            including_permanent: bool = False,
            level: int | None = None,
        ) -> None: ...

        def check_and_add_hook(
            self,
            hook_point: _HookPoint,
            hook_point_name: str,
            hook: Callable[..., Any],
            dir: _Direction = "fwd",
            is_permanent: bool = False,
            level: int | None = None,
            prepend: bool = False,
        ) -> None: ...

        def hooks(
            self,
            fwd_hooks: _Hooks = (),
            bwd_hooks: _Hooks = (),
            reset_hooks_end: bool = True,
            clear_contexts: bool = False,
        ) -> AbstractContextManager[HookedRootModule]: ...

        def run_with_hooks(
            self,
            *model_args: Any,
            fwd_hooks: _Hooks = (),
            bwd_hooks: _Hooks = (),
            reset_hooks_end: bool = True,
            clear_contexts: bool = False,
            **model_kwargs: Any,
        ) -> Any: ...

        def run_with_cache(self, *model_args: Any, **kwargs: Any) -> Any: ...

else:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    Module, Linear, ModuleList = nn.Module, nn.Linear, nn.ModuleList

__all__ = [
    "LISTS_BRIDGE_NAMES",
    "ActivationCache",
    "FactoredMatrix",
    "HookPoint",
    "HookedRootModule",
    "Linear",
    "Module",
    "ModuleList",
    "Slice",
    "SliceInput",
    "TransformerLensConfig",
    "TransformerLensKeyValueCache",
    "composition_scores",
    "get_act_name",
    "get_device",
    "lm_cross_entropy_loss",
    "sample_logits",
    "warn_if_mps",
]
