"""The door: what a public callable is given is looked at once, before it is used.

*Types.* :func:`checked` refuses arguments that their type hints exclude, shapes and dtypes of
tensors included (jaxtyping), and says so in one sentence. beartype makes the check from the hints
when a callable is first called, so that importing costs nothing and names that a module imports
for the type checker alone are known by then. Every item of a list is looked at: beartype's own way
is one at random, which finds a wrong one sometimes, and draws from Python's global generator.
Numbers of numpy and tensors without dimensions are numbers here. Within ``torch.compile`` nothing
is checked. What a callable returns is not the caller's fault and is not looked at.

*Values.* :func:`whole`, :func:`number`, :func:`one_of` and :func:`at_most_one` return the value, or
name the argument, the value and what is valid.
"""

from __future__ import annotations

import collections.abc as abc
import inspect
import math
import operator
import re
import sys
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from enum import Enum
from functools import wraps
from itertools import islice
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import torch
from beartype import beartype
from beartype.door import is_bearable
from beartype.roar import BeartypeCallHintParamViolation
from beartype.vale import Is
from jaxtyping import Bool, Float, Integer, jaxtyped
from torch import Tensor

from tl_looped.errors import ArgumentTypeError, InputError, TLLoopedError

T = TypeVar("T")
E = TypeVar("E", bound=Enum)

Seed: TypeAlias = Annotated[int, "of any size"]
"""An integer that may have more than 64 bits, which other integers may not: torch takes none."""

_MARK = "__has_checked_arguments__"

MOST_DRAWS = 10**7
"""Most resamples, permutations, starts or iterations of one call: what a day may hold."""

_WHOLE = int | np.integer | Integer[Tensor, ""] | Integer[np.ndarray, ""]
_INT = Annotated[_WHOLE, Is[lambda value: -(2**63) <= value < 2**63]]
_NUMBERS = {
    bool: bool | np.bool_ | Bool[Tensor, ""],
    int: _INT,
    float: Union[float, np.floating, Float[Tensor, ""], Float[np.ndarray, ""], _INT],  # noqa: UP007
    Seed: _WHOLE,
}
_COLLECTIONS = (list, set, frozenset, abc.Sequence, abc.Collection, abc.Iterable, abc.Set)
_MAPPINGS = (dict, abc.Mapping)


def checked(thing: T) -> T:
    """Decorate a function, or a class's public methods, so that wrong arguments are refused.

    Args:
        thing: A function with type hints, or a class: its ``__init__``, ``__call__`` and the
            methods, class methods and static methods without a leading underscore that it defines
            itself. It keeps its name, signature and documentation.

    Raises:
        ArgumentTypeError: from the decorated callable, for an argument that its hint excludes.
    """
    if not inspect.isclass(thing):
        return cast(T, _checked_function(cast(Callable[..., Any], thing)))
    for name, member in list(vars(thing).items()):
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        if hasattr(member, _MARK):
            continue  # a method that is decorated itself
        if isinstance(member, (classmethod, staticmethod)):
            setattr(thing, name, type(member)(_checked_function(member.__func__)))
        elif inspect.isfunction(member):
            setattr(thing, name, _checked_function(member))
    return cast(T, thing)


def _checked_function(function: Callable[..., Any]) -> Callable[..., Any]:
    check: Callable[..., None] | None = None

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal check
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if check is None:
            check = _check_of(function)
        try:
            # Sizes that hints name alike must be alike: of this call's tensors, not its caller's.
            with jaxtyped("context"):
                check(*args, **kwargs)
        except BeartypeCallHintParamViolation as violation:
            refusal = _refusal(function, check.__annotations__, args, kwargs, violation)
        else:
            return function(*args, **kwargs)
        raise refusal

    setattr(call, _MARK, True)
    return call


def _check_of(function: Callable[..., Any]) -> Callable[..., None]:
    """A function of the same parameters that does nothing but look at them."""
    # A lambda: jaxtyping's import hook leaves it alone, and beartype skips what jaxtyping wrapped.
    # It sees through wrappers of (*args, **kwargs) alone: so what is checked is the innermost.
    innermost = inspect.unwrap(function)
    check = wraps(innermost)(lambda *args, **kwargs: None)
    names = innermost.__globals__
    package = vars(sys.modules["tl_looped"])  # LoopedTransformer, in the layers below it
    written = innermost.__annotations__.items()
    check.__annotations__ = {name: hint for name, hint in written if name != "return"}
    hints = get_type_hints(check, {**package, **names}, include_extras=True)
    check.__annotations__ = {name: _precise(hint) for name, hint in hints.items()}
    return cast(Callable[..., None], beartype(check))


