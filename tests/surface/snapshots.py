"""The public surface of TransformerLens, by inspection, and as it was snapshotted by version.

A snapshot is ``transformerlens-VERSION.json`` beside this file: area -> class -> name -> member.
``python tests/surface/snapshots.py`` writes that of the installed version.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SNAPSHOTS = {"3.5.1": "HookedTransformer's last minor version", "4.3.0": "TransformerBridge"}
# What stands behind a class's brackets, as in cache["resid_post", 3].
PROTOCOL = ("__init__", "__call__", "__getitem__", "__iter__", "__len__", "__contains__")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its kind as ``inspect`` says it, its default as text."""

    name: str
    kind: str
    default: str | None = None


@dataclass(frozen=True)
class Member:
    """One name of a class: a method, a property, an attribute or a field of a config."""

    kind: str
    parameters: tuple[Parameter, ...] = ()
    default: str | None = None

    @classmethod
    def of(cls, value: dict[str, Any]) -> Member:
        found, kind = [], "positional_or_keyword"
        for text in value.get("parameters", ()):
            if text == "*":
                kind = "keyword_only"
                continue
            stars = text[: len(text) - len(text.lstrip("*"))]
            name, has_default, default = text.lstrip("*").partition("=")
            variadic = {"*": "var_positional", "**": "var_keyword"}.get(stars)
            found.append(Parameter(name, variadic or kind, default if has_default else None))
            kind = "keyword_only" if stars == "*" else kind
        return cls(value["kind"], tuple(found), value.get("default"))

    def to_json(self) -> dict[str, Any]:
        """Parameters are written as in a signature."""
        out: dict[str, Any] = {"kind": self.kind}
        texts: list[str] = []
        for one in self.parameters:
            stars = {"var_positional": "*", "var_keyword": "**"}.get(one.kind, "")
            if one.kind == "keyword_only" and not any(text.startswith("*") for text in texts):
                texts.append("*")
            texts.append(stars + one.name + ("" if one.default is None else f"={one.default}"))
        if texts:
            out["parameters"] = texts
        return out | ({} if self.default is None else {"default": self.default})


Classes = dict[str, dict[str, dict[str, Member]]]  # area -> class -> name -> member


# -- inspection -------------------------------------------------------------------------------


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in PROTOCOL


def parameters_of(function: Any) -> tuple[Parameter, ...]:
    """Without self and cls."""
    found = list(inspect.signature(function).parameters.values())
    return tuple(
        Parameter(one.name, one.kind.name.lower(), _default(one.default))
        for one in found
        if one.name not in ("self", "cls")
    )


def _default(value: Any) -> str | None:
    return None if value is inspect.Parameter.empty else shown(value)


def shown(value: Any) -> str:
    """A default as text that does not depend on the address or the machine."""
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return repr(value)


def members_of(cls: type) -> dict[str, Member]:
    """What TransformerLens itself defines on a class; not what nn.Module or object do."""
    found: dict[str, Member] = {}
    for base in cls.__mro__:
        if base.__module__.split(".")[0] != "transformer_lens":
            continue
        for name, value in vars(base).items():
            if is_public(name) and name not in found:
                found[name] = _member(value)
    return found


def _member(value: Any) -> Member:
    if isinstance(value, (classmethod, staticmethod)):
        return Member(type(value).__name__, parameters_of(value.__func__))
    if inspect.isfunction(value):
        return Member("method", parameters_of(value))
    return Member("property" if isinstance(value, property) else "attribute")


def attributes_of(instance: Any) -> dict[str, Member]:
    """Instance attributes, submodules included; not those that every nn.Module has."""
    from torch import nn

    common = set(vars(nn.Module())) if isinstance(instance, nn.Module) else set()
    names = [name for name in vars(instance) if name not in common and is_public(name)]
    names += [name for name in getattr(instance, "_modules", {}) if is_public(name)]
    return {name: Member("attribute") for name in names}


def fields_of(cfg: Any) -> dict[str, Member]:
    """Fields of a config: of the dataclass, and those that ``__init__`` takes and keeps."""
    given = {one.name: one.default for one in parameters_of(type(cfg).__init__)}
    return {name: Member("field", default=given.get(name)) for name in vars(cfg) if is_public(name)}


def installed() -> Classes:
    """The surface of the installed TransformerLens."""
    import torch

    small = {"n_layers": 1, "d_model": 8, "d_head": 4, "n_heads": 2, "d_mlp": 8, "d_vocab": 5}
    small |= {"n_ctx": 6, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS"}
    small |= {"positional_embedding_type": "rotary"}
    if version().startswith("3."):
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        model: Any = HookedTransformer(HookedTransformerConfig(**small, rotary_dim=4))
    else:
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_native(small)
    _, cache = model.run_with_cache(torch.arange(4)[None])
    found: Classes = {}
    for area, instance in (("model", model), ("cache", cache), ("config", model.cfg)):
        cls = type(instance)
        extra = fields_of(instance) if area == "config" else attributes_of(instance)
        names = extra | members_of(cls)
        # A dataclass's defaults are attributes of the class as well.
        names |= {name: extra[name] for name in extra if area == "config"}
        found[area] = {cls.__name__: {name: names[name] for name in sorted(names)}}
    return found


def version() -> str:
    return importlib.metadata.version("transformer-lens")


# -- snapshots --------------------------------------------------------------------------------


def path_of(release: str) -> Path:
    return HERE / f"transformerlens-{release}.json"


def snapshot(release: str) -> Classes:
    stored = json.loads(path_of(release).read_text(encoding="utf-8"))
    return {
        area: {
            cls: {name: Member.of(value) for name, value in members.items()}
            for cls, members in classes.items()
        }
        for area, classes in stored.items()
    }


def write_snapshot() -> Path:
    """One line a member, so that a difference between versions reads as one."""
    lines = ["{"]
    classes = installed()
    for area, found in classes.items():
        for cls, members in found.items():
            lines.append(f'"{area}": {{"{cls}": {{')
            rows = [f"{json.dumps(k)}: {json.dumps(m.to_json())}" for k, m in members.items()]
            lines.append(",\n".join(rows))
            lines.append("}}" + ("" if area == list(classes)[-1] else ","))
    path = path_of(version())
    path.write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")
    return path


@dataclass(frozen=True)
class Source:
    """Where a name is from."""

    release: str
    cls: str
    member: Member


@dataclass
class Name:
    """A member, or a keyword of one, of an area, over all snapshots."""

    area: str
    member: str
    keyword: str | None = None
    sources: list[Source] = field(default_factory=list)

    @property
    def short(self) -> str:
        return self.member if self.keyword is None else f"{self.member}({self.keyword})"

    @property
    def key(self) -> str:
        return f"{self.area}.{self.short}"


def names() -> dict[str, Name]:
    """All names of all snapshots, by key: ``model.generate``, ``model.generate(top_k)``."""
    out: dict[str, Name] = {}
    for release in SNAPSHOTS:
        for area, cls, member, what in walk(snapshot(release)):
            # The fields of a config are the keywords of its __init__.
            keywords = () if (area, member) == ("config", "__init__") else what.parameters
            for keyword in (None, *(one.name for one in keywords)):
                name = Name(area, member, keyword)
                out.setdefault(name.key, name).sources.append(Source(release, cls, what))
    return out


def walk(classes: Classes) -> Iterator[tuple[str, str, str, Member]]:
    for area, found in classes.items():
        for cls, members in found.items():
            for name, member in members.items():
                yield area, cls, name, member


if __name__ == "__main__":
    print(write_snapshot())
