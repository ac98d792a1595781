"""Several processes on the same prompts: ``accelerate launch -m tl_looped ...``.

On GPUs by ``accelerate launch``; on CPUs by ``torchrun --nproc-per-node 2 -m tl_looped ...``, since
``accelerate launch --cpu`` starts a single process unless MPI is there.
Every process runs the batches that its number selects and writes its own part files into the
shared folder; the first process joins them. The batches are those of a single process, so that the
results are the same. Outside of a launch nothing of accelerate is imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from tl_looped.errors import ConfigError, InputError

T = TypeVar("T")

# The first process may have to wait for the slowest for as long as that one's prompts take.
_PATIENCE = timedelta(days=14)


@dataclass(frozen=True)
class Workers:
    """The processes of a launch, seen from one of them.

    Args:
        rank: Number of this process.
        world: Number of processes.
        device: Where this one runs; None for TransformerLens's default.
        state: Accelerate's state, if there is more than one process.
    """

    rank: int = 0
    world: int = 1
    device: str | None = None
    state: Any = None

    @classmethod
    def here(cls, device: str | None = None) -> Workers:
        """The processes that this one was launched with.

        Raises:
            InputError: for a device over which a model would be spread.
            ConfigError: in a launch of several processes without accelerate.
        """
        if device in ("auto", "balanced", "balanced_low_0", "sequential"):
            raise InputError(
                f"device={device!r} would spread one model over several devices, which looped "
                "models do not support: their layers use their weights at every recurrence without "
                "being the modules that accelerate's device_map could move. Name one device, or "
                "use a smaller dtype; several devices run prompts in parallel through "
                "accelerate launch -m tl_looped"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls(device=device)
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ConfigError(
                "several processes need accelerate: pip install accelerate"
            ) from error
        state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
        own = str(state.device) if device in (None, "cuda") else device
        return cls(state.process_index, state.num_processes, own, state)

    @property
    def first(self) -> bool:
        """Whether this process joins the parts and draws."""
        return self.rank == 0

    def mine(self, items: list[T]) -> list[T]:
        """Every ``world``-th item."""
        return items[self.rank :: self.world]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def close(self) -> None:
        """End the launch; without it PyTorch warns about the process group when it exits."""
        if self.state is not None:
            self.state.destroy_process_group()
