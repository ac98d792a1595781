"""Random weights. The paper's Section 4.2 turns on the initialisation, so both kinds are here."""

from __future__ import annotations

import torch
from torch import nn

from tl_looped.model.config import LoopedConfig
from tl_looped.model.roles import Role, parameter_roles


@torch.no_grad()
def init_weights(model: nn.Module, cfg: LoopedConfig) -> None:
    """Draw every matrix from ``cfg.seed``; gains become one and biases zero.

    The draws are made on the CPU in fp32, in the order of ``named_parameters``, so the same seed
    gives the same weights on every device. On the meta device nothing is drawn.

    Args:
        model: The module to fill.
        cfg: Its ``init_mode``: ``"normal"`` draws N(0, ``initializer_range``²); ``"fan_in"`` draws
            linear maps N(0, 1 / fan_in) and embeddings N(0, 1).
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            continue
        if roles[name] is Role.GAIN:
            parameter.fill_(1.0)
        elif roles[name] is Role.BIAS:
            parameter.zero_()
        else:
            draw = torch.randn(parameter.shape, generator=generator)
            if cfg.init_mode == "normal":
                std = cfg.initializer_range
            else:
                std = 1.0 if name == "embed.W_E" else parameter.shape[-1] ** -0.5
            parameter.copy_(draw * std)
