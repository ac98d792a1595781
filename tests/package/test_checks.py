"""The door: arguments of a wrong type, shape or value are refused before anything is done."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float
from refusals import refused
from torch import Tensor

from tl_looped import ConfigError, InputError, LoopedTransformer
from tl_looped.checks import Seed, at_most_one, checked, number, one_of, whole
from tl_looped.errors import ArgumentTypeError


@checked
def mean(
    x: Float[Tensor, "batch pos"],
    weight: Float[Tensor, "batch pos"] | None = None,
    names: Sequence[str] = (),
    scale: float = 1.0,
    form: Literal["abs", "rel"] = "abs",
    pair: tuple[int, str] | None = None,
    by_name: Mapping[str, int | None] | None = None,
    *more: int,
    model: LoopedTransformer | None = None,
    **options: bool,
) -> Any:
    """Some documentation."""
    return "a return value is not looked at", x if weight is None else x * weight


x = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: mean(3), ("mean", "x must be Float[Tensor, 'batch pos']", "the int 3")),
        (lambda: mean(torch.zeros(2)), ("x must", "float32 tensor of shape (2,)")),
        (lambda: mean(torch.zeros(2, 3).int()), ("an int32 tensor of shape (2, 3)",)),
        (lambda: mean(x, torch.zeros(3, 3)), ("weight", "(3, 3), beside x of shape (2, 3)")),
        (lambda: mean(x, names=["a", "b", None]), ("names", "a list of 3 (str and NoneType)")),
        (lambda: mean(x, scale="1"), ("scale must be float", "the str '1'")),
        (lambda: mean(x, form="max"), ("form must be Literal['abs', 'rel']", "'max'")),
        (lambda: mean(x, pair=(1, 2)), ("pair", "a tuple of 2 (int)")),
        (lambda: mean(x, pair=(1, "a", 2)), ("pair", "a tuple of 3")),
        (lambda: mean(x, by_name={"a": 1, "b": "c"}), ("by_name", "a dict of 2 (int and str)")),
        (lambda: mean(x, None, (), 1.0, "abs", None, None, 4, "5"), ("more", "the str '5'")),
        (lambda: mean(x, model=3), ("model must be LoopedTransformer | None", "the int 3")),
        (lambda: mean(x, fast="yes"), ("options must be bool", "'yes'")),
    ],
)
def test_wrong_types_are_refused_by_name(call: Callable[[], Any], parts: tuple[str, ...]) -> None:
    for _ in range(3):  # every item is looked at, not one at random
        with refused(ArgumentTypeError, *parts):
            call()
        with pytest.raises(TypeError):
            call()


def test_what_hints_mean_is_taken() -> None:
    for scale in (1, 2.0, np.float32(3), np.int64(2), torch.tensor(2.0), np.array(1.0)):
        mean(x, scale=scale)
    mean(x, torch.ones(2, 3), ["a"], 1.0, "rel", (np.int64(1), "a"), {"a": None}, 1, 2, fast=True)
    with pytest.raises(TypeError, match="missing 1 required"):
        mean()
    with pytest.raises(TypeError, match="unexpected"):
        checked(lambda a: a)(b=3)


def test_integers_have_64_bits_and_seeds_any_number_of_them() -> None:
    @checked
    def draw(n: int, seed: Seed, scale: float = 1.0) -> None: ...

    draw(2**63 - 1, 2**100)
    for arguments in ((2**63, 0), (-(2**63) - 1, 0), (0, 0, 2**63)):
        with refused(ArgumentTypeError, "an integer of 64 bits"):
            draw(*arguments)


def test_checks_draw_from_no_generator_and_read_no_iterator() -> None:
    @checked
    def first(names: Iterable[str], numbers: list[int]) -> str:
        return next(iter(names))

    before = random.getstate()
    assert first(iter(["a", "b"]), [1, 2, 3]) == "a"
    assert random.getstate() == before


def test_a_call_within_a_call_has_sizes_of_its_own() -> None:
    @checked
    def outer(x: Float[Tensor, "batch pos"]) -> Any:
        return mean(x.T)

    assert outer(x)[1].shape == (3, 2)


@checked
@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule."""

    patience: int = 1
    names: tuple[str, ...] = dataclasses.field(default_factory=tuple)

    def scaled(self, by: float) -> Rule:
        """Another rule."""
        return Rule(int(self.patience * by))

    @classmethod
    def of(cls, text: str) -> Rule:
        """A rule of a text."""
        return cls(len(text))

    def _own(self, by: float) -> float:
        return by


