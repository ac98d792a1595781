"""Theta and scaling of rotary embeddings, from every place that a ``config.json`` has for them.

transformers 4 writes ``rope_theta`` beside ``rope_scaling``; transformers 5 writes both into
``rope_parameters`` and may leave the old keys standing. All that are there must say the same:
which of two would win depends on the version of the library that reads them. A value of null is a
value that is not given. Types that a looped model cannot compute are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl_looped.errors import ConfigError

LLAMA3_KEYS = (
    "factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings",
)  # fmt: skip


def read_rope(config: Mapping[str, Any], *theta_keys: str) -> tuple[Any, dict[str, Any] | None]:
    """Theta as it is written, None if nowhere, and Llama 3's scaling or None.

    Numbers are not looked at: :class:`LoopedConfig` does that for every door.

    Args:
        config: A ``config.json``.
        *theta_keys: Keys at its top that give theta; ``rope_theta`` if none is named.

    Raises:
        ConfigError: two places that contradict each other, or a type that is not supported.
    """
    _refuse_partial(config, "config.json")
    thetas = {key: config.get(key) for key in theta_keys or ("rope_theta",)}
    scalings: dict[str, dict[str, Any] | None] = {}
    for key in ("rope_scaling", "rope_parameters"):
        theta, kind, scaling = _one_place(config.get(key), key)
        thetas[f"{key}.rope_theta"] = theta
        if kind is not None:
            scalings[key] = scaling
    return _agreed(thetas), _agreed(scalings, none_counts=True)


def refuse_contradictions(config: Mapping[str, Any]) -> None:
    """Raise if the places for rotary embeddings contradict each other, whatever their type.

    For models that transformers itself runs: it knows all types, and picks one of two silently.
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    places = {"rope_theta": config.get("rope_theta")}
    kinds: dict[str, Any] = {}
    for key, given in (("rope_scaling", old), ("rope_parameters", new)):
        if isinstance(given, Mapping) and not _nested(given):
            places[f"{key}.rope_theta"] = given.get("rope_theta")
            rest = {k: v for k, v in given.items() if k not in ("rope_theta", "type")}
            kind = given.get("rope_type", given.get("type"))
            if kind is not None:
                kinds[key] = rest | {"rope_type": kind}
    _agreed(places)
    _agreed(kinds)


def _one_place(given: Any, name: str) -> tuple[Any, str | None, dict[str, Any] | None]:
    """Theta, type (None if it says nothing of one) and scaling of one dict."""
    if given is None:
        return None, None, None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} must be an object or null, got {given!r}")
    if _nested(given):
        raise ConfigError(
            f"{name} gives rotary embeddings for each kind of layer by itself ({sorted(given)}); "
            "a looped model has one for all its layers"
        )
    _refuse_partial(given, name)
    left = {key: value for key, value in given.items() if value is not None}
    left.pop("partial_rotary_factor", None)
    theta = left.pop("rope_theta", None)
    kind = _agreed({f"{name}.{key}": left.pop(key, None) for key in ("rope_type", "type")})
    scaling = None
    if kind == "llama3":
        scaling = {key: left.pop(key) for key in LLAMA3_KEYS if key in left}
        scaling["rope_type"] = kind
    elif kind not in (None, "default"):
        raise ConfigError(
            f"{name}={dict(given)!r} asks for rotary embeddings of type {kind!r}; known are "
            "'default' and 'llama3', and ignoring it would silently change the result"
        )
    if left:
        raise ConfigError(
            f"{name} of type {kind or 'default'!r} holds {left!r}, which no supported model reads; "
            "ignoring it could silently change the result"
        )
    return theta, kind, scaling


def _nested(given: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in given.values())


def _refuse_partial(given: Mapping[str, Any], name: str) -> None:
    part = given.get("partial_rotary_factor")
    if part is not None and part != 1.0:
        raise ConfigError(
            f"{name} has partial_rotary_factor={part!r}; only 1.0 is supported: every dimension of "
            "a head is rotated"
        )


def _agreed(places: Mapping[str, Any], none_counts: bool = False) -> Any:
    """The one value of all places that give one."""
    given = {name: value for name, value in places.items() if none_counts or value is not None}
    first = next(iter(given.values()), None)
    if any(value is not first and value != first for value in given.values()):
        listed = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(
            f"config.json contradicts itself: {listed}. Which one holds depends on the library "
            "that reads it; take the wrong one out"
        )
    return first
