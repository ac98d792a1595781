"""The calls that are compared with TransformerLens's own reach every name that is the same."""

from __future__ import annotations

import ast
from pathlib import Path

import calls
import pytest
from calls import CACHE, MODEL
from mistakes import MISTAKES
from verdicts import Verdict, verdicts

pytestmark = pytest.mark.once

# Names of HookedTransformer's and its cache's that no call of calls.py compares, and why.
NOT_CALLED: dict[str, str] = {
    "model.cfg": "field by field, in the area config",
    "model.cuda": "needs a device",
    "model.mps": "needs a device",
    "model.list_hooks": "prints",
    "model.from_pretrained": "no checkpoint is one of both",
    "model.from_pretrained_no_processing": "no checkpoint is one of both",
    "model.init_weights": "draws other numbers",
    "cache.__init__": "run_with_cache makes the caches",
}
NOT_GIVEN: dict[str, str] = {
    "cache.__getitem__(key)": "what stands in brackets has no name",
    "cache.get_full_resid_decomposition(project_output_onto)": "TransformerLens adds fp32 biases",
    "model.__init__(cfg)": "test_different.py makes a model",
    "model.__init__(move_to_device)": "test_different.py makes a model",
    "model.__init__(default_padding_side)": "test_different.py makes a model",
}


def same_of_hooked_transformer() -> dict[str, Verdict]:
    """What HookedTransformer 3.5.1 and its cache have, and the model has alike."""
    return {
        key: one
        for key, one in verdicts().items()
        if one.verdict == "same"
        and one.name.area != "config"
        and any(source.release == "3.5.1" for source in one.name.sources)
    }


def test_every_member_that_is_the_same_is_called() -> None:
    wanted = {key for key, one in same_of_hooked_transformer().items() if not one.name.keyword}
    assert sorted(wanted - set(MODEL) - set(CACHE) - set(NOT_CALLED)) == []
    assert sorted(set(NOT_CALLED) - wanted) == [], "an exception that is none"


def given_keywords() -> set[str]:
    """``generate(top_k)`` of each keyword that calls.py writes, in whichever call."""
    found = set()
    for node in ast.walk(ast.parse(Path(calls.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name, words = written(node)
            found |= {f"{name}({word})" for word in words}
    return found


# Functions of calls.py that hand their keywords on.
HELPERS = {
    "m": "forward",
    "seeded": "generate",
    "streamed": "generate_stream",
    "sampled": "sample_datapoint",
    "processed": "process_weights_",
    "loaded": "load_and_process_state_dict",
}


def written(call: ast.Call) -> tuple[str, list[str]]:
    """The method that is called, and its keywords; of_cache has them in dicts."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr, [one.arg for one in call.keywords if one.arg]
    helper = getattr(call.func, "id", "")
    if helper == "of_cache":
        name, *options = call.args
        assert isinstance(name, ast.Constant)
        keys = [key for one in options if isinstance(one, ast.Dict) for key in one.keys]
        return str(name.value), [str(key.value) for key in keys if isinstance(key, ast.Constant)]
    return HELPERS.get(helper, helper), [one.arg for one in call.keywords if one.arg]


def test_every_keyword_that_is_the_same_is_given() -> None:
    variadic = ("args", "kwargs")
    wanted = {
        key
        for key, one in same_of_hooked_transformer().items()
        if one.name.keyword
        and not one.name.keyword.endswith(variadic)
        and f"{one.name.area}.{one.name.member}" not in NOT_CALLED
    }
    given = {f"{area}.{name}" for area in ("model", "cache") for name in given_keywords()}
    assert sorted(wanted - given - set(NOT_GIVEN)) == []
    assert sorted(set(NOT_GIVEN) - wanted) == [], "an exception that is none"


def test_the_mistakes_are_called_what_they_are() -> None:
    assert all(name == name.lower() or "batch" in name for name in MISTAKES)
