"""The site's pages say what the code does: their code runs, their messages are real, no name is
missing. The strict build, which also follows the links, is `make docs`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from pages import DOCS, assert_alike, blocks, run_page

import tl_looped
from tl_looped import LoopedTransformer, TLLoopedError, errors, metrics
from tl_looped.adapters import all_aliases
from tl_looped.model.block import GATED_HOOKS

RUN = [
    "index.md",
    "tutorial.md",
    "verified.md",
    *(f"howto/{page.name}" for page in DOCS.glob("howto/*.md")),
]


pytestmark = [pytest.mark.once, pytest.mark.usefixtures("as_it_was")]


@pytest.mark.full
@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs_and_prints_what_it_says(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_page(page, capsys)
    assert names or page == "howto/traps.md"


def sections(page: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_exception_has_a_section_with_symptom_cause_and_fix() -> None:
    classes = {
        name
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, TLLoopedError)
    }
    found = sections("errors.md")
    assert set(found) == classes
    for name, text in found.items():
        assert all(f"**{part}" in text for part in ("Symptom**", "Cause.**", "Fix.**")), name
        # The first message is of the class itself; the base class is never raised as such.
        shown = re.search(r"```text\n(\w+):", text)
        assert shown is not None
        assert shown[1] == name or name == "TLLoopedError"
        built_in = f"| [`{name}`](#{name.lower()}) | `{_also(getattr(errors, name))}` |"
        assert built_in in (DOCS / "errors.md").read_text() or name == "TLLoopedError"


def _also(cls: type) -> str:
    return next(base.__name__ for base in reversed(cls.__bases__))


def test_the_messages_of_the_errors_page_are_those_that_the_code_raises() -> None:
    setup, *cases = blocks("errors.md")
    names: dict[str, Any] = {}
    exec(compile(setup.code, "errors.md", "exec"), names)
    assert len(cases) > len(sections("errors.md"))
    for case in cases:
        with pytest.raises(TLLoopedError) as caught:
            exec(compile(case.code, "errors.md", "exec"), names)
        assert case.text is not None
        assert_alike(f"{type(caught.value).__name__}: {caught.value}", case.text)


# -- the reference of hook names --------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "_generate"))
        import hook_reference

        yield hook_reference


@pytest.fixture(scope="module")
def printed(reference: ModuleType) -> dict[str, dict[str, tuple[str, str]]]:
    return tables(reference.markdown())


def tables(markdown: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Family -> pattern -> shape and condition, as printed."""
    out: dict[str, dict[str, tuple[str, str]]] = {}
    for part in re.split(r'^=== "', markdown, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^    \| `(.+?)` \| `\[(.+?)\]` \| .+? \| (.+?) \|$", part, re.MULTILINE)
        assert len({name for name, _, _ in rows}) == len(rows)
        out[part.split('"')[0]] = {name: (shape, when) for name, shape, when in rows}
    return out


def test_the_hook_reference_is_what_the_models_have(
    reference: ModuleType, printed: dict[str, dict[str, tuple[str, str]]]
) -> None:
    assert list(printed) == list(reference.FAMILIES)
    batch, pos = 3, 5
    for family, where in reference.FAMILIES.items():
        # The checkpoint itself, of other sizes and recurrences than the page was made with.
        model = LoopedTransformer.from_pretrained(where, device="cpu", n_recurrences=2)
        cfg = model.cfg
        sizes = {
            "batch": batch, "pos": pos, "query": pos, "key": pos, "1": 1, "head": cfg.n_heads,
            "kv_head": cfg.n_kv_heads, "d_head": cfg.d_head, "d_model": cfg.d_model,
            "d_mlp": cfg.d_mlp, "d_vocab": cfg.d_vocab, "head × d_head": cfg.n_heads * cfg.d_head,
            "kv_head × d_head": cfg.n_kv_heads * cfg.d_head,
        }  # fmt: skip
        expected = {
            pattern.format(i=i, r=i): tuple(sizes[name] for name in shape.split(", "))
            for pattern, (shape, _) in printed[family].items()
            for i in (range(model.loop.n_layers) if "{i}" in pattern else range(model.loop.R))
        }
        tokens = torch.arange(batch * pos).reshape(batch, pos)
        seen: dict[str, tuple[int, ...]] = {}
        for flags in (("use_attn_in", "use_hook_mlp_in"), ("use_split_qkv_input",)):
            for flag in flags:
                getattr(model, f"set_{flag}")(True)
            _, cache = model.run_with_cache(tokens)
            seen |= {name: tuple(x.shape) for name, x in cache.items()}
            for flag in flags:
                getattr(model, f"set_{flag}")(False)
        model.set_use_attn_result(True)
        _, cache = model.run_with_cache(tokens)  # last: the plain shapes of ln1's hooks
        seen |= {name: tuple(x.shape) for name, x in cache.items()}
        assert seen == expected, family


def test_the_hook_reference_says_when_a_hook_exists(
    printed: dict[str, dict[str, tuple[str, str]]],
) -> None:
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    for pattern, (_, when) in printed["demo"].items():
        name = pattern.format(i=0, r=0)
        flag = re.search(r"with `(\w+)`", when)
        assert (name in dict.keys(model.hook_dict)) == (flag is None)
        assert GATED_HOOKS.get(name.removeprefix("blocks.0.")) == (flag and flag[1])


def test_a_hook_without_words_stops_the_build(
    reference: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="no words for hook_new"):
        reference.meaning("hook_new")
    monkeypatch.setitem(reference.MEANING, "hook_gone", "nothing")
    suffixes = [row.suffix for row in reference.rows(reference.family_config("demo"))]
    with pytest.raises(RuntimeError, match=r"words for no hook.*'nothing'"):
        reference.refuse_unused_words(suffixes)


# -- the API pages ----------------------------------------------------------------------------


def documented() -> set[str]:
    pages = (DOCS / "reference" / "api").glob("*.md")
    return {
        name
        for page in pages
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_every_public_name_is_on_an_api_page() -> None:
    shown = documented()
    modules = [name for name in shown if name.rsplit(".", 1)[-1].islower()]
    for package in (tl_looped, metrics):
        for name in set(package.__all__) - {"__version__"}:
            value = getattr(package, name)
            home = getattr(value, "__module__", package.__name__)
            places = {f"{package.__name__}.{name}", f"{home}.{name}"}
            whole = home in modules and home != package.__name__
            assert places & shown or whole, name


def test_every_command_is_on_the_command_line_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "_generate"))
    import cli_reference

    from tl_looped.cli import app

    text = cli_reference.markdown()
    commands: Any = typer.main.get_command(app).commands
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        assert f"\n## `tl-looped {name}`\n" in text
        for parameter in commands[name].params:
            assert any(option in text for option in parameter.opts), (name, parameter.opts)