def test_classes_check_fields_and_public_methods() -> None:
    with refused(ArgumentTypeError, "Rule: patience must be int", "'x'"):
        Rule("x")
    with refused(ArgumentTypeError, "names"):
        Rule(names=("a", 3))
    with refused(ArgumentTypeError, "Rule.scaled: by must be float"):
        Rule().scaled(None)
    with refused(ArgumentTypeError, "Rule.of: text"):
        Rule.of(3)
    assert Rule.of("ab").scaled(2) == Rule(4)
    assert pickle.loads(pickle.dumps(Rule(3))) == Rule(3)
    assert Rule()._own("x") == "x"  # what has an underscore is not a door
    assert list(inspect.signature(Rule).parameters) == ["patience", "names"]


def test_a_checked_function_keeps_its_face() -> None:
    assert mean.__name__ == "mean"
    assert mean.__doc__ == "Some documentation."
    assert list(inspect.signature(mean).parameters)[:3] == ["x", "weight", "names"]
    assert pickle.loads(pickle.dumps(mean)) is mean


def test_transforms_and_compilation_go_through() -> None:
    @checked
    def twice(x: Float[Tensor, " pos"], by: float = 2.0) -> Tensor:
        return x * by

    batch = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(torch.func.vmap(twice)(batch), 2 * batch)
    assert torch.equal(torch.func.jacrev(twice)(batch[0]), 2 * torch.eye(3))
    compiled = torch.compile(twice, backend="eager", fullgraph=True)
    assert torch.equal(compiled(batch[0]), 2 * batch[0])


class Kind(Enum):
    ONE = "one"
    TWO = "two"


def test_values_within_bounds_come_back() -> None:
    assert [whole(v, "n") for v in (0, np.int64(3), torch.tensor(4))] == [0, 3, 4]
    assert whole(-5, "n", None) == -5
    assert [number(v, "x", 0, 1) for v in (0, 1, np.float32(0.5))] == [0.0, 1.0, 0.5]
    assert one_of("two", "kind", Kind) is one_of(Kind.TWO, "kind", Kind) is Kind.TWO
    assert one_of(2, "n", (1, 2)) == 2
    at_most_one(a=None, b=3)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: whole(-1, "n"), ("n must be an integer of at least 0, got -1",)),
        (lambda: whole(9, "n", 1, 8), ("n", "at least 1 and at most 8", "got 9")),
        *((lambda v=v: whole(v, "n"), ("n must be an integer",)) for v in (True, "3", None, 2.0)),
        (lambda: whole(torch.ones(3).int(), "n"), ("an int32 tensor of shape (3,)",)),
        (lambda: number(2, "eps", above=0, below=1), ("eps", "above 0 and below 1", "got 2")),
        *((lambda v=v: number(v, "eps"), ("eps must be a number",)) for v in ("1", None, 1e999)),
        (lambda: number(float("nan"), "eps", fix="leave it out"), ("nan: leave it out",)),
        (lambda: number(10**400, "eps"), ("eps",)),
        (lambda: one_of("three", "kind", Kind), ("kind must be one of 'one', 'two', got 'three'",)),
        (lambda: one_of(np.zeros((2, 3)), "kind", ("a", "b")), ("float64 array of shape (2, 3)",)),
        (lambda: at_most_one(a=1, b=2, c=None), ("a and b exclude each other",)),
    ],
)
def test_values_out_of_bounds_are_refused(call: Callable[[], Any], parts: tuple[str, ...]) -> None:
    with refused(InputError, *parts):
        call()


def test_values_are_refused_with_the_exception_asked_for() -> None:
    with refused(ConfigError, "n"):
        whole(0, "n", 1, error=ConfigError)
