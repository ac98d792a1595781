"""What an adapter is: a declarative description of one family's checkpoints.

An adapter says how a checkpoint's ``config.json`` becomes a :class:`LoopedConfig`, which tensors
make which parameter, and what the tokenizer's special tokens are. It holds no forward code. A third
party supports a new family by subclassing :class:`Adapter` in one file and registering it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tl_looped.adapters.reference import Reference
from tl_looped.checks import checked
from tl_looped.errors import ConfigError
from tl_looped.model.config import TRAINED, LoopedConfig


@checked
@dataclass(frozen=True)
class Source:
    """Where a parameter comes from.

    Args:
        names: Checkpoint tensors; several are concatenated along their first dimension.
        rows: First dimension of each of ``names``; needed only if there are several.
        index: Leading indices to take, for tensors that hold several parameters.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] | None = None
    index: tuple[int, ...] = ()


@checked
@dataclass(frozen=True)
class HubAlias:
    """A short name for a hub checkpoint, with the number of recurrences it was trained for."""

    hub_id: str
    n_recurrences: int | None = None


class Adapter(ABC):
    """One family of checkpoints. Subclasses are stateless.

    Attributes:
        name: Name of the family, unique in the registry.
        aliases: Short names that ``from_pretrained`` takes.
        special_token_ids: ``bos``, ``eos`` and ``pad`` of the family's own tokenizer, for one that
            does not say what they are; see :meth:`special_tokens`.
        reference: How the authors' own code is run, to compare it with; None if there is none.
    """

    name: ClassVar[str]
    aliases: ClassVar[Mapping[str, HubAlias]] = {}
    special_token_ids: ClassVar[Mapping[str, int]] = {}
    reference: ClassVar[Reference | None] = None

    @abstractmethod
    def matches(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> bool:
        """Whether a checkpoint with this ``config.json`` and these tensors is of this family."""

    @abstractmethod
    def config(self, config: Mapping[str, Any]) -> LoopedConfig:
        """The model's configuration, in fp32 on no particular device."""

    @abstractmethod
    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """For every parameter of the model, by its ``named_parameters`` name, its source."""

    def special_tokens(self, tokenizer: Any) -> dict[str, str]:
        """What a checkpoint's tokenizer should say its special tokens are, and does not.

        A tokenizer's own special tokens win where it declares them: it may be another one than the
        family's. Where it declares none, that of :attr:`special_token_ids` is meant, provided that
        this is a special token of the tokenizer and not a piece of text.

        Returns:
            Token by kind, ``bos``, ``eos`` or ``pad``.
        """
        special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        return {
            kind: special[token_id]
            for kind, token_id in self.special_token_ids.items()
            if getattr(tokenizer, f"{kind}_token_id") is None and token_id in special
        }

    def generation_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What of a checkpoint's ``generation_config.json`` holds for its model: all of it."""
        return dict(config)

    def raw_config(self, cfg: LoopedConfig) -> dict[str, Any] | None:
        """The inverse of :meth:`config`: a ``config.json``; None if the family is only read.

        It need not ask whether ``cfg`` fits the format: what it loses is found by reading it back.
        """
        return None

    def ignored(self, cfg: LoopedConfig) -> frozenset[str]:
        """Tensors that a checkpoint may hold and the model does not need, such as rotary tables."""
        return frozenset()

    def duplicates(self, cfg: LoopedConfig) -> dict[str, str]:
        """Tensors that may be stored a second time (tied weights): extra name -> original name.

        A stored duplicate must equal its original, or loading fails.
        """
        return {}


def require(config: Mapping[str, Any], *keys: str) -> list[Any]:
    """The values of ``keys``, or an error that lists all that are missing."""
    missing = [key for key in keys if key not in config]
    if missing:
        raise ConfigError(f"config.json lacks {missing}")
    return [config[key] for key in keys]


def require_equal(config: Mapping[str, Any], **expected: Any) -> None:
    """Refuse a checkpoint whose config asks for something that no supported model has.

    A key that is absent or null passes: it then has the reference's default, which is the expected
    value.
    """
    for key, value in expected.items():
        if config.get(key) is not None and config[key] != value:
            raise ConfigError(
                f"config.json has {key}={config[key]!r}; only {value!r} is supported, and anything "
                "else would silently change the result"
            )


def trained_recurrences_of(config: Mapping[str, Any], n_recurrences: Any) -> Any:
    """How many recurrences a checkpoint was trained with; None if not as a loop.

    Checkpoints that do not say it were trained with the number that they run, but for a model made
    of a feedforward one: that says where its layers come from (``source_layers``), and its number
    is one to begin with.

    Args:
        config: The checkpoint's ``config.json``.
        n_recurrences: What it runs.
    """
    if TRAINED in config:
        return config[TRAINED]
    return None if config.get("source_layers") else n_recurrences or None


def given(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """What a config says, or the default where it says nothing or null."""
    value = config.get(key)
    return default if value is None else value


def head_width(config: Mapping[str, Any], d_model: Any, n_heads: Any) -> Any:
    """Width of a head: ``head_dim``, or an equal share of the model's."""
    value = config.get("head_dim")
    return d_model // n_heads if value is None else value


def as_float(value: Any) -> Any:
    """JSON has one kind of number; what is none is left for :class:`LoopedConfig` to refuse."""
    return float(value) if type(value) is int else value
