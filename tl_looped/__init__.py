"""tl_looped: looped language models in TransformerLens.

``LoopedTransformer`` presents a depth-recurrent, weight-tied model as an ordinary transformer of
effective layers, every one also addressable as (recurrence, layer).
"""

from typing import TYPE_CHECKING, Any

from tl_looped._version import __version__
from tl_looped.adapters import (
    Adapter,
    HubAlias,
    HuginnAdapter,
    OuroAdapter,
    RetrofitLlamaAdapter,
    RetrofitOlmoAdapter,
    Source,
    known_adapters,
    register_adapter,
    unregister_adapter,
)
from tl_looped.cache import LoopedActivationCache
from tl_looped.errors import (
    ArgumentTypeError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    GatedHookError,
    HookNameError,
    InputError,
    InvalidDecompositionError,
    LayerIndexError,
    MissingActivationError,
    RecurrenceCountError,
    RegistryError,
    SingleTokenError,
    TLLoopedError,
    TokenizerError,
    UnknownArchitectureError,
    UnsupportedMethodError,
)
from tl_looped.model.config import InitialState, Injection, LoopedConfig, NormLayout, RotaryStyle
from tl_looped.model.geometry import LayerLocation, LoopGeometry
from tl_looped.model.hook_points import LoopedHookPoint
from tl_looped.model.kv_cache import LoopedKeyValueCache
from tl_looped.transformer import LoopedTransformer

if TYPE_CHECKING:
    from tl_looped.retrofitting import retrofit

__all__ = [
    "Adapter",
    "ArgumentTypeError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "GatedHookError",
    "HookNameError",
    "HubAlias",
    "HuginnAdapter",
    "InitialState",
    "Injection",
    "InputError",
    "InvalidDecompositionError",
    "LayerIndexError",
    "LayerLocation",
    "LoopGeometry",
    "LoopedActivationCache",
    "LoopedConfig",
    "LoopedHookPoint",
    "LoopedKeyValueCache",
    "LoopedTransformer",
    "MissingActivationError",
    "NormLayout",
    "OuroAdapter",
    "RecurrenceCountError",
    "RegistryError",
    "RetrofitLlamaAdapter",
    "RetrofitOlmoAdapter",
    "RotaryStyle",
    "SingleTokenError",
    "Source",
    "TLLoopedError",
    "TokenizerError",
    "UnknownArchitectureError",
    "UnsupportedMethodError",
    "__version__",
    "known_adapters",
    "register_adapter",
    "retrofit",
    "unregister_adapter",
]


def __getattr__(name: str) -> Any:
    # Imported when it is used: it loads transformers' model classes.
    if name == "retrofit":
        from tl_looped.retrofitting import retrofit

        return retrofit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