def _precise(hint: Any) -> Any:
    """The hint with numbers of every library, and every item checked in place of one at random."""
    if isinstance(hint, Hashable) and hint in _NUMBERS:
        return _NUMBERS[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return Union[tuple(_precise(each) for each in arguments)]  # noqa: UP007
    if not arguments or origin not in (*_COLLECTIONS, *_MAPPINGS, tuple):
        return hint
    items = [_holds(_precise(each)) for each in arguments if each is not ...]
    if origin is tuple and ... not in arguments:

        def fit(value: Any) -> bool:
            return len(value) == len(items) and all(
                holds(each) for holds, each in zip(items, value, strict=True)
            )

    elif origin in _MAPPINGS:

        def fit(value: Any) -> bool:
            return all(map(items[0], value)) and all(map(items[1], value.values()))

    else:

        def fit(value: Any) -> bool:
            return not isinstance(value, abc.Collection) or all(map(items[0], value))  # read once

    def fits(value: Any) -> bool:
        with suppress(TypeError):  # a tensor without dimensions has __iter__
            return fit(value)
        return False

    return Annotated[origin, Is[fits]]


def _holds(hint: Any) -> Callable[[Any], bool]:
    """Whether an item fits; fast where its hint is a class, for caches of thousands of tensors."""
    if isinstance(hint, type) and hint is not Any:
        return lambda value: isinstance(value, hint)
    return lambda value: is_bearable(value, hint)


def _refusal(
    function: Callable[..., Any],
    hints: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    violation: Exception,
) -> ArgumentTypeError:
    """What to raise: the first argument that does not fit, what it is, and what it must be."""
    signature = inspect.signature(function)
    earlier: list[str] = []
    with jaxtyped("context"):
        for name, given in signature.bind_partial(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].kind
            several = given if kind is kind.VAR_POSITIONAL else [given]
            for value in given.values() if kind is kind.VAR_KEYWORD else several:
                if name in hints and not is_bearable(value, hints[name]):
                    shape = isinstance(value, Tensor) and bool(earlier)
                    return ArgumentTypeError(
                        f"{_named(function, args)}: {name} must be {_written(function, name)}, "
                        f"got {described(value)}" + f", beside {', '.join(earlier)}" * shape
                    )
            if isinstance(given, Tensor):
                earlier.append(f"{name} of shape {tuple(given.shape)}")
    return ArgumentTypeError(str(violation))


def _named(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """``LoopedTransformer.generate``, in whichever of its classes that is; a class for __init__."""
    owner, _, method = function.__qualname__.rpartition(".")
    of = args[0] if args and isinstance(args[0], type) else type(args[0] if args else None)
    if any(base.__qualname__ == owner for base in of.__mro__):
        owner = of.__name__
    return owner if method == "__init__" else f"{owner}.{method}".removeprefix(".")


def _written(function: Callable[..., Any], name: str) -> str:
    """A parameter's hint as the source has it, with what an alias stands for."""
    names = inspect.unwrap(function).__globals__

    def spelled_out(word: re.Match[str]) -> str:
        meant = names.get(word[0])
        if isinstance(meant, TypeVar):
            meant = meant.__bound__ or Any
        elif meant is Seed:
            return "int"
        elif get_origin(meant) not in (Union, UnionType, Literal):
            return word[0]
        return re.sub(r"(?:\w+\.)+(?=\w)", "", inspect.formatannotation(meant))

    hint = inspect.unwrap(function).__annotations__[name]
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    return re.sub(r"\b[A-Za-z_]\w*", spelled_out, text)


def described(value: Any) -> str:
    """What something is, in a few words: ``a float32 tensor of shape (2, 3)``, ``the str 'x'``."""
    if isinstance(value, (Tensor, np.ndarray)):
        dtype = str(value.dtype).removeprefix("torch.")
        what = "tensor" if isinstance(value, Tensor) else "array"
        return f"{_a(dtype)} {what} of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 63:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value) if value is None else f"the {type(value).__name__} {value!r}"
    if isinstance(value, (str, bytes)):
        text = repr(value)
        return f"the {type(value).__name__} {text if len(text) < 60 else text[:56] + '...'}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        items = value.values() if isinstance(value, dict) else value
        kinds = dict.fromkeys(_kind(each) for each in islice(items, 9))
        of = " and ".join(list(kinds)[:3])
        return f"{_a(type(value).__name__)} of {len(value)}" + f" ({of})" * bool(of)
    return _a(type(value).__name__)


def _kind(item: Any) -> str:
    return described(item) if isinstance(item, (Tensor, np.ndarray)) else type(item).__name__


def _a(word: str) -> str:
    return f"a{'n' * word.lower().startswith(tuple('aeio'))} {word}"


def whole(
    value: Any,
    name: str,
    least: int | None = 0,
    most: int | None = None,
    error: type[TLLoopedError] = InputError,
    fix: str = "",
) -> int:
    """The value as an int; numpy's integers are numbers, True and False are not.

    Args:
        value: What was given.
        name: What it is called in the message.
        least: Least valid number; None for any.
        most: Largest valid number; None for any.
        error: Exception to raise.
        fix: What to do about it, for the end of the message.

    Raises:
        TLLoopedError: ``error``, unless it is an integer within the bounds.
    """
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        n = operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # the latter from tensors of several elements
        n = None
    if n is None or not (least is None or n >= least) or not (most is None or n <= most):
        raise error(_sentence(name, value, "an integer", {"at least": least, "at most": most}, fix))
    return n


def number(
    value: Any,
    name: str,
    least: int | float | None = None,
    most: int | float | None = None,
    *,
    above: int | float | None = None,
    below: int | float | None = None,
    error: type[TLLoopedError] = InputError,
    fix: str = "",
) -> float:
    """The value as a finite float.

    Args:
        value: What was given.
        name: What it is called in the message.
        least: Least valid number; None for any.
        most: Largest valid number; None for any.
        above: Bound that is not valid itself.
        below: Bound that is not valid itself.
        error: Exception to raise.
        fix: What to do about it, for the end of the message.

    Raises:
        TLLoopedError: ``error``, unless it is a finite number within the bounds.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        x = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        x = math.nan
    fits = math.isfinite(x) and not (
        (least is not None and x < least)
        or (most is not None and x > most)
        or (above is not None and x <= above)
        or (below is not None and x >= below)
    )
    if not fits:
        bounds = {"at least": least, "above": above, "at most": most, "below": below}
        raise error(_sentence(name, value, "a number", bounds, fix))
    return x


def one_of(
    value: Any, name: str, choices: Iterable[T], error: type[TLLoopedError] = InputError
) -> T:
    """The one of the choices that equals the value: of an Enum, the member.

    Args:
        value: What was given: of an Enum, a member or its value.
        name: What it is called in the message.
        choices: What is valid.
        error: Exception to raise.

    Raises:
        TLLoopedError: ``error``, if it is none of them.
    """
    valid = list(choices)
    for choice in valid:
        plain = choice.value if isinstance(choice, Enum) else choice
        if type(value) in (type(choice), type(plain)) and value in (choice, plain):
            return choice
    named = ", ".join(repr(c.value if isinstance(c, Enum) else c) for c in valid)
    raise error(f"{name} must be {'one of ' * (len(valid) > 1)}{named}, got {shown(value)}")


def at_most_one(error: type[TLLoopedError] = InputError, **given: Any) -> None:
    """Refuse arguments that exclude each other.

    Args:
        error: Exception to raise.
        **given: The arguments by name; None is not given.

    Raises:
        TLLoopedError: ``error``, if more than one of them is given.
    """
    there = [name for name, value in given.items() if value is not None]
    if len(there) > 1:
        raise error(f"{' and '.join(there)} exclude each other: give one of them")


def _sentence(name: str, value: Any, what: str, bounds: dict[str, Any], fix: str) -> str:
    limits = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    valid = f"{what} of {limits}" if limits.startswith("at ") else f"{what} {limits}".rstrip()
    return f"{name} must be {valid}, got {shown(value)}" + f": {fix}" * bool(fix)


def shown(value: Any) -> str:
    """Numbers and text as they are, other things in words."""
    plain = isinstance(value, (bool, int, float, str, np.number, Enum)) or value is None
    return repr(value) if plain and len(repr(value)) < 60 else described(value)
