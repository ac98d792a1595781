"""``tl-looped demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tl_looped.cli.console import console, progress_bar


def demo(
    out: Annotated[Path, typer.Option(help="Folder for figures and numbers.")] = Path(
        "demo-report"
    ),
) -> None:
    """Run the bundled model on 32 bundled word problems at 32 recurrences."""
    # Imported here: `--help` and a mistyped option answer at once.
    from tl_looped.experiments.demo import read_prompts, run_demo, write_demo
    from tl_looped.experiments.files import make_folder
    from tl_looped.transformer import LoopedTransformer

    make_folder(out)
    model = LoopedTransformer.from_pretrained("demo", device="cpu")
    prompts = read_prompts()
    with progress_bar() as progress:
        result = run_demo(
            model, prompts, track=lambda items: progress.track(items, description="word problems")
        )
    console.print(_demo_table(result))
    for path in write_demo(result, out):
        console.print(f"  {path.name}", highlight=False)
    console.print(f"The report is in [bold]{out.resolve()}[/bold]", soft_wrap=True)


def _demo_table(result: Any) -> Table:
    """Means over the core's layers at a few recurrences."""
    table = Table(title=f"{result.settings['model']} {result.settings['shape']}: mean over layers")
    table.add_column("recurrence", justify="right")
    for name in ("ColSum concentration", "relative step", "relative distance to the last state"):
        table.add_column(name, justify="right")
    last = result.loop.R - 1
    for r in sorted({0, 1, 2, 3, 4, 8, 16, last}):
        if r > last:
            continue
        cells = [result.grid(m)[r].mean() for m in ("colsum_concentration", "step", "distance")]
        table.add_row(str(r), *("-" if c != c else f"{c:.4g}" for c in cells))
    return table
