"""Configuration of a looped transformer.

Two enums (where the norms stand, how the prelude is injected into the loop) and a few switches
describe every family; a new family is one adapter file and no change here. Field names are
TransformerLens's where TransformerLens has one; ``n_layers`` is the number of *effective* layers,
``n_prelude + n_core * n_recurrences + n_coda``, and follows ``n_recurrences``.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, cast

import numpy as np
import torch

from tl_looped._compat import TransformerLensConfig
from tl_looped.checks import checked, one_of, whole
from tl_looped.errors import ConfigError
from tl_looped.model import limits
from tl_looped.model.geometry import LayerLocation
from tl_looped.model.limits import MOST_UNITS
from tl_looped.model.owned import FLAGS, OwnedFields
from tl_looped.model.tl_fields import FIXED, OF_TOKENIZER

FLOAT32 = torch.finfo(torch.float32)


class NormLayout(str, Enum):
    """Where a block normalises. ``n`` is an RMSNorm, ``x`` the residual stream.

    - ``PRE`` (Llama): ``x += attn(ln1 x); x += mlp(ln2 x)``
    - ``POST`` (OLMo-2): ``x += ln1_post(attn x); x += ln2_post(mlp x)``
    - ``SANDWICH`` (Ouro): ``x += ln1_post(attn(ln1 x)); x += ln2_post(mlp(ln2 x))``
    - ``RESIDUAL`` (Huginn): ``x = ln_mid(x + attn(ln1 x)); x = ln_out(x + mlp(ln2 x))``
    """

    PRE = "pre"
    POST = "post"
    SANDWICH = "sandwich"
    RESIDUAL = "residual"

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Names of the norms that a block of this layout has, in the order of the forward pass."""
        return {
            NormLayout.PRE: ("ln1", "ln2"),
            NormLayout.POST: ("ln1_post", "ln2_post"),
            NormLayout.SANDWICH: ("ln1", "ln1_post", "ln2", "ln2_post"),
            NormLayout.RESIDUAL: ("ln1", "ln_mid", "ln2", "ln_out"),
        }[self]


class Injection(str, Enum):
    """How the prelude's output ``e`` enters each recurrence.

    - ``NONE``: it does not; the loop starts from ``e`` and maps the state to itself.
    - ``LINEAR``: ``x = adapter(concat[state, e])``, the state first (Huginn, retrofits).
    """

    NONE = "none"
    LINEAR = "linear"


class RotaryStyle(str, Enum):
    """Which dimensions rotate together: ``(i, i + d_head / 2)`` or ``(2i, 2i + 1)``."""

    HALF = "half"
    INTERLEAVED = "interleaved"


class InitialState(str, Enum):
    """Where recurrence 0 starts when no ``initial_state`` is given.

    - ``RANDOM``: a truncated normal, a function of the seed and the position alone.
    - ``PRELUDE``: the prelude's output ``e``. The only choice without injection.
    - ``PRELUDE_SKIP_ADAPTER``: ``e``, and recurrence 0 does not pass through the adapter.
    """

    RANDOM = "random"
    PRELUDE = "prelude"
    PRELUDE_SKIP_ADAPTER = "prelude-skip-adapter"


_ENUMS: dict[str, type[Enum]] = {
    "norm_layout": NormLayout,
    "injection": Injection,
    "rotary_style": RotaryStyle,
    "initial_state": InitialState,
}


TRAINED = "trained_recurrences"
"""The field that says how a model was trained. No number of a run depends on it."""

