"""Every public callable has a valid call, and refuses in our words what it cannot take."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from doors import UNSUPPORTED, World, faults, public

from tl_looped import TLLoopedError

pytestmark = pytest.mark.once

# Their valid call is refused: it names what there is not.
REFUSED = {
    "adapters.find_adapter": "UnknownArchitectureError",
    "LoopedTransformer.cuda": "InputError",
    "LoopedTransformer.mps": "InputError",
    "Run.load": "DataError",
    "experiments.compare_runs": "InputError",
    "experiments.load": "DataError",
    "experiments.load_runs": "DataError",
    "experiments.run": "DataError",
    "register_adapter": "RegistryError",
    "retrofit": "CheckpointError",
    "training.train": "DataError",
    "training.train_model_on_texts": "DataError",
    "training.train_on_texts": "DataError",
    "unregister_adapter": "RegistryError",
    "verification.verify": "CheckpointError",
    **{f"LoopedTransformer.{name}": "UnsupportedMethodError" for name in UNSUPPORTED},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """With 8 GB more of memory at most, and without the checks that only tests make."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 8 * 2**30, before[1]))
    jaxtyping.config.update("jaxtyping_disable", True)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("doors")
        patch.chdir(folder)
        yield World(folder)
    jaxtyping.config.update("jaxtyping_disable", False)
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_every_public_callable_has_a_valid_call(world: World) -> None:
    assert set(world.calls()) == set(public())


def test_valid_calls_work(world: World) -> None:
    refused: dict[str, str] = {}
    for name, door in world.doors().items():
        try:
            door.run()
        except TLLoopedError as error:
            refused[name] = type(error).__name__
    assert refused == REFUSED


def test_some_wrong_arguments_are_refused(world: World) -> None:
    found, made = faults(world, 0, 61)
    assert found == []
    assert made > 200


@pytest.mark.full
@pytest.mark.parametrize("start", range(4))
def test_wrong_arguments_are_refused(world: World, start: int) -> None:
    found, made = faults(world, start, 4)
    assert found == []
    assert made > 4500
