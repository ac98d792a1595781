"""``tl-looped report``, ``compare``, ``models`` and ``info``: what looks, and runs no prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tl_looped.cli.console import command_line, console, note
from tl_looped.cli.runs import Revision, parse_counts
from tl_looped.errors import InputError
from tl_looped.words import count, differing, training

if TYPE_CHECKING:
    from tl_looped.transformer import LoopedTransformer

_DTYPES = {"float32": 4, "bfloat16": 2}


def report(
    folder: Annotated[Path, typer.Argument(help="A run, or a folder of runs.")],
    feedforward: Annotated[
        str | None,
        typer.Option(help="Feedforward run, or its model, for mirroring scores; if several fit."),
    ] = None,
) -> None:
    """Write the HTML report of a run, or of all runs in a folder."""
    from tl_looped.cli.execution import write_reports

    write_reports(folder, feedforward)


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Runs, or folders of runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables and figures.")] = Path(
        "comparison"
    ),
    figures: Annotated[
        bool, typer.Option(help="Draw Figs 8 and 40: blocks over the feedforward model.")
    ] = True,
) -> None:
    """Runs side by side: curves over depth, mirroring scores, clusters of layers."""
    from tl_looped.experiments.compare import compare_runs, load_runs
    from tl_looped.files import make_folder

    runs = load_runs(folders)
    found = compare_runs(runs)
    make_folder(out)
    for notice in found.notices:
        note(notice)
    short = dict(zip(runs, differing(list(runs)), strict=True))
    runs_table, alike = _runs_table(found.runs, short)
    console.print(runs_table)
    if alike:
        console.print(f"Alike in all runs: {alike}", highlight=False, markup=False, soft_wrap=True)
    for name, label in short.items():
        if name != label:
            console.print(f"  {label}: {name}", highlight=False, soft_wrap=True)
    if not found.mirroring.empty:
        keys = ["run", "feedforward", "metric", "curve"]
        means = found.mirroring.groupby(keys)[["pearson", "spearman", "lag"]].mean()
        console.print(_table("Mirroring, mean over recurrences", means.reset_index(), short))
    if not found.clusters.empty:
        keys = ["run", "feedforward"]
        means = found.clusters.groupby(keys)[["agreement", "rand_index", "transitions"]].mean()
        console.print(_table("Stages, mean over recurrences", means.reset_index(), short))
    found.write(out / "tables")
    if figures:
        _overlays(runs, out / "figures")
    console.print(f"The comparison is in [bold]{out.resolve()}[/bold]", soft_wrap=True)


def _overlays(runs: dict[str, Any], folder: Path) -> None:
    """Figs 8 and 40 of every looped run over every feedforward run."""
    from tl_looped.experiments.reading import is_feedforward
    from tl_looped.paper.drawing import OVER, draw_over

    looped = [name for name in runs if not is_feedforward(runs[name])]
    others = [name for name in runs if name not in looped]
    for name in looped:
        for other in others:
            label = name if len(others) == 1 else f"{name}_over_{other}"
            draw_over(label, runs[name], runs[other], OVER, folder, command_line(), note)


def models() -> None:
    """Models that have a short name."""
    from huggingface_hub import try_to_load_from_cache

    from tl_looped.adapters import all_aliases
    from tl_looped.checkpoints import BUNDLED
    from tl_looped.paper.plan import PAPER

    table = Table(title="Models by short name; a folder or a hub id does as well")
    for column in ("name", "where", "recurrences", "here", "in the paper's figures"):
        table.add_column(column, no_wrap=column == "name")
    for name in BUNDLED:
        table.add_row(name, "bundled", "as trained", "yes", "as a stand-in")
    for name, alias in sorted(all_aliases().items()):
        here = isinstance(try_to_load_from_cache(alias.hub_id, "config.json"), str)
        n = "as trained" if alias.n_recurrences is None else str(alias.n_recurrences)
        table.add_row(name, alias.hub_id, n, "yes" if here else "no", "yes" * (name in PAPER))
    console.print(table)


def info(
    model: Annotated[str, typer.Argument(help="demo, an alias, a hub id or a folder.")],
    revision: Revision = None,
    tokens: Annotated[int, typer.Option(help="Length of a prompt for the cache's size.")] = 128,
    recurrences: Annotated[
        str,
        typer.Option(help="Numbers of recurrences for the cache's size; the model's own if empty."),
    ] = "",
) -> None:
    """Shape and sizes of a model, and what a cache of a run would cost. Loads no weights."""
    from tl_looped.transformer import LoopedTransformer
    from tl_looped.transformer.cache_size import PRESETS, readable

    found = LoopedTransformer.from_pretrained(model, device="meta", revision=revision)
    cfg, n_parameters = found.cfg, sum(p.numel() for p in found.parameters())
    console.print(f"[bold]{cfg.model_name}[/bold] {found.loop}, {cfg.n_layers} effective layers")
    for line in (
        training(cfg.trained_recurrences) + (" recurrences" * bool(cfg.trained_recurrences)),
        f"{cfg.architecture}: norms {cfg.norm_layout.value}, injection {cfg.injection.value}",
        f"{cfg.d_model} dimensions, {cfg.n_heads} heads of {cfg.d_head}, MLP {cfg.d_mlp}",
        f"vocabulary {cfg.d_vocab}, context {cfg.n_ctx}",
        found.describe_bos(),
        *_ends(found),
        f"{n_parameters:,} parameters: "
        + ", ".join(f"{readable(n_parameters * size)} in {name}" for name, size in _DTYPES.items()),
    ):
        console.print(line, highlight=False)
    counts = parse_counts(recurrences) if recurrences else [found.loop.R]
    if min(n or 0 for n in counts) < 1:
        raise InputError(f"recurrences must be at least 1, got {recurrences}")
    table = Table(title=f"Cache of one prompt of {tokens} tokens in float32")
    table.add_column("names_filter")
    for n_recurrences in counts:
        table.add_column(count(n_recurrences or 0, "recurrence"), justify="right")
    for preset in PRESETS:
        sizes = [found.estimate_cache_bytes(preset, 1, tokens, n) for n in counts]
        table.add_row(preset, *(readable(size).split(" (")[0] for size in sizes))
    console.print(table)


def _ends(model: LoopedTransformer) -> list[str]:
    """A line on the tokens that end a generated text; none without a tokenizer."""
    if model.tokenizer is None:
        return []
    tokens = [repr(model.to_string(token)) for token in model.stop_tokens()]
    return [f"a generated text ends at {', '.join(tokens) or 'no token'}"]


def _runs_table(runs: Any, short: dict[str, str]) -> tuple[Table, str]:
    """The runs and what tells them apart, and in words what is alike in all."""
    runs = runs.drop(columns="hash")
    alike = [c for c in runs.columns if c != "run" and len(runs) > 1 and runs[c].nunique() == 1]
    said = ", ".join(f"{c} {runs[c].iloc[0]}" for c in alike if str(runs[c].iloc[0]))
    return _table("Runs", runs.drop(columns=alike), short), said


def _table(title: str, data: Any, short: dict[str, str]) -> Table:
    """A table that folds what is too wide, and cuts nothing off; runs by their short names."""
    table = Table(title=title)
    for column in data.columns:
        table.add_column(str(column), overflow="fold")
    for row in data.itertuples(index=False):
        cells = zip(data.columns, row, strict=True)
        table.add_row(
            *(
                f"{x:.3g}"
                if isinstance(x, float)
                else short.get(x, str(x))
                if column in ("run", "feedforward")
                else str(x)
                for column, x in cells
            )
        )
    return table
