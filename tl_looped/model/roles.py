"""What a parameter is, by the module that holds it and its name; its shape does not say.

The biases of queries, keys and values are stored ``[heads, d_head]``, as their checkpoints add
them, and are biases all the same.
"""

from __future__ import annotations

from enum import Enum

from torch import nn

from tl_looped.model.norms import NormWeights


class Role(Enum):
    """Roles of parameters.

    ``EMBEDDING`` is the embedding and the unembedding, tied or not; ``GATE`` the exit gate's
    weight; ``MATRIX`` the linear maps of the blocks and of the injection.
    """

    GAIN = "gain"
    BIAS = "bias"
    EMBEDDING = "embedding"
    GATE = "gate"
    MATRIX = "matrix"


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter, by name and in the order of ``named_parameters``."""
    gains = {id(module.w) for module in model.modules() if isinstance(module, NormWeights)}
    return {name: _role(name, id(p) in gains) for name, p in model.named_parameters()}


def _role(name: str, is_gain: bool) -> Role:
    *modules, own = name.split(".")
    if is_gain:
        return Role.GAIN
    if own.endswith("bias"):
        return Role.BIAS
    if "exit_gate" in modules:
        return Role.GATE
    return Role.EMBEDDING if {"embed", "unembed"} & set(modules) else Role.MATRIX
