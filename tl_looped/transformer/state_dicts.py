"""State dicts under TransformerLens's names: read into a model's own weights, and processed.

``HookedTransformer`` has a set of weights for every layer. Here the effective layers of a loop
share theirs, so a state dict fits only if its copies of one weight are equal; and it fits only if
the biases that a looped model does not have are zero. Everything is looked at before the first
weight is written. What TransformerLens has no name for, the adapter of an injection and an exit
gate, may be there under its own name, and stays as it is otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_looped.checks import described
from tl_looped.errors import InputError
from tl_looped.model.config import LoopedConfig
from tl_looped.transformer.weight_map import StoredRows
from tl_looped.words import count

if TYPE_CHECKING:
    from tl_looped.transformer.named_weights import NamedWeights

# Buffers of HookedTransformer: masks and rotary tables, which are computed here.
_BUFFERS = re.compile(r"blocks\.\d+\.attn\.(mask|IGNORE|rotary_sin|rotary_cos)")
_HEADS = re.compile(r"attn\.(_?)([Wb])_([QKVO])$")
_FOLDABLE = ("ln1.w", "ln2.w")


def load(model: NamedWeights, state_dict: Mapping[str, Tensor]) -> None:
    """Write a state dict into a model's weights, in place, if all of it fits.

    Raises:
        InputError: names that are missing or unknown, shapes that differ, copies of one weight that
            differ, biases that the model does not have, numbers that are not finite.
        LayerIndexError: more layers than there are at the present number of recurrences.
    """
    parameters = dict(model.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        raise InputError("a model on the meta device has no values to load into")
    found = _Found(model)
    for name, value in state_dict.items():
        found.take(name, value)
    values = found.complete()
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def refuse_other_names(model: NamedWeights, state_dict: Mapping[str, Any]) -> None:
    """Raise if names are TransformerLens's, which PyTorch's own loading does not know."""
    theirs = ("blocks.", "unembed.W_U", "ln_final.")
    found = [name for name in state_dict if str(name).startswith(theirs)]
    if found:
        raise InputError(
            f"{found[0]!r} is TransformerLens's name of a weight, and load_state_dict takes this "
            f"model's own, such as {next(name for name, _ in model.named_parameters())!r}: "
            "model.load_and_process_state_dict(state_dict, fold_ln=False, center_unembed=False, "
            "fold_value_biases=False) reads TransformerLens's"
        )


class _Found:
    """What a state dict says of each parameter, while it is read."""

    def __init__(self, model: NamedWeights) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        # By parameter, by first row: the name in the state dict, and the rows as they are stored.
        self.rows: dict[str, dict[int, tuple[str, Tensor]]] = {}

    def take(self, name: str, value: Tensor) -> None:
        """Read one entry."""
        if not isinstance(value, Tensor) or not (value.is_floating_point() or _is_buffer(name)):
            raise InputError(f"{name} must be a tensor of floats, got {described(value)}")
        if _is_buffer(name):
            return
        if value.is_meta or value.layout != torch.strided:
            kind = "on the meta device, without values" if value.is_meta else str(value.layout)
            raise InputError(f"{name} must be a dense tensor with values, and it is {kind}")
        own = name in self.parameters
        stored = StoredRows(name) if own else self.model.parameter_of(name)
        if stored is None:
            if bool(value.count_nonzero()):
                raise InputError(
                    f"{name} is not zero, and looped models have no such bias: this state dict is "
                    "of another model, or its value biases were folded (fold_value_biases=False)"
                )
            return
        if not bool(value.isfinite().all()):
            raise InputError(f"{name} is not finite: it holds NaN or infinity")
        value = value.detach()
        dtype = self.parameters[stored.name].dtype
        if not bool(value.to(dtype).isfinite().all()):
            raise InputError(
                f"{name} has numbers beyond the largest of {dtype}, the model's dtype: "
                "move the model to another one first (model.to(torch.float32))"
            )
        self._store(name, stored, value if own else _as_stored(name, value, self.model.cfg))

    def _store(self, name: str, stored: StoredRows, value: Tensor) -> None:
        parameter = self.parameters[stored.name]
        want = parameter[stored.rows].shape
        if value.shape != want:
            raise InputError(
                f"{name} has the shape of {tuple(value.shape)} as it is stored, and "
                f"{stored.name}{_written(stored.rows)} has {tuple(want)}"
            )
        rows = self.rows.setdefault(stored.name, {})
        first, earlier = rows.setdefault(stored.rows.start or 0, (name, value))
        if not torch.equal(earlier, value.to(earlier)):
            raise InputError(
                f"{first} and {name} differ, and in this model they are one weight, {stored.name}"
                f"{_written(stored.rows)}. {_why_one(self.model, stored.name)}"
            )

    def complete(self) -> dict[str, Tensor]:
        """Every parameter's new value; those that TransformerLens has no name for may lack."""
        self._add_folded_gains()
        values: dict[str, Tensor] = {}
        missing: list[str] = []
        for name, parameter in self.parameters.items():
            rows = self.rows.get(name, {})
            parts = [rows[start][1].to(parameter.device) for start in sorted(rows)]
            if sum(map(len, parts)) == len(parameter):
                values[name] = torch.cat(parts)
            elif parts or (known := self.model.transformer_lens_names(name)):
                given = {given for given, _ in rows.values()}
                named = self.model.transformer_lens_names(name) if parts else known
                missing += [each for each in named if each not in given][:4]
        if missing:
            raise InputError(
                f"the state dict lacks {len(missing)} weights of this model, or more: {missing[:6]}"
                f". It has {self.model.loop.n_layers} effective layers at "
                f"{count(self.model.loop.R, 'recurrence')}; set_recurrences changes that, and "
                "fill_missing_keys fills in its own weights"
            )
        return values

    def _add_folded_gains(self) -> None:
        """Gains of one, where those that can be folded are folded into the weights behind them."""
        gains = [n for n in self.parameters if n == "final_norm.w" or n.endswith(_FOLDABLE)]
        if any(name in self.rows for name in gains):
            return
        if why := _why_not_folded(self.model.cfg):
            raise InputError(
                "the gains of this state dict are folded into its weights (there is no ln_final.w),"
                f" and {why}: take the state dict of the model before folding"
            )
        for name in gains:
            self.rows[name] = {0: ("a folded gain", torch.ones_like(self.parameters[name]))}


