"""Adapters: one declarative file for each family of checkpoints."""

from tl_looped.adapters.base import Adapter, HubAlias, Source
from tl_looped.adapters.huginn import HuginnAdapter
from tl_looped.adapters.native import NativeAdapter
from tl_looped.adapters.ouro import OuroAdapter
from tl_looped.adapters.reference import Package, Reference
from tl_looped.adapters.registry import (
    all_aliases,
    find_adapter,
    get_adapter,
    known_adapters,
    register_adapter,
    unregister_adapter,
)
from tl_looped.adapters.retrofit_llama import RetrofitLlamaAdapter
from tl_looped.adapters.retrofit_olmo import RetrofitOlmoAdapter

__all__ = [
    "Adapter",
    "HubAlias",
    "HuginnAdapter",
    "NativeAdapter",
    "OuroAdapter",
    "Package",
    "Reference",
    "RetrofitLlamaAdapter",
    "RetrofitOlmoAdapter",
    "Source",
    "all_aliases",
    "find_adapter",
    "get_adapter",
    "known_adapters",
    "register_adapter",
    "unregister_adapter",
]
