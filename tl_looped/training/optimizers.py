"""AdamW, and Muon with AdamW beside it, with weight decay on matrices only.

What a matrix is, is a parameter's role and not its number of dimensions: gains and all biases are
never decayed, and Muon takes the linear maps of the blocks and the injection alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tl_looped.errors import ConfigError
from tl_looped.model.roles import Role, parameter_roles
from tl_looped.training.spec import TrainSpec

BETAS = (0.9, 0.95)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, as one optimiser with one state.

    ``torch.optim.Muon`` takes nothing but matrices. Its updates are scaled to AdamW's root mean
    square (``match_rms_adamw``), so that one learning rate serves both.

    Args:
        matrices: Groups of parameters for Muon.
        others: Groups of parameters for AdamW.
        lr: Learning rate.
    """

    def __init__(
        self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], lr: float
    ) -> None:
        self.muon = torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=BETAS)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._join()

    def _join(self) -> None:
        """Both parts read their groups and their state from this optimiser."""
        n = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = (
            self.param_groups[:n],
            self.param_groups[n:],
        )
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer``'s, which puts new groups and a new state in place."""
        super().load_state_dict(state_dict)
        self._join()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss


def make_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """The spec's optimiser for a model.

    Raises:
        ConfigError: ``"muon"`` where PyTorch has none.
    """
    roles = parameter_roles(model)
    vectors = _of(model, roles, Role.GAIN, Role.BIAS)
    undecayed = {"params": vectors, "weight_decay": 0.0}
    if spec.optimizer == "adamw":
        matrices = _of(model, roles, Role.EMBEDDING, Role.GATE, Role.MATRIX)
        decayed = {"params": matrices, "weight_decay": spec.weight_decay}
        return torch.optim.AdamW([decayed, undecayed], lr=spec.learning_rate, betas=BETAS)
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer='muon' needs PyTorch 2.9 or later, and {torch.__version__} is installed; "
            "use 'adamw'"
        )
    muon = _of(model, roles, Role.MATRIX)
    rest = _of(model, roles, Role.EMBEDDING, Role.GATE)
    return MuonWithAdamW(
        [{"params": muon, "weight_decay": spec.weight_decay}],
        [{"params": rest, "weight_decay": spec.weight_decay}, undecayed],
        spec.learning_rate,
    )


def _of(model: nn.Module, roles: dict[str, Role], *wanted: Role) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if roles[name] in wanted]
