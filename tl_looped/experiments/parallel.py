"""Several processes on the same prompts: ``accelerate launch -m tl_looped ...``.

On GPUs ``accelerate launch`` starts a process for each. On CPUs it needs ``--multi_gpu``, which is
what makes it start several processes, by torchrun, whatever the device::

    accelerate launch --multi_gpu --num_processes 2 -m tl_looped analyze ... --device cpu

With ``--cpu``, and with ``MULTI_CPU`` in its configuration, it starts a single one, and leaves more
to MPI.

Every process runs the batches that its number selects and writes its own part files into the
shared folder; the first process joins them. The batches are those of a single process, so that the
results are the same. Outside of a launch nothing of accelerate is imported.

A model that is too large for one device is spread over several by one process (``device="auto"``);
the two cannot be combined, as the processes would have to share the devices.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from tl_looped._compat import get_device
from tl_looped.errors import ConfigError, InputError
from tl_looped.transformer.spreading import PLANS

T = TypeVar("T")

# The first process may have to wait for the slowest for as long as that one's prompts take.
_PATIENCE = timedelta(days=14)


@dataclass(frozen=True)
class Workers:
    """The processes of a launch, seen from one of them.

    Args:
        rank: Number of this process.
        world: Number of processes.
        device: Where this one runs; None for TransformerLens's default; one of accelerate's plans
            (``"auto"``, ...) to spread the model.
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
            InputError: for a device that is not there, and for one that spreads the model in a
                launch of several processes.
            ConfigError: in a launch of several processes without accelerate, or where accelerate
                cannot make them work together.
        """
        if device is not None and device not in PLANS:
            _check_device(device)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world <= 1:
            return cls(device=device)
        if device in PLANS:
            raise InputError(
                f"device={device!r} spreads one model over all devices, and this is a launch of "
                f"{world} processes, which would each spread one over the same devices: run it "
                "without accelerate launch, or name one device (or none) to give each process a "
                "model of its own"
            )
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ConfigError(
                "several processes need accelerate: pip install accelerate"
            ) from error
        on_cpu = torch.device(get_device() if device is None else device).type == "cpu"
        state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
        if state.num_processes != world:
            # Each would take itself for the only one and write into the same folder.
            raise ConfigError(
                f"{world} processes were launched, and accelerate joins {state.num_processes} of "
                f"them on {state.device}: launch one process, or use device='cpu'"
            )
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


def _check_device(device: str) -> None:
    try:
        # Reads a value, which a device without memory (meta) cannot give.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device {device!r} cannot be used here: {reason}. There are cpu, cuda, cuda:1, mps as "
            f"far as the machine has them, and the plans {', '.join(PLANS)}"
        ) from error
