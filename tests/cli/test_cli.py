"""The command line: what it takes, refuses and prints."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import typer
from refusals import command_refused
from typer.testing import CliRunner

from tl_looped import cli
from tl_looped.cli import app, main
from tl_looped.experiments.spec import Experiment, PromptSet
from tl_looped.experiments.store import find_runs, read_dataset

pytestmark = pytest.mark.once


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the demo on the test sentence."""
    folder = tmp_path_factory.mktemp("runs")
    printed = run(
        "analyze", "demo", "--prompts", "sentence", "--recurrences", "2,3", "--figures", "",
        "--out", folder, "--device", "cpu",
    )  # fmt: skip
    assert printed.count("Results are in") == 2
    return folder


def test_analyze_runs_each_number_of_recurrences_once(out: Path) -> None:
    folders = find_runs(out)
    data = [read_dataset(folder / "results.nc") for folder in folders]
    assert [d.attrs["n_recurrences"] for d in data] == [2, 3]
    assert all("verdict" in d for d in data)
    again = run(
        "analyze", "demo", "--prompts", "sentence", "--recurrences", "3", "--figures", "",
        "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert "nothing was run again" in again
    assert find_runs(out) == folders
    assert find_runs(folders[0]) == [folders[0]]


def test_run_takes_what_analyze_wrote(out: Path) -> None:
    spec = find_runs(out)[0] / "spec.toml"
    assert "nothing was run again" in run("run", spec, "--out", out, "--device", "cpu")
    assert Experiment.read(spec).prompts == PromptSet("sentence")


def test_compare_writes_its_tables(out: Path, tmp_path: Path) -> None:
    printed = run("compare", out, "--out", tmp_path / "c", "--no-figures")
    assert "need a looped run and a feedforward one" in printed
    names = {path.name for path in (tmp_path / "c" / "tables").iterdir()}
    assert names == {"runs.csv", "runs.parquet", "curves.csv", "curves.parquet"}


def test_info_says_the_exact_size_of_a_cache() -> None:
    printed = run("info", "demo", "--tokens", "16", "--recurrences", "4,8")
    assert "(2, 4 x 4, 2), 20 effective layers" in printed
    # Of 16 tokens, fp32: three residual streams of 128 in each of 20 layers.
    assert f"{3 * 20 * 16 * 128 * 4 / 1024:.1f} KiB" in printed
    assert "1,878,144 parameters" in printed


def test_models_lists_all_short_names() -> None:
    printed = run("models")
    for name in ("demo", "huginn", "ouro-1.4b", "bundled"):
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("analyze", "demo", "--figures", "99"), "there is no '99'. One run can be drawn as 2, 3"),
        (("analyze", "demo", "--figures", "8"), "tl-looped compare LOOPED FEEDFORWARD"),
        (("analyze", "demo", "--figures", "41"), "add --ablate-mlp prelude.1"),
        (("analyze", "demo", "--ablate-mlp", "coda.2"), "coda.2"),
        (("analyze", "demo", "--prompts", "gsm"), "'gsm' is neither a file nor one of bundled"),
        (("analyze", "demo", "--recurrences", "x"), "recurrences must be integers"),
        (("analyze", "demo", "--recurrences", "0"), "recurrences must be an integer of at least 1"),
        (("analyze", "demo", "--extras", "pcaa"), "extras must be one of"),
        (("analyze", "demo", "--metrics", "x"), "there is no 'x'"),
        (("analyze", "demo", "--dtype", "int8"), "floating point"),
        (("analyze", "demo", "--batch-size", "0"), "batch_size must be an integer of at least 1"),
        (("analyze", "demo", "--device", "foo"), "device 'foo' cannot be used here"),
        (("analyze", "demo", "--device", "meta"), "device 'meta' cannot be used here"),
        (("analyze", "demo", "--recurrences", "²"), "recurrences must be integers"),
        (("analyze", "demo-control", "--feedforward"), "leave out --feedforward"),
        (("analyze", "demo", "--feedforward", "--extras", "pca"), "need a loop"),
        (("analyze", " "), "model is empty"),
        (("info", "demo", "--recurrences", "0"), "recurrences must be at least 1"),
        (("analyze", "no/such folder"), "hub"),
        (("reproduce", "--models", "huggin"), "did you mean huginn?"),
        (("reproduce", "--models", "demo,huginn", "--checkpoint", "x"), "is for one model"),
        (("run", "absent.toml"), "absent.toml cannot be read"),
        (("compare", "absent"), "absent holds no finished run"),
        (("report", "absent"), "absent is not a folder"),
    ],
)
def test_mistakes_are_one_message(arguments, says: str, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert says in command_refused(monkeypatch, capsys, *arguments)


def test_an_empty_prompt_file(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_text("\n")
    printed = command_refused(
        monkeypatch, capsys, "analyze", "demo", "--prompts", tmp_path / "e.txt"
    )
    assert "e.txt is empty" in printed


def test_the_disks_errors_are_messages_and_others_are_not(monkeypatch, capsys) -> None:
    def fails_with(number: int):
        def command() -> None:
            raise OSError(number, "the system's words", "file.png")

        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(command)
        return app

    monkeypatch.setattr(cli, "app", fails_with(errno.ENOSPC))
    assert "the system's words" in command_refused(monkeypatch, capsys)
    monkeypatch.setattr(cli, "app", fails_with(errno.EBADF))
    with pytest.raises(OSError, match="the system's words"):
        main()


def test_ctrl_c_says_that_the_run_can_go_on(monkeypatch, tmp_path: Path) -> None:
    from tl_looped.experiments.engines import LoopedEngine

    calls = []

    def interrupted(self, rows):
        calls.append(len(rows))
        raise KeyboardInterrupt

    monkeypatch.setattr(LoopedEngine, "run", interrupted)
    result = CliRunner().invoke(
        app, ["analyze", "demo", "--prompts", "sentence", "--figures", "", "--out", str(tmp_path)]
    )
    assert calls == [1]
    assert result.exit_code == 130
    assert "the same command goes on from there" in " ".join(result.output.split())
