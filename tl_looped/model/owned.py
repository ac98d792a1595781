"""Configurations that belong to a model: what may be set there, and what that does.

A model has a configuration of its own. HookedTransformer reads its fields at every run, and code
that is made for it sets flags there (``model.cfg.use_attn_result = True``). Here that does what the
model's method does; a field that a run honours may be set; and one from which modules or weights
were made is refused, as it would change what the configuration says and not what the model does.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tl_looped.errors import ConfigError
from tl_looped.model.bos import adds_bos, adds_eos
from tl_looped.model.tl_fields import FIXED, OWN_FIXED, TransformerLensFields, why_fixed

FLAGS = (
    "use_attn_result",
    "use_split_qkv_input",
    "use_attn_in",
    "use_hook_mlp_in",
    "ungroup_grouped_query_attention",
)
"""TransformerLens's flags, each of which ``model.set_...`` switches."""

_FREE = (
    "architecture", "model_name", "source_layers", "trained_recurrences", "seed", "init_mode",
    "initializer_range", "default_prepend_bos", "bos_from", "exit_threshold", "n_ctx",
    "rotary_style", "rotary_base", "rope_scaling", "rotary_in_fp32", "initial_state",
    "initial_state_std", "skipped_processing", "init_weights",
)  # fmt: skip
"""Fields that are read at every run, or are notes: a model's own may be set."""
_OF_THE_CELL = ("initial_state", "initial_state_std")
"""Those of them that a run reads in the model's own configuration, even if a view runs."""
_HOW_TO_SET: dict[str, str] = {
    "n_layers": "it follows from n_recurrences: model.set_recurrences(...)",
    "device": "it follows the weights: model.to(device)",
    "dtype": "it follows the weights: model.to(dtype)",
    "n_devices": "it follows the weights: from_pretrained(device_map=...)",
    "normalization_type": "it follows model.enable_compatibility_mode(), which folds the gains",
    "center_unembed": "it follows model.enable_compatibility_mode(), which centres the logits",
}
"""Fields of a model's configuration that the model sets, and how to make it."""


class OwnedFields(TransformerLensFields):
    """What a configuration does when it is told whose it is."""

    __slots__ = ("_owners",)  # weak references to the model; no field, and in no copy

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]
        _owners: tuple[weakref.ref[Any], ...]

        def settle(self) -> None: ...  # noqa: D102

    def belong_to(self, *owners: Any) -> None:
        """Be the configuration of a model, or of a view and its model, from now on."""
        object.__setattr__(self, "_owners", tuple(map(weakref.ref, owners)))

    @property
    def _owner(self) -> Any:
        """The model, or None; of a view that is gone, the model that it was a view of."""
        references = getattr(self, "_owners", ())
        return next((owner for one in references if (owner := one()) is not None), None)

    @property
    def _tokenizer(self) -> Any:
        return getattr(self._owner, "tokenizer", None)

    @property
    def tokenizer_name(self) -> str | None:
        """Where the model's tokenizer is from; None without a model or a tokenizer."""
        return getattr(self._tokenizer, "name_or_path", None) or None

    @property
    def tokenizer_prepends_bos(self) -> bool | None:
        """Whether it puts BOS before a text by itself; None without a model or a tokenizer."""
        return None if self._tokenizer is None else adds_bos(self._tokenizer)

    @property
    def tokenizer_appends_eos(self) -> bool | None:
        """Whether it puts EOS behind a text by itself; None without a model or a tokenizer."""
        return None if self._tokenizer is None else adds_eos(self._tokenizer)

    @property
    def default_padding_side(self) -> str | None:
        """The side on which it pads; None without a model or a tokenizer."""
        return getattr(self._tokenizer, "padding_side", None)

    def note(self, **changes: Any) -> None:
        """Take what the model has made true already."""
        self.__dict__.update(changes)

    def __getstate__(self) -> dict[str, Any]:
        """The fields: a copy belongs to no model."""
        return dict(self.__dict__)

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            if name in FIXED or name in OWN_FIXED:
                only = OWN_FIXED[name] if name in OWN_FIXED else getattr(self, name)
                if not _same(value, only):
                    raise ConfigError(f"{name} cannot be {value!r}: {why_fixed(name, only)}")
                if name in OWN_FIXED:
                    self.note(**{name: only})
            elif (owner := self._owner) is None:
                super().__setattr__(name, value)
            else:
                self._set_of(owner, name, value)

    def _set_of(self, owner: Any, name: str, value: Any) -> None:
        """Set a field of a model's configuration, if a run honours it."""
        if name in FLAGS:
            getattr(owner, f"set_{name}")(value)
            return self.note(**{name: vars(owner.cfg)[name]})
        current = getattr(self, name, None)
        # 5 trained recurrences are not a mean of 5.0.
        if _same(value, current) and (name not in _FREE or type(value) is type(current)):
            return None
        if len(self._owners) > 1 and (name not in _FREE or name in _OF_THE_CELL):
            raise ConfigError(
                f"this is the configuration of a view of a model, and {name} is the model's: set "
                "that one's, model.cfg"
            )
        if name == "n_recurrences":
            owner.set_recurrences(value)
            return None
        if name in _FREE or name not in self.__dataclass_fields__:
            before = dict(vars(self))
            self.note(**{name: value})
            try:
                return self.settle()
            except ConfigError:
                self.note(**before)
                raise
        made_of = (
            f"the model was made with {getattr(self, name)!r}. A copy of the configuration may have"
            f" another, dataclasses.replace(model.cfg, {name}=...), and a model be made of that"
        )
        how = _HOW_TO_SET.get(name, made_of)
        raise ConfigError(f"{name} of a model cannot be set to {value!r}: {how}")


def _same(value: Any, current: Any) -> bool:
    """Whether a value to be set is the one that is there."""
    if isinstance(value, torch.device):
        value = str(value)
    comparable = value is None or isinstance(value, (bool, int, float, str, tuple, dict))
    comparable = comparable or isinstance(value, torch.dtype)
    return comparable and bool(value == current)
