"""An experiment as data: one model, one set of prompts, one number of recurrences.

An :class:`Experiment` is a frozen dataclass of plain values. It goes to TOML and back without a
change; a key that it does not have, or a value of the wrong kind, is an error that names the near
match or the expected kind. How fast a run goes (device, batch size, number of processes) is not
part of it: those may change the last bits of a result, never what it means.

The subset of prompts depends on its seed and on the number of prompts alone, so that every model
gets the same one: rows are ranked by the SHA-256 of seed and row number.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
import types
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from tl_looped.checks import checked, one_of, shown, whole
from tl_looped.errors import ConfigError, DataError
from tl_looped.files import is_file, write_text
from tl_looped.metrics.catalogue import DEFAULT_METRICS, select
from tl_looped.model import limits
from tl_looped.model.config import parse_dtype

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEST_SENTENCE = "Hello! I’ve been well. I hope that you’re doing well."
"""The test sentence of arXiv 2604.11791."""

SOURCES = ("bundled", "sentence", "gsm8k", "hellaswag", "file", "text")
KINDS = ("looped", "feedforward")
EXTRAS = (
    "confirm",
    "convergence",
    "limiting",
    "neurons",
    "pairwise",
    "patterns",
    "pca",
    "spectrum",
    "tokens",
)
_LONGEST_FILE = 2**26  # characters
_LAYER = re.compile(r"(prelude|core|coda)\.(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class PromptSet:
    """Which prompts are run.

    Args:
        source: ``"bundled"`` (32 word problems), ``"sentence"`` (the test sentence), ``"gsm8k"``,
            ``"hellaswag"`` (from ``file``, or from the hub without one), ``"file"``, or ``"text"``
            (``texts`` itself).
        file: A jsonl file, or a text file of one prompt per line.
        column: Key of the prompt in a jsonl file, a text or a conversation (a list of messages, for
            the model's chat template); the first of ``question``, ``ctx``, ``prompt``, ``text``,
            ``messages`` that the file has if None.
        split: Of a data set on the hub.
        texts: The prompts of ``source = "text"``.
        subset: How many are run; all if 0, or if there are fewer.
        seed: Of the choice of the subset.
        too_long: ``"skip"`` leaves out prompts that exceed the model's context, ``"truncate"``
            keeps their beginning. Both are counted in the results.
    """

    source: str = "bundled"
    file: str | None = None
    column: str | None = None
    split: str = "test"
    texts: tuple[str, ...] = ()
    subset: int = 256
    seed: int = 0
    too_long: str = "skip"

    def __post_init__(self) -> None:
        _check_types(self, "prompts.")
        one_of(self.source, "prompts.source", SOURCES)
        one_of(self.too_long, "prompts.too_long", ("skip", "truncate"))
        whole(self.subset, "prompts.subset", 0, error=ConfigError, fix="0 is all")
        if (self.source == "file") and self.file is None:
            raise ConfigError('prompts.source = "file" needs prompts.file, a jsonl or text file')
        if self.file is not None and self.source not in ("file", "gsm8k", "hellaswag"):
            raise ConfigError(
                f'prompts.file has no effect with prompts.source = "{self.source}": '
                'use source = "file"'
            )
        if (self.source == "text") != bool(self.texts):
            raise ConfigError('prompts.texts belongs to prompts.source = "text", which needs it')

    @classmethod
    @checked
    def parse(cls, text: str, **changes: Any) -> PromptSet:
        """The set that a command line names.

        Args:
            text: ``bundled``, ``sentence``, ``gsm8k``, ``hellaswag``, a path, or a path behind
                ``gsm8k:`` or ``hellaswag:``.
            **changes: Other fields.

        Raises:
            DataError: if it is none of these.
        """
        name, colon, path = text.partition(":")
        if colon and name in ("gsm8k", "hellaswag") and path:
            return cls(source=name, file=path, **changes)
        if text in ("bundled", "sentence", "gsm8k", "hellaswag"):
            return cls(source=text, **changes)
        if not is_file(text):
            near = difflib.get_close_matches(text, SOURCES[:4], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DataError(
                f"prompts: {text!r} is neither a file nor one of {', '.join(SOURCES[:4])}{hint}"
            )
        return cls(source="file", file=text, **changes)

    @property
    def label(self) -> str:
        """A short name for folders and captions."""
        return Path(self.file).stem if self.file and self.source == "file" else self.source


@dataclass(frozen=True)
class Experiment:
    """One run: a model, prompts, a number of recurrences, and what is measured.

    Args:
        model: A bundled name, an alias, a hub id or a folder.
        kind: ``"looped"``, or ``"feedforward"`` for a model that TransformerLens loads as a
            TransformerBridge, for comparison.
        revision: Branch, tag or commit on the hub.
        prompts: See :class:`PromptSet`.
        recurrences: Of the run; the model's own number if None.
        reference_recurrences: Take the fixed points from a run of so many recurrences instead.
        metrics: Names and groups of ``tl_looped.metrics.catalogue``.
        extras: What else is computed: ``"pairwise"`` (attention distance and residual cosine
            between all effective layers), ``"pca"`` (path of the first prompt's last token),
            ``"tokens"`` (similarity of every token's state to its last one), ``"limiting"`` (its
            label), ``"convergence"`` (a verdict per prompt), ``"confirm"`` (the same, and every
            prompt runs for twice the recurrences too, on which the verdict then rests),
            ``"neurons"`` (prediction and suppression), ``"patterns"`` (attention of the first
            prompt, every layer and head), ``"spectrum"`` (spectral radius and largest singular
            value of the loop's Jacobian at the last state, of the first 32 prompts).
        ablate_mlp: Layers whose MLP output is set to zero wherever they run: ``"prelude.1"`` is
            the paper's ablation of massive activations (Fig. 41), ``"core.2"`` acts in every
            recurrence.
        feedforward: ``model`` of the feedforward run that reports compare this one with. It
            decides no number of this run, and is no part of its hash.
        prepend_bos: Whether every prompt begins with BOS; as the model's configuration or tokenizer
            says if None.
        skip_first: Tokens at the beginning of every prompt that metrics of states, and so verdict
            and rate, leave out of their means: where attention sinks, one token's norm can decide
            them. None, as all leave out none; pairwise matrices, spectrum and path do not heed it.
        initial_state: ``"model"`` for the model's own, or ``"zeros"``.
        state_seed: Of a random initial state.
        dtype: Of the weights, as PyTorch names it.
        batching: ``"length"`` or ``"padded"``, see ``tl_looped.metrics.StreamOptions``.
    """

    model: str
    kind: str = "looped"
    revision: str | None = None
    prompts: PromptSet = field(default_factory=PromptSet)
    recurrences: int | None = None
    reference_recurrences: int | None = None
    metrics: tuple[str, ...] = DEFAULT_METRICS
    extras: tuple[str, ...] = ()
    ablate_mlp: tuple[str, ...] = ()
    feedforward: str | None = None
    prepend_bos: bool | None = None
    skip_first: int | None = None
    initial_state: str = "model"
    state_seed: int = 0
    dtype: str = "float32"
    batching: str = "length"

    def __post_init__(self) -> None:
        _check_types(self)
        one_of(self.kind, "kind", KINDS)
        if not self.model.strip():
            raise ConfigError("model is empty: name a bundled model, a hub id or a folder")
        one_of(self.initial_state, "initial_state", ("model", "zeros"))
        one_of(self.batching, "batching", ("length", "padded"))
        select(self.metrics)
        parse_dtype(self.dtype)
        for name in self.extras:
            one_of(name, "extras", EXTRAS)
        for name in self.ablate_mlp:
            if not _LAYER.fullmatch(name):
                raise ConfigError(
                    f'ablate_mlp: {name!r} is not a layer; layers are named "prelude.1", "core.0", '
                    '"coda.1", each counted from 0'
                )
        most, how = limits.most_layers, limits.HOW_TO_RAISE
        if self.recurrences is not None:
            whole(self.recurrences, "recurrences", 1, most, ConfigError, how)
        if self.reference_recurrences is not None:
            whole(self.reference_recurrences, "reference_recurrences", 1, most, ConfigError, how)
        if self.skip_first is not None:
            whole(self.skip_first, "skip_first", 1, None, ConfigError, "leave it out to skip none")
        needs_own_end = sorted({"confirm", "convergence", "limiting"} & set(self.extras))
        if self.reference_recurrences is not None and needs_own_end:
            raise ConfigError(
                f"extras: {', '.join(needs_own_end)} compare with the run's own last recurrence: "
                "leave reference_recurrences out"
            )
        if self.kind == "feedforward":
            self._check_feedforward()

    def _check_feedforward(self) -> None:
        if self.recurrences not in (None, 1) or self.reference_recurrences is not None:
            raise ConfigError(f"a feedforward model has 1 recurrence, not {self.recurrences}")
        wrong = sorted(set(self.extras) - {"neurons", "pairwise", "patterns"})
        if wrong:
            raise ConfigError(f"extras: {wrong} need a loop, and the model is feedforward")
        for name in ("ablate_mlp", "feedforward"):
            if getattr(self, name):
                raise ConfigError(f"{name} is for looped models, and this one is feedforward")
        if self.batching == "padded":
            raise ConfigError('batching = "padded" is for looped models; use "length"')

    # -- TOML ---------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Experiment:
        """From plain values, as TOML or JSON give them.

        Raises:
            ConfigError: for an unknown key, naming the near match, and for a wrong value.
        """
        made = _build(cls, values, "")
        assert isinstance(made, Experiment)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None is left out."""
        return _plain(self)

    @classmethod
    @checked
    def from_toml(cls, text: str) -> Experiment:
        """From TOML text."""
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # numbers and nesting without end as well
            raise ConfigError(f"the experiment is not TOML: {error}") from error
        return cls.from_dict(values)

    def to_toml(self) -> str:
        """TOML text that :meth:`from_toml` turns into an equal experiment."""
        values = self.to_dict()
        tables = {key: value for key, value in values.items() if isinstance(value, dict)}
        lines = [f"{key} = {_toml(value)}" for key, value in values.items() if key not in tables]
        for name, table in tables.items():
            lines += ["", f"[{name}]", *(f"{key} = {_toml(v)}" for key, v in table.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    @checked
    def read(cls, path: str | Path) -> Experiment:
        """From a TOML file; a prompt file in it is looked for from the current folder.

        Raises:
            DataError: if the file cannot be read.
            ConfigError: if it is no experiment.
        """
        try:
            with Path(path).open(encoding="utf-8") as file:
                text = file.read(_LONGEST_FILE)
            if len(text) == _LONGEST_FILE:
                raise ValueError(f"{_LONGEST_FILE} characters or more")
        except (OSError, ValueError) as error:
            raise DataError(f"the experiment {path} cannot be read: {error}") from error
        try:
            return cls.from_toml(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @checked
    def write(self, path: str | Path) -> Path:
        """Write the TOML file."""
        return write_text(self.to_toml(), Path(path))


def _check_types(spec: Any, where: str = "") -> None:
    """Values as their types say, lists as tuples; no text that no file can hold.

    Files and callers are told the same in the same words.
    """
    for name, kind in get_type_hints(type(spec)).items():
        value = _value(kind, getattr(spec, name), where + name)
        object.__setattr__(spec, name, value)
        if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
            raise ConfigError(f"{where}{name} holds what is no character: {value!r}")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        items = ((f.name, getattr(value, f.name)) for f in fields(value))
        return {name: _plain(item) for name, item in items if item is not None}
    return list(value) if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # A JSON string is a TOML basic string, but for one control character that JSON does not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _build(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from plain values, which it checks itself."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where.rstrip('.')} must be a table, got {shown(values)}")
    known = [one.name for one in fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key {where}{key}; {hint}")
    if kind is Experiment and "model" not in values:
        raise ConfigError("the experiment names no model")
    hints = get_type_hints(kind)
    return kind(
        **{name: _value(hints[name], value, where + name) for name, value in values.items()}
    )


def _value(kind: Any, value: Any, key: str) -> Any:
    if kind is PromptSet:
        return value if isinstance(value, PromptSet) else _build(kind, value, key + ".")
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} must be a list, got {shown(value)}")
        return tuple(_value(get_args(kind)[0], item, key) for item in value)
    allowed = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if isinstance(value, np.integer):
        value = int(value)
    # True is not a number of recurrences.
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(k.__name__ for k in allowed if k is not type(None))
        raise ConfigError(f"{key} must be of type {names}, got {shown(value)}")
    return value
