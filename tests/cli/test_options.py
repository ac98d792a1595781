"""Options of ``tl-looped train`` are the fields of the dataclasses that it fills."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from tl_looped.cli import app
from tl_looped.cli.options import described_fields, options_of, with_options
from tl_looped.training.spec import Shape, TrainSpec

FLAGS = [
    "--out",
    "--from",
    "--prelude",
    "--core",
    "--coda",
    "--recurrences",
    "--sampled",
    "--sigma",
    "--backprop-last",
    "--injection",
    "--no-injection",
    "--loss",
    "--beta",
    "--d-model",
    "--heads",
    "--context",
    "--vocabulary",
    "--tokenizer",
    "--held-out",
    "--steps",
    "--batch-size",
    "--learning-rate",
    "--warmup",
    "--evaluate-every",
    "--optimizer",
    "--bf16",
    "--no-bf16",
    "--seed",
    "--data-seed",
    "--snapshots",
    "--device",
]
PARAMETERS = {one.name: one for one in get_command(app).commands["train"].params}


def test_training_has_the_flags_that_it_always_had() -> None:
    found = [flag for one in PARAMETERS.values() for flag in (*one.opts, *one.secondary_opts)]
    assert sorted(set(found) - {"data"}) == sorted(FLAGS)


@pytest.mark.parametrize("of", [Shape, TrainSpec])
def test_every_field_is_described(of: type) -> None:
    assert described_fields(of).keys() == {one.name for one in fields(of)}
    assert all(text.endswith(".") for text in described_fields(of).values())


def test_defaults_are_the_dataclasses_own_but_for_three() -> None:
    others = {"steps": 1000, "warmup": 100, "evaluate_every": 100}
    own = {o.name: o.default for o in fields(TrainSpec) if o.name in PARAMETERS}
    del own["recurrences"], own["loss"]  # made of several options
    assert {name: PARAMETERS[name].default for name in own} == own | others
    shown = {one.name: one.default for one in fields(Shape)}
    assert shown.keys() <= PARAMETERS.keys()
    assert all(PARAMETERS[name].default is None for name in shown)
    assert PARAMETERS["heads"].show_default == str(Shape.heads)
    assert PARAMETERS["injection"].show_default == "no-injection"


@dataclass(frozen=True)
class Two:
    """Two numbers.

    Args:
        first: ``int`` that is
            needed. Not shown.
        second: Another.
    """

    first: int
    second: float = 0.5


def test_a_command_gets_a_dict_for_each_dataclass() -> None:
    given = []
    small, runner = typer.Typer(), CliRunner()

    @small.command()
    @with_options(two=options_of(Two, defaults={"first": 3}))
    def command(name: str, two: dict[str, float]) -> None:
        given.append((name, two))

    assert described_fields(Two) == {"first": "int that is needed.", "second": "Another."}
    assert fields(Two)[0].default is MISSING
    assert runner.invoke(small, ["a", "--second", "2"]).exit_code == 0
    assert given == [("a", {"first": 3, "second": 2.0})]
    assert runner.invoke(small, ["a", "--first", "x"]).exit_code == 2