_NUMBERS: dict[str, float] = {
    "eps": 0.0,
    "rotary_base": 1.0,
    "initial_state_std": 0.0,
    "embed_scale": 0.0,
    "exit_threshold": 0.0,
    "initializer_range": 0.0,
}
"""Least value of every field that is a number and no count."""
_UNITS = ("d_model", "d_head", "n_heads", "n_key_value_heads", "d_vocab", "d_mlp")
_SWITCHES = (
    "loop_norm", "pre_coda_norm", "exit_gate", "qk_bias", "v_bias", "qk_norm", "qk_norm_per_head",
    "rotary_in_fp32", "tie_embeddings",
)  # fmt: skip
_LLAMA3: dict[str, float] = {
    "factor": 1.0,
    "low_freq_factor": FLOAT32.tiny,
    "high_freq_factor": FLOAT32.tiny,
    "original_max_position_embeddings": 1.0,
}
"""Least values of Llama 3's rotary scaling; a factor below one would speed the slow waves up."""

_NOT_SAVED = (
    "device",
    "n_devices",
    "bos_from",
    "normalization_type",
    "center_unembed",
    "skipped_processing",
    *FLAGS,
)
_SINCE = ("cell", "core_layers")
"""Fields that older files lack, and that are saved where they say something."""


@dataclass(kw_only=True)
class LoopedConfig(OwnedFields):
    """Everything that determines a looped transformer, weights aside.

    Args:
        n_prelude: Layers before the loop, run once.
        n_core: Layers of the loop, run ``n_recurrences`` times with the same weights.
        n_coda: Layers after the loop, run once.
        n_recurrences: How often the loop runs; of a published checkpoint the trained number, until
            it is set otherwise.
        trained_recurrences: Recurrences that the model was trained with, or None if it was not
            trained as a loop: a virtual loop, a new retrofit, random weights. Where the number was
            drawn anew for each step, a float: the mean as its authors state it (Huginn's r-bar).
            The trainer sets it, and figures and reports say it.
        architecture: Name of the family, as in the adapter registry.
        model_name: Where the model came from.
        norm_layout: See :class:`NormLayout`.
        injection: See :class:`Injection`.
        core_layers: For each core layer, the number of the set of weights that it uses, for loops
            within a recurrence; None gives each layer a set of its own.
        cell: Name of the loop cell, see ``tl_looped.model.cells``; the four fields that follow and
            ``initial_state`` are settings of the standard one.
        loop_norm: The final norm also ends every recurrence (Ouro).
        pre_coda_norm: The final norm also stands between the loop and the coda (Huginn).
        exit_gate: The model has an exit gate, read at the end of every recurrence (Ouro).
        exit_threshold: Cumulative exit probability at which a token leaves the loop, the default
            of ``model.exits(...)``. The model's own logits are always the last recurrence's.
        qk_bias: Queries and keys have a bias (Huginn, Qwen2).
        v_bias: Values have a bias (Qwen2).
        qk_norm: RMSNorm on the whole flattened query and key vectors (OLMo-2).
        qk_norm_per_head: That norm is on each head by itself, with one gain for all heads of a
            layer (Qwen3).
        rotary_style: See :class:`RotaryStyle`.
        rotary_base: Rotary theta.
        rope_scaling: Llama 3 frequency scaling, as in ``transformers`` configs, or None.
        rotary_in_fp32: Rotate in fp32 and cast back (Huginn); otherwise the angles' cosines and
            sines are cast to the activations' dtype first (retrofits, Ouro).
        embed_scale: Factor on the token embeddings and on the random initial state.
        tie_embeddings: The unembedding is the embedding, transposed.
        initial_state: See :class:`InitialState`.
        initial_state_std: Standard deviation of the normal before it is cut at three of them,
            before ``embed_scale``.
        init_mode: ``"normal"``: every matrix N(0, ``initializer_range``²); ``"fan_in"``: linear
            maps N(0, 1 / fan_in), embeddings N(0, 1). Gains are one, biases zero. Only for random
            models.
        initializer_range: See ``init_mode``.
        seed: Seed of random weights.
        n_devices: How many devices the weights are on, as in TransformerLens. The model sets it;
            ``device`` is that of the embedding, where tokens go in and results come out.
        source_layers: Of a model made from a feedforward one: which of its layers became
            ``"prelude"``, ``"core"`` and ``"coda"``, and its name as ``"model"``. For the record.
        default_prepend_bos: Whether text gets a BOS token. If None, the model's tokenizer is asked
            what it does itself, and the answer is written here; with neither, nothing is prepended.
        bos_from: Who decided that: ``"config"``, ``"tokenizer"`` or ``"caller"``. A note of the
            model in memory: a saved model is one whose configuration has decided.
        center_unembed: Whether the model gives its logits, and ``W_U``, without their mean over the
            vocabulary. The model sets it.
        skipped_processing: What of TransformerLens's weight processing was asked for when the model
            was loaded and does not apply to it, such as ``center_writing_weights``.
        use_attn_in: TransformerLens's flag for ``hook_attn_in``.
        use_hook_mlp_in: TransformerLens's flag for ``hook_mlp_in``.
        ungroup_grouped_query_attention: TransformerLens's flag for keys and values of each query
            head.

    A model has a copy of its own, ``model.cfg``. Setting a flag there, or ``n_recurrences``, does
    what the model's ``set_...`` does; a field from which modules or weights were made is refused.
    Copies of it belong to no model. TransformerLens's other fields (``attn_scale``,
    ``window_size``, ``n_params``, ...) can be read, with the values that are right here; see
    ``tl_looped.model.tl_fields``.
    """

    n_layers: int = -1
    cell: str = "standard"
    core_layers: Any = None
    n_prelude: int = 0
    n_core: int
    n_coda: int = 0
    n_recurrences: int = 1
    trained_recurrences: int | float | None = None
    architecture: str = "looped"
    model_name: str = "custom"
    norm_layout: NormLayout = NormLayout.PRE
    injection: Injection = Injection.NONE
    loop_norm: bool = False
    pre_coda_norm: bool = False
    exit_gate: bool = False
    exit_threshold: float = 1.0
    qk_bias: bool = False
    v_bias: bool = False
    qk_norm: bool = False
    qk_norm_per_head: bool = False
    rotary_style: RotaryStyle = RotaryStyle.HALF
    rotary_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rotary_in_fp32: bool = False
    embed_scale: float = 1.0
    tie_embeddings: bool = False
    initial_state: InitialState = InitialState.PRELUDE
    initial_state_std: float = 0.0
    init_mode: str = "normal"
    initializer_range: float = 0.02
    seed: int = 0
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    ungroup_grouped_query_attention: bool = False

    n_key_value_heads: int | None = None
    device: str | None = None
    n_devices: int = 1
    source_layers: dict[str, Any] | None = None
    # TransformerLens's own default prepends, whatever the tokenizer does.
    default_prepend_bos: bool | None = None  # type: ignore[assignment]
    bos_from: str = "config"
    center_unembed: bool = False
    skipped_processing: tuple[str, ...] = ()

    # The same for every supported family; TransformerLens's tools read these fields.
    normalization_type: str | None = "RMS"
    uses_rms_norm: bool = True
    final_rms: bool = True
    positional_embedding_type: str = "rotary"
    act_fn: str = "silu"
    gated_mlp: bool = True

    def __post_init__(self) -> None:
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
            as_many = bool(self.n_key_value_heads == self.n_heads)
        except (ValueError, ArithmeticError, TypeError, RuntimeError) as error:
            raise ConfigError(f"inconsistent sizes: {error}") from error
        if as_many:
            self.n_key_value_heads = None  # TransformerLens: None means one per query head
        self.device = str(self.device)
        self.settle()

    def settle(self) -> None:
        """Check all fields, as they are now, and what follows from them.

        Raises:
            ConfigError: for one that is out of range, or contradicts another.
        """
        for name, enum in _ENUMS.items():
            self.note(**{name: _as_enum(enum, name, getattr(self, name))})
        self._validate()
        n_layers = self.n_prelude + self.n_core * self.n_recurrences + self.n_coda
        self.note(n_layers=n_layers)

    @property
    def n_kv_heads(self) -> int:
        """Number of key and value heads (``n_key_value_heads``, or ``n_heads`` if that is None)."""
        return self.n_key_value_heads or self.n_heads

    @property
    def n_hooked_kv_heads(self) -> int:
        """Heads of keys and values at their hooks: ``n_heads`` if the groups are ungrouped."""
        return self.n_heads if self.ungroup_grouped_query_attention else self.n_kv_heads

    @property
    def why_not_ungrouped(self) -> str | None:
        """Why query heads cannot have keys of their own, or None if they can."""
        if self.qk_norm and not self.qk_norm_per_head and self.n_kv_heads < self.n_heads:
            return (
                "ungroup_grouped_query_attention needs keys that are normalised head by head, if "
                "at all, and here one norm is over the keys of all heads (qk_norm)"
            )
        return None

    @property
    def n_core_weights(self) -> int:
        """Sets of weights in the core, ``n_core`` unless layers share some (``core_layers``)."""
        return self.n_core if self.core_layers is None else max(self.core_layers) + 1

    @checked
    def weights_of(self, place: LayerLocation) -> tuple[str, int]:
        """Stage, and number in it, of the weights that a layer uses."""
        if place.stage == "core" and self.core_layers is not None:
            return place.stage, self.core_layers[place.layer]
        return place.stage, place.layer

    @property
    def has_loop(self) -> bool:
        """Whether the model is more than a feedforward one that could be repeated.

        One without is all core and was trained to run it once, and nothing else makes a difference
        between a recurrence and a layer: the controls of looped models are such. It depends on how
        the model was made, never on the number of recurrences. A model of which it is not known how
        it was trained has a loop.
        """
        marks = self.injection is not Injection.NONE or self.loop_norm or self.exit_gate
        return marks or self.n_prelude + self.n_coda > 0 or self.trained_recurrences != 1

    @property
    def min_recurrences(self) -> int:
        """Fewest recurrences that give a defined output.

        Zero is legal where the initial state can go on to a coda (Huginn, retrofits).
        """
        return 0 if self.injection is not Injection.NONE and self.n_coda > 0 else 1

    @property
    def initial_state_scale(self) -> float:
        """What a standard draw of the random initial state is multiplied by."""
        return self.initial_state_std * self.embed_scale

    def _validate(self) -> None:
        positive = ("d_model", "d_head", "n_heads", "n_ctx", "d_vocab", "d_mlp", "n_core")
        counts = ("n_prelude", "n_coda", "n_recurrences")
        for name in (*positive, *counts, "n_key_value_heads"):
            value, least = getattr(self, name), 0 if name in counts else 1
            if name == "n_key_value_heads" and value is None:
                continue
            most = MOST_UNITS if name in _UNITS else None
            self.note(**{name: whole(value, name, least, most, error=ConfigError)})
        layers = self.n_prelude + self.n_core * self.n_recurrences + self.n_coda
        if max(layers, self.n_core) > limits.most_layers:
            raise ConfigError(
                f"a model of ({self.n_prelude}, {self.n_core} x {self.n_recurrences}, "
                f"{self.n_coda}) layers has {layers} effective layers, and {limits.most_layers} are"
                f" the limit: take fewer recurrences ({limits.HOW_TO_RAISE})"
            )
        self._validate_core_layers()
        for name, smallest in _NUMBERS.items():
            self.note(**{name: _number(name, getattr(self, name), smallest)})
        for name in (*_SWITCHES, *FLAGS):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("architecture", "model_name"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a text, got {getattr(self, name)!r}")
        self.note(seed=whole(self.seed, "seed", None, error=ConfigError))
        if not _is_trained_number(self.trained_recurrences):
            raise ConfigError(
                "trained_recurrences must be a finite number above 0, or None for a model "
                f"that was not trained as a loop, got {self.trained_recurrences!r}"
            )
        if not isinstance(self.default_prepend_bos, (bool, type(None))):
            raise ConfigError(
                "default_prepend_bos must be True, False or None (as the tokenizer does), got "
                f"{self.default_prepend_bos!r}"
            )
        if self.n_recurrences < self.min_recurrences:
            raise ConfigError(
                f"n_recurrences must be at least {self.min_recurrences} here, "
                f"got {self.n_recurrences}"
            )
        if self.d_head % 2:
            raise ConfigError(f"rotary embeddings need an even d_head, got {self.d_head}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads ({self.n_heads}) must be a multiple of n_key_value_heads "
                f"({self.n_kv_heads})"
            )
        if self.injection is Injection.NONE and self.initial_state is not InitialState.PRELUDE:
            raise ConfigError(
                f"initial_state={self.initial_state.value!r} needs an injection: without one the "
                "prompt would never reach the loop. Use initial_state='prelude'."
            )
        if self.pre_coda_norm and (self.loop_norm or self.n_coda == 0):
            raise ConfigError("pre_coda_norm needs a coda, and excludes loop_norm")
        if self.qk_norm_per_head and not self.qk_norm:
            raise ConfigError(
                "qk_norm_per_head says where qk_norm stands: set qk_norm=True with it"
            )
        one_of(self.init_mode, "init_mode", ("normal", "fan_in"), ConfigError)
        one_of(self.act_fn, "act_fn", ("silu",), ConfigError)
        one_of(self.gated_mlp, "gated_mlp", (True,), ConfigError)
        if self.use_attn_in and self.use_split_qkv_input:
            raise ConfigError(
                "use_split_qkv_input and use_attn_in exclude each other: turn one off"
            )
        if self.ungroup_grouped_query_attention and (why := self.why_not_ungrouped) is not None:
            raise ConfigError(why)
        if not isinstance(self.source_layers, (dict, type(None))):
            raise ConfigError(f"source_layers must be a dict or None, got {self.source_layers!r}")
        self._validate_rope()

    def _validate_core_layers(self) -> None:
        """Every set of weights is used, and every layer has one."""
        if self.core_layers is None:
            return
        given = self.core_layers
        integers = isinstance(given, tuple) and all(type(i) is int for i in given)
        if not integers or len(given) != self.n_core or set(given) != set(range(max(given) + 1)):
            raise ConfigError(
                f"core_layers must name, for each of the {self.n_core} core layers, a set of "
                f"weights, numbered from 0 without gaps, got {given!r}"
            )

    def _validate_rope(self) -> None:
        """Llama 3's scaling, the only one there is; "default" is none."""
        if self.rope_scaling is None:
            return
        if not isinstance(self.rope_scaling, dict):
            raise ConfigError(f"rope_scaling must be a dict or None, got {self.rope_scaling!r}")
        if self.rope_type not in ("llama3", "default"):
            raise ConfigError(
                f"rope_scaling of type {self.rope_type!r} is not supported; known: 'llama3', None"
            )
        keys = _LLAMA3 if self.rope_type == "llama3" else {}
        unknown = sorted(set(self.rope_scaling) - set(keys) - {"rope_type", "type"}, key=str)
        if unknown:
            raise ConfigError(f"rope_scaling of type {self.rope_type!r} has no {unknown}")
        if self.rope_type == "default":
            return self.note(rope_scaling=None)
        missing = [key for key in keys if key not in self.rope_scaling]
        if missing:
            raise ConfigError(f"rope_scaling lacks {missing}")
        for key, least in keys.items():
            _number(f"rope_scaling[{key!r}]", self.rope_scaling[key], least)
        low, high = (self.rope_scaling[f"{which}_freq_factor"] for which in ("low", "high"))
        if not low < high:
            raise ConfigError(
                f"rope_scaling needs low_freq_factor < high_freq_factor, got {low} and {high}"
            )

    @property
    def rope_type(self) -> str | None:
        """Type of the rotary scaling, or None."""
        if self.rope_scaling is None:
            return None
        return self.rope_scaling.get("rope_type", self.rope_scaling.get("type"))

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, but for the device and TransformerLens's hook flags.

        Those belong to the machine and to the moment, not to the model.
        """
        out: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _NOT_SAVED or (field.name in _SINCE and value == field.default):
                continue
            if isinstance(value, Enum):
                value = value.value
            elif isinstance(value, torch.dtype):
                value = str(value).removeprefix("torch.")
            out[field.name] = value
        return out

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, TransformerLens's that are fixed or follow from others included."""
        return vars(self) | {name: getattr(self, name) for name in ("init_weights", *sorted(FIXED))}

    @classmethod
    @checked
    def from_dict(cls, config_dict: dict[str, Any]) -> LoopedConfig:
        """Inverse of :meth:`to_dict`; not every field need be there.

        What it says of a tokenizer is left out: a model is given its tokenizer.

        Raises:
            ConfigError: an unknown field, or one that has another value in every such model.
        """
        theirs = FIXED | {"init_weights"}
        own = {name: value for name, value in config_dict.items() if name not in theirs}
        cfg = cls.from_json(own)
        for name in (theirs - set(OF_TOKENIZER)) & set(config_dict):
            setattr(cfg, name, config_dict[name])
        return cfg

    @classmethod
    @checked
    def unwrap(cls, config: dict[str, Any] | TransformerLensConfig) -> LoopedConfig:
        """As in TransformerLens: a configuration as it is, or one made of a dict of its fields.

        Raises:
            ConfigError: of another kind of model, which lacks what makes a loop.
        """
        if isinstance(config, LoopedConfig):
            return config
        return cls.from_dict(config if isinstance(config, dict) else config.to_dict())

    @checked
    def set_seed_everywhere(self, seed: int) -> None:
        """As in TransformerLens: seed Python's, NumPy's and PyTorch's global generators."""
        random.seed(seed)
        np.random.seed(whole(seed, "seed", 0, 2**32 - 1, error=ConfigError))
        torch.manual_seed(seed)

    @classmethod
    @checked
    def from_json(cls, values: dict[str, Any]) -> LoopedConfig:
        """Inverse of :meth:`to_json`; unknown keys are an error."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown configuration fields {unknown}; the file may be of a newer version"
            )
        values = dict(values)
        if "dtype" in values:
            values["dtype"] = parse_dtype(values["dtype"])
        for name, enum in _ENUMS.items():
            if name in values:
                values[name] = _as_enum(enum, name, values[name])
        if isinstance(values.get("core_layers"), list):
            values["core_layers"] = tuple(values["core_layers"])
        missing = [name for name in ("d_model", "d_head", "n_ctx", "n_core") if name not in values]
        if missing:
            raise ConfigError(f"the configuration lacks {missing}")
        return cls(**values)


def _is_trained_number(value: Any) -> bool:
    if value is None:
        return True
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"`` or ``torch.bfloat16`` -> ``torch.bfloat16``; only floats are accepted."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"dtype must be a floating point type such as 'float32' or 'bfloat16', got {dtype!r}"
        )
    return found


def _number(name: str, value: Any, least: float) -> float:
    """A finite number of fp32, in which norms and angles are computed."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not least <= value <= FLOAT32.max:
        raise ConfigError(
            f"{name} must be a finite number from {least:g} to {FLOAT32.max:.3g}, got {value!r}"
        )
    return float(value)


def _as_enum(enum: type[Enum], name: str, value: Any) -> Enum:
    try:
        return enum(value)
    except ValueError:
        valid = [cast(str, member.value) for member in enum]
        raise ConfigError(f"{name} must be one of {valid}, got {value!r}") from None
