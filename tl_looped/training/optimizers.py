"""AdamW, and Muon with AdamW beside it, with weight decay on matrices only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tl_looped.errors import ConfigError
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
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    if spec.optimizer == "adamw":
        decayed = {"params": matrices, "weight_decay": spec.weight_decay}
        return torch.optim.AdamW([decayed, gains], lr=spec.learning_rate, betas=BETAS)
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer='muon' needs PyTorch 2.9 or later, and {torch.__version__} is installed; "
            "use 'adamw'"
        )
    named = dict(model.named_parameters())
    inside = {id(p) for name, p in named.items() if p.ndim == 2 and not _is_embedding_or_gate(name)}
    muon = [p for p in matrices if id(p) in inside]
    rest = [p for p in matrices if id(p) not in inside]
    return MuonWithAdamW(
        [{"params": muon, "weight_decay": spec.weight_decay}],
        [{"params": rest, "weight_decay": spec.weight_decay}, gains],
        spec.learning_rate,
    )


def _is_embedding_or_gate(name: str) -> bool:
    return any(part in ("embed", "unembed", "exit_gate") for part in name.split("."))