def test_the_certificates_page_has_every_published_checkpoint_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "_generate"))
    import verified

    page = (DOCS / "verified.md").read_text(encoding="utf-8")
    assert verified.written(page) == verified.parts()
    for alias in all_aliases().values():
        assert f"| `{alias.hub_id}` |" in page


def test_the_guarantees_are_the_readmes() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    page = (DOCS / "guarantees.md").read_text(encoding="utf-8")
    for name in re.findall(r'--8<-- "README.md:(.+?)"', page):
        body = readme.split(f"[start:{name}] -->")[1].split(f"<!-- --8<-- [end:{name}]")[0]
        assert body.strip().startswith(("-", "|"))
    assert page.count("--8<--") == 3


def test_the_pages_in_the_navigation_are_those_that_there_are() -> None:
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(pages)


def test_every_notebook_has_a_line() -> None:
    text = (DOCS / "notebooks.md").read_text(encoding="utf-8")
    for path in (DOCS.parent / "notebooks").glob("*.ipynb"):
        assert f"/blob/main/notebooks/{path.name})" in text


def test_the_generated_pages_ask_for_their_text() -> None:
    for what, name in {"hooks": "hooks", "cli": "cli", "surface": "transformerlens"}.items():
        page = (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
        assert f"<!-- generated: {what} -->" in page