def _why_not_folded(cfg: LoopedConfig) -> str | None:
    """Why no stored weights are those of the model with its final norm folded; None if some are."""
    if cfg.loop_norm or cfg.pre_coda_norm:
        return (
            f"the final norm of {cfg.model_name} stands in front of other things than the "
            "unembedding too"
        )
    return None


def _is_buffer(name: str) -> bool:
    return isinstance(name, str) and _BUFFERS.fullmatch(name) is not None


def _as_stored(name: str, value: Tensor, cfg: LoopedConfig) -> Tensor:
    """A weight of TransformerLens's shape as the model stores it."""
    heads = _HEADS.search(name)
    if heads is None:
        plain = name.endswith(".w") or name == "embed.W_E"
        return value if plain else _matrix(name, value).mT
    _, kind, which = heads.groups()
    if value.ndim != (3 if kind == "W" else 2):
        wanted = "[head, in, out]" if kind == "W" else "[head, d_head]"
        raise InputError(f"{name} must be {wanted}, got shape {tuple(value.shape)}")
    if which in "KV" and len(value) == cfg.n_heads != cfg.n_kv_heads:
        value = _once(name, value, cfg)
    if kind == "b":
        return value
    stored: Tensor = value.flatten(0, 1).mT if which == "O" else value.mT.flatten(0, 1)
    return stored


def _matrix(name: str, value: Tensor) -> Tensor:
    if value.ndim != 2:
        raise InputError(f"{name} must be [in, out], got shape {tuple(value.shape)}")
    return value


def _once(name: str, value: Tensor, cfg: LoopedConfig) -> Tensor:
    """Keys or values that are repeated for each query head, once."""
    groups = value.unflatten(0, (cfg.n_kv_heads, -1))
    if not torch.equal(groups, groups[:, :1].expand_as(groups)):
        raise InputError(
            f"{name} has other weights for query heads that share one of the {cfg.n_kv_heads} key "
            "and value heads of this model"
        )
    once: Tensor = groups[:, 0]
    return once


def _written(rows: slice) -> str:
    return "" if rows.start is None else f"[{rows.start}:{rows.stop}]"


def _why_one(model: NamedWeights, parameter: str) -> str:
    if parameter == "embed.W_E":
        return (
            "Its unembedding is its embedding (tie_embeddings): a state dict with folded or "
            "centred W_U is another model's"
        )
    return (
        f"A loop runs with the same weights in every recurrence; the model is at {model.loop.R} of "
        "them, and set_recurrences changes that"
    )


# -- TransformerLens's processing, of a state dict ------------------------------------------------


def fill_missing(model: NamedWeights, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the model's own weights where it has none."""
    have = {re.sub(r"attn\._([Wb]_[KV])$", r"attn.\1", name) for name in state_dict}
    own = {name: value.detach() for name, value in model.tl_parameters().items()}
    return {**state_dict, **{name: value for name, value in own.items() if name not in have}}


def fold_gains(cfg: LoopedConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gains of ``ln1``, ``ln2`` and ``ln_final`` multiplied into the weights behind them.

    As in TransformerLens, what is left of them is ones.

    Raises:
        InputError: the model's final norm has more behind it, or the names are not
            TransformerLens's.
    """
    if why := _why_not_folded(cfg):
        raise InputError(
            f"fold_layer_norm: {why}, so that folded weights would be those of another model. "
            "enable_compatibility_mode() shows gains as folded and changes no number"
        )
    if not any(name.startswith("blocks.") for name in state_dict):
        raise InputError(
            "fold_layer_norm: the state dict has none of TransformerLens's names, blocks.0.ln1.w "
            f"and the like, but {sorted(state_dict)[:4]}: model.tl_parameters() has them"
        )
    out = dict(state_dict)
    behind = {
        "ln1.w": ("attn.W_Q", "attn.W_K", "attn._W_K", "attn.W_V", "attn._W_V"),
        "ln2.w": ("mlp.W_in", "mlp.W_gate"),
        "ln_final.w": ("unembed.W_U",),
    }
    for name, gain in state_dict.items():
        for suffix, weights in behind.items():
            if name != suffix and not re.fullmatch(rf"blocks\.\d+\.{re.escape(suffix)}", name):
                continue
            for weight in weights:
                if (key := name.removesuffix(suffix) + weight) in out:
                    out[key] = gain[:, None] * out[key]
            out[name] = torch.ones_like(gain)
    return out


def center_unembedding(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``unembed.W_U`` and ``b_U`` without their mean over the vocabulary."""
    out = dict(state_dict)
    if "unembed.W_U" not in out:
        raise InputError(f"the state dict has no unembed.W_U, it has {sorted(out)[:6]}")
    for name in ("unembed.W_U", "unembed.b_U"):
        if name in out:
            out[name] = out[name] - out[name].mean(-1, keepdim=True)
    return out
