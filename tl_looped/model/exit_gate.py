"""Ouro's exit gate: from gate logits to an exit distribution, exit steps and logits.

With gate probabilities lambda_t, a token leaves at step t with probability
``p_t = lambda_t * prod_{j<t} (1 - lambda_j)``; the last step takes what is left. At threshold q a
token takes the first step whose cumulative probability reaches q, else the last. All of it is
computed in the dtype of its input, as the reference does: in bf16 a cumulative probability above
about 0.998 rounds to 1, so tokens may leave early at the default threshold 1.
``ExitReadout.float()`` and ``GateExit(..., in_fp32=True)`` avoid that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.checks import checked
from tl_looped.errors import InputError


@checked
def exit_distribution(
    gate_logits: Float[Tensor, "... recurrence"],
) -> Float[Tensor, "... recurrence"]:
    """Probability of leaving the loop at each recurrence."""
    gate = gate_logits.sigmoid()
    remaining = (1.0 - gate[..., :-1]).cumprod(-1)
    before = torch.cat((torch.ones_like(gate[..., :1]), remaining), -1)
    gate = torch.cat((gate[..., :-1], torch.ones_like(gate[..., :1])), -1)
    return gate * before


@checked
def exit_recurrence(
    distribution: Float[Tensor, "... recurrence"], threshold: float
) -> Int[Tensor, "..."]:
    """First recurrence whose cumulative exit probability reaches ``threshold``, else the last."""
    if not distribution.shape[-1]:
        raise InputError("distribution holds no recurrence")
    reached = distribution.cumsum(-1) >= threshold
    reached[..., -1] = True
    return reached.int().argmax(-1)


@dataclass(frozen=True)
class ExitReadout:
    """What an exit gate says about a prompt.

    Args:
        gate_logits: Gate output before the sigmoid.
        exit_logits: The model's logits, had it stopped after each recurrence.
        threshold: The checkpoint's threshold, used where none is given.
    """

    gate_logits: Float[Tensor, "batch pos recurrence"]
    exit_logits: Float[Tensor, "recurrence batch pos d_vocab"]
    threshold: float = 1.0

    def float(self) -> ExitReadout:
        """The same in fp32, so that the rule and the averages are computed in it."""
        return replace(
            self, gate_logits=self.gate_logits.float(), exit_logits=self.exit_logits.float()
        )

    @property
    def distribution(self) -> Float[Tensor, "batch pos recurrence"]:
        """See :func:`exit_distribution`."""
        return exit_distribution(self.gate_logits)

    @property
    def expected_logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits averaged over the exit distribution."""
        return torch.einsum("btr,rbtv->btv", self.distribution, self.exit_logits)

    def recurrence(self, threshold: float | None = None) -> Int[Tensor, "batch pos"]:
        """See :func:`exit_recurrence`."""
        return exit_recurrence(
            self.distribution, self.threshold if threshold is None else threshold
        )

    def logits_at(self, threshold: float | None = None) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of each token at the step it takes at ``threshold``."""
        steps = self.recurrence(threshold).long()[None, ..., None]
        return torch.take_along_dim(self.exit_logits, steps, 0)[0]
