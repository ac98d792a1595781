"""Each public name of TransformerLens has one verdict, and the verdict is true.

A release of TransformerLens with new names makes the first test red, which lists them: write its
snapshot (``python tests/surface/snapshots.py``) and the verdicts of what is new (verdicts.toml).
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from ours import CLASSES, faults
from refused_calls import REFUSED
from snapshots import SNAPSHOTS, Name, installed, path_of, snapshot, version, walk
from verdicts import VERDICTS, Verdict, counted, counts, verdicts

from tl_looped import LoopedTransformer, TLLoopedError

pytestmark = pytest.mark.once

ALL = verdicts()
ROOT = Path(__file__).parents[2]
METHODS = ("method", "classmethod", "staticmethod")


def keyed(verdict: str, keywords: bool | None = None) -> list[str]:
    """Keys with a verdict; members alone, keywords alone, or both."""
    return [
        key
        for key, one in ALL.items()
        if one.verdict == verdict
        and (keywords is None or keywords == (one.name.keyword is not None))
    ]


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """One of each area, by the bundled model without a loop."""
    model = LoopedTransformer.from_pretrained("demo-control", device="cpu")
    _, cache = model.run_with_cache(torch.arange(4)[None])
    return {"model": model, "cache": cache, "config": model.cfg}


# -- the snapshots ----------------------------------------------------------------------------


def nearest() -> str:
    """The snapshot of the installed major version."""
    return next(release for release in SNAPSHOTS if release[0] == version()[0])


def test_the_snapshot_is_what_the_installed_transformerlens_has() -> None:
    found = {(area, name): member for area, _, name, member in walk(installed())}
    stored = {(area, name): member for area, _, name, member in walk(snapshot(nearest()))}
    new, gone = sorted(set(found) - set(stored)), sorted(set(stored) - set(found))
    changed = sorted(key for key in set(found) & set(stored) if found[key] != stored[key])
    assert (new, gone, changed) == ([], [], []), f"of TransformerLens {version()}"
    assert installed() == snapshot(nearest())


def test_every_snapshot_is_listed() -> None:
    assert {path_of(release) for release in SNAPSHOTS} == set(
        Path(__file__).parent.glob("transformerlens-*.json")
    )


# -- the verdicts -----------------------------------------------------------------------------


def inherited(name: Name) -> bool:
    """Whether our class has a member from the installed TransformerLens, whichever that is."""
    homes = [cls for cls in CLASSES[name.area].__mro__ if name.member in vars(cls)]
    return not homes or homes[0].__module__.split(".")[0] == "transformer_lens"


def judged(one: Verdict) -> list[Any]:
    """The sources that a member of ours can be held to, in this environment."""
    sources = one.name.sources
    if inherited(one.name):
        return [source for source in sources if source.release == nearest()]
    return sources


def absent(one: Verdict) -> bool:
    """Whether TransformerLens's own cache, which ours is, has a member in another release alone."""
    return one.name.area == "cache" and not (
        judged(one) or hasattr(CLASSES["cache"], one.name.member)
    )


WORKS = [
    key
    for verdict in ("same", "different")
    for key in keyed(verdict, keywords=False)
    if not absent(ALL[key])
]


@pytest.mark.parametrize("key", WORKS)
def test_what_is_the_same_or_different_exists(key: str, objects: dict[str, Any]) -> None:
    one, theirs = ALL[key], {source.member.kind in METHODS for source in judged(ALL[key])}
    owner = objects[one.name.area]
    value = getattr(owner, one.name.member)
    if one.verdict == "same" and theirs:
        assert {inspect.ismethod(value) or inspect.isfunction(value)} == theirs


@pytest.mark.parametrize("key", WORKS)
def test_a_method_takes_transformerlenss_arguments(key: str) -> None:
    one, cls = ALL[key], CLASSES[ALL[key].name.area]
    ours = getattr(cls, one.name.member, None)
    found = {
        f"{source.cls} {source.release}: {keyword}: {fault}"
        for source in judged(one)
        if source.member.kind in METHODS and callable(ours)
        for keyword, fault in faults(source.member, ours)
        if not key.endswith("__init__") and ALL.get(f"{key}({keyword})", one).verdict == "same"
    }
    assert sorted(found) == []


@pytest.mark.parametrize("key", keyed("refused"))
def test_what_is_refused_says_so(key: str, objects: dict[str, Any]) -> None:
    one = ALL[key]
    if not one.listed:
        assert ALL[f"{one.name.area}.{one.name.member}"].verdict == "refused"
        return
    with pytest.raises(TLLoopedError) as caught:
        REFUSED[key](objects[one.name.area])
    assert (one.name.keyword or one.name.member) in str(caught.value)


def test_every_refused_call_is_of_a_refused_name() -> None:
    assert set(REFUSED) == {key for key in keyed("refused") if ALL[key].listed}


@pytest.mark.parametrize("key", [key for key in keyed("missing") if ALL[key].listed])
def test_what_is_missing_is_missing(key: str, objects: dict[str, Any]) -> None:
    name = ALL[key].name
    if name.keyword is None:
        assert not hasattr(objects[name.area], name.member)
        return
    parameters = inspect.signature(getattr(CLASSES[name.area], name.member)).parameters
    assert name.keyword not in parameters


def test_what_differs_names_a_test() -> None:
    for key in keyed("different"):
        file, _, test = ALL[key].test.partition("::")
        assert test in functions(ROOT / file), key


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}


def test_the_readme_says_how_many_names_have_which_verdict() -> None:
    found = counts(counted().values())
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    told = ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS)
    assert f"of {sum(found.values())} public names of TransformerLens" in said
    assert told in said
