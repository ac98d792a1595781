"""Leaving the loop early: rules for ``exit_rule=``, and what an exit gate (Ouro) says of a prompt.

The rules are explained in :mod:`tl_looped.model.exit_rules`, the gate in
:mod:`tl_looped.model.exit_gate`.
"""

from tl_looped.model.exit_gate import ExitReadout, exit_distribution, exit_recurrence
from tl_looped.model.exit_rules import (
    Acceleration,
    ArgmaxStability,
    EntropyDifference,
    ExitAt,
    ExitResult,
    ExitRule,
    GateExit,
    KLDivergence,
    LatentDifference,
)

__all__ = [
    "Acceleration",
    "ArgmaxStability",
    "EntropyDifference",
    "ExitAt",
    "ExitReadout",
    "ExitResult",
    "ExitRule",
    "GateExit",
    "KLDivergence",
    "LatentDifference",
    "exit_distribution",
    "exit_recurrence",
]
