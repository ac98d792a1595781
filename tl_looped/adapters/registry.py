"""The registry of adapters. Registering a name or an alias twice is an error."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from tl_looped.adapters.base import Adapter, HubAlias
from tl_looped.checks import checked
from tl_looped.errors import ConfigError, RegistryError, UnknownArchitectureError

_ADAPTERS: dict[str, Adapter] = {}
A = TypeVar("A", bound=type[Adapter])


@checked
def register_adapter(adapter: A) -> A:
    """Make ``from_pretrained`` know a family; usable as a class decorator.

    Raises:
        RegistryError: if its name or one of its aliases is taken.
    """
    if adapter.name in _ADAPTERS:
        owner = type(_ADAPTERS[adapter.name]).__name__
        raise RegistryError(
            f"an adapter named {adapter.name!r} is registered already ({owner}); "
            "choose another name or call unregister_adapter first"
        )
    taken = sorted(set(adapter.aliases) & set(all_aliases()))
    if taken:
        raise RegistryError(f"the aliases {taken} of adapter {adapter.name!r} are taken")
    _ADAPTERS[adapter.name] = adapter()
    return adapter


@checked
def unregister_adapter(name: str) -> None:
    """Forget a family.

    Raises:
        RegistryError: if there is none of that name.
    """
    get_adapter(name)
    del _ADAPTERS[name]


@checked
def get_adapter(name: str) -> Adapter:
    """The family of that name.

    Raises:
        RegistryError: if there is none.
    """
    if name not in _ADAPTERS:
        raise RegistryError(f"no adapter named {name!r}; known: {known_adapters()}")
    return _ADAPTERS[name]


@checked
def known_adapters() -> list[str]:
    """Names of all registered families, sorted."""
    return sorted(_ADAPTERS)


@checked
def all_aliases() -> dict[str, HubAlias]:
    """Every short checkpoint name of every registered family."""
    return {
        name: alias for adapter in _ADAPTERS.values() for name, alias in adapter.aliases.items()
    }


@checked
def find_adapter(config: Mapping[str, Any], tensor_names: Collection[str]) -> Adapter:
    """The one adapter that recognises a checkpoint.

    Raises:
        UnknownArchitectureError: if none does, or more than one.
    """
    if not isinstance(config.get("architectures") or [], (list, tuple)):
        raise ConfigError(f"architectures must be a list, got {config['architectures']!r}")
    found = [a for a in _ADAPTERS.values() if a.matches(config, tensor_names)]
    if len(found) == 1:
        return found[0]
    what = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
    if found:
        names = sorted(a.name for a in found)
        raise UnknownArchitectureError(f"{what}: several adapters claim it: {names}")
    raise UnknownArchitectureError(
        f"unknown architecture ({what}); known families: {known_adapters()}. "
        "A new one is added with tl_looped.register_adapter. A feedforward model is made looped by "
        "tl_looped.retrofit(folder, core=[...]), and measured as it is by "
        "tl-looped analyze --feedforward."
    )
