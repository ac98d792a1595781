"""TransformerLens's weight processing, of what a looped model shows.

``HookedTransformer`` multiplies gains into weights, centres them and moves biases. Here the weights
stay as they are stored, and what is shown changes: so a model can be trained, saved and shown as it
is at any time, and layers that share weights cannot fall apart.

What each step is, for models with RMSNorm:

- ``fold_ln``: gains count as part of the weights behind their norms. No number of a run changes.
- ``center_unembed``: ``W_U`` and the logits lose their mean over the vocabulary.
- ``center_writing_weights``: not done, in ``HookedTransformer`` neither. RMSNorm does not take the
  mean out, so a centred stream would be another one.
- ``fold_value_biases``: nothing to do without value biases, and refused with them: what is moved
  would be an output bias, which these models do not have. Sums over heads and layers leave none out
  because there is none.
- ``refactor_factored_attn_matrices``: refused, as ``HookedTransformer`` does for rotary positions.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tl_looped.errors import InputError
from tl_looped.transformer import weights

if TYPE_CHECKING:
    from tl_looped.model.config import LoopedConfig
    from tl_looped.transformer.named_weights import NamedWeights

_LOG = logging.getLogger("tl_looped")
_SAID: set[str] = set()

NO_REFACTORING = (
    "refactor_factored_attn_matrices is not supported: rotary queries and keys allow no such "
    "change of basis, and TransformerLens refuses it for them too. Set it to False"
)
NO_CENTRED_WRITING = (
    "center_writing_weights=True changes nothing: it needs a LayerNorm, which takes the mean out "
    "of the stream, and this model has RMSNorm. HookedTransformer skips it as well"
)


def say_once(text: str) -> None:
    """Log a warning, the first time in this process."""
    if text not in _SAID:
        _SAID.add(text)
        _LOG.warning(text)


@dataclass(frozen=True)
class Processing:
    """What is asked for, by TransformerLens's names; see the module.

    Args:
        fold_ln: Show gains as part of the weights behind their norms.
        center_writing_weights: Without effect.
        center_unembed: Whether to centre ``W_U`` and the logits; None leaves that as it is.
        fold_value_biases: Without effect; refused where there are value biases.
        refactor_factored_attn_matrices: Refused.
    """

    fold_ln: bool = False
    center_writing_weights: bool = False
    center_unembed: bool | None = False
    fold_value_biases: bool = False
    refactor_factored_attn_matrices: bool = False

    def check(self, cfg: LoopedConfig) -> None:
        """Refuse what cannot be honoured.

        Raises:
            InputError: ``refactor_factored_attn_matrices``; ``fold_value_biases`` of a model with
                value biases.
        """
        if self.refactor_factored_attn_matrices:
            raise InputError(NO_REFACTORING)
        if self.fold_value_biases:
            refuse_value_biases(cfg)

    def apply(self, model: NamedWeights) -> None:
        """Show the model's weights so from now on."""
        self.check(model.cfg)
        weights.fold_gains(model, self.fold_ln)
        if self.center_unembed is not None:
            center_logits(model, self.center_unembed)

    def note(self, cfg: LoopedConfig) -> None:
        """Write down, and say once, what was asked for and does not apply."""
        if self.center_writing_weights:
            cfg.skipped_processing = ("center_writing_weights",)
            say_once(NO_CENTRED_WRITING)


def center_logits(model: NamedWeights, centered: bool) -> None:
    """Give ``W_U`` and the logits without their mean over the vocabulary, or as they are."""
    for cfg in (model.cfg, model.cell.cfg):  # the model's own, even if a view is centred
        cfg.note(center_unembed=centered)
    model.unembed.centered = centered


def refuse_value_biases(cfg: LoopedConfig) -> None:
    """Raise if a model has value biases."""
    if cfg.v_bias:
        raise InputError(
            f"fold_value_biases=True would move the value biases of {cfg.model_name} into output "
            "biases, which looped models do not have: hook_v, hook_z and each head's result would "
            "no longer sum to the layer's output. Set fold_value_biases=False; the biases are "
            "blocks[i].attn.b_V"
        )
